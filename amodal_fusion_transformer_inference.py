"""Fuse a folder of scenes with a trained network.

    python amodal_fusion_transformer_inference.py --data_dir examples/scenes --output_dir outputs
    python amodal_fusion_transformer_inference.py --data_dir TEST --output_dir OUT \\
        --checkpoint checkpoints/transformer_run1/best_model.pth --n_max_completions 5 --img_size 256

The first takes the weights that ship. Read is a folder per scene: partial.png, mask.png (255 = hole), comp1.png …, and
original.png where there is one. Written per scene, at the scene's own size:

    OUT/<id>/fused.png            the completions, weighted and blended
    OUT/<id>/residual_mask.png    255 where none of them won: what an inpainter should still draw
    OUT/<id>/weight_1.png …       16 bit, 65535 = the pixel is this completion's alone
    OUT/<id>/figure.png           all of it in one picture
    OUT/metrics.csv, summary.*    with originals: per scene, and means beside every simple rule and the oracle

Exit status: 0 all is well, 1 some scenes could not be fused (they are named), 2 wrong usage.
"""

import math
import os
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from amodal_fusion_transformer import load_model
from fusion.config import option, parse
from fusion.data.images import write_image
from fusion.data.scenes import find_scenes, read_list, read_scene
from fusion.data.tensors import HALF_PRECISION, to_arrays, to_tensors
from fusion.errors import LpipsUnavailable, SceneError, UserError
from fusion.evaluation import score, write_metrics
from fusion.figures import draw_scene
from fusion.model.compositing import add_fill, composite
from fusion.training.perceptual import PerceptualLoss

SHIPPED = Path(__file__).parent / "pretrained" / "amodal_fusion_transformer.pth"


@dataclass
class InferenceConfig:
    """Every option of the inference script. The network's own come from the checkpoint."""

    data_dir: str = option("", "folder of scenes", "data")
    list: str | None = option(None, "fuse only the scenes of this list, one id per line", "data")
    n_max_completions: int | None = option(None, "use the first so many completions of a scene; None: all",
                                           "data", least=1)
    img_size: int | None = option(None, "the network sees each scene at the area of img_size², px; outputs keep "
                                        "their size; None: as in training", "data", least=16)
    checkpoint: str = option(str(SHIPPED), "checkpoint of the training script, or the weights that ship", "network")
    device: str = option("auto", "auto takes a GPU if there is one", "network", ("auto", "cuda", "cpu"))
    amp: str = option("off", "half precision", "network", tuple(HALF_PRECISION))
    batch_size: int = option(4, "scenes per forward pass; scenes of different sizes never share one",
                             "network", least=1)
    output_dir: str = option("", "folder to write", "output")
    overwrite: bool = option(False, "fuse scenes again whose outputs are there", "output")
    figures: bool = option(True, "draw figure.png per scene", "output")
    metrics: bool = option(True, "with originals: metrics.csv, summary.md and summary.png", "output")
    evaluate: bool = option(False, "in the metrics, also what two inpainters make of the fused images", "output")
    lpips_net: str = option("alex", "backbone of LPIPS in the metrics", "output", ("alex", "vgg", "squeeze"))
    lpips_weights: str | None = option(None, "torchvision checkpoint of that backbone; None: cache, then download",
                                       "output")
    workers: int = option(min(4, os.cpu_count() or 1), "processes that read, and as many that write", "output", least=0)


class SceneReader(Dataset):
    """Reads scenes ahead; a scene that cannot be read is its error message."""

    def __init__(self, data_dir, scene_ids, n_max_completions):
        self.data_dir, self.scene_ids, self.n_max_completions = Path(data_dir), scene_ids, n_max_completions

    def __len__(self):
        return len(self.scene_ids)

    def __getitem__(self, index):
        try:
            return read_scene(self.data_dir / self.scene_ids[index], self.n_max_completions)
        except SceneError as error:
            return str(error)


def network_size(size, img_size):
    """(height, width) that the network sees: the scene's aspect, the area of img_size², multiples of 16."""
    scale = img_size / math.sqrt(size[0] * size[1])
    return tuple(max(16, 16 * round(side * scale / 16)) for side in size)


@torch.no_grad()
def fuse_scenes(model, scenes, size, device, amp="off"):
    """Fuse scenes whose network size is the same.

    The network looks at small copies; its logits are scaled up and meet the alpha of the full-size completions,
    so that edges stay sharp.

    Args:
        scenes: list of Scene, of any sizes; size: (height, width) for the network; amp: "off", "bf16", "fp16".

    Returns:
        per scene a dict of its tensors at its own size, with a batch dimension of 1: partial, mask, completions,
        valid, original (if there is one), and weights, residual, fill, fused.
    """
    slots = max(len(scene.completions) for scene in scenes)
    small = [to_tensors(s.resized(size), slots) for s in scenes]
    batch = {name: torch.stack([item[name] for item in small]).to(device)
             for name in ("partial", "mask", "completions", "valid")}
    half = HALF_PRECISION[amp]
    with torch.autocast(device.type, half, enabled=half is not None):
        logits = model(**batch)["logits"].float()  # (B,M,h,w)
    results = []
    for scene, small_logits in zip(scenes, logits):
        count = len(scene.completions)
        full = {name: value[None].to(device) for name, value in to_tensors(scene, count).items()}
        # the fill's logit comes first, the padding's last
        scene_logits = F.interpolate(small_logits[None, : count + 1], size=full["mask"].shape[-2:], mode="bilinear")
        candidates, _ = add_fill(full["partial"], full["mask"], full["completions"])
        fused = composite(scene_logits, candidates, full["partial"], full["mask"])
        fill = candidates[:, 0, :3]
        results.append({**full, **fused, "fill": fill})
    return results


