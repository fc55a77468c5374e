"""Ablation: train the network without one of its parts, from scratch, with several seeds, on the same scenes.

    python -m experiments.ablation --objects MATERIAL/train/objects --backgrounds MATERIAL/train/backgrounds \\
        --coco MATERIAL/train/coco/instances.json --eval_dirs COMPOSED USER REAL --json ablation.json

All networks train side by side, one step of each in turn, on the same scenes; each seed has its own order of scenes. So
the networks can be compared whenever training stops. On a GPU every step is a CUDA graph.
"""

import argparse
import functools
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from amodal_fusion.data.datasets import WithLayers
from amodal_fusion.data.scenes import find_scenes, read_scene
from amodal_fusion.data.tensors import INPUTS, inputs_of, to_tensors
from amodal_fusion.distributed import Process
from amodal_fusion.errors import exit_with_message
from amodal_fusion.evaluation.metrics import compare_methods, undecided_share
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.evaluation.rules import apply_rules, oracle
from amodal_fusion.model.cues import VisibleCues
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.layers import LayeredScenes
from amodal_fusion.synthesis.synthesizer import Synthesizer
from amodal_fusion.training.loop import TrainStep
from amodal_fusion.training.run import Run
from amodal_fusion_transformer import AmodalFusionTransformer, ConvEncoder, TrainConfig, VisiblePrior, fusion_loss

FIELDS = (*INPUTS, "original")


class NoPrior(VisiblePrior):
    """No prior logits: cues are inputs only, and the network starts with equal weights."""

    def forward(self, cues):
        return torch.zeros_like(cues.copied)


class NoImageNet(ConvEncoder):
    def backbone_features(self, candidates, photo):  # noqa: ARG002
        return 0, 0, 0


class WithoutCue(torch.nn.Module):
    """A block whose last input are the cues, and which does not see one of them."""

    def __init__(self, block, cue):
        super().__init__()
        self.block, self.cue = block, cue

    def forward(self, *inputs):
        *others, cues = inputs
        return self.block(*others, cues._replace(**{self.cue: torch.zeros_like(getattr(cues, self.cue))}))


PARTS = {
    "as it is": {},
    "without ImageNet features": {"encoder": lambda _: NoImageNet(128)},
    "without prior": {"prior": lambda _: NoPrior()},
    "without scene self-attention": {},
    **{f"without cue {cue}": dict.fromkeys(("encoder", "prior"), functools.partial(WithoutCue, cue=cue))
       for cue in VisibleCues._fields},
}


def build(part, seed):
    torch.manual_seed(seed)
    model = AmodalFusionTransformer(encoder_layers=0 if part == "without scene self-attention" else 2)
    for name, changed in PARTS[part].items():
        setattr(model, name, changed(getattr(model, name)))
    return model.to(memory_format=torch.channels_last)


class Trainee:
    """One network in training, with the options of the training script."""

    def __init__(self, part, seed, scenes, perceptual, options, device):
        self.part, self.seed = part, seed
        config = TrainConfig(epochs=1, batch_size=options.batch_size, optimizer=options.optimizer, lr=options.lr,
                             warmup_steps=150, cuda_graph=True)
        self.run = Run(build(part, seed).to(device).train(), config, Process(0, 1, device), scenes, "")
        self.step = TrainStep(self.run, self.run.model, fusion_loss, perceptual)

    def train(self, batch):
        self.step(iter([batch]))
        self.run.advance()


class Mixed:
    """Scene `index` of photos with layers for a share of the indices, a composed one for the others."""

    def __init__(self, synthesizer, layers, share):
        self.synthesizer, self.layers, self.share, self.n_max = synthesizer, layers, share, synthesizer.n_max

    def __call__(self, index):
        layered = index * WithLayers.SPREAD % 1 < self.share
        return (self.layers if layered else self.synthesizer)(index)


def compose(synthesizer, index):
    """Scene `index` as uint8 arrays, padded to n_max completions. They take a quarter of the memory of float32."""
    tensors = to_tensors(synthesizer(index), synthesizer.n_max)
    return {name: (tensors[name] if name == "valid" else (tensors[name] * 255).round().byte()).numpy()
            for name in FIELDS}


def pick(stored, indices):
    """A batch of the stored scenes, as float tensors in [0,1]."""
    batch = {name: value[indices] for name, value in stored.items()}
    return {name: value if value.dtype == torch.bool else value.float() / 255 for name, value in batch.items()}


def mirrored(batch, generator):
    if torch.rand((), generator=generator) < 0.5:
        return {name: value.flip(-1) if value.dim() > 2 else value for name, value in batch.items()}
    return batch


def score(out, batch, perceptual):
    """PSNR of the fused image in hole and overlap, LPIPS, and the share of undecided pixels, (B,) each."""
    whole = torch.where(batch["mask"] > 0.5, out["fused"], batch["original"])
    return {**compare_methods(batch, {"ours": out["fused"]}), "lpips": perceptual(whole, batch["original"]),
            "undecided": undecided_share({**batch, **out})}


