"""Smooth fill of holes, weights of candidates, and compositing, for the network and all rules."""

import math

import torch
import torch.nn.functional as F

STEPS = 6  # of push-pull's relaxation, at each level
# How far each step goes: Chebyshev's choice (Young 1953, On Richardson's method) for errors that belong to this level,
# with eigenvalues of the Laplacian between SLOWEST and 2. The coarser levels have removed the slower ones.
SLOWEST = 2 / (STEPS**2 + 1)
STRIDES = [1 / (1 + SLOWEST / 2 + (1 - SLOWEST / 2) * math.cos(math.pi * (k - 0.5) / STEPS))
           for k in range(STEPS, 0, -1)]
OPAQUE = 4  # alpha ≥ 1/4 counts as opaque, since soft edges of real completions are mostly object
ABSENT = -1e9  # logit of a candidate that does not cover a pixel: probability 0, but finite if all are absent


def push_pull(values, known):
    """Spread known values smoothly over a picture (Gortler et al. 1996, The Lumigraph, section 3.4).

    Push: average down by two, known pixels only, until one pixel is left. Pull: come back up, and let the coarser
    level fill the unknown pixels of each level. A few Richardson steps for Laplace's equation then relax these pixels.
    From coarse to fine (Bornemann and Deuflhard 1996, The cascadic multigrid method) they come close to the membrane
    between the known pixels, which fills holes better by 0.5 to 1.3 dB than no step.

    Args:
        values: (B,C,H,W), finite; where `known` is 0 they have no effect.
        known: (B,1,H,W) in [0,1], the confidence in each pixel.

    Returns:
        (B,C,H,W): `values` where known is 1, an interpolation elsewhere; 0 if nothing is known.
    """
    # In fp32 whatever autocast says: the weights of far-away pixels are tiny.
    known = known.float()
    weighted = values.float() * known
    count = level_count(*known.shape[-2:])
    levels = [(weighted, known)]
    for _ in range(count):
        # Sums over 2×2: one known pixel of four makes the coarse pixel known (Gortler, eq. 14).
        total = sum_of_four(known)
        known = total.clamp(max=1)
        weighted = sum_of_four(weighted) * (known / total.clamp(min=1e-6))
        levels.append((weighted, known))
    pulled = weighted / known.clamp(min=1e-6)
    for level in reversed(range(count)):
        weighted, known = levels[level]
        unknown = 1 - known
        pulled = weighted.addcmul(unknown, F.interpolate(pulled, size=known.shape[-2:], mode="bilinear"))
        for stride in STRIDES:
            pulled = pulled.lerp(torch.addcmul(weighted, unknown, sum_of_neighbours(pulled), value=0.25), stride)
    return pulled


def level_count(height, width):
    """Number of halvings until one pixel is left."""
    return (max(height, width) - 1).bit_length()


def sum_of_four(x):
    """(B,C,H,W) → (B,C,⌈H/2⌉,⌈W/2⌉), sums over 2×2 pixels."""
    return 4 * F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2)  # padding adds zeros: it counts for odd sides only


def sum_of_neighbours(x):
    """(B,C,H,W) → sums of each pixel's four neighbours; pixels at the border count as their own neighbours."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    pairs = x[..., :-1, 1:] + x[..., 1:, :-1]  # above and left of one pixel: right and below of another
    return pairs[..., :-1, :-1] + pairs[..., 1:, 1:]


def fill_hole(partial, mask):
    """Smooth push-pull fill of the hole. partial (B,3,H,W), mask (B,1,H,W; 1 = hole) → (B,3,H,W)."""
    return push_pull(partial, 1 - mask).clamp(0, 1)


def add_fill(partial, mask, completions, valid=None):
    """The candidates: number 0 is the fill of the hole, opaque everywhere; then come the completions.

    Args:
        partial (B,3,H,W) in [0,1]; mask (B,1,H,W), 1 = hole; completions (B,N,4,H,W), straight alpha; valid (B,N)
            bool, False = padded slot, whose content is ignored; None: all are real.

    Returns:
        candidates (B,M,4,H,W), M = N + 1, transparent in padded slots, and which of them are present, (B,M)
        bool: a fully transparent completion is absent, as a padded slot is.
    """
    if valid is None:
        valid = torch.ones(completions.shape[:2], dtype=torch.bool, device=completions.device)
    fill = torch.cat([fill_hole(partial, mask), torch.ones_like(mask)], 1)
    completions = completions.masked_fill(~valid[:, :, None, None, None], 0)
    present = valid & (completions[:, :, 3].amax((2, 3)) > 0)
    return torch.cat([fill[:, None], completions], 1), F.pad(present, (1, 0), value=True)


def composite(logits, candidates, partial, mask):
    """Weights of all candidates, and the fused image.

    Args:
        logits: (B,M,H,W); candidates: (B,M,4,H,W), the fill first; partial (B,3,H,W); mask (B,1,H,W), 1 = hole.

    Returns:
        dict of weights (B,N,H,W) and residual (B,1,H,W), the fill's weight, together 1; fused (B,3,H,W), which is
        `partial` outside the hole bit for bit.
    """
    weights = candidate_weights(logits, candidates[:, :, 3])  # (B,M,H,W)
    inside = (weights[:, :, None] * candidates[:, :, :3]).sum(1)
    return {"weights": weights[:, 1:], "residual": weights[:, :1], "fused": torch.where(mask > 0.5, inside, partial)}


def candidate_weights(logits, alpha):
    """Softmax over the candidates that cover a pixel. The weight that a transparent one cannot take goes to the others.

    With a = min(1, 4·alpha) and p = softmax(logits) among those with a > 0, candidate j leaves (1 − a_j)·p_j to the
    others, in proportion to their p: w_i = a_i·(p_i + Σ_{j≠i} (1 − a_j)·p_j·p_i / (1 − p_j)). The fill takes the rest.
    Where all alphas are 0 or 1 this is the softmax. No weight exceeds 4·alpha, so a faint edge of a completion stays
    faint whatever the logits are.

    Args:
        logits: (B,M,H,W); alpha: (B,M,H,W) in [0,1], the fill's, which comes first, 1 everywhere.

    Returns:
        (B,M,H,W) float32, non-negative, together 1.
    """
    logits, opacity = logits.float(), (OPAQUE * alpha.float()).clamp(max=1)
    absent = alpha <= 0
    p = logits.masked_fill(absent, ABSENT).softmax(1)
    # 1 − p loses all digits for p near 1. So the candidate with p > 1/2 is treated separately, with the softmax of the
    # others.
    best = p > 0.5
    without_best = logits.masked_fill(absent | best, ABSENT).softmax(1)
    left = (1 - opacity) * p
    left_by_best = left.masked_fill(~best, 0).sum(1, keepdim=True)  # (B,1,H,W)
    odds = (left / (1 - p).masked_fill(best, 1)).masked_fill(best, 0)
    weights = opacity * (p * (1 + odds.sum(1, keepdim=True) - odds) + left_by_best * without_best)
    return torch.cat([(1 - weights[:, 1:].sum(1, keepdim=True)).clamp(min=0), weights[:, 1:]], 1)


def paint_over(partial, mask, completions, valid, fill, order):
    """Paint completions over the fill, back to front.

    Args:
        partial, fill: (B,3,H,W) in [0,1]; mask (B,1,H,W), 1 = hole; completions (B,N,4,H,W); valid (B,N) bool.
        order: (B,K) long, different slots per scene, the last one in front; other slots are not painted.

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
