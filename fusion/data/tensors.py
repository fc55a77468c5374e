"""Scenes as the network takes and gives them, and as figures show them."""

import numpy as np
import torch
import torch.nn.functional as F

INPUTS = ("partial", "mask", "completions", "valid")  # of the network


def inputs_of(batch):
    """What the network takes of a batch: `model(**inputs_of(batch))`."""
    return {name: batch[name] for name in INPUTS}


def to_tensors(scene, slots):
    """A Scene → the tensors of AmodalFusionDataset, its completions padded to `slots`."""

    def tensor(array):  # (…,H,W,C) uint8 → (…,C,H,W) in [0,1]
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, -3))).float() / 255

    count = len(scene.completions)
    tensors = {
        "partial": tensor(scene.partial),
        "mask": tensor(scene.mask[..., None] * np.uint8(255)),
        "completions": F.pad(tensor(np.stack(scene.completions)), (0, 0, 0, 0, 0, 0, 0, slots - count)),
        "valid": torch.arange(slots) < count,
    }
    if scene.original is not None:
        tensors["original"] = tensor(scene.original)
    return tensors


def to_arrays(batch):
    """Tensors of a fused batch → one dict of arrays per scene, padded slots left out.

    Args:
        batch: partial, fused (B,3,H,W), mask, residual (B,1,H,W), completions (B,N,4,H,W), weights (B,N,H,W),
            valid (B,N), and perhaps original (B,3,H,W).

    Returns:
        list of dicts as `fusion.figures.scene_panels` takes them: float32, channels last.
    """
    scenes = []
    for i, valid in enumerate(batch["valid"].cpu()):
        scene = {name: batch[name][i].permute(1, 2, 0).float().cpu().numpy()
                 for name in ("partial", "fused", "original") if name in batch}
        scene |= {name: batch[name][i, 0].float().cpu().numpy() for name in ("mask", "residual")}
        scene["completions"] = batch["completions"][i].cpu()[valid].permute(0, 2, 3, 1).numpy()
        scene["weights"] = batch["weights"][i].float().cpu()[valid].numpy()
        scenes.append(scene)
    return scenes
