"""Divide cut-outs, backgrounds and annotated photos into training and validation by file: every eighth is held out.

    python -m experiments.hold_out --objects OBJECTS --backgrounds PHOTOS --coco COCO/instances.json \\
        --output_dir MATERIAL
    python prepare_dataset.py synthesize --objects MATERIAL/train/objects --backgrounds MATERIAL/train/backgrounds \\
        --coco MATERIAL/train/coco/instances.json --output_dir DATA --n_scenes 8000

Files are linked, not copied. By name, not by chance: the same folders give the same two halves on any machine.
"""

import argparse
import json
from pathlib import Path

from fusion.data.images import IMAGE_SUFFIXES
from fusion.files import write_text

HELD_OUT = 8  # one file in so many


def part_of(index):
    return "val" if index % HELD_OUT == 0 else "train"


def link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, required=True)
    parser.add_argument("--coco", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True)
    for name in ("objects", "backgrounds"):
        folder = getattr(options, name)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        for index, path in enumerate(files):
            link(path, options.output_dir / part_of(index) / name / path.relative_to(folder))
    content = json.loads(options.coco.read_text(encoding="utf-8"))
    photos = sorted(content["images"], key=lambda photo: photo["file_name"])
    for part in ("train", "val"):
        kept = [photo for index, photo in enumerate(photos) if part_of(index) == part]
        ids = {photo["id"] for photo in kept}
        for photo in kept:
            name = photo["file_name"]
            link(options.coco.parent / name, options.output_dir / part / "coco" / name)
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        write_text(options.output_dir / part / "coco" / options.coco.name,
                   json.dumps({**content, "images": kept, "annotations": annotations}))
        print(f"{part}: {len(list((options.output_dir / part).rglob('*.*')))} files")


if __name__ == "__main__":
    main()
