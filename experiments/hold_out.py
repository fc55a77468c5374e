"""Divide cut-outs, backgrounds and annotated photos into training and validation by file: every eighth is held out.

    python -m experiments.hold_out --objects OBJECTS --backgrounds PHOTOS --coco COCO/instances.json \\
        --output_dir MATERIAL
    python prepare_dataset.py synthesize --objects MATERIAL/train/objects --backgrounds MATERIAL/train/backgrounds \\
        --coco MATERIAL/train/coco/instances.json --output_dir DATA --n_scenes 8000

By name, not by chance: the same folders give the same two parts on any machine. Files are linked; with --max_side they
are copied, the larger ones scaled down, which makes the material small enough to be carried to another machine.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from fusion.data.images import IMAGE_SUFFIXES, resize
from fusion.files import write_text

HELD_OUT = 8  # one file in so many


def part_of(index):
    return "val" if index % HELD_OUT == 0 else "train"


def put(source, target, max_side):
    """Link `source`, or copy it with its longer side at most `max_side` pixels; returns the scale."""
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


def scaled(polygons, scale):
    """COCO polygons [[x, y, …], …] in pixels of a picture that has been scaled."""
    return [[round(number * scale, 1) for number in polygon] for polygon in polygons]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, required=True)
    parser.add_argument("--coco", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--max_side", type=int, help="copy, scaled down to this many pixels; default: link")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True)
    for name in ("objects", "backgrounds"):
        folder = getattr(options, name)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        for index, path in enumerate(files):
            put(path, options.output_dir / part_of(index) / name / path.relative_to(folder), options.max_side)
    content = json.loads(options.coco.read_text(encoding="utf-8"))
    photos = sorted(content["images"], key=lambda photo: photo["file_name"])
    for part in ("train", "val"):
        kept = [photo for index, photo in enumerate(photos) if part_of(index) == part]
        scales = {}
        for photo in kept:
            name = photo["file_name"]
            target = options.output_dir / part / "coco" / name
            scales[photo["id"]] = put(options.coco.parent / name, target, options.max_side)
        annotations = [{**a, "segmentation": scaled(a["segmentation"], scales[a["image_id"]])}
                       for a in content["annotations"] if a["image_id"] in scales and not a.get("iscrowd")]
        write_text(options.output_dir / part / "coco" / options.coco.name,
                   json.dumps({**content, "images": kept, "annotations": annotations}))
        print(f"{part}: {len(list((options.output_dir / part).rglob('*.*')))} files")


if __name__ == "__main__":
    main()
