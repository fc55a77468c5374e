"""CSF-Net (Heo and Cho, WACV 2026) beside this network: parameters, time and memory; and both after equal training.

    python -m benchmarks.peer --csf_net CSF-Net
    python -m benchmarks.peer --csf_net CSF-Net --scenes TRAIN --eval_scenes HELD_OUT --steps 2000

CSF-Net is the checkout of its published code that you name; it needs timm. Both networks get the same K candidates,
those with the highest visible score; CSF-Net sees them on white, as its authors do. In training both see the same
scenes in the same order, with the same loss, L1 in the hole plus LPIPS, from random weights (ours also has its frozen
ImageNet features). CSF-Net copies pixels, which has no gradient; the gradient of its scores' softmax takes that place
(straight-through). Its own loss and schedule (200 epochs of 10,950 photos) are not used: a short run says how fast each
of them learns, not how good it gets.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

from amodal_fusion.data.scenes import find_scenes, read_scene
from amodal_fusion.data.tensors import inputs_of, to_tensors
from amodal_fusion.errors import UserError, exit_with_message
from amodal_fusion.evaluation.markdown import print_table
from amodal_fusion.evaluation.metrics import region_psnr
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.evaluation.rules import visible_score
from amodal_fusion_transformer import AmodalFusionTransformer
from benchmarks.measure import alone, alternate, random_scenes, spread

NAMES = {"ours": "ours", "csf_net": "CSF-Net"}
RATES = {"ours": 7e-4, "csf_net": 2e-4}  # AdamW; CSF-Net's is its paper's
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def namespace(value):
    """Nested dicts → nested namespaces, as CSF-Net takes its configuration."""
    return SimpleNamespace(**{k: namespace(v) for k, v in value.items()}) if isinstance(value, dict) else value


class CsfNet(torch.nn.Module):
    """CSF-Net of a checkout, with the inputs and the fused image of this network."""

    def __init__(self, folder, slots, size):
        super().__init__()
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        from models.csf_network import CSFNetwork

        settings = yaml.safe_load((Path(folder) / "configs" / "csf_config.yaml").read_text(encoding="utf-8"))
        settings["data"] |= {"Kmax": slots, "img_size": size}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a lot
            self.network = CSFNetwork(namespace(settings))

    def forward(self, partial, mask, completions, valid=None):
        """As AmodalFusionTransformer.forward; returns a dict of fused (B,3,H,W). Padded slots are white."""
        alpha = completions[:, :, 3:]
        if valid is not None:
            alpha = alpha * valid[:, :, None, None, None]
        white = alpha * completions[:, :, :3] + 1 - alpha  # (B,K,3,H,W)
        mean, std = MEAN.to(partial), STD.to(partial)
        with contextlib.redirect_stdout(io.StringIO()):
            picture, _, info = self.network((partial - mean) / std * (1 - mask), 1 - mask, (white - mean) / std)
        if info.get("fallback_active"):
            raise UserError(f"CSF-Net failed: {info['error']}")
        fused = (picture * std + mean).clamp(0, 1)
        if self.training:  # the copied pixels have no gradient: that of the softmax of the scores instead
            soft = (info["final_selection_scores"].softmax(1)[:, :, None] * white).sum(1)
            fused = fused.detach() + soft - soft.detach()
        return {"fused": torch.where(mask > 0.5, fused, partial)}


def build(name, folder, slots, size):
    """A network with random weights; CSF-Net makes some of its layers in its first forward pass."""
    torch.manual_seed(0)
    if name == "ours":
        return AmodalFusionTransformer()
    network = CsfNet(folder, slots, size)
    with torch.no_grad():
        network(*inputs_of(random_scenes(1, slots, size)).values())
    return network


def one_forward(name, folder, slots, size, threads):
    torch.set_num_threads(threads)
    model = build(name, folder, slots, size).eval()
    with torch.no_grad():
        model(**inputs_of(random_scenes(1, slots, size)))


def compare_cost(options, device):
    """Rows of parameters, seconds and memory of both networks."""
    models = {name: build(name, options.csf_net, options.slots, options.size).eval().to(device) for name in NAMES}
    batch = inputs_of(random_scenes(1, options.slots, options.size, device))

    def program(model):
        def forward():
            with torch.no_grad():
                model(**batch)
        return forward

    seconds = alternate({name: program(model) for name, model in models.items()}, options.runs)
    rows = []
    for name, model in models.items():
        row = {"network": NAMES[name], "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
               "time": spread(seconds[name]), "seconds": seconds[name]}
        if device == "cpu":
            result, peak = alone(one_forward, name, options.csf_net, options.slots, options.size,
                                 torch.get_num_threads())
            row["memory"] = str(result)[:40] if isinstance(result, Exception) else f"{peak:.2f}"
        rows.append(row)
    return rows


class Scenes:
    """Batches of prepared scenes at one size, each with its K best candidates."""

    def __init__(self, folder, options, device):
        self.folder, self.ids, self.options, self.device = folder, find_scenes(folder), options, device

    def one(self, scene_id):
        scene = read_scene(self.folder / scene_id, need_original=True).resized((self.options.size,) * 2)
        tensors = {name: value[None] for name, value in
                   to_tensors(scene, max(self.options.slots, len(scene.completions))).items()}
        best = visible_score(tensors)[0].argsort(descending=True, stable=True)[: self.options.slots]
        return tensors | {name: tensors[name][:, best] for name in ("completions", "valid")}

    def batch(self, ids):
        scenes = [self.one(scene_id) for scene_id in ids]
        return {name: torch.cat([scene[name] for scene in scenes]).to(self.device) for name in scenes[0]}


def train(models, scenes, options, perceptual):
    """Train the networks side by side: one step each on every batch."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), RATES[name]) for name, model in models.items()}
    generator, order = torch.Generator().manual_seed(0), []
    for step in range(options.steps):
        while len(order) < options.batch:
            order += torch.randperm(len(scenes.ids), generator=generator).tolist()
        chosen, order = order[: options.batch], order[options.batch :]
        batch = scenes.batch([scenes.ids[i] for i in chosen])
        losses = {}
        for name, model in models.items():
            fused = model(**inputs_of(batch))["fused"]
            l1 = ((fused - batch["original"]).abs() * batch["mask"]).sum() / (3 * batch["mask"].sum())
            loss = l1 + perceptual(fused, batch["original"]).mean()
            optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            losses[name] = loss.item()
        if (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}: " + ", ".join(f"{NAMES[n]} {loss:.4f}" for n, loss in losses.items()), flush=True)


