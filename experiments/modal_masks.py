"""Is it worth telling the network where the completer saw each object? Its modal mask as one more input of the encoder.

    python -m experiments.modal_masks --objects MATERIAL/train/objects --backgrounds MATERIAL/train/backgrounds \\
        --coco MATERIAL/train/coco/instances.json --held_out MATERIAL/val

Trained by the ablation's protocol on its scenes, so that its table has the row to compare with. Every second scene
comes without masks, and so does every held-out scene once: users may have none. Without a mask the input is what could
be seen of the completion if nothing hid it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from amodal_fusion_transformer import C2, AmodalFusionTransformer, ConvEncoder
from experiments.ablation import Trainee, mirrored, picked, score, to_bytes
from fusion.data.synthesis import Synthesizer
from fusion.data.tensors import inputs_of, to_tensors
from fusion.perceptual import PerceptualLoss


class ModalEncoder(ConvEncoder):
    def __init__(self):
        super().__init__(128)
        self.stem_candidate = torch.nn.Conv2d(6, C2, 4, stride=2, padding=1, bias=False)

    def forward(self, candidates, photo, mask, error, cues):
        return super().forward(candidates, photo, mask, torch.cat([error, self.modal], 2), cues)


class ModalNetwork(AmodalFusionTransformer):
    """Takes the modal masks as a fifth channel of the completions; sides must be multiples of 16."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.encoder = ModalEncoder()

    def forward(self, partial, mask, completions, valid):
        self.encoder.modal = F.pad(completions[:, :, 4:], (0, 0, 0, 0, 0, 0, 1, 0))  # 0 for the fill
        return super().forward(partial, mask, completions[:, :, :4], valid)


def compose(synthesizer, index, given):
    """Scene `index` as uint8 arrays, modal masks (if `given`) as a fifth channel."""
    composition = synthesizer.compose(index)
    scene = composition.scene
    tensors = to_tensors(scene, synthesizer.n_max)
    modal = tensors["completions"][:, 3:] * (1 - tensors["mask"])  # (N,1,H,W)
    for slot, number in enumerate(composition.shown):
        if given and number is not None:
            modal[slot, 0] = torch.from_numpy(composition.objects[number].visible & ~scene.mask)
    tensors["completions"] = torch.cat([tensors["completions"], modal], 1)
    return to_bytes(tensors)


def compose_all(synthesizer, count, given):
    stored = {}
    for index in tqdm(range(count), "compose", mininterval=10):
        for name, value in compose(synthesizer, index, given(index)).items():
            stored.setdefault(name, np.empty((count, *value.shape), value.dtype))[index] = value
    return {name: torch.from_numpy(value) for name, value in stored.items()}


@torch.no_grad()
def evaluate(model, stored, perceptual):
    """PSNR in hole and overlap, LPIPS, and share of undecided pixels, means over the stored scenes."""
    rows = {}
    for start in range(0, len(stored["mask"]), 25):
        batch = picked(stored, slice(start, start + 25))
        out = model(**inputs_of(batch))
        for key, value in score(out, {**batch, "completions": batch["completions"][:, :, :4]}, perceptual).items():
            rows.setdefault(key, []).append(value)
    return {key: torch.cat(values).nanmean().item() for key, values in rows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("objects", "backgrounds", "coco"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--held_out", type=Path, required=True, help="the part of the material that evaluates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--n_scenes", type=int, default=200, help="held-out ones of each kind")
    parser.add_argument("--lpips_weights")
    options = parser.parse_args()
    count = options.steps * options.batch_size
    synthesizer = Synthesizer(options.objects, options.backgrounds, options.coco, 128, seed=1)
    stored = compose_all(synthesizer, count, lambda index: index % 2 == 0)

    perceptual = PerceptualLoss("alex", options.lpips_weights)
    trainee = Trainee("modal masks", options.seed, {}, perceptual, 7e-4, torch.device("cpu"), ModalNetwork)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    mirror = torch.Generator().manual_seed(0)
    for step in tqdm(range(options.steps), "train", mininterval=10):
        indices = order[step * options.batch_size : (step + 1) * options.batch_size]
        trainee.batch = mirrored(picked(stored, indices), mirror)
        trainee.set_schedule(step, options.steps)
        trainee.step()

    held_out = [options.held_out / name for name in ("objects", "backgrounds", "coco/instances.json")]
    for name, style, seed in (("user", "pix2gestalt", 601), ("composed", "mixed", 602)):
        for given in (True, False):
            made = Synthesizer(*held_out, 128, style=style, seed=seed)
            scenes = compose_all(made, options.n_scenes, lambda _, given=given: given)
            figures = evaluate(trainee.averaged, scenes, perceptual)
            print(name, "with masks" if given else "without", {key: round(value, 4) for key, value in figures.items()})


if __name__ == "__main__":
    main()
