"""Means, intervals and tables over many scored scenes: metrics.csv, summary.md and summary.png."""

import csv
import math
from array import array
from itertools import pairwise

import numpy as np

from amodal_fusion.evaluation.figures import draw_bars
from amodal_fusion.evaluation.inpainters import GIVEN, INPAINTERS
from amodal_fusion.evaluation.metrics import gap_closed
from amodal_fusion.evaluation.rules import RULES
from amodal_fusion.files import atomic_file, plain_cell, write_text

METHODS = ("ours", *RULES, "oracle")
METRICS = {"psnr": "PSNR", "psnr_overlap": "PSNR overlap", "ssim": "SSIM", "l1": "L1", "lpips": "LPIPS",
           "undecided": "undecided"}
LEAST_PHOTOS = 5  # fewer are too few for an interval
GROUPS = {
    "hole, share of the picture": ("hole", (0, 0.1, 0.25, 1.01)),
    "completions": ("completions", (1, 3, 5, 6, 1000)),
    "overlap, share of the hole": ("overlap", (0, 0.05, 0.25, 1.01)),
}


def write_metrics(output_dir, rows):
    """Write metrics.csv, summary.md and summary.png.

    Args:
        rows: iterable of the dicts of `evaluate_scene`; 100,000 take about 250 MB.

    Returns:
        the summary; None without rows.
    """
    scenes, photos, columns = [], {}, {}
    for row in rows:
        for column, value in row.items():
            if column not in ("scene", "photo"):
                numbers = columns.setdefault(column, array("d"))
                numbers.extend([math.nan] * (len(scenes) - len(numbers)))  # earlier scenes had no such column
                numbers.append(math.nan if value is None else value)
        scenes.append((row["scene"], photos.setdefault(row["photo"], len(photos))))
    if not scenes:
        return None
    table = {}
    for column, given in columns.items():
        numbers = np.full(len(scenes), math.nan)
        numbers[: len(given)] = given
        if not np.isnan(numbers).all():
            table[column] = numbers
    names = list(photos)
    order = sorted(range(len(scenes)), key=lambda i: scenes[i])
    with atomic_file(output_dir / "metrics.csv", owned=True) as temporary, \
            open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["scene", "photo", *table])
        for i in order:
            cells = ("" if math.isnan(numbers[i]) else f"{numbers[i]:.6g}" for numbers in table.values())
            writer.writerow([plain_cell(scenes[i][0]), plain_cell(names[scenes[i][1]]), *cells])
    photo = np.array([photo for _, photo in scenes])
    intervals = mean_and_interval(table, photo)
    text = summarize(table, intervals, photo)
    write_text(output_dir / "summary.md", text, owned=True)
    draw_bars(output_dir / "summary.png", {
        title: {method: intervals[f"{method}_{metric}"] for method in METHODS if f"{method}_{metric}" in intervals}
        for metric, title in (("psnr", "PSNR in the hole, dB"), ("psnr_overlap", "PSNR in the overlap, dB"))
        if f"ours_{metric}" in intervals})
    return text


def mean_and_interval(table, photo, draws=1000):
    """Means over scenes, with 95 % intervals by resampling photos (bootstrap).

    Scenes of one photo are not independent; treated as independent, they would give too narrow intervals.

    Args:
        table: column → (S,) numbers, one per scene; nan is ignored.
        photo: (S,) which photo each scene was cut from, 0, 1, …

    Returns:
        column → (mean, 2.5 percentile, 97.5 percentile); the last two are nan with fewer than LEAST_PHOTOS.
    """
    means, resampled = bootstrap(np.stack(list(table.values()), 1), photo, draws)
    return dict(zip(table, zip(means, *_percentiles(resampled))))


def gap_with_interval(table, photo, metric):
    """The best rule's name, and the share of its gap to the oracle that ours closes, with its 95 % interval.

    Every sample of photos is compared with the rule that is best for all photos.

    Args:
        table, photo: as in `mean_and_interval`; metric: "psnr" or "psnr_overlap".
    """
    means, resampled = bootstrap(np.stack([table[f"{method}_{metric}"] for method in METHODS], 1), photo)
    best, gap = _best_rule_and_gap(dict(zip(METHODS, means)))
    columns = [METHODS.index(method) for method in ("ours", best, "oracle")]
    gaps = np.array([[gap_closed(*sample[columns])] for sample in resampled]).reshape(-1, 1)
    return best, (gap, *(bound[0] for bound in _percentiles(gaps)))


