"""What to choose for the guide by what an inpainter makes of it: confidence, and number of completions.

    python -m experiments.guide_choice --data_dir COMPOSED --confidence 0.3 0.4 0.5 0.6 0.7 0.8
    python -m experiments.guide_choice --data_dir USER --completions 1 3 5 10 all --store WEIGHTS

Inpainters are Telea's (OpenCV) and, if the package gmic is installed, PatchMatch. The best value has the lowest LPIPS
of the inpainted pictures, averaged over the inpainters. With --store the best confidence is written into the
checkpoint, and inference takes it from there. Completions are kept as `create` keeps them, the most useful first;
seconds are those of the network for one scene.
"""

import argparse
import functools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from amodal_fusion.checkpoints import load_checkpoint, save_checkpoint
from amodal_fusion.data.scenes import find_scenes, read_scene
from amodal_fusion.data.tensors import as_tensor
from amodal_fusion.errors import exit_with_message
from amodal_fusion.evaluation.inpainters import OPENCV, PATCHMATCH, grow, inpaint, inpaint_opencv, run_command
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.evaluation.scores import measure_picture
from amodal_fusion.ingest.selection import select_completions
from amodal_fusion.model.blending import blend_hole
from amodal_fusion.output.guide import make_guide
from amodal_fusion.output.scene_reader import count_candidates, network_size
from amodal_fusion_transformer_inference import SHIPPED, FusionPredictor

SEAM = 3  # px, as --seam


def fuse(predictor, scene):
    """Blend of a scene, and the seconds that the network took."""
    small = scene.resized(network_size(scene.mask.shape, predictor.img_size,
                                       count_candidates(scene, predictor.img_size)))
    start = time.perf_counter()
    logits = predictor.predict_logits([small])[0]
    seconds = time.perf_counter() - start
    return blend_hole(scene, logits), seconds


def measure(scene, pictures, inpainters, perceptual):
    """Metrics in the hole of the fused image, and of each inpainter's picture of the guide.

    Args:
        pictures: fused and guide (H,W,3) uint8, region to draw (H,W) bool.
    """
    fused, guide, todo = pictures
    original, mask = as_tensor(scene.original), torch.from_numpy(scene.mask)[None, None].float()
    region = grow(todo, SEAM) & scene.mask
    made = {"fused": as_tensor(fused)}
    made |= {name: inpaint(as_tensor(guide), region, method) for name, method in inpainters.items()}
    values = {f"{name} {metric}": value for name, picture in made.items()
              for metric, value in measure_picture(picture, original, mask, perceptual).items()
              if metric in ("psnr", "lpips")}
    return values | {"drawn": todo.sum() / scene.mask.sum(),
                     "score": np.mean([values[f"{name} lpips"] for name in inpainters])}


def keep(scene, count):
    """The scene with its `count` most useful completions; "all" keeps all."""
    if count == "all" or int(count) >= len(scene.completions):
        return scene
    kept, _ = select_completions(scene.completions, scene.mask, scene.partial, int(count))
    return replace(scene, completions=[scene.completions[i] for i in kept or [0]], numbers=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--checkpoint", default=SHIPPED)
    parser.add_argument("--n_scenes", type=int, help="use only the first N scenes; default: all")
    parser.add_argument("--confidence", type=float, nargs="+", help="default: the checkpoint's")
    parser.add_argument("--completions", nargs="+", default=["all"], help="numbers, or all")
    parser.add_argument("--lpips_weights")
    parser.add_argument("--store", help="write the weights with the best confidence to this file")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    predictor, perceptual = FusionPredictor(options.checkpoint), PerceptualLoss("alex", options.lpips_weights)
    inpainters = {"telea": functools.partial(inpaint_opencv, OPENCV["telea"])}
    if PATCHMATCH:
        inpainters["patchmatch"] = functools.partial(run_command, PATCHMATCH)
    confidences = options.confidence or [predictor.guide_confidence]
    rows = {(count, confidence): [] for count in options.completions for confidence in confidences}
    for scene_id in tqdm(find_scenes(options.data_dir)[: options.n_scenes], disable=None):
        scene = read_scene(options.data_dir / scene_id, need_original=True)
        for count in options.completions:
            kept = keep(scene, count)
            blend, seconds = fuse(predictor, kept)
            for confidence in confidences:
                pictures = blend.fused(kept.partial), *make_guide(kept, blend, confidence)
                rows[count, confidence].append(measure(kept, pictures, inpainters, perceptual) | {
                    "seconds": seconds, "count": len(kept.completions)})
    table = []
    for (count, confidence), values in rows.items():
        means = {name: float(np.mean([row[name] for row in values])) for name in values[0]}
        table.append({"completions": f"{count} ({means['count']:.1f})", "confidence": confidence, "means": means,
                      **{name: f"{mean:.2f}" if "psnr" in name else f"{mean:.4f}" for name, mean in means.items()
                         if name != "count"}})
    names = {name: name.replace("psnr", "PSNR").replace("lpips", "LPIPS") for name in table[0]
             if name not in ("means", "score")}
    print(f"{len(values)} scenes, means in the hole\n")
    print_table(table, names, options.json)
    best = min(table, key=lambda row: row["means"]["score"])
    print(f"\nLowest LPIPS after inpainting: {best['completions']} completions, confidence {best['confidence']}")
    if options.store:
        state = load_checkpoint(options.checkpoint)
        state["config"]["guide_confidence"] = best["confidence"]
        save_checkpoint(options.store, {name: state[name] for name in state if name not in ("kind", "version")})
        print(f"written to {options.store}")


if __name__ == "__main__":
    with exit_with_message():
        main()
