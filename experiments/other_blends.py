"""Blend the same logits in other ways after training: sharper, or with another alpha rule.

    python -m experiments.other_blends --data_dir SET

Undecided is the share of the hole where no candidate has a weight of 0.8 or more. Squared error rewards mixtures of
guesses, a person prefers one guess, LPIPS lies between the two.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from amodal_fusion.data.scenes import find_scenes, read_scene
from amodal_fusion.data.tensors import inputs_of, to_tensors
from amodal_fusion.errors import exit_with_message
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.model.compositing import OPAQUE, add_fill, composite
from amodal_fusion_transformer import load_model
from amodal_fusion_transformer_inference import SHIPPED
from experiments.ablation import score


def sharper(factor):
    return lambda logits, candidates: (factor * logits, candidates)


def limited(multiple):
    """Limit weights to `multiple` · alpha; the network uses 4."""
    def blend(logits, candidates):
        rgb, alpha = candidates.split([3, 1], 2)
        return logits, torch.cat([rgb, (alpha * multiple / OPAQUE).clamp(max=1)], 2)
    return blend


def unlimited(logits, candidates):
    """softmax(logits + log alpha): large logits can paint rims of low alpha."""
    rgb, alpha = candidates.split([3, 1], 2)
    return logits + alpha.squeeze(2).clamp(min=1e-6).log(), torch.cat([rgb, (alpha > 0).float()], 2)


BLENDS = {
    "as it is": sharper(1),
    "logits · 1.5": sharper(1.5),
    "logits · 2": sharper(2),
    "up to 1 · alpha": limited(1),
    "up to 16 · alpha": limited(16),
    "softmax(logits + log alpha)": unlimited,
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--checkpoint", default=SHIPPED)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--n_scenes", type=int, help="use only the first N scenes; default: all")
    parser.add_argument("--least_alpha", type=float, default=0, help="smaller alpha counts as 0")
    parser.add_argument("--lpips_weights")
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    model, _ = load_model(options.checkpoint)
    perceptual = PerceptualLoss("alex", options.lpips_weights)
    figures = {name: {} for name in BLENDS}
    for scene_id in tqdm(find_scenes(options.data_dir)[: options.n_scenes], disable=None):
        scene = read_scene(options.data_dir / scene_id, need_original=True).resized((options.img_size,) * 2)
        batch = {name: value[None] for name, value in to_tensors(scene, len(scene.completions)).items()}
        alpha = batch["completions"][:, :, 3]
        alpha[alpha < options.least_alpha] = 0
        inputs = inputs_of(batch)
        logits, (candidates, _) = model(**inputs)["logits"], add_fill(**inputs)
        for blend, rows in figures.items():
            out = composite(*BLENDS[blend](logits, candidates), batch["partial"], batch["mask"])
            for name, value in score(out, batch, perceptual).items():
                rows.setdefault(name, []).append(value)
    means = [{"blend": blend, **{name: f"{torch.cat(v).nanmean().item():.4f}" for name, v in rows.items()}}
             for blend, rows in figures.items()]
    print_table(means, {"blend": "blend", "ours_psnr": "PSNR, hole", "ours_psnr_overlap": "overlap", "lpips": "LPIPS",
                        "undecided": "undecided"}, options.json)


if __name__ == "__main__":
    with exit_with_message():
        main()
