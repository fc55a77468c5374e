"""How much of the oracle's lead is left when it chooses among objects instead of pixels.

    python -m experiments.oracle_granularity --data_dir SCENES

The oracle knows the original and takes the nearest candidate at every pixel, so it also fits noise. Here the choice is
coarser: one choice per square block, or one per "set": all hole pixels that the same completions cover. In a block,
completions are painted over the fill one after another while the error falls. In a set, one candidate wins, or
("set, mixed") one mixture is used for all its pixels.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from amodal_fusion.data.scenes import find_scenes, read_scene
from amodal_fusion.errors import exit_with_message
from amodal_fusion.evaluation.markdown import print_gaps
from amodal_fusion.evaluation.metrics import compare_methods
from amodal_fusion.evaluation.rules import apply_rules, oracle
from amodal_fusion_transformer_inference import FusionPredictor

BLOCKS = (4, 8, 16, 32)


def squared_error(image, original):
    return (image - original).square().mean(1, keepdim=True)  # (B,1,H,W)


def choose_per_block(mask, completions, fill, original, side):
    """The best painting by blocks of `side` pixels, (1,3,H,W); completions are (1,N,4,H,W)."""
    def upsample(blocks):
        return blocks.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., : mask.shape[2], : mask.shape[3]]

    canvas = fill
    for _ in range(completions.shape[1]):
        error = squared_error(canvas, original)
        painted = [canvas + front[:, 3:] * (front[:, :3] - canvas) for front in completions.unbind(1)]
        gains = torch.cat([F.avg_pool2d((error - squared_error(image, original)) * mask, side, ceil_mode=True)
                           for image in painted], 1)  # (1,N,H/side,W/side)
        best, winner = gains.max(1, keepdim=True)
        winner = upsample(winner.masked_fill(best <= 0, -1))
        for slot, image in enumerate(painted):
            canvas = torch.where(winner == slot, image, canvas)
    return canvas


def best_mixture(candidates, target, nearest, steps=200):
    """The convex mixture of candidates (K,D) nearest to target (D,), by the method of Frank and Wolfe (1956).

    `nearest` is the index of the candidate to start from.
    """
    gram, wanted = candidates @ candidates.T, candidates @ target
    shares = F.one_hot(nearest, len(candidates)).to(target)
    for _ in range(steps):
        slope = gram @ shares - wanted
        towards = F.one_hot(slope.argmin(), len(candidates)) - shares
        step = -(slope @ towards) / (towards @ gram @ towards).clamp(min=1e-12)
        shares = shares + step.clamp(0, 1) * towards
    return shares @ candidates


def choose_per_set(mask, completions, fill, original):
    """The best single candidate and the best mixture for each set of covering completions, (1,3,H,W) each."""
    covers = completions[0, :, 3] > 0.5  # (N,H,W)
    number = (covers * 2 ** torch.arange(len(covers)).view(-1, 1, 1)).sum(0)  # (H,W), which set
    hole = mask[0, 0] > 0.5
    single, mixture = fill.clone(), fill.clone()
    for present in number[hole].unique():
        region = (number == present) & hole
        candidates = [c[:3] for i, c in enumerate(completions[0]) if present.item() >> i & 1]
        candidates = torch.stack([image[:, region] for image in [fill[0], *candidates]]).double()  # (K,3,P)
        target = original[0][:, region].double()
        nearest = squared_error(candidates, target).mean((1, 2)).argmin()
        single[0][:, region] = candidates[nearest].float()
        mixture[0][:, region] = best_mixture(candidates.flatten(1), target.flatten(), nearest).view_as(target).float()
    return single, mixture


@torch.no_grad()
def compare_scene(scene, predictor):
    """{method: (PSNR in the hole, PSNR in the overlap)} of one scene."""
    (result,) = predictor.fuse_scenes([scene])
    mask, completions, fill, original = (result[name] for name in ("mask", "completions", "fill", "original"))
    images = apply_rules(result) | {"ours": result["fused"]}
    images["set"], images["set, mixed"] = choose_per_set(mask, completions, fill, original)
    images |= {f"{side}²": choose_per_block(mask, completions, fill, original, side) for side in reversed(BLOCKS)}
    images["oracle"] = oracle(result)[0]
    psnr = compare_methods(result, images)
    return {name: [psnr[f"{name}_psnr"].item(), psnr[f"{name}_psnr_overlap"].item()] for name in images}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--checkpoint", help="default: the weights that ship")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    predictor = FusionPredictor(options.checkpoint, "cpu", options.img_size)
    scores = [compare_scene(read_scene(options.data_dir / scene_id, need_original=True), predictor)
              for scene_id in find_scenes(options.data_dir)]
    figures = {name: torch.tensor([row[name] for row in scores]) for name in scores[0]}
    print_gaps(figures, "one choice per", options.json)


if __name__ == "__main__":
    with exit_with_message():
        main()