@torch.no_grad()
def evaluate(models, scenes, perceptual):
    """Rows of mean PSNR in the hole and LPIPS."""
    values = {name: [] for name in models}
    for scene_id in scenes.ids:
        batch = scenes.batch([scene_id])
        for name, model in models.items():
            fused = model.eval()(**inputs_of(batch))["fused"]
            values[name].append([region_psnr(fused, batch["original"], batch["mask"]).item(),
                                 perceptual(fused, batch["original"]).item()])
    means = {name: torch.tensor(rows).mean(0).tolist() for name, rows in values.items()}
    return [{"network": NAMES[name], "psnr": f"{psnr:.2f}", "lpips": f"{lpips:.4f}"}
            for name, (psnr, lpips) in means.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csf_net", type=Path, required=True, help="checkout of CSF-Net's code")
    parser.add_argument("--size", type=int, default=256, help="side, px; CSF-Net: a multiple of 32")
    parser.add_argument("--slots", type=int, default=3, help="candidates, K")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scenes", type=Path, help="prepared scenes to train both with")
    parser.add_argument("--eval_scenes", type=Path, help="prepared scenes to compare them on")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lpips_weights")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    if not (options.csf_net / "models" / "csf_network.py").is_file():
        raise UserError(f"{options.csf_net}: no models/csf_network.py there; name a checkout of CSF-Net", "csf_net")
    if importlib.util.find_spec("timm") is None:
        raise UserError("CSF-Net needs timm: pip install timm")
    if bool(options.steps) != bool(options.scenes) or bool(options.scenes) != bool(options.eval_scenes):
        raise UserError("training needs scenes, other scenes to compare on, and a number of steps", "scenes",
                        "eval_scenes", "steps")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{options.size}², K = {options.slots}, a scene at a time")
    print_table(compare_cost(options, device),
                {"network": "network", "parameters": "parameters", "time": "time", "memory": "peak GiB"}, options.json)
    if options.steps:
        short = "; a short run on a CPU" if device == "cpu" else ""
        print(f"\nAfter {options.steps} steps of {options.batch} scenes each{short}")
        models = {name: build(name, options.csf_net, options.slots, options.size).train().to(device) for name in NAMES}
        perceptual = PerceptualLoss("alex", options.lpips_weights).to(device)
        train(models, Scenes(options.scenes, options, device), options, perceptual)
        rows = evaluate(models, Scenes(options.eval_scenes, options, device), perceptual)
        print_table(rows, {"network": "network", "psnr": "PSNR, hole", "lpips": "LPIPS"})


if __name__ == "__main__":
    with exit_with_message():
        main()
