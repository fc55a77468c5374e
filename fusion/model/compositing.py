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


def weigh(logits, completions):
    """Weights ∝ alpha·exp(logit), among the completions and the fill, whose alpha is 1 everywhere.

    Args:
        logits: (B,N+1,H,W), the fill's last; completions (B,N,4,H,W), alpha 0 in padded slots.

    Returns:
        log-weights (B,N+1,H,W): −inf where alpha is zero; their exponentials add up to 1.
    """
    return (logits + F.pad(completions[:, :, 3].float().log(), (0, 0, 0, 0, 0, 1))).log_softmax(1)


def blend(partial, mask, completions, fill, weights, residual):
    """fused = partial·(1−mask) + mask·(Σ weights_i·completion_i + residual·fill).

    Args:
        partial, fill: (B,3,H,W) in [0,1]; mask (B,1,H,W) in {0,1}, 1 = hole; completions (B,N,4,H,W);
            weights (B,N,H,W) and residual (B,1,H,W), together 1.

    Returns:
        fused (B,3,H,W), equal to `partial` outside the hole bit for bit.
    """
    inside = residual * fill
    for i in range(completions.shape[1]):  # a loop: the (B,N,3,H,W) product is never needed in memory
        inside = inside + weights[:, i : i + 1] * completions[:, i, :3]
    return torch.where(mask > 0.5, inside, partial)


def fuse(log_weights, partial, mask, completions, fill):
    """What `weigh` returned → the weights and the fused image.

    Args:
        log_weights: (B,N+1,H,W), the fill's last; the others as in `blend`.

    Returns:
        dict of weights (B,N,H,W), residual (B,1,H,W) and fused (B,3,H,W).
    """
    weights, residual = log_weights.exp().split([completions.shape[1], 1], 1)
    fused = blend(partial, mask, completions, fill, weights, residual)
    return {"weights": weights, "residual": residual, "fused": fused}


def paint_over(partial, mask, completions, valid, fill, order):
    """Paint completions over the fill, back to front.

    Args:
        partial, mask, completions, valid, fill: as in `blend`; valid (B,N) bool.
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
