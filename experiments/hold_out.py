"""Split cut-outs, backgrounds and annotated photos into training and validation files; every eighth file is held out.

    python -m experiments.hold_out --objects OBJECTS --backgrounds PHOTOS --coco COCO/instances.json \\
        --output_dir MATERIAL --subject "(mv_images_[0-9]+|multi_image_[a-z]+)_"
    python prepare_dataset.py synthesize --objects MATERIAL/train/objects --backgrounds MATERIAL/train/backgrounds \\
        --coco MATERIAL/train/coco/instances.json --output_dir DATA --n_scenes 8000

The split depends on file names only, so the same folders give the same split on any machine. A held-out file that has
a copy among the training files, or shows the same subject, is left out of both parts. Files are linked. With --max_side
they are copied and scaled down, so that the material is small enough to move to another machine.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from amodal_fusion.data.images import IMAGE_SUFFIXES, resize
from amodal_fusion.errors import UserError, exit_with_message
from amodal_fusion.files import write_text

HELD_OUT = 8  # every eighth file
ALIKE = 3  # of 255: thumbnails of two copies differ by less on average


def divide(files, subject=None):
    """Split sorted paths into {"train": paths, "val": paths}. Prints the files left out of both.

    Args:
        subject: compiled regular expression. Two files show the same subject when its match in their names, or its
            first group, is the same.

    Raises:
        OSError: a file is no picture.
    """
    def subject_of(path):
        found = subject and subject.search(path.name)
        return found and found[subject.groups and 1]

    parts = {"train": [f for i, f in enumerate(files) if i % HELD_OUT], "val": []}
    subjects = set(map(subject_of, parts["train"])) - {None}
    thumbnails = np.stack([thumbnail(path) for path in tqdm(parts["train"], files[0].parent.name, disable=None)])
    for path in files[::HELD_OUT]:
        distances = np.abs(thumbnails - thumbnail(path)).mean((1, 2, 3))
        if distances.min() < ALIKE:
            print(f"left out: {path.name}, a copy of {parts['train'][distances.argmin()].name}")
        elif subject_of(path) in subjects:
            print(f"left out: {path.name}, whose subject is in training")
        else:
            parts["val"].append(path)
    return parts


def thumbnail(path):
    """A small copy for comparisons, (24,24,4) int16, colours multiplied by alpha."""
    with Image.open(path) as image:
        rgba = np.asarray(image.convert("RGBA").resize((24, 24)), np.int16)
    return np.concatenate([rgba[..., :3] * rgba[..., 3:] // 255, rgba[..., 3:]], 2)


def put(source, target, max_side):
    """Link `source`, or copy it with a longer side of at most `max_side` pixels. Returns the scale."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if max_side is None:
        target.symlink_to(source.resolve())
        return 1.0
    with Image.open(source) as image:
        size = max(image.size)
        if size <= max_side:
            shutil.copyfile(source, target)
            return 1.0
        small = np.asarray(image.convert("RGBA" if "A" in image.getbands() else "RGB"))
    scale = max_side / size
    small = resize(small, tuple(round(side * scale) for side in small.shape[:2]))
    Image.fromarray(small).save(target, quality=90)
    return scale


def scaled(value, scale):
    """Pixel coordinates of a COCO file, a number or nested lists, for a scaled picture."""
    return [scaled(one, scale) for one in value] if isinstance(value, list) else round(value * scale, 1)


def scaled_annotation(annotation, scale):
    """A COCO or COCOA annotation for a scaled picture. Run-length masks are dropped."""
    new = {name: value for name, value in annotation.items() if not isinstance(value, dict)}
    new |= {name: scaled(new[name], scale) for name in ("segmentation", "bbox") if name in new}
    if "area" in new:
        new["area"] = round(new["area"] * scale**2, 1)
    if "regions" in new:
        new["regions"] = [scaled_annotation(region, scale) for region in new["regions"]]
    return new


def divide_coco(file, output_dir, max_side):
    """Split the photos of a COCO or COCOA file together with their annotations."""
    content = json.loads(file.read_text(encoding="utf-8"))
    photos = {file.parent / photo["file_name"]: photo for photo in content["images"]}
    for part, paths in divide(sorted(photos)).items():
        scales, kept = {}, []
        for path in paths:
            photo = photos[path]
            scale = put(path, output_dir / part / "coco" / photo["file_name"], max_side)
            scales[photo["id"]] = scale
            kept.append(photo | {name: round(photo[name] * scale) for name in ("width", "height") if name in photo})
        annotations = [scaled_annotation(a, scales[a["image_id"]]) for a in content["annotations"]
                       if a["image_id"] in scales and not a.get("iscrowd")]
        annotations = [a for a in annotations if "segmentation" in a or "regions" in a]
        write_text(output_dir / part / "coco" / file.name,
                   json.dumps({**content, "images": kept, "annotations": annotations}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path)
    parser.add_argument("--backgrounds", type=Path)
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--max_side", type=int, help="copy, scaled down to this many pixels; default: link")
    parser.add_argument("--subject", type=re.compile, help="regular expression; cut-outs with the same match in "
                                                           "their names, or the same first group, show one subject")
    options = parser.parse_args()
    if not (options.objects or options.backgrounds or options.coco):
        parser.error("nothing to divide: give --objects, --backgrounds or --coco, or several")
    if options.max_side is not None and options.max_side < 32:
        parser.error("--max_side: at least 32")
    if options.output_dir.exists():
        parser.error(f"{options.output_dir} exists; remove it, or choose another --output_dir")
    unfinished = options.output_dir.with_name(options.output_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("objects", "backgrounds"):
        if folder := getattr(options, name):
            files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if len(files) <= HELD_OUT:
                raise UserError(f"{folder}: {len(files)} pictures, too few to hold some out")
            for part, paths in divide(files, options.subject if name == "objects" else None).items():
                for path in paths:
                    put(path, unfinished / part / name / path.relative_to(folder), options.max_side)
    if options.coco:
        divide_coco(options.coco, unfinished, options.max_side)
    unfinished.rename(options.output_dir)
    for part in ("train", "val"):
        print(f"{part}: {len(list((options.output_dir / part).rglob('*.*')))} files")


if __name__ == "__main__":
    with exit_with_message():
        main()
