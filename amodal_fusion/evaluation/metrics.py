"""Metrics of fused images inside the hole.

`batch` is the dict of tensors that the data sets return: partial (B,3,H,W) in [0,1], mask (B,1,H,W; 1 = hole),
completions (B,N,4,H,W; RGB + alpha in [0,1]), valid (B,N) bool, original (B,3,H,W); and the network's fill (B,3,H,W).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounding to 8 bits alone gives 59 dB. Without a limit one pixel of a nearly exact copy would change the mean over a
# hundred scenes by half a decibel.
MOST_PSNR = 60.0
DECIDED = 0.8  # weight from which a pixel counts as decided


def overlap_region(batch: dict[str, Tensor]) -> Tensor:
    """(B,1,H,W) in {0,1}: inside the hole where at least two completions have alpha > 0.5."""
    covers = (batch["completions"][:, :, 3] > 0.5) & batch["valid"][:, :, None, None]
    return batch["mask"] * (covers.sum(1, keepdim=True) >= 2)


def compare_methods(batch: dict[str, Tensor], images: dict[str, Tensor]) -> dict[str, Tensor]:
    """PSNR of each method in the hole and in the overlap.

    Args:
        images: method → (B,3,H,W).

    Returns:
        dict of <method>_psnr and <method>_psnr_overlap, (B,) each; nan where a scene has no overlap.
    """
    regions = {"psnr": batch["mask"], "psnr_overlap": overlap_region(batch)}
    return {f"{method}_{metric}": region_psnr(image, batch["original"], region)
            for method, image in images.items() for metric, region in regions.items()}


def undecided_share(batch: dict[str, Tensor]) -> Tensor:
    """Share of the hole where no candidate, `residual` included, has a weight of 0.8, per scene, (B,)."""
    largest = torch.maximum(batch["weights"].amax(1, keepdim=True), batch["residual"])
    return ((largest < DECIDED) * batch["mask"]).sum((1, 2, 3)) / batch["mask"].sum((1, 2, 3))


def region_psnr(fused: Tensor, original: Tensor, region: Tensor) -> Tensor:
    """PSNR in dB over `region` (B,1,H,W) per scene, (B,); nan where the region is empty; `MOST_PSNR` at most."""
    squared = ((fused - original).square() * region).sum((1, 2, 3)) / (3 * region.sum((1, 2, 3)))
    return -10 * squared.clamp(min=10 ** (-MOST_PSNR / 10)).log10()


def region_l1(fused: Tensor, original: Tensor, region: Tensor) -> Tensor:
    """Mean absolute error over `region` (B,1,H,W) per scene, (B,), in [0,1]; nan where the region is empty."""
    return ((fused - original).abs() * region).sum((1, 2, 3)) / (3 * region.sum((1, 2, 3)))


def region_ssim(fused: Tensor, original: Tensor, region: Tensor) -> Tensor:
    """Mean SSIM over `region` per scene, (B,), (Wang et al. 2004; Gaussian window 11, sigma 1.5, data range 1)."""
    x = torch.arange(11, device=fused.device, dtype=fused.dtype) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = window / window.sum()

    def smooth(image):
        channels = image.shape[1]
        image = F.pad(image, (5, 5, 5, 5), mode="replicate")
        image = F.conv2d(image, window.view(1, 1, 1, 11).expand(channels, -1, -1, -1), groups=channels)
        return F.conv2d(image, window.view(1, 1, 11, 1).expand(channels, -1, -1, -1), groups=channels)

    mean_f, mean_o = smooth(fused), smooth(original)
    var_f = smooth(fused.square()) - mean_f.square()
    var_o = smooth(original.square()) - mean_o.square()
    covariance = smooth(fused * original) - mean_f * mean_o
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_f * mean_o + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_f.square() + mean_o.square() + c1) * (var_f + var_o + c2))
    return (similarity * region).sum((1, 2, 3)) / (3 * region.sum((1, 2, 3)))


def gap_closed(ours: float, best_rule: float, upper_bound: float) -> float:
    """Share of the way from the best rule to the oracle, (ours − best rule) / (oracle − best rule), in dB."""
    gap = upper_bound - best_rule
    return (ours - best_rule) / gap if gap > 0 else math.nan
