"""Scenes as tensors for the network, and as arrays for figures."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amodal_fusion.data.images import open_picture, read_image
from amodal_fusion.data.scenes import Scene, check_alpha
from amodal_fusion.errors import SceneError

INPUTS = ("partial", "mask", "completions", "valid")  # of the network


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's inputs in a batch: `model(**inputs_of(batch))`."""
    return {name: batch[name] for name in INPUTS}


def to_uint8(scene: Scene, slots: int) -> dict[str, torch.Tensor]:
    """A Scene → what travels from loaders to the device, a quarter of the bytes of `to_tensors`.

    Returns:
        dict of uint8 partial (H,W,3), mask (H,W,1), 255 in the hole, completions (N,H,W,4) with N = slots, original
        (H,W,3) if there is one, and valid (N,) bool.
    """
    count = len(scene.completions)
    completions = np.zeros((slots, *scene.mask.shape, 4), np.uint8)
    for slot, completion in enumerate(scene.completions):
        completions[slot] = completion
    arrays = {"partial": scene.partial, "mask": scene.mask[..., None] * np.uint8(255), "completions": completions}
    if scene.original is not None:
        arrays["original"] = scene.original
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return {**tensors, "valid": torch.arange(slots) < count}


def to_floats(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pictures uint8 (…,H,W,C) → float32 (…,C,H,W) in [0,1], on any device; other tensors stay as they are."""
    return {name: t.movedim(-1, -3).contiguous().float() / 255 if t.dtype == torch.uint8 else t
            for name, t in batch.items()}


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    """A single picture (H,W,C) uint8 → (1,C,H,W) float32 in [0,1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255


def to_tensors(scene: Scene, slots: int) -> dict[str, torch.Tensor]:
    """A Scene → the network's tensors without a batch, its completions padded to `slots`, and its original."""
    return to_floats(to_uint8(scene, slots))


def first_copies(completions: Sequence[np.ndarray]) -> list[int | None]:
    """For each completion the index of the first one that equals it; None if it is transparent.

    Colours under alpha 0 are ignored.

    Args:
        completions: N × (H,W,4) uint8.
    """
    seen: dict[bytes, int] = {}
    firsts: list[int | None] = []
    for index, completion in enumerate(completions):
        alpha = completion[..., 3:]
        pixels = np.where(alpha > 0, completion, 0).tobytes()
        first = seen.setdefault(hashlib.blake2b(pixels, digest_size=16).digest(), index)
        firsts.append(first if alpha.any() else None)
    return firsts


def distinct(completions: Sequence[np.ndarray]) -> list[int]:
    """Indices of the distinct completions: the first of each set of exact copies, no transparent one.

    If all are transparent, the first one is kept. `completions` as in `first_copies`.
    """
    return list(dict.fromkeys(first for first in first_copies(completions) if first is not None)) or [0]


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


def as_scene(partial, mask, completions, key=None) -> Scene:
    """PIL images, numpy arrays, tensors or paths, also mixed → Scene.

    Args:
        partial: the photo, RGB; its content in the hole is ignored.
        mask: the hole, white (255, 1 or True) on black.
        completions: any number of RGBA pictures, a list of them or one array; or a single one.
            Paths; PIL images; numpy (H,W), (H,W,C) and (N,H,W,4); or tensors (1,H,W), (C,H,W) and (N,4,H,W).
            8-bit values, or floats in [0,1].
        key: function of RGB (H,W,3) uint8 → RGBA, for completions that are opaque everywhere; None: these must have
            an alpha channel.

    Raises:
        SceneError: says which picture has the wrong shape, values or size, or that there is no hole.
    """
    partial = to_bytes(partial, "partial", (3,))
    mask = to_mask(mask)
    if isinstance(completions, (str, Path, Image.Image)) or getattr(completions, "ndim", 4) == 3:
        completions = [completions]
    completions = [to_rgba(c, f"completion {i}", key) for i, c in enumerate(completions, 1)]
    if not completions:
        raise SceneError("completions: there is none")
    for i, completion in enumerate(completions, 1):
        check_alpha(f"completion {i}", completion)
    named = {"mask": mask, **{f"completion {i}": c for i, c in enumerate(completions, 1)}}
    for name, picture in named.items():
        if picture.shape[:2] != partial.shape[:2]:
            raise SceneError(f"{name}: {picture.shape[1]}×{picture.shape[0]}, but partial is "
                             f"{partial.shape[1]}×{partial.shape[0]}; all pictures must show the same frame")
    if not mask.any():
        raise SceneError("mask: no hole in it; the hole is white")
    if not mask.all() and not partial[~mask].any() and partial[mask].any():
        raise SceneError("mask: inverted (partial is black where the mask says visible); the hole is white")
    if not any(completion[..., 3].any() for completion in completions):
        raise SceneError("completions: every one is fully transparent")
    return Scene("scene", np.where(mask[..., None], 0, partial).astype(np.uint8), mask, completions)


def to_mask(mask):
    """A mask, of one channel or of equal ones → (H,W) bool, True in the hole."""
    mask = to_bytes(mask, "mask", (1, 3, 4))
    if (mask[..., :3] != mask[..., :1]).any():
        raise SceneError("mask: a picture in colour; a mask is white in the hole and black elsewhere")
    mask = mask[..., 0]
    if mask.max() <= 1:  # 0 and 1 instead of 0 and 255
        mask = mask * np.uint8(255)
    if not np.isin(mask, (0, 255)).all():
        raise SceneError("mask: has values other than black and white; threshold it first")
    return mask >= 128


def to_rgba(picture, name, key):
    """A completion → (H,W,4) uint8; one without transparent pixels is keyed by `key`, see `as_scene`."""
    try:
        rgba = to_bytes(picture, name, (4,) if key is None else (3, 4))
    except SceneError as error:
        if key is None and "needs alpha" in str(error):
            raise SceneError(f"{error}; background=\"auto\" keys a flat background out") from None
        raise
    if key is not None and (rgba.shape[2] == 3 or (rgba[..., 3] == 255).all()):
        return key(np.ascontiguousarray(rgba[..., :3]))
    return rgba


def from_path(path, name, channels):
    """The picture of a file, for `to_bytes`."""
    if channels == (4,):
        with open_picture(path) as picture:
            if "A" not in picture.getbands() and "transparency" not in picture.info:
                raise SceneError(f"{name}: {path}, a picture of mode {picture.mode}; a completion needs alpha: RGBA")
    picture = read_image(path, "L" if channels[0] == 1 else "RGBA" if 4 in channels else "RGB")
    return picture[..., None] if picture.ndim == 2 else picture


def from_pillow(picture, name, channels):
    """A PIL image in a mode of `channels`. Raises SceneError if its mode does not fit."""
    modes = {1: ("1", "L", "RGB", "RGBA", "P"), 3: ("RGB", "RGBA", "L", "P"), 4: ("RGBA", "LA", "PA")}[channels[0]]
    if picture.mode not in modes:
        raise SceneError(f"{name}: a picture of mode {picture.mode}; " + (
            "a completion needs alpha: RGBA" if channels == (4,) else f"expected one of {', '.join(modes)}"))
    if channels == (3, 4):
        return picture.convert("RGBA" if picture.mode == "RGBA" or "transparency" in picture.info else "RGB")
    if channels[0] == 1 and picture.mode not in ("1", "L"):
        return picture.convert("RGB")
    return picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels[0]])


def to_bytes(picture, name, channels):
    """One picture, or its path → uint8 (H,W,C), with C among `channels`."""
    if isinstance(picture, (str, Path)):
        return from_path(Path(picture), name, channels)
    if isinstance(picture, Image.Image):
        picture = np.asarray(from_pillow(picture, name, channels))
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
