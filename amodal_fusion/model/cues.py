"""What the visible photo says about the candidates: which of them fit, and which is in front of which.

Candidate 0 is always the fill of the hole. It meets no other candidate in plain view, so it has no cues about order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from amodal_fusion.model.compositing import push_pull

STRIDE = 4  # cues live on a grid four times coarser than the picture
TYPICAL_ERROR = 0.04  # mean absolute colour difference, in [0,1], of a completion that was redrawn
EXACT_ERROR = 0.01  # the same, of a completion that copies the photo
HALF_BELIEVED = 1e-3  # share of the picture that must be seen for an error to count as much as a typical one
COPY_SHARE = 0.15  # share of a completion's visible pixels that must be exact to half prove it a copy
NEGLIGIBLE_OUTSIDE = 0.02  # share of a shape outside another one that still counts as inside
LEAST_ERROR, LEAST_SHARE = 1e-4, 1e-6  # lower bounds under logarithms and quotients


class VisibleCues(NamedTuple):
    """Six cues per candidate, each (B,M,H/4,W/4); larger is better, or more certain.

    Their order is that of the input channels of `ConvEncoder.embed_cues`: trained weights depend on it.
    """

    local_fit: torch.Tensor  # minus log error against the photo, carried smoothly into the hole
    overall_fit: torch.Tensor  # minus log of the mean error over the picture, alike everywhere
    order: torch.Tensor  # log ratio of errors where rivals meet in plain view, over the rivals at this pixel
    containment: torch.Tensor  # log ratio of the shares of their shapes outside each other, over the same
    visible: torch.Tensor  # log share of the picture in which it explains the photo, alike everywhere
    copied: torch.Tensor  # 0 … 1, confidence that it copies the photo, alike everywhere; the fill: mean of those here


def photometric_error(candidates, photo, mask):
    """Colour difference between candidates and photo where both can be seen.

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

    A plate is not wrong where food hides it: its error counts only where no other candidate fits better.
    """
    fit = visible * (-pixel_error / TYPICAL_ERROR).exp()
    total = fit[:, 1:].sum(1, keepdim=True).clamp(min=LEAST_SHARE)
    return torch.cat([fit[:, :1], fit[:, 1:] / total], 1).clamp(max=1)


def pair_error(error, visible):
    """Log error of each completion where it meets another one in plain view, (B,N,N): the row's, beside the column.

    Where two completions overlap in the photo the one behind differs from it: the clearest sign of their order.
    """
    error, visible = error[:, 1:].flatten(2), visible[:, 1:].flatten(2)  # (B,N,P)
    prior = HALF_BELIEVED / 10 * error.shape[2]
    return ((error @ visible.mT + prior * TYPICAL_ERROR) / (visible @ visible.mT + prior)).log()


def outside_fraction(alpha):
    """Log share of each completion's shape that lies outside another one's, (B,N,N): the row's, outside the column's.

    What lies within another one's shape is in front of it: behind it, it could not have been seen and completed.
    """
    alpha = alpha[:, 1:].flatten(2)  # (B,N,P)
    outside = 1 - alpha @ alpha.mT / alpha.sum(2, keepdim=True).clamp(min=1e-3)
    return (outside + NEGLIGIBLE_OUTSIDE).log()


def over_rivals(log_handicap, alpha):
    """Pairwise handicaps (B,N,N) → what each candidate has on all its rivals at a pixel, (B,M,h,w); 0 for the fill."""
    advantage = log_handicap.mT - log_handicap
    return F.pad(advantage @ alpha[:, 1:].flatten(2), (0, 0, 1, 0)).view_as(alpha)


def copy_share(pixel_error, believed, seen, alpha):
    """Confidence that each candidate copies the photo, from the share of its visible pixels that is exact, (B,M,h,w).

    Of a scaled copy only a part is exact. The fill takes the mean of the completions at a pixel.
    """
    exact = (believed * (-pixel_error / EXACT_ERROR).exp()).mean((2, 3), keepdim=True)
    exact = (exact + HALF_BELIEVED / 4) / (seen + HALF_BELIEVED)  # (B,M,1,1)
    copied = (exact.square() / (exact.square() + COPY_SHARE**2))[:, 1:].expand_as(alpha[:, 1:])
    present = alpha[:, 1:] + 1e-3 * alpha[:, 1:].mean((2, 3), keepdim=True)  # where no completion is, the mean of all
    mean = (copied * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1e-9)
    return torch.cat([mean, copied], 1)
