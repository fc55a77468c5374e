"""Scenes as tensors, the network's inputs and outputs, and as arrays for figures."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from amodal_fusion.data.scenes import Scene, check_alpha
from amodal_fusion.errors import SceneError

INPUTS = ("partial", "mask", "completions", "valid")  # of the network


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the network takes of a batch: `model(**inputs_of(batch))`."""
    return {name: batch[name] for name in INPUTS}


def to_tensors(scene: Scene, slots: int) -> dict[str, torch.Tensor]:
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


def distinct(completions: Sequence[np.ndarray]) -> list[int]:
    """Indices of the completions that count: the first of each set of exact copies, none that is all transparent.

    Colours under alpha 0 do not matter. When all are transparent, the first one counts.

    Args:
        completions: N × (H,W,4) uint8.
    """
    seen: dict[bytes, int] = {}
    for index, completion in enumerate(completions):
        alpha = completion[..., 3:]
        if alpha.any():
            pixels = np.where(alpha > 0, completion, 0).tobytes()
            seen.setdefault(hashlib.blake2b(pixels, digest_size=16).digest(), index)
    return list(seen.values()) or [0]


def to_arrays(batch: dict[str, torch.Tensor]) -> list[dict[str, np.ndarray]]:
    """Tensors of a fused batch → one dict of arrays per scene, padded slots left out.

    Args:
        batch: partial, fused (B,3,H,W), mask, residual (B,1,H,W), completions (B,N,4,H,W), weights (B,N,H,W),
            valid (B,N), and perhaps original (B,3,H,W).

    Returns:
        list of dicts as `amodal_fusion.evaluation.figures.scene_panels` takes them: float32, channels last.
    """
    scenes: list[dict[str, np.ndarray]] = []
    for i, valid in enumerate(batch["valid"].cpu()):
        scene: dict[str, np.ndarray] = {name: batch[name][i].permute(1, 2, 0).float().cpu().numpy()
                                        for name in ("partial", "fused", "original") if name in batch}
        scene |= {name: batch[name][i, 0].float().cpu().numpy() for name in ("mask", "residual")}
        scene["completions"] = batch["completions"][i].cpu()[valid].permute(0, 2, 3, 1).numpy()
        scene["weights"] = batch["weights"][i].float().cpu()[valid].numpy()
        scenes.append(scene)
    return scenes


# ----------------------------------------------------------------------------
# A scene out of whatever a program holds its pictures in: PIL images, numpy arrays or tensors.


def as_scene(partial, mask, completions) -> Scene:
    """Three arguments of one kind or of several → Scene.

    Args:
        partial: the photo, RGB; what it shows in the hole does not matter.
        mask: the hole, white (255, 1 or True) on black.
        completions: any number of RGBA pictures, a list of them or one array; or a single one.
            PIL images; numpy (H,W), (H,W,C) and (N,H,W,4); or tensors (1,H,W), (C,H,W) and (N,4,H,W).
            8-bit values, or floats in [0,1].

    Raises:
        SceneError: says which picture has the wrong shape, values or size, or that there is no hole.
    """
    partial = to_bytes(partial, "partial", (3,))
    mask = to_bytes(mask, "mask", (1,))[..., 0]
    if mask.max() <= 1:  # 0 and 1 instead of 0 and 255
        mask = mask * np.uint8(255)
    if not np.isin(mask, (0, 255)).all():
        raise SceneError("mask: has values other than black and white; threshold it first")
    mask = mask >= 128
    if isinstance(completions, Image.Image) or getattr(completions, "ndim", 4) == 3:
        completions = [completions]
    completions = [to_bytes(c, f"completion {i}", (4,)) for i, c in enumerate(completions, 1)]
    if not completions:
        raise SceneError("completions: there is none")
    for i, completion in enumerate(completions, 1):
        check_alpha(f"completion {i}", completion)
    named = {"mask": mask, **{f"completion {i}": c for i, c in enumerate(completions, 1)}}
    for name, picture in named.items():
        if picture.shape[:2] != partial.shape[:2]:
            raise SceneError(f"{name}: {picture.shape[1]}×{picture.shape[0]}, but partial is "
                             f"{partial.shape[1]}×{partial.shape[0]}; all pictures show the same frame")
    if not mask.any():
        raise SceneError("mask: no hole in it; the hole is white")
    if not mask.all() and not partial[~mask].any() and partial[mask].any():
        raise SceneError("mask: inverted (partial is black where the mask says visible); the hole is white")
    if not any(completion[..., 3].any() for completion in completions):
        raise SceneError("completions: every one is fully transparent")
    return Scene("scene", np.where(mask[..., None], 0, partial).astype(np.uint8), mask, completions)


def to_bytes(picture, name, channels):
    """One picture → uint8 (H,W,C); C must be one of `channels`."""
    if isinstance(picture, Image.Image):
        modes = {1: ("1", "L"), 3: ("RGB", "RGBA", "L", "P"), 4: ("RGBA", "LA", "PA")}[channels[0]]
        if picture.mode not in modes:
            raise SceneError(f"{name}: a picture of mode {picture.mode}; " + (
                "a completion needs alpha: RGBA" if channels == (4,) else f"expected {modes[-1]}"))
        picture = np.asarray(picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels[0]]))
    elif isinstance(picture, torch.Tensor):
        picture = picture.detach().float().cpu().numpy() if picture.is_floating_point() else picture.cpu().numpy()
        picture = np.moveaxis(picture, 0, -1) if picture.ndim == 3 else picture
    picture = np.asarray(picture)
    picture = picture[..., None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[2] not in channels:
        hint = " (a completion needs alpha)" if channels == (4,) else ""
        raise SceneError(f"{name}: shape {picture.shape}, expected height × width × {channels[0]}{hint}; "
                         "tensors have the channels first")
    if not picture.size:
        raise SceneError(f"{name}: no pixel in it, {picture.shape}")
    if picture.dtype == bool:
        return picture.astype(np.uint8)
    if np.issubdtype(picture.dtype, np.floating):
        if not (picture.min() >= 0 and picture.max() <= 1):  # nan is neither
            raise SceneError(f"{name}: values from {picture.min():g} to {picture.max():g}; floats lie in [0, 1]")
        return np.rint(picture * 255).astype(np.uint8)
    if picture.min() < 0 or picture.max() > 255:
        raise SceneError(f"{name}: values from {picture.min()} to {picture.max()}; whole numbers lie in 0 … 255")
    return picture.astype(np.uint8)
