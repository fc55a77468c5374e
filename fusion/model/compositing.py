"""Filling holes smoothly, and painting completions over the fill: the model and every rule build on these."""

import torch
import torch.nn.functional as F


def push_pull(values, known):
    """Spread known values smoothly over a picture (Gortler et al. 1996, The Lumigraph, section 3.4).

    Push: average down by two until one pixel is left, counting known pixels only. Pull: come back up and let
    the coarser level fill what a level does not know.

    Args:
        values: (B,C,H,W); what stands where `known` is 0 does not matter, as long as it is finite.
        known: (B,1,H,W) in [0,1], the confidence in each pixel.

    Returns:
        (B,C,H,W): `values` where known is 1, an interpolation elsewhere; 0 where nothing at all is known.
    """
    # In fp32 whatever autocast says: the weights of far-away pixels are tiny.
    values, known = values.float(), known.float()
    levels = []
    weighted = values * known
    while True:
        levels.append((weighted, known))
        height, width = known.shape[-2:]
        if height == width == 1:
            break
        kernel = (min(2, height), min(2, width))
        # Sums over 2×2, so that one known pixel of four already makes the coarse pixel known (Gortler, eq. 14).
        area = kernel[0] * kernel[1]
        weighted = area * F.avg_pool2d(weighted, kernel, ceil_mode=True, count_include_pad=True)
        total = area * F.avg_pool2d(known, kernel, ceil_mode=True, count_include_pad=True)
        known = total.clamp(max=1)
        weighted = weighted * (known / total.clamp(min=1e-6))
    pulled = None
    for weighted, known in reversed(levels):
        if pulled is None:
            pulled = weighted / known.clamp(min=1e-6)
        else:
            coarse = F.interpolate(pulled, size=known.shape[-2:], mode="bilinear", align_corners=False)
            pulled = weighted + (1 - known) * coarse
    return pulled


def fill_hole(partial, mask):
    """Smooth push-pull fill of the hole. partial (B,3,H,W), mask (B,1,H,W; 1 = hole) → (B,3,H,W)."""
    return push_pull(partial, 1 - mask)


def add_fill(partial, mask, completions, valid=None):
    """All that may stand at a pixel: the fill of the hole, opaque everywhere, as candidate 0, then the completions.

    Args:
        partial (B,3,H,W) in [0,1]; mask (B,1,H,W), 1 = hole; completions (B,N,4,H,W), straight alpha; valid (B,N)
            bool, False = padded slot, whatever it holds; None: all are real.

    Returns:
        candidates (B,M,4,H,W), M = N + 1, transparent in padded slots, and which of them are real, (B,M) bool.
    """
    if valid is None:
        valid = torch.ones(completions.shape[:2], dtype=torch.bool, device=completions.device)
    fill = torch.cat([fill_hole(partial, mask), torch.ones_like(mask)], 1)
    completions = completions.masked_fill(~valid[:, :, None, None, None], 0)
    return torch.cat([fill[:, None], completions], 1), F.pad(valid, (1, 0), value=True)


def composite(logits, candidates, partial, mask):
    """Weights ∝ alpha·exp(logit) among all candidates, and the picture that they make in the hole.

    Args:
        logits: (B,M,H,W); candidates: (B,M,4,H,W), the fill first; partial (B,3,H,W); mask (B,1,H,W), 1 = hole.

    Returns:
        dict of weights (B,N,H,W) and residual (B,1,H,W), the fill's weight, together 1; fused (B,3,H,W), which is
        `partial` outside the hole bit for bit.
    """
    rgb, alpha = candidates[:, :, :3], candidates[:, :, 3].float()
    weights = (logits + alpha.log()).softmax(1)  # (B,M,H,W)
    inside = (weights[:, :, None] * rgb).sum(1)
    return {"weights": weights[:, 1:], "residual": weights[:, :1], "fused": torch.where(mask > 0.5, inside, partial)}


def paint_over(partial, mask, completions, valid, fill, order):
    """Paint completions over the fill, back to front.

    Args:
        partial, fill: (B,3,H,W) in [0,1]; mask (B,1,H,W), 1 = hole; completions (B,N,4,H,W); valid (B,N) bool.
        order: (B,N) long, a permutation per scene; the last one is in front.

    Returns:
        (B,3,H,W).
    """
    batch = torch.arange(len(partial), device=partial.device)
    canvas = fill
    for slot in order.unbind(1):
        front = completions[batch, slot]  # (B,4,H,W)
        alpha = front[:, 3:] * valid[batch, slot][:, None, None, None]
        canvas = canvas + alpha * (front[:, :3] - canvas)
    return torch.where(mask > 0.5, canvas, partial)
