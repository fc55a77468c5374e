"""How good fused scenes are beside the simple rules, the oracle, and after an inpainter has had its turn."""

import csv
import math
import zlib
from itertools import pairwise

import cv2
import numpy as np
import torch

from fusion.figures import draw_bars
from fusion.files import atomic_file, write_text
from fusion.metrics import (
    RULES,
    apply_rules,
    gap_closed,
    oracle,
    overlap_region,
    region_l1,
    region_psnr,
    region_ssim,
)

METHODS = ("ours", *RULES, "oracle")
FIGURES = ("psnr", "psnr_overlap", "ssim", "l1", "lpips")
INPAINTERS = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}
GIVEN = ("hole", "visible_fit", "ours")  # what an inpainter is given
GROUPS = {
    "hole, share of the picture": ("hole", (0, 0.1, 0.25, 1.01)),
    "completions": ("completions", (1, 3, 5, 6, 1000)),
    "overlap, share of the hole": ("overlap", (0, 0.05, 0.25, 1.01)),
}


@torch.no_grad()
def score(scene_id, result, perceptual, downstream=False):
    """All figures of one fused scene, inside the hole.

    Args:
        result: tensors with a batch dimension of 1: partial, mask, completions, valid, original, weights, residual,
            fill, fused.
        perceptual: PerceptualLoss or None.
        downstream: also inpaint, given the bare hole, the visible-fit rule or our fusion.

    Returns:
        dict of scene, completions, hole (share of the picture), overlap (share of the hole), winner_accuracy (share of
        the overlap where our winner is the oracle's; nan without overlap), <method>_<figure>, and with `downstream`
        <inpainter>_<given>_<figure>.
    """
    inputs = [result[name] for name in ("partial", "mask", "completions", "valid")]
    original, mask, fill = result["original"], result["mask"], result["fill"]
    overlap = overlap_region(*inputs[1:])
    best, choice = oracle(*inputs, fill, original)
    images = {"ours": result["fused"], "oracle": best}
    images |= apply_rules(*inputs, fill, seed=zlib.crc32(scene_id.encode()))
    winner = torch.cat([result["weights"], result["residual"]], 1).argmax(1)
    agrees = (winner == choice)[overlap[:, 0] > 0].float()
    row = {"scene": scene_id, "completions": inputs[3].sum().item(), "hole": mask.mean().item(),
           "overlap": (overlap.sum() / mask.sum()).item(), "winner_accuracy": agrees.mean().item()}

    def figures(image):
        values = {"psnr": region_psnr(image, original, mask), "psnr_overlap": region_psnr(image, original, overlap),
                  "ssim": region_ssim(image, original, mask), "l1": region_l1(image, original, mask)}
        if perceptual is not None and min(mask.shape[-2:]) >= 32:
            values["lpips"] = perceptual(torch.where(mask > 0.5, image, original), original)
        return {name: value.item() for name, value in values.items()}

    for method in METHODS:
        row |= {f"{method}_{name}": value for name, value in figures(images[method]).items()}
    if downstream:
        bare = result["completions"][:, :, 3].amax(1, keepdim=True) <= 0.5  # nothing is painted there
        none_wins = (winner == len(result["weights"][0]))[:, None]
        todo = {"hole": mask > 0.5, "visible_fit": (mask > 0.5) & bare, "ours": (mask > 0.5) & none_wins}
        start = {"hole": result["partial"], "visible_fit": images["visible_fit"], "ours": result["fused"]}
        for name, method in INPAINTERS.items():
            for given in GIVEN:
                image = inpaint(start[given], todo[given], method)
                row |= {f"{name}_{given}_{figure}": value for figure, value in figures(image).items()}
    return row


