"""Cues from the visible photo: which candidates fit it, and which of two is in front.

Candidate 0 is the fill of the hole. It overlaps no other candidate outside the hole, so it has no cues about order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from amodal_fusion.model.compositing import push_pull

STRIDE = 4  # cues have a quarter of the picture's resolution
TYPICAL_ERROR = 0.04  # mean absolute colour difference in [0,1] of a redrawn completion
EXACT_ERROR = 0.01  # the same for a completion that copies the photo
HALF_BELIEVED = 1e-3  # visible share of the picture at which a measured error weighs as much as the typical one
COPY_SHARE = 0.15  # share of exact visible pixels at which the confidence in a copy is a half
NEGLIGIBLE_OUTSIDE = 0.02  # a shape counts as inside another one with at most this share outside
LEAST_ERROR, LEAST_SHARE = 1e-4, 1e-6  # lower bounds under logarithms and quotients


class VisibleCues(NamedTuple):
    """Six cues per candidate, each (B,M,H/4,W/4); larger is better, or more certain.

    Their order is that of the input channels of `ConvEncoder.embed_cues`: trained weights depend on it.
    """

    local_fit: torch.Tensor  # minus log error against the photo, carried smoothly into the hole
    overall_fit: torch.Tensor  # minus log of the mean error over the picture, constant
    order: torch.Tensor  # log ratio of errors where rivals overlap outside the hole, over the rivals at this pixel
    containment: torch.Tensor  # log ratio of the shares of shapes outside each other, over the rivals here
    visible: torch.Tensor  # log share of the picture where it explains the photo, constant
    copied: torch.Tensor  # 0 … 1, confidence that it copies the photo, constant; fill: mean of the others at this pixel


def photometric_error(candidates, photo, mask):
    """Colour difference between candidates and photo where both are visible.

    Args:
        candidates: (B,M,4,H,W) in [0,1]; photo: (B,3,H,W); mask: (B,1,H,W), 1 = hole.

    Returns:
        error: (B,M,1,H,W) in [0,1], mean absolute difference times visibility.
        visible: (B,M,1,H,W) in [0,1], alpha outside the hole.
    """
    rgb, alpha = candidates.split([3, 1], 2)
    visible = alpha * (1 - mask)[:, None]
    return visible * (rgb - photo[:, None]).abs().mean(2, keepdim=True), visible


def visible_cues(error, visible, alpha):
    """All cues of all candidates.

    Args:
        error, visible: (B,M,1,H,W), see `photometric_error`; alpha: (B,M,1,H,W); sides multiples of 4, the fill first.

    Returns:
        VisibleCues, always float32: ratios of small errors need all digits.
    """
    with torch.autocast(alpha.device.type, enabled=False):
        parts = torch.cat([error, visible, alpha], 2).float()
        parts = F.avg_pool2d(parts.flatten(0, 1), STRIDE).unflatten(0, parts.shape[:2])  # (B,M,3,H/4,W/4)
        error, visible, alpha = parts.unbind(2)  # (B,M,h,w)
        pixel_error = error / visible.clamp(min=LEAST_SHARE)
        believed = visible * responsibility(pixel_error, visible)
        seen = believed.mean((2, 3), keepdim=True)  # (B,M,1,1)
        overall = (pixel_error * believed).mean((2, 3), keepdim=True) + HALF_BELIEVED * TYPICAL_ERROR
        overall = overall / (seen + HALF_BELIEVED)
        local = push_pull(pixel_error.flatten(0, 1)[:, None], believed.flatten(0, 1)[:, None]).view_as(error)
        local = (seen * local + HALF_BELIEVED * overall) / (seen + HALF_BELIEVED)
        return VisibleCues(
            local_fit=-local.clamp(min=LEAST_ERROR).log(),
            overall_fit=-overall.log().expand_as(alpha),
            order=over_rivals(pair_error(error, visible), alpha),
            containment=over_rivals(outside_fraction(alpha), alpha),
            visible=seen.clamp(min=LEAST_ERROR).log().expand_as(alpha),
            copied=copy_share(pixel_error, believed, seen, alpha),
        )


def responsibility(pixel_error, visible):
    """Share of the photo at each pixel that a candidate explains, (B,M,h,w) in [0,1].

    A plate is not wrong where food hides it, so its error counts only where no other candidate fits better.
    """
    fit = visible * (-pixel_error / TYPICAL_ERROR).exp()
    total = fit[:, 1:].sum(1, keepdim=True).clamp(min=LEAST_SHARE)
    return torch.cat([fit[:, :1], fit[:, 1:] / total], 1).clamp(max=1)


def pair_error(error, visible):
    """Log error of each completion (row) where it overlaps another one (column) outside the hole, (B,N,N).

    There the one behind differs from the photo: the clearest sign of their order.
    """
    error, visible = error[:, 1:].flatten(2), visible[:, 1:].flatten(2)  # (B,N,P)
    prior = HALF_BELIEVED / 10 * error.shape[2]
    return ((error @ visible.mT + prior * TYPICAL_ERROR) / (visible @ visible.mT + prior)).log()


def outside_fraction(alpha):
    """Log share of each completion's shape (row) that lies outside another one's (column), (B,N,N).

    A shape within another one is in front of it: behind it, it could not have been seen and completed.
    """
    alpha = alpha[:, 1:].flatten(2)  # (B,N,P)
    outside = 1 - alpha @ alpha.mT / alpha.sum(2, keepdim=True).clamp(min=1e-3)
    return (outside + NEGLIGIBLE_OUTSIDE).log()


def over_rivals(log_handicap, alpha):
    """Pairwise log handicaps (B,N,N) → advantage of each candidate over its rivals at a pixel, (B,M,h,w); fill: 0."""
    advantage = log_handicap.mT - log_handicap
    return F.pad(advantage @ alpha[:, 1:].flatten(2), (0, 0, 1, 0)).view_as(alpha)


def copy_share(pixel_error, believed, seen, alpha):
    """Confidence that each candidate copies the photo, from the share of its visible pixels that is exact, (B,M,h,w).

    A scaled copy is exact only in part. The fill gets the mean of the completions at a pixel.
    """
    exact = (believed * (-pixel_error / EXACT_ERROR).exp()).mean((2, 3), keepdim=True)
    exact = (exact + HALF_BELIEVED / 4) / (seen + HALF_BELIEVED)  # (B,M,1,1)
    copied = (exact.square() / (exact.square() + COPY_SHARE**2))[:, 1:].expand_as(alpha[:, 1:])
    present = alpha[:, 1:] + 1e-3 * alpha[:, 1:].mean((2, 3), keepdim=True)  # without completions here: the mean
    mean = (copied * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1e-9)
    return torch.cat([mean, copied], 1)