@torch.no_grad()
def evaluate(model, sets, perceptual):
    """{set: {figure: mean over scenes}}, with the figures of `score`, and PSNR of the oracle and of visible fit."""
    results = {}
    for name, batches in sets.items():
        rows = {}
        for batch in batches:
            out = model(**inputs_of(batch))
            filled = {**batch, "fill": out["fill"]}
            images = {"oracle": oracle(filled)[0], **apply_rules(filled, rules=("visible_fit",))}
            for key, value in (compare_methods(filled, images) | score(out, batch, perceptual)).items():
                rows.setdefault(key, []).append(value)
        results[name] = {key: torch.cat(values).nanmean().item() for key, values in rows.items()}
    return results


def read_sets(folders, size, device):
    sets = {}
    for folder in map(Path, folders):
        scenes = [read_scene(folder / scene_id, 5).resized((size, size)) for scene_id in find_scenes(folder)]
        items = [to_tensors(scene, 5) for scene in scenes]
        sets[folder.name] = [{name: torch.stack([item[name] for item in items[i : i + 25]]).to(device)
                              for name in FIELDS} for i in range(0, len(items), 25)]
    return sets


def report(results):
    """Markdown table for each set: mean ± half the range over seeds; PSNR in hole / overlap, LPIPS, undecided."""
    sets = list(next(iter(results.values()))[0])
    lines = [f"| network | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for part, runs in results.items():
        cells = []
        for name in sets:
            hole, overlap, lpips, undecided = ([run[name][key] for run in runs] for key in
                                               ("ours_psnr", "ours_psnr_overlap", "lpips", "undecided"))
            cells.append(" / ".join(f"{statistics.mean(v):.2f} ± {(max(v) - min(v)) / 2:.2f}" for v in (hole, overlap))
                         + f" / {statistics.mean(lpips):.4f} ± {(max(lpips) - min(lpips)) / 2:.4f}"
                         + f" / {statistics.mean(undecided):.2f}")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("objects", "backgrounds", "coco"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--layers", nargs="+", help="folders of photos with completed layers")
    parser.add_argument("--layers_share", type=float, default=0.5, help="share of the scenes that come from layers")
    parser.add_argument("--eval_dirs", nargs="+", required=True, help="prepared data sets to measure on")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--img_size", type=int, default=128)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lpips_weights")
    parser.add_argument("--seconds", type=float, help="stop training after this time, at whatever step")
    parser.add_argument("--processes", type=int, default=2, help="processes that compose scenes")
    parser.add_argument("--json", help="file to write the numbers to")
    return parser.parse_args()


def compose_all(synthesizer, count, processes):
    """Scenes 0 to count - 1 as uint8 tensors, field → (count, …)."""
    stored = {}
    # One thread each: threads of several processes would compete for the cores.
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = pool.map(compose, [synthesizer] * count, range(count), chunksize=32)
        for index, scene in enumerate(tqdm(jobs, "compose", count, mininterval=10)):
            for name, value in scene.items():
                if not index:
                    stored[name] = np.empty((count, *value.shape), value.dtype)
                stored[name][index] = value
    return {name: torch.from_numpy(value) for name, value in stored.items()}


def train(stored, perceptual, options, device):
    """Train all networks side by side on the stored scenes.

    Returns:
        list of Trainee, and the number of steps taken.
    """
    count = len(stored["mask"])
    trainees = [Trainee(part, seed, count, perceptual, options, device)
                for part in options.parts for seed in options.seeds]
    orders = {seed: torch.randperm(count, generator=torch.Generator().manual_seed(seed)) for seed in options.seeds}
    mirror = torch.Generator().manual_seed(0)
    start = time.monotonic()
    for step in tqdm(range(options.steps), "train", mininterval=10):
        batches = {}
        for seed, order in orders.items():
            indices = order[step * options.batch_size : (step + 1) * options.batch_size].to(device)
            batches[seed] = {**mirrored(pick(stored, indices), mirror), "index": indices}
        for trainee in trainees:
            trainee.train(batches[trainee.seed])
        if step % 100 == 99 and device.type == "cuda":
            torch.cuda.synchronize()
        if options.seconds and time.monotonic() - start > options.seconds:
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{step + 1} steps in {time.monotonic() - start:.0f} s", flush=True)
    return trainees, step + 1


def main():
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    perceptual = PerceptualLoss("alex", options.lpips_weights).to(device)  # first, because its weights may be missing
    start = time.monotonic()
    material = Material(options.objects, options.backgrounds, options.coco)
    source = Synthesizer(material, options.img_size, seed=1)
    if options.layers:
        source = Mixed(source, LayeredScenes(options.layers, options.img_size, seed=1), options.layers_share)
    stored = compose_all(source, options.steps * options.batch_size, options.processes)
    stored = {name: value.to(device) for name, value in stored.items()}
    print(f"{len(stored['mask'])} scenes composed in {time.monotonic() - start:.0f} s", flush=True)

    trainees, steps = train(stored, perceptual, options, device)
    sets = read_sets(options.eval_dirs, options.img_size, device)
    results = {}
    for trainee in trainees:
        results.setdefault(trainee.part, []).append(evaluate(trainee.run.ema.module.eval(), sets, perceptual))
    torch.manual_seed(0)
    results["untrained"] = [evaluate(AmodalFusionTransformer().to(device).eval(), sets, perceptual)]
    print(report(results))
    for name, figures in results["as it is" if "as it is" in results else "untrained"][0].items():
        print(name, {key: round(value, 3) for key, value in figures.items() if "ours" not in key})
    if options.json:
        Path(options.json).write_text(json.dumps({"steps": steps, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with exit_with_message():
        main()