def inpaint(image, region, method):
    """OpenCV's inpainting of `region` (1,1,H,W) bool of an image (1,3,H,W) in [0,1], the same shape."""
    picture = np.rint(image[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy() * 255).astype(np.uint8)
    done = cv2.inpaint(picture, region[0, 0].cpu().numpy().astype(np.uint8), 3, method)
    done = torch.from_numpy(done).permute(2, 0, 1)[None].to(image) / 255
    return torch.where(region, done, image)  # 8 bits only where it painted


def write_metrics(output_dir, rows):
    """Write metrics.csv (keeping scenes of earlier runs), summary.md and summary.png; returns the summary."""
    path = output_dir / "metrics.csv"
    table = {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            table = {row["scene"]: row for row in csv.DictReader(file)}
    table |= {row["scene"]: row for row in rows}
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(table[scene_id] for scene_id in sorted(table))
    numbers = {column: np.array([float(row.get(column) or "nan") for row in table.values()])
               for column in columns if column != "scene"}
    text = summarize(numbers)
    write_text(output_dir / "summary.md", text)
    draw_bars(output_dir / "summary.png", {
        title: {method: mean_and_interval(numbers[f"{method}_{figure}"]) for method in METHODS}
        for figure, title in (("psnr", "PSNR in the hole, dB"), ("psnr_overlap", "PSNR in the overlap, dB"))})
    return text


def mean_and_interval(values, draws=1000):
    """Mean, and the 2.5 and 97.5 percentiles of the mean under resampling of scenes (bootstrap); nan left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan, math.nan
    resampled = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return values.mean(), *np.percentile(resampled, [2.5, 97.5])


def _mean(values):
    known = values[~np.isnan(values)]
    return known.mean() if len(known) else math.nan


def summarize(numbers):
    """Markdown report of the columns of metrics.csv."""
    count = len(numbers["hole"])
    lines = [f"Means over {count} scenes, inside the hole, with 95 % bootstrap intervals for PSNR (dB). Overlap: where "
             "two completions meet.", "",
             "| method | PSNR | PSNR overlap | SSIM | L1 | LPIPS |", "|---|---|---|---|---|---|"]
    empty = np.full(count, math.nan)
    for method in METHODS:
        cells = []
        for figure in FIGURES:
            mean, low, high = mean_and_interval(numbers.get(f"{method}_{figure}", empty))
            cells.append(f"{mean:.2f} ({low:.2f} – {high:.2f})" if "psnr" in figure else f"{mean:.4f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    for figure, where in (("psnr", "in the hole"), ("psnr_overlap", "in the overlap")):
        means = {method: _mean(numbers[f"{method}_{figure}"]) for method in METHODS}
        best = max(RULES, key=means.get)
        gap = gap_closed(means["ours"], means[best], means["oracle"])
        lines += ["", f"Gap closed {where}, from the best rule ({best}) to the oracle: {gap:.2f}"]
    lines += ["", f"Winner is the oracle's at {_mean(numbers['winner_accuracy']):.0%} of the overlap."]
    if "telea_ours_psnr" in numbers:
        lines += ["", "| inpainter | given | PSNR | LPIPS |", "|---|---|---|---|"]
        for name in INPAINTERS:
            for given in GIVEN:
                psnr, lpips = (_mean(numbers.get(f"{name}_{given}_{figure}", empty)) for figure in ("psnr", "lpips"))
                lines.append(f"| {name} | {given} | {psnr:.2f} | {lpips:.4f} |")
    for title, (column, edges) in GROUPS.items():
        lines += ["", f"| {title} | scenes | ours | best rule | oracle | gap closed |", "|---|---|---|---|---|---|"]
        for low, high in pairwise(edges):
            inside = (numbers[column] >= low) & (numbers[column] < high)
            if inside.any():
                means = {method: _mean(numbers[f"{method}_psnr"][inside]) for method in METHODS}
                best = max(RULES, key=means.get)
                gap = gap_closed(means["ours"], means[best], means["oracle"])
                lines.append(f"| {low:g} ≤ … < {high:g} | {inside.sum()} | {means['ours']:.2f} | {means[best]:.2f} "
                             f"({best}) | {means['oracle']:.2f} | {gap:.2f} |")
    return "\n".join(lines) + "\n"
