"""How good the network would be on composed scenes if it knew the hidden truth.

    python -m experiments.oracle_order --objects CUTOUTS --backgrounds PHOTOS --coco INSTANCES.json \\
        --style pix2gestalt --seed 99

The first clue is which object is in front at each pixel of the hole. The second is how close each completion is to the
original. Each clue is multiplied by a factor and added to the logits; the factors are fitted to the PSNR of the same
scenes. So the result is an upper bound for a network that must infer the clues from the picture.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from amodal_fusion.data.tensors import inputs_of, to_tensors
from amodal_fusion.errors import exit_with_message
from amodal_fusion.evaluation.markdown import print_gaps
from amodal_fusion.evaluation.metrics import compare_methods, region_psnr
from amodal_fusion.evaluation.rules import apply_rules, oracle
from amodal_fusion.model.compositing import add_fill, composite
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.synthesizer import STYLES, Synthesizer
from amodal_fusion_transformer_inference import SHIPPED, load_model


@torch.no_grad()
def prepare(model, synthesizer, index):
    """A scene of the synthesizer and the clues to it.

    Returns:
        dict of the scene's tensors and the network's `fill` and `logits`, all with a batch dimension of 1;
        and `clues`, each (1,N+1,…) over the candidates, the fill first: 1 where its object is in front, −1 elsewhere,
        0 where it has no object; the square of this; 1 for the fill; the completion's PSNR in the hole in tens of dB.
    """
    composition = synthesizer.compose(index)
    scene = composition.scene
    tensors = {name: value[None] for name, value in to_tensors(scene, len(scene.completions)).items()}
    out = model(**inputs_of(tensors))
    front = torch.zeros_like(out["logits"])
    for slot, number in enumerate(composition.shown, 1):
        if number is not None:
            front[0, slot] = torch.from_numpy(composition.objects[number].visible).float() * 2 - 1
    colours, alpha = tensors["completions"][0].split([3, 1], 1)  # (N,3,H,W), (N,1,H,W)
    psnr = region_psnr(colours, tensors["original"], alpha * tensors["mask"]).nan_to_num().clamp(max=40)  # (N,)
    nearness = torch.cat([torch.zeros(1), psnr / 10]).view(1, -1, 1, 1)
    is_fill = torch.tensor([1.0] + [0.0] * len(scene.completions)).view(1, -1, 1, 1)
    return {**tensors, "fill": out["fill"], "logits": out["logits"],
            "clues": [front, front.square(), is_fill, nearness]}


def psnr(scene, fused):
    """PSNR in hole and overlap, (2,); the second is nan without an overlap."""
    hole, overlap = compare_methods(scene, {"": fused}).values()
    return torch.cat([hole, overlap.detach() if overlap.isnan() else overlap])  # the gradient 0 · nan would be nan


def fuse_with_clues(scene, scale=1.0, factors=()):
    """The scene fused by logits · scale + Σ factor · clue, over the first len(factors) clues."""
    logits = scene["logits"] * scale + sum(factor * clue for factor, clue in zip(factors, scene["clues"]))
    candidates, _ = add_fill(**inputs_of(scene))
    return composite(logits, candidates, scene["partial"], scene["mask"])["fused"]


def fit(scenes, clues, steps=60):
    """PSNR (scenes, 2) with fitted factors for the logits and the first `clues` clues."""
    scale, factors = torch.ones(1, requires_grad=True), torch.zeros(clues, requires_grad=True)
    optimizer = torch.optim.Adam([scale, factors], lr=0.15)

    def figures():
        return torch.stack([psnr(scene, fuse_with_clues(scene, scale, factors)) for scene in scenes])

    for _ in tqdm(range(steps), disable=None, leave=False):
        hole, overlap = figures().unbind(1)
        (-hole.mean() - overlap[~overlap.isnan()].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return figures()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("objects", "backgrounds", "coco"):
        parser.add_argument(f"--{name}", type=Path, required=name != "coco")
    parser.add_argument("--style", choices=STYLES, default="mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_scenes", type=int, default=80)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--checkpoint", default=SHIPPED)
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    material = Material(options.objects, options.backgrounds, options.coco)
    synthesizer = Synthesizer(material, options.img_size, style=options.style, seed=options.seed)
    model, _ = load_model(options.checkpoint)
    scenes = [prepare(model, synthesizer, index) for index in tqdm(range(options.n_scenes), disable=None)]
    figures = {}
    for scene in scenes:
        images = apply_rules(scene) | {"ours": fuse_with_clues(scene), "oracle": oracle(scene)[0]}
        for name, image in images.items():
            figures.setdefault(name, []).append(psnr(scene, image))
    figures = {name: torch.stack(rows) for name, rows in figures.items()}
    figures["order known"] = fit(scenes, 3)
    figures["order and errors known"] = fit(scenes, 4)
    print_gaps(figures, "network", options.json)


if __name__ == "__main__":
    with exit_with_message():
        main()
