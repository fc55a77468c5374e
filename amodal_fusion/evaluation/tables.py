"""Means, intervals and tables over many scored scenes: metrics.csv, summary.md and summary.png."""

import csv
import math
import re
from array import array
from itertools import pairwise

import numpy as np

from amodal_fusion.evaluation.figures import draw_bars
from amodal_fusion.evaluation.inpainters import GIVEN
from amodal_fusion.evaluation.metrics import gap_closed
from amodal_fusion.evaluation.rules import RULES
from amodal_fusion.files import atomic_file, plain_cell, write_text

METHODS = ("ours", *RULES, "oracle")
METRICS = {"psnr": "PSNR", "psnr_overlap": "PSNR overlap", "ssim": "SSIM", "l1": "L1", "lpips": "LPIPS",
           "undecided": "undecided"}
INPAINTED = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "psnr_whole": "PSNR, whole", "ssim_whole": "SSIM, whole",
             "lpips_whole": "LPIPS, whole", "clip": "CLIP", "fid": "FID"}  # metrics of what an inpainter returned
INPAINTER = re.compile(rf"(.+)_({'|'.join(GIVEN)})_psnr")
LEAST_PHOTOS = 5  # fewer are too few for an interval
GROUPS = {
    "hole, share of the picture": ("hole", (0, 0.1, 0.25, 1.01)),
    "completions": ("completions", (1, 3, 5, 6, 1000)),
    "overlap, share of the hole": ("overlap", (0, 0.05, 0.25, 1.01)),
}


def write_metrics(output_dir, rows, of_sets=dict):
    """Write metrics.csv, summary.md and summary.png.

    Args:
        rows: iterable of the dicts of `evaluate_scene`; 100,000 take about 250 MB.
        of_sets: called after the last row; returns metrics of all scenes together, column → number, as FID is.

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
    intervals |= {column: (value, math.nan, math.nan) for column, value in of_sets().items()}
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
    known = not np.isnan(resampled).all()  # False without samples, too
    return np.nanpercentile(resampled, [2.5, 97.5], 0) if known else np.full((2, resampled.shape[1]), math.nan)


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
            lines += ["", f"Gap closed {where}, from the best rule ({best}) to the oracle: "
                          + ("– (the rule is better: blending at soft edges can beat one choice per pixel)"
                             if math.isnan(gap[0]) else _cell("psnr", gap))]
    if "winner_accuracy" in table:
        lines += ["", f"Winner is the oracle's at {intervals['winner_accuracy'][0]:.0%} of the overlap."]
    lines += _inpainted(table, intervals, photo)
    for title, (column, edges) in GROUPS.items():
        lines += ["", *_header(title, "scenes", "ours", "best rule", "oracle", "gap closed")]
        for low, high in pairwise(edges):
            inside = (table[column] >= low) & (table[column] < high)
            if inside.any():
                means = {method: table[f"{method}_psnr"][inside].mean() for method in METHODS}
                best, gap = _best_rule_and_gap(means)
                lines.append(_row(f"{low:g} ≤ … < {high:g}", inside.sum(), f"{means['ours']:.2f}",
                                  f"{means[best]:.2f} ({best})", f"{means['oracle']:.2f}",
                                  "–" if math.isnan(gap) else f"{gap:.2f}"))
    return "\n".join(lines) + "\n"


def _inpainted(table, intervals, photo):
    """Lines about what each inpainter made of what it was given, and of the guide less of the bare hole."""
    names = list(dict.fromkeys(match[1] for match in map(INPAINTER.fullmatch, table) if match))
    if not names:
        return []
    pairs = [(name, given) for name in names for given in GIVEN if f"{name}_{given}_psnr" in table]
    metrics = [m for m in INPAINTED if any(f"{name}_{given}_{m}" in intervals for name, given in pairs)]
    lines = ["", *_header("inpainter", "given", *(INPAINTED[metric] for metric in metrics))]
    lines += [_row(name, given, *(_cell(m, intervals.get(f"{name}_{given}_{m}"), True) for m in metrics))
              for name, given in pairs]
    gains = {(name, given, m): table[f"{name}_{given}_{m}"] - table[f"{name}_hole_{m}"] for name, given in pairs
             for m in metrics if given != "hole" and {f"{name}_hole_{m}", f"{name}_{given}_{m}"} <= set(table)}
    if gains:
        gains = mean_and_interval(gains, photo)
        lines += ["", *_header("inpainter", "less the bare hole", *(INPAINTED[metric] for metric in metrics))]
        lines += [_row(*pair, *(_cell(m, gains.get((*pair, m)), True) for m in metrics))
                  for pair in dict.fromkeys(key[:2] for key in gains)]
    return lines


def _best_rule_and_gap(means):
    """The best rule's name, and the share of its gap to the oracle that ours closes; means: method → dB."""
    best = max(RULES, key=means.get)
    return best, gap_closed(means["ours"], means[best], means["oracle"])


def _cell(metric, interval, always=False):
    """A mean, with its interval for PSNR, or `always`."""
    if interval is None:
        return ""
    mean, low, high = interval
    digits = 2 if metric == "fid" or "psnr" in metric else 4
    if math.isnan(low) or not ("psnr" in metric or always):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def _header(*titles):
    return [_row(*titles), "|" + "---|" * len(titles)]


def _row(*cells):
    return f"| {' | '.join(map(str, cells))} |"