def write_outputs(folder, result, title, figure):
    """Write one scene's pictures, fused.png last: it says that the others are there. `result` holds numpy arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = result["mask"] > 0.5
    for number, weight in enumerate(result["weights"], 1):
        write_image(folder / f"weight_{number}.png", np.rint(weight * inside * 65535).astype(np.uint16))
    none_wins = inside & (result["residual"] > result["weights"].max(0))
    write_image(folder / "residual_mask.png", none_wins.astype(np.uint8) * 255)
    if figure:
        draw_scene(folder / "figure.png", result, title)
    write_image(folder / "fused.png", np.rint(np.clip(result["fused"], 0, 1) * 255).astype(np.uint8))


def fuse_folder(config, model, img_size, scene_ids, device, perceptual):
    """Fuse and write all scenes. Returns rows of metrics and {scene id: what went wrong}."""
    reader = DataLoader(SceneReader(config.data_dir, scene_ids, config.n_max_completions), batch_size=None,
                        num_workers=config.workers)
    rows, failed, pending = [], {}, deque()
    with ProcessPoolExecutor(max(1, config.workers)) as pool:
        pool.submit(os.getpid).result()  # fork the first writer before the network starts its threads

        def finish(at_most):
            while len(pending) > at_most:  # bounds the memory that waiting pictures take
                scene_id, job = pending.popleft()
                try:
                    job.result()
                except OSError as error:
                    failed[scene_id] = f"{error.filename or config.output_dir}: {error.strerror}"

        def readable():
            for scene_id, scene in zip(scene_ids, tqdm(reader, desc="fuse", disable=None)):
                if isinstance(scene, str):
                    failed[scene_id] = scene
                else:
                    yield network_size(scene.mask.shape, img_size), scene

        for size, group in batches(readable(), config.batch_size):
            for scene, result in zip(group, fuse_scenes(model, group, size, device, config.amp)):
                title = scene.id
                if "original" in result and config.metrics:
                    rows.append(score(scene.id, result, perceptual, config.evaluate))
                    title += f": {rows[-1]['ours_psnr']:.2f} dB in the hole, visible fit " \
                             f"{rows[-1]['visible_fit_psnr']:.2f}, oracle {rows[-1]['oracle_psnr']:.2f}"
                folder, arrays = Path(config.output_dir) / scene.id, to_arrays(result)[0]
                pending.append((scene.id, pool.submit(write_outputs, folder, arrays, title, config.figures)))
                finish(2 * max(1, config.workers))
        finish(0)
    return rows, failed


def batches(sized_scenes, batch_size):
    """(size, scene), … → (size, up to batch_size scenes), …, in order."""
    for size, run in groupby(sized_scenes, key=lambda pair: pair[0]):
        group = []
        for _, scene in run:
            group.append(scene)
            if len(group) == batch_size:
                yield size, group
                group = []
        if group:
            yield size, group


def main():
    config = parse(InferenceConfig, __doc__)
    try:
        for name in ("data_dir", "output_dir"):
            if not getattr(config, name):
                print(f"error: --{name} is missing", file=sys.stderr)
                sys.exit(2)
        found = torch.cuda.is_available()
        if config.device == "cuda" and not found:
            print("error: --device cuda, but there is no GPU; use --device cpu", file=sys.stderr)
            sys.exit(2)
        device = torch.device("cuda" if found and config.device != "cpu" else "cpu")
        model, trained = load_model(config.checkpoint)
        scene_ids = read_list(config.list, config.data_dir) if config.list else find_scenes(config.data_dir)
        output_dir = Path(config.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        todo = [i for i in scene_ids if config.overwrite or not (output_dir / i / "fused.png").exists()]
        if len(todo) < len(scene_ids):
            print(f"{len(scene_ids) - len(todo)} of {len(scene_ids)} scenes are done already (anew with --overwrite)")
        perceptual = None
        if config.metrics and any((Path(config.data_dir) / i / "original.png").exists() for i in todo):
            try:
                perceptual = PerceptualLoss(config.lpips_net, config.lpips_weights).to(device)
            except LpipsUnavailable as error:
                print(f"no LPIPS in the metrics: {error}", file=sys.stderr)
        rows, failed = fuse_folder(config, model.to(device), config.img_size or trained["img_size"], todo, device,
                                   perceptual)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    if rows:
        print(write_metrics(output_dir, rows))
    print(f"{len(todo) - len(failed)} scenes fused into {output_dir}")
    for scene_id, fault in failed.items():
        print(f"error: {scene_id}: {fault}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
