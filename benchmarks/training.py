"""Seconds per training step (forward, loss with LPIPS, backward, Muon, EMA), beside the plain design and AdamW.

    python -m benchmarks.training --sizes 128 256 --batch 2 --lpips_net vgg --json training.json

The LPIPS backbone has random weights: its cost does not depend on them.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torchvision

from amodal_fusion.distributed import Process
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.precision import HALF_PRECISION, training_precision
from amodal_fusion.training.cuda_graph import WARM_UP
from amodal_fusion.training.loop import TrainStep
from amodal_fusion.training.run import Run
from amodal_fusion_transformer import AmodalFusionTransformer, TrainConfig, fusion_loss
from benchmarks.measure import alternate, random_scenes, spread
from experiments.plain_design import PlainDesign


def random_lpips(net):
    """PerceptualLoss with a random backbone."""
    models = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.pth"
        torch.save(models[net](weights=None).state_dict(), path)
        return PerceptualLoss(net, path)


def step(model, batch, perceptual, options, device, **more):
    """A function that does one training step with the options of the training script; see `TrainStep`."""
    config = TrainConfig(batch_size=options.batch, amp=options.amp, **more)
    run = Run(model, config, Process(0, 1, torch.device(device)), 10**6, "")
    train = TrainStep(run, run.model, fusion_loss, perceptual)
    for _ in range(WARM_UP + 1 if config.cuda_graph else 0):
        train(iter([batch]))
    return lambda: train(iter([batch]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--slots", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lpips_net", choices=("vgg", "alex"), default="vgg")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--amp", choices=tuple(HALF_PRECISION), default="bf16", help="as in the training script")
    parser.add_argument("--plain_limit", type=int, default=256, help="largest side for the plain design, pixels")
    parser.add_argument("--compile", action="store_true", help="on a GPU, torch.compile the network, too")
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = training_precision(options.amp, torch.device(device))
    perceptual, rows = random_lpips(options.lpips_net).to(device), []
    for size in options.sizes:
        batch = random_scenes(options.batch, options.slots, size, device)
        batch["index"] = torch.arange(options.batch)
        ours = AmodalFusionTransformer().to(device).train()
        made = {"ours": step(ours, batch, perceptual, options, device),
                "network": step(ours, batch, None, options, device)}
        if size <= options.plain_limit:
            plain = PlainDesign(options.slots).to(device).train()
            made |= {"plain": step(plain, batch, perceptual, options, device, optimizer="adamw"),
                     "plain network": step(plain, batch, None, options, device, optimizer="adamw")}
        if device == "cuda":
            made["graphs"] = step(AmodalFusionTransformer().to(device).train(), batch, perceptual, options, device,
                                  cuda_graph=True)
            if options.compile:
                made["compiled"] = step(torch.compile(ours), batch, perceptual, options, device)
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
                       "graphs": "ours as CUDA graphs", "compiled": "ours compiled"}, options.json)


if __name__ == "__main__":
    main()
