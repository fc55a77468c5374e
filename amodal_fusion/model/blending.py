"""The network's weights at a scene's own size, computed only at the pixels of the hole, in blocks.

No array of size (M,H,W) is needed, so photos of many megapixels with hundreds of completions fit into memory.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from amodal_fusion.errors import SceneError
from amodal_fusion.model.compositing import composite, fill_hole

BLOCK = 2**20  # candidates × pixels in a block


@dataclass
class Blend:
    """Weights and fused colours at the P pixels of a hole, in row-major order of `mask`."""

    mask: np.ndarray  # (H,W) bool
    weights: np.ndarray  # (N,P) float32, or uint16 with 65535 for 1
    residual: np.ndarray  # (P,) alike
    colours: np.ndarray  # (P,3) float32 in [0,1]
    fill: np.ndarray  # (P,3) float32 in [0,1]

    def on_picture(self, values):
        """(P,) or (P,C) → (H,W) or (H,W,C), zero outside the hole."""
        picture = np.zeros(self.mask.shape + values.shape[1:], values.dtype)
        picture[self.mask] = values
        return picture

    def fused(self, partial):
        """The fused image (H,W,3), uint8: `partial` outside the hole."""
        picture = partial.copy()
        picture[self.mask] = np.rint(np.clip(self.colours, 0, 1) * 255).astype(np.uint8)
        return picture

    def none_wins(self):
        """(H,W) bool: the pixels of the hole where no completion has more weight than the residual."""
        return self.on_picture(self.residual > self.weights.max(0))


def blend_hole(scene, logits, exact=True):
    """Enlarge the logits to the scene's size, then compute weights and fused colours.

    Args:
        scene: Scene of any size (H,W) with N completions.
        logits: (M,h,w) float32 on the CPU, M = N + 1, the fill first, predicted for a smaller copy.
        exact: weights as float32; else as uint16, half the memory.

    Returns:
        Blend.

    Raises:
        SceneError: the result is not finite.
    """
    fill = fill_pixels(scene)  # before the completions are in memory
    count, size = len(scene.completions), len(fill)
    pixels = np.empty((count, size, 4), np.uint8)
    for slot, completion in enumerate(scene.completions):  # large ones are read one by one
        pixels[slot] = completion[scene.mask]
    weights, residual = (np.empty(shape, np.float32 if exact else np.uint16) for shape in ((count, size), (size,)))
    colours = np.empty((size, 3), np.float32)
    enlarged = enlarge_at(logits, scene.mask)
    step = max(64, BLOCK // (count + 1) // 64 * 64)  # whole vectors: bytes do not depend on it
    for start in range(0, size, step):
        part = slice(start, start + step)
        rgba = torch.from_numpy(pixels[:, part]).permute(0, 2, 1).float() / 255  # (N,4,b)
        behind = torch.from_numpy(fill[part]).T  # (3,b)
        candidates = torch.cat([F.pad(behind, (0, 0, 0, 1), value=1)[None], rgba])  # (M,4,b)
        inside = torch.ones(1, 1, 1, rgba.shape[2])
        out = composite(enlarged(part)[None, :, None], candidates[None, :, :, None], 0 * inside, inside)  # (1,·,1,b)
        if not out["fused"].isfinite().all():
            raise SceneError(f"{scene.id}: the network's result is not finite; compute in float32", "amp")
        for array, name in ((weights, "weights"), (residual, "residual")):
            values = out[name][0, :, 0].numpy()
            array[..., part] = values if exact else to_levels(values)
        colours[part] = out["fused"][0, :, 0].T.numpy()
    return Blend(scene.mask, weights, residual, colours, fill)


def to_levels(weights):
    """float32 in [0,1] → uint16, 65535 for 1. uint16 is returned unchanged."""
    return weights if weights.dtype == np.uint16 else np.rint(weights * 65535).astype(np.uint16)


def fill_pixels(scene):
    """The smooth fill at the pixels of the hole, (P,3) float32. One channel at a time needs a third of the memory."""
    mask = torch.from_numpy(scene.mask)[None, None].float()
    fill = np.empty((scene.mask.sum(), 3), np.float32)
    for channel in range(3):
        known = torch.from_numpy(np.ascontiguousarray(scene.partial[..., channel]))[None, None].float() / 255
        fill[:, channel] = fill_hole(known, mask)[0, 0].numpy()[scene.mask]
    return fill


def enlarge_at(logits, mask):
    """Bilinear enlargement of (M,h,w) to the size of `mask` (H,W), as a function: slice of its pixels → (M,b)."""
    height, width = mask.shape
    wide = F.interpolate(logits[None], size=(logits.shape[1], width), mode="bilinear")[0]  # (M,h,W)
    rows, columns = (torch.from_numpy(index) for index in np.nonzero(mask))
    # rows as F.interpolate finds them: centres of pixels lie at halves
    source = ((torch.arange(height) + 0.5) * (logits.shape[1] / height) - 0.5).clamp(min=0)
    above = source.long()
    below, share = (above + 1).clamp(max=logits.shape[1] - 1), source - above

    def at(part):
        row, column = rows[part], columns[part]
        lower = share[row]
        return wide[:, above[row], column] * (1 - lower) + wide[:, below[row], column] * lower

    return at
