"""Pictures of scenes, weights and training curves. Figures are made without pyplot: no display, no leak."""

import json
import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from fusion.images import atomic_file

# one colour per candidate in winner maps; the last, grey, is "none of these"
WINNER_COLOURS = colormaps["tab20"].colors
NONE_COLOUR = (0.5, 0.5, 0.5)


def save_figure(figure, path, dpi=100):
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight")


def on_checkerboard(completion):
    """RGBA (H,W,4) in [0,1] over a grey checkerboard, (H,W,3)."""
    height, width = completion.shape[:2]
    cell = max(4, max(height, width) // 32)
    y, x = np.mgrid[:height, :width] // cell
    board = np.where((y + x) % 2, 0.85, 0.7)[..., None]
    return completion[..., :3] * completion[..., 3:] + board * (1 - completion[..., 3:])


def winner_map(weights, residual):
    """Colour of the candidate with the largest weight, (H,W,3); grey where the residual wins."""
    winner = np.concatenate([weights, residual[None]]).argmax(0)
    colours = [WINNER_COLOURS[i % len(WINNER_COLOURS)] for i in range(len(weights))]
    return np.array([*colours, NONE_COLOUR])[winner]


def scene_panels(scene):
    """Titled pictures of one fused scene, in reading order.

    Args:
        scene: dict of float arrays in [0,1]: partial, fused (H,W,3), mask, residual (H,W), completions (N,H,W,4),
            weights (N,H,W), and perhaps original (H,W,3).

    Returns:
        list of (title, picture, colour map or None).
    """
    inside = scene["mask"]
    panels = [("partial", scene["partial"], None), ("mask", inside, "gray")]
    panels += [(f"comp{i}", on_checkerboard(c), None) for i, c in enumerate(scene["completions"], 1)]
    panels += [(f"weight {i}", weight * inside, "magma") for i, weight in enumerate(scene["weights"], 1)]
    panels.append(("weight of none", scene["residual"] * inside, "magma"))
    winners = winner_map(scene["weights"], scene["residual"])
    panels.append(("winner (grey: none)", np.where(inside[..., None] > 0.5, winners, 1), None))
    panels.append(("fused", scene["fused"], None))
    if "original" in scene:
        panels.append(("original", scene["original"], None))
        error = np.abs(scene["fused"] - scene["original"]).mean(2)
        panels.append((f"error in the hole, mean {error[inside > 0.5].mean():.3f}", error * inside, "inferno"))
    return panels


def _show(axes, title, picture, cmap):
    axes.imshow(np.clip(picture, 0, 1), cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def draw_scene(path, scene, title=""):
    """One scene over several rows, as written beside every fused image. `scene` as in `scene_panels`."""
    panels = scene_panels(scene)
    columns = min(6, math.ceil(len(panels) / 2))
    rows = math.ceil(len(panels) / columns)
    height, width = scene["mask"].shape
    figure = Figure(figsize=(2 * columns, rows * (2 * height / width + 0.25)))
    for position, panel in enumerate(panels, 1):
        _show(figure.add_subplot(rows, columns, position), *panel)
    figure.tight_layout(pad=0.3)
    figure.suptitle(title, fontsize=9, y=1, va="bottom")  # above the panels' own titles; saving crops to all of it
    save_figure(figure, path)


def draw_scenes(path, scenes, titles):
    """One scene per row: partial, completions, winner map, fused, original. `scenes` as in `scene_panels`."""
    wanted = ("partial", "comp", "winner", "fused", "original")
    rows = [[panel for panel in scene_panels(scene) if panel[0].startswith(wanted)] for scene in scenes]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.6 * columns, 2 * len(rows)))
    for number, (row, title) in enumerate(zip(rows, titles)):
        # the shared panels stand right-aligned, below each other, whatever the number of completions
        places = [0, *range(1, len(row) - 3), *range(columns - 3, columns)]
        for place, panel in zip(places, row):
            axes = figure.add_subplot(len(rows), columns, number * columns + place + 1)
            _show(axes, panel[0] if place else f"{title}\npartial", *panel[1:])
    figure.tight_layout(pad=0.3, h_pad=1)
    save_figure(figure, path)


def draw_curves(path, metrics_file):
    """Loss and PSNR over the steps of a metrics.jsonl."""
    records = {"train": {}, "val": {}}
    for line in Path(metrics_file).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["kind"]][record["step"]] = record  # after a resume the later line counts
    train, val = ([kind[step] for step in sorted(kind)] for kind in records.values())
    figure = Figure(figsize=(10, 3.5))
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in train], [r["loss"] for r in train], label="train", alpha=0.7)
    left.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", label="validation (EMA)")
    left.set(xlabel="step", ylabel="loss")
    if train or val:
        left.legend()
    for key, label in (("psnr", "ours"), ("visible_fit_psnr", "visible fit"), ("oracle_psnr", "oracle")):
        right.plot([r["step"] for r in val], [r[key] for r in val], "o-", label=label)
    right.set(xlabel="step", ylabel="PSNR in the hole, dB")
    right.legend()
    figure.tight_layout()
    save_figure(figure, path)


def draw_bars(path, charts):
    """Bars with error bars side by side; charts: title → {name: (mean, low, high)}."""
    figure = Figure(figsize=(5 * len(charts), 3.5))
    for axes, (title, bars) in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts.items()):
        means, lows, highs = np.array(list(bars.values())).T
        errors = np.nan_to_num([means - lows, highs - means])
        axes.barh(list(bars), means, xerr=errors, color=["tab:orange", *["tab:blue"] * (len(bars) - 2), "tab:gray"])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def draw_selection(path, scenes):
    """Which completions were kept (green) and dropped (red), a few rows per scene.

    Args:
        scenes: per scene a list of (title, uint8 picture RGB or RGBA, True kept / False dropped / None).
    """
    columns = 9
    rows = sum(math.ceil(len(panels) / columns) for panels in scenes)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows))
    row = 0
    for panels in scenes:
        for position, (title, picture, kept) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, (row + position // columns) * columns + position % columns + 1)
            image = picture / 255.0
            _show(axes, title, on_checkerboard(image) if image.shape[2] == 4 else image, None)
            axes.title.set(fontsize=6, color={True: "green", False: "red", None: "black"}[kept])
        row += math.ceil(len(panels) / columns)
    figure.tight_layout(pad=0.3)
    save_figure(figure, path)
