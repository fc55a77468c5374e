"""The simple rules to beat, and the oracle, the upper bound of all choices.

`batch` is the dict of tensors that the data sets return: partial (B,3,H,W) in [0,1], mask (B,1,H,W; 1 = hole),
completions (B,N,4,H,W; RGB + alpha in [0,1]), valid (B,N) bool, original (B,3,H,W); and the network's fill (B,3,H,W).
"""

import math

import torch
from torch import Tensor

from amodal_fusion.model.compositing import paint_over

RULES = ("fill", "mean", "over_given", "over_random", "over_area", "over_lowest", "visible_fit", "best_one",
         "best_three")
LEAST_MSE, LEAST_LPIPS = 1e-6, 1e-3  # limits of what an exact copy scores


def best_rule(row: dict[str, float]) -> str:
    """Name of the rule with the highest PSNR in one row of `evaluate_scene`."""
    return max(RULES, key=lambda rule: row[f"{rule}_psnr"])


def visible_error(batch: dict[str, Tensor]) -> Tensor:
    """Error of each completion against the photo where both are visible.

    Returns:
        (B,N): mean absolute difference over alpha·(1−mask), in [0,1]; 1 for a completion without visible pixels.
    """
    errors, areas = [], []
    for completion in batch["completions"].unbind(1):  # (B,4,H,W)
        visible = completion[:, 3:] * (1 - batch["mask"])
        difference = (completion[:, :3] - batch["partial"]).abs().mean(1, keepdim=True)
        errors.append((visible * difference).sum((1, 2, 3)))
        areas.append(visible.sum((1, 2, 3)))
    error, seen = torch.stack(errors, 1), torch.stack(areas, 1)
    return torch.where(seen >= 1, error / seen.clamp(min=1), 1.0)


def visible_score(batch: dict[str, Tensor], perceptual: torch.nn.Module | None = None) -> Tensor:
    """Agreement of each completion with the photo where both are visible: 1/MSE + 1/LPIPS (Heo and Cho 2026, CSF-Net).

    Args:
        perceptual: PerceptualLoss; None, or a picture under 32 px: 1/MSE alone.

    Returns:
        (B,N), at least 0; 0 for a completion without visible pixels, −1 for a padded slot.
    """
    partial, seen = batch["partial"], 1 - batch["mask"]
    scores = []
    for completion, valid in zip(batch["completions"].unbind(1), batch["valid"].unbind(1)):  # (B,4,H,W), (B,)
        visible = completion[:, 3:] * seen
        area = visible.sum((1, 2, 3))
        squared = (completion[:, :3] - partial).square().mean(1, keepdim=True)
        score = 1 / ((visible * squared).sum((1, 2, 3)) / area.clamp(min=1)).clamp(min=LEAST_MSE)
        if perceptual is not None and min(partial.shape[-2:]) >= 32:
            distance = perceptual(partial + visible * (completion[:, :3] - partial), partial)
            distance = distance * visible[0, 0].numel() / area.clamp(min=1)  # per visible pixel, as the MSE is
            score = score + 1 / distance.clamp(min=LEAST_LPIPS)
        scores.append(torch.where(valid, torch.where(area >= 1, score, 0.0), -1.0))
    return torch.stack(scores, 1)


def apply_rules(batch: dict[str, Tensor], seed: int = 0, rules: tuple[str, ...] = RULES,
                perceptual: torch.nn.Module | None = None) -> dict[str, Tensor]:
    """Fuse by each simple rule.

    Args:
        seed: for the random order; scenes of one batch get different orders.
        rules: which of RULES.
        perceptual: for `visible_score`.

    Returns:
        dict rule → (B,3,H,W). `fill` ignores the completions; `mean` is weighted by alpha; the `over_*` rules
        paint completions over the fill with the last, the first of a random order, the smallest, or the one
        that reaches lowest in the picture in front; `visible_fit` puts the one in front that agrees best with
        the visible photo; `best_one` uses only the completion with the highest `visible_score`; `best_three` takes
        each pixel from the best of three that has alpha > 0.5 there, without blending.
    """
    partial, mask, completions, valid, fill = (
        batch[name] for name in ("partial", "mask", "completions", "valid", "fill"))
    alpha = completions[:, :, 3] * valid[:, :, None, None]  # (B,N,H,W)
    fused = {}
    if "fill" in rules:
        fused["fill"] = torch.where(mask > 0.5, fill, partial)
    if "mean" in rules:
        total = alpha.sum(1, keepdim=True)  # (B,1,H,W)
        mean = (alpha[:, :, None] * completions[:, :, :3]).sum(1) / total.clamp(min=1e-6)
        cover = total.clamp(max=1)
        fused["mean"] = torch.where(mask > 0.5, cover * mean + (1 - cover) * fill, partial)

    # Each order is a score per completion; the highest score is painted last, in front.
    rows = torch.arange(alpha.shape[2], device=alpha.device, dtype=alpha.dtype)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "over_given": lambda: torch.arange(alpha.shape[1], device=alpha.device).expand(alpha.shape[:2]),
        "over_random": lambda: torch.rand(alpha.shape[:2], generator=generator).to(alpha.device),
        "over_area": lambda: -alpha.sum((2, 3)),
        "over_lowest": lambda: ((alpha.amax(3) > 0.5) * rows).amax(2),
        "visible_fit": lambda: -visible_error(batch),
    }
    for name, score in scores.items():
        if name in rules:
            fused[name] = paint_over(partial, mask, completions, valid, fill, score().argsort(dim=1, stable=True))
    if "best_one" in rules or "best_three" in rules:
        order = visible_score(batch, perceptual).argsort(dim=1, stable=True)
        hard = torch.cat([completions[:, :, :3], (completions[:, :, 3:] > 0.5).to(completions)], 2)
        for name, count, pictures in (("best_one", 1, completions), ("best_three", 3, hard)):
            if name in rules:
                fused[name] = paint_over(partial, mask, pictures, valid, fill, order[:, -count:])
    return fused


def oracle(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The best choice: at each pixel the candidate, or the fill, that is nearest to the original.

    No choice is better. A blend can be, for example at soft edges.

    Returns:
        fused (B,3,H,W) and choice (B,H,W) long: the winning slot, N for the fill.
    """
    completions, valid, fill, original = (batch[name] for name in ("completions", "valid", "fill", "original"))
    distances = [
        ((completion[:, :3] - original).square().sum(1)).masked_fill(
            (completion[:, 3] <= 0) | ~valid[:, i, None, None], math.inf
        )
        for i, completion in enumerate(completions.unbind(1))
    ]
    distances.append((fill - original).square().sum(1))
    choice = torch.stack(distances, 1).argmin(1)  # (B,H,W)
    colours = torch.cat([completions[:, :, :3], fill[:, None]], 1)  # (B,N+1,3,H,W)
    nearest = colours.gather(1, choice[:, None, None].expand(-1, 1, 3, -1, -1))[:, 0]
    return torch.where(batch["mask"] > 0.5, nearest, batch["partial"]), choice