def bootstrap(columns, photo, draws=1000):
    """Means of `columns` (S,C) over scenes, (C,), and of resampled photos, (D,C); D = 0 with too few photos."""
    known = ~np.isnan(columns)
    count = photo.max() + 1
    sums, counts = np.zeros((2, count, columns.shape[1]))
    np.add.at(sums, photo, np.where(known, columns, 0))
    np.add.at(counts, photo, known)
    rng, resampled = np.random.default_rng(0), [np.empty((0, columns.shape[1]))]
    for _ in range(draws // 50 if count >= LEAST_PHOTOS else 0):
        times = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(50)]) * 1.0
        with np.errstate(invalid="ignore"):
            resampled.append(times @ sums / (times @ counts))  # (50,C), the same photos for all columns
    return sums.sum(0) / counts.sum(0), np.concatenate(resampled)


def _percentiles(resampled):
    """The 2.5th and 97.5th of samples (D,C), (C,) each; nan without any."""
    return np.nanpercentile(resampled, [2.5, 97.5], 0) if len(resampled) else np.full((2, resampled.shape[1]), math.nan)


def summarize(table, intervals, photo):
    """Markdown report of the columns of metrics.csv; columns without values are left out."""
    photos = f"{photo.max() + 1} photo{'s' if photo.max() else ''}"
    intervals_are = ("with 95 % bootstrap intervals over photos for PSNR (dB)" if photo.max() + 1 >= LEAST_PHOTOS else
                     f"PSNR in dB; fewer than {LEAST_PHOTOS} photos are too few for an interval")
    lines = [f"Means over {len(photo)} scenes cut from {photos}, inside the hole, {intervals_are}. "
             "Overlap: where two completions lie. Undecided: share of the hole where no weight, that of the fill "
             "included, reaches 0.8.", ""]
    metrics = [metric for metric in METRICS if f"ours_{metric}" in table]
    lines += _header("method", *(METRICS[metric] for metric in metrics))
    for method in METHODS:
        lines.append(_row(method, *(_cell(metric, intervals.get(f"{method}_{metric}")) for metric in metrics)))
    for metric, where in (("psnr", "in the hole"), ("psnr_overlap", "in the overlap")):
        if metric in metrics:
            best, gap = gap_with_interval(table, photo, metric)
            lines += ["", f"Gap closed {where}, from the best rule ({best}) to the oracle: {_cell('psnr', gap)}"]
    if "winner_accuracy" in table:
        lines += ["", f"Winner is the oracle's at {intervals['winner_accuracy'][0]:.0%} of the overlap."]
    if "telea_ours_psnr" in table:
        metrics = [metric for metric in ("psnr", "lpips") if f"telea_ours_{metric}" in table]
        lines += ["", *_header("inpainter", "given", *(METRICS[metric] for metric in metrics))]
        for name in INPAINTERS:
            for given in GIVEN if f"{name}_ours_psnr" in table else ():
                lines.append(_row(name, given, *(_cell(m, intervals.get(f"{name}_{given}_{m}")) for m in metrics)))
    for title, (column, edges) in GROUPS.items():
        lines += ["", *_header(title, "scenes", "ours", "best rule", "oracle", "gap closed")]
        for low, high in pairwise(edges):
            inside = (table[column] >= low) & (table[column] < high)
            if inside.any():
                means = {method: table[f"{method}_psnr"][inside].mean() for method in METHODS}
                best, gap = _best_rule_and_gap(means)
                lines.append(_row(f"{low:g} ≤ … < {high:g}", inside.sum(), f"{means['ours']:.2f}",
                                  f"{means[best]:.2f} ({best})", f"{means['oracle']:.2f}", f"{gap:.2f}"))
    return "\n".join(lines) + "\n"


def _best_rule_and_gap(means):
    """The best rule's name, and the share of its gap to the oracle that ours closes; means: method → dB."""
    best = max(RULES, key=means.get)
    return best, gap_closed(means["ours"], means[best], means["oracle"])


def _cell(metric, interval):
    if interval is None:
        return ""
    mean, low, high = interval
    if "psnr" not in metric:
        return f"{mean:.4f}"
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} ({low:.2f} – {high:.2f})"


def _header(*titles):
    return [_row(*titles), "|" + "---|" * len(titles)]


def _row(*cells):
    return f"| {' | '.join(map(str, cells))} |"
