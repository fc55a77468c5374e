"""Evaluation scenes from real completions: holes are cut where completed objects of a photo overlap.

    python -m experiments.real_holes --input_dir REAL --output_dir real --per_photo 30
    python amodal_fusion_transformer_inference.py --data_dir real --output_dir OUT --evaluate

REAL has one folder per photo with photo.* and obj_*.png; each obj_*.png is one completed object, RGBA, full frame. The
photo is the ground truth. A scene is a square crop around a point where two objects overlap, with a box hole over that
point. Its completions are the objects that cover most of the hole, at most five.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from amodal_fusion.data.images import read_image, resize
from amodal_fusion.data.scenes import Scene, write_scene
from amodal_fusion.errors import UserError, exit_with_message

MOST_MISSES = 1000  # failed draws in a row


def cut(photo, objects, rng):
    """One draw: (crop, hole, indices of objects), or None when fewer than two objects reach the hole."""
    alphas = [o[..., 3] > 127 for o in objects]
    height, width = photo.shape[:2]
    rows, columns = np.nonzero(np.sum(alphas, 0) >= 2)
    if not len(rows):
        return None
    at = rng.integers(len(rows))
    side = int(rng.uniform(0.4, 0.9) * min(height, width))
    box = (side * rng.uniform(0.2, 0.5, 2)).astype(int)
    hole = np.zeros((height, width), bool)
    top, left = (int(np.clip(centre[at] - b / 2, 0, length - b))
                 for centre, b, length in ((rows, box[0], height), (columns, box[1], width)))
    hole[top : top + box[0], left : left + box[1]] = True
    top, left = (int(np.clip(centre[at] - side / 2, 0, length - side))
                 for centre, length in ((rows, height), (columns, width)))
    crop = np.s_[top : top + side, left : left + side]
    covers = np.array([(alpha[crop] & hole[crop]).sum() for alpha in alphas])
    chosen = [i for i in np.argsort(covers)[::-1] if covers[i] > 0.01 * hole[crop].sum()][:5]
    if len(chosen) < 2 or hole[crop].mean() < 0.03:
        return None
    return crop, hole[crop], rng.permutation(chosen)


def distance_by_alpha(photo, objects):
    """RMS difference between completions and photo by alpha: {lower bound of alpha: RMS}, colours in [0,1]."""
    rgba = np.stack(objects) / 255  # (N,H,W,4)
    squared = ((rgba[..., :3] - photo / 255) ** 2).mean(3)
    ranges = (1 / 255, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.98), (0.98, 1.01)
    return {least: squared[(rgba[..., 3] >= least) & (rgba[..., 3] < below)].mean() ** 0.5 for least, below in ranges}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--per_photo", type=int, default=20)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    folders = sorted(path.parent for path in options.input_dir.glob("*/photo.*"))
    folders = [folder for folder in folders if len(list(folder.glob("obj_*.png"))) > 1]
    if not folders:
        sys.exit(f"error: {options.input_dir}: needs a folder per photo, with photo.* and at least two obj_*.png")
    for folder in folders:
        photo = read_image(next(folder.glob("photo.*")), "RGB")
        objects = [resize(read_image(path, "RGBA"), photo.shape[:2]) for path in sorted(folder.glob("obj_*.png"))]
        distances = ", ".join(f"{at:.2f}: {rms:.3f}" for at, rms in distance_by_alpha(photo, objects).items())
        print(f"{folder.name}: RMS difference from the photo, by least alpha: {distances}")
        made = misses = 0
        while made < options.per_photo:
            drawn = cut(photo, objects, rng)
            misses = 0 if drawn else misses + 1
            if misses >= MOST_MISSES:
                raise UserError(f"{folder}: no hole in {misses} draws, its objects hardly overlap; remove this folder")
            if drawn is None:
                continue
            crop, hole, chosen = drawn
            partial = np.where(hole[..., None], 0, photo[crop]).astype(np.uint8)
            scene = Scene(f"{folder.name}_{made:02d}", partial, hole, [objects[i][crop] for i in chosen], photo[crop])
            (options.output_dir / scene.id).mkdir(parents=True, exist_ok=True)
            write_scene(options.output_dir / scene.id, scene.resized((options.img_size, options.img_size)))
            made += 1
    print(f"{len(list(options.output_dir.iterdir()))} scenes in {options.output_dir}")


if __name__ == "__main__":
    with exit_with_message():
        main()
