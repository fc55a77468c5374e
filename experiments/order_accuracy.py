"""How often order.json names the object that is really in front, on composed scenes, where the order is known.

    python -m experiments.order_accuracy --objects MATERIAL/val/objects --backgrounds MATERIAL/val/backgrounds \\
        --coco MATERIAL/val/coco/instances.json --style pix2gestalt

Counts pairs that overlap on at least 20 pixels of the hole. The order is read from the confidence, from the weights
alone, and from the logits alone.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amodal_fusion.errors import exit_with_message
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.model.blending import blend_hole
from amodal_fusion.output.order import order_of
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.synthesizer import STYLES, Synthesizer
from amodal_fusion_transformer_inference import SHIPPED, FusionPredictor

LEAST_AREA = 20
NAMES = ("confidence", "weights", "logits")


def judge(predictor, composition, size):
    """For each pair of a scene, whether confidence, weights and logits name the front one: list of three bools."""
    scene, shown = composition.scene, composition.shown
    logits = predictor.predict_logits([scene.resized((size, size))])[0]
    rows = []
    for pair in order_of(scene, blend_hole(scene, logits), logits.numpy())["pairs"]:
        front, behind = shown[pair["front"] - 1], shown[pair["behind"] - 1]
        if None not in (front, behind) and front != behind and pair["area_in_hole"] >= LEAST_AREA:
            right = front > behind  # objects are numbered from back to front
            rows.append([right, *((pair.get(name, 0) > 0.5) == right for name in ("weights", "pairwise"))])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("objects", "backgrounds", "coco"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--checkpoint", default=SHIPPED)
    parser.add_argument("--style", choices=STYLES, default="mixed")
    parser.add_argument("--n_scenes", type=int, default=80)
    parser.add_argument("--seed", type=int, default=99)
    options = parser.parse_args()
    material = Material(options.objects, options.backgrounds, options.coco)
    synthesizer = Synthesizer(material, 128, style=options.style, seed=options.seed)
    predictor = FusionPredictor(options.checkpoint, device="cpu")
    rows = [row for index in tqdm(range(options.n_scenes), disable=None)
            for row in judge(predictor, synthesizer.compose(index), predictor.img_size)]
    if not rows:
        sys.exit("error: no two objects overlap in the holes of these scenes; use more scenes (--n_scenes)")
    shares = np.mean(rows, 0)
    print_table([{"pairs": len(rows), **{name: f"{share:.2f}" for name, share in zip(NAMES, shares)}}],
                {"pairs": "pairs", **{name: name for name in NAMES}}, None)


if __name__ == "__main__":
    with exit_with_message():
        main()
