"""Seconds per training step (forward, loss with LPIPS, backward, Muon), compared with the plain design and AdamW.

    python -m benchmarks.training --sizes 128 256 --batch 2 --lpips_net vgg --json training.json

The LPIPS backbone has random weights: its cost does not depend on them.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch.optim import AdamW

from amodal_fusion.data.tensors import inputs_of
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.precision import HALF_PRECISION, training_precision
from amodal_fusion.training.cuda_graph import WARM_UP, Recorded
from amodal_fusion.training.optimizers import Muon
from amodal_fusion_transformer import AmodalFusionTransformer, fusion_loss
from benchmarks.measure import alternate, random_scenes, spread
from experiments.plain_design import PlainDesign


def random_lpips(net):
    """PerceptualLoss with a random backbone."""
    models = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.pth"
        torch.save(models[net](weights=None).state_dict(), path)
        return PerceptualLoss(net, path)


def step(model, optimizer, batch, perceptual, half, device, recorded=False):
    """A function that does one training step: autocast to `half` unless None, CUDA graphs if `recorded`."""
    optimizer = optimizer(model.parameters(), lr=torch.tensor(1e-5, device=device) if recorded else 1e-5,
                          capturable=recorded)

    def gradients(**batch):
        with torch.autocast(device, half, enabled=half is not None):
            out = model(**inputs_of(batch))
            loss, _ = fusion_loss(out, batch, perceptual, 0.5, psnr_weight=1.0)
        loss.backward()

    gradients, move = (Recorded(gradients), Recorded(optimizer.step)) if recorded else (gradients, optimizer.step)

    def program():
        gradients(**batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        move()
        optimizer.zero_grad(set_to_none=not recorded)

    for _ in range(WARM_UP + 1 if recorded else 0):
        program()
    return program


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--slots", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lpips_net", choices=("vgg", "alex"), default="vgg")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--amp", choices=tuple(HALF_PRECISION), default="bf16", help="as in the training script")
    parser.add_argument("--plain_limit", type=int, default=256, help="largest side for the plain design, pixels")
    parser.add_argument("--compile", action="store_true", help="on a GPU, also time torch.compile")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = training_precision(options.amp, torch.device(device))
    muon = partial(Muon, half=half if half is torch.bfloat16 else None)
    perceptual, rows = random_lpips(options.lpips_net).to(device), []
    for size in options.sizes:
        batch = random_scenes(options.batch, options.slots, size, device)
        ours = AmodalFusionTransformer().to(device).train()
        made = {"ours": step(ours, muon, batch, perceptual, half, device),
                "network": step(ours, muon, batch, None, half, device)}
        if size <= options.plain_limit:
            plain = PlainDesign(options.slots).to(device).train()
            made |= {"plain": step(plain, AdamW, batch, perceptual, half, device),
                     "plain network": step(plain, AdamW, batch, None, half, device)}
        if device == "cuda":
            made["recorded"] = step(AmodalFusionTransformer().to(device).train(), muon, batch, perceptual, half, device,
                                    recorded=True)
            if options.compile:
                made["compiled"] = step(torch.compile(ours), muon, batch, perceptual, half, device)
        seconds = alternate(made, options.runs)
        row = {"size": size, "seconds": {name: value[0] for name, value in seconds.items()}}
        row |= {name: spread(value) for name, value in seconds.items()}
        if "plain" in made:
            row["ratio"] = f"{seconds['plain'][0] / seconds['ours'][0]:.1f}"
            row["network ratio"] = f"{seconds['plain network'][0] / seconds['network'][0]:.1f}"
        rows.append(row)
        print(row, flush=True)
    print(f"\nbatch {options.batch}, N = {options.slots}, LPIPS with {options.lpips_net}, {half or torch.float32}")
    print_table(rows, {"size": "side", "ours": "ours", "plain": "plain design", "ratio": "plain / ours",
                       "network": "ours without LPIPS", "plain network": "plain without LPIPS",
                       "network ratio": "plain / ours without LPIPS",
                       "recorded": "ours as CUDA graphs", "compiled": "ours compiled"}, options.json)


if __name__ == "__main__":
    main()
