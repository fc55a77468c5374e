"""Pictures of scenes, weights and training curves. Figures are made without pyplot: no display, no leak."""

import json
import math
import os
from pathlib import Path

import numpy as np

backend = os.environ.pop("MPLBACKEND", None)  # a notebook's backend may be missing: the import would fail
from matplotlib import colormaps, get_data_path  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from amodal_fusion.data.images import resize, write_image  # noqa: E402
from amodal_fusion.files import atomic_file  # noqa: E402

if backend is not None:
    os.environ["MPLBACKEND"] = backend

# one colour per candidate in winner maps; the last, grey, is "none of these"
WINNER_COLOURS = [colormaps["tab20"](i)[:3] for i in range(20)]
NONE_COLOUR = (0.5, 0.5, 0.5)
KEPT, DROPPED = (0.0, 0.55, 0.15), (0.85, 0.1, 0.1)
TILE, LINE, GAP, FRAME = 256, 16, 8, 4  # of figures, px


def save_figure(figure, path, owned=False):
    with atomic_file(path, owned) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def on_checkerboard(completion):
    """RGBA (H,W,4) in [0,1] over a grey checkerboard, (H,W,3)."""
    height, width = completion.shape[:2]
    cell = max(4, max(height, width) // 32)
    y, x = np.mgrid[:height, :width] // cell
    board = np.where((y + x) % 2, 0.85, 0.7)[..., None]
    return completion[..., :3] * completion[..., 3:] + board * (1 - completion[..., 3:])


def winner_colour(place):
    return WINNER_COLOURS[place % len(WINNER_COLOURS)]


def winner_map(weights, residual):
    """Colour of the candidate with the largest weight, (H,W,3); grey where the residual wins."""
    winner = np.concatenate([weights, residual[None]]).argmax(0)
    colours = [winner_colour(i) for i in range(len(weights))]
    return np.array([*colours, NONE_COLOUR])[winner]


def scene_panels(scene):
    """Titled pictures of one fused scene, in reading order.

    Args:
        scene: dict of float arrays in [0,1]: partial, fused (H,W,3), mask, residual (H,W), completions (N,H,W,4),
            weights (N,H,W); optional: original (H,W,3), `labels`, the names of the N completions, and `shown`, the
            indices of the completions if not all N.

    Returns:
        list of (title, picture, colour map or None[, colour of a frame]).
    """
    inside = scene["mask"]
    labels = scene.get("labels") or [f"comp{i + 1}" for i in range(len(scene["weights"]))]
    panels = [("partial", scene["partial"], None), ("mask", inside, "gray")]
    shown = scene.get("shown", range(len(scene["completions"])))
    panels += [(labels[i], on_checkerboard(c), None, winner_colour(i)) for i, c in zip(shown, scene["completions"])]
    panels += [(f"weight of {labels[i]}", scene["weights"][i] * inside, "magma") for i in shown]
    panels.append(("weight of none", scene["residual"] * inside, "magma"))
    winners = winner_map(scene["weights"], scene["residual"])
    panels.append(("winner", np.where(inside[..., None] > 0.5, winners, 1), None))
    panels.append(("fused", scene["fused"], None))
    if "original" in scene:
        panels.append(("original", scene["original"], None))
        error = np.abs(scene["fused"] - scene["original"]).mean(2)
        panels.append(("error in the hole", error * inside, "inferno"))
    return panels


def scene_legend(scene):
    """What the colours of `scene_panels` mean, as `draw_grid` takes it."""
    frames = [(title, frame[0]) for title, _, _, *frame in scene_panels(scene) if frame]
    error = [("error, 0 to 1", "inferno")] if "original" in scene else []
    return [("weight, 0 to 1", "magma"), *error, ("frames and winner:", None), *frames, ("none of them", NONE_COLOUR)]


def draw_grid(path, rows, heading="", legend=(), owned=False):
    """Titled pictures in rows, as one PNG.

    Pillow draws it, because matplotlib takes seconds for a few dozen axes.

    Args:
        rows: lists of panels, (title, picture, colour map or None[, colour of a frame or None]) with picture (H,W) or
            (H,W,3) in [0,1]; None leaves a place empty. Titles may have several lines.
        legend: (text, colour or name of a colour map or None), …, drawn below.
        owned: see `atomic_file`.
    """
    cells, tops, top = [], [], GAP + bool(heading) * (LINE + GAP)
    for row in rows:
        panels = [(place, panel) for place, panel in enumerate(row) if panel is not None]
        lines = max(panel[0].count("\n") for _, panel in panels) + 1
        drawn = [(place, panel, _tile(*panel[1:], width=TILE)) for place, panel in panels]
        cells.append(drawn)
        tops.append((top, top + lines * LINE + 2))
        top = tops[-1][1] + max(image.height for *_, image in drawn) + GAP
    width = max(map(len, rows)) * (TILE + GAP) + GAP
    below = _legend(legend, width)
    sheet = Image.new("RGB", (width, top + below.height), "white")
    sheet.paste(below, (0, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), drawable(heading), "black", _font())
    for drawn, (text_top, image_top) in zip(cells, tops):
        for place, (title, *_), image in drawn:
            left = GAP + place * (TILE + GAP)
            short = "\n".join(_shortened(text, 38) for text in map(drawable, title.split("\n")))
            pen.text((left, text_top), short, "black", _font(), spacing=2)
            sheet.paste(image, (left, image_top))
    write_image(path, np.asarray(sheet), owned=owned)


def _font():
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)


def _shortened(text, length):
    return text if len(text) <= length else text[: length - 1] + "…"


def _legend(entries, width):
    """A picture `width` wide with a swatch or a colour bar before each text, in as many lines as they need."""
    font, places, left, top = _font(), [], GAP, 0
    for text, colour in entries:
        text = _shortened(drawable(text), 60)  # noqa: PLW2901
        swatch = 0 if colour is None else 100 if isinstance(colour, str) else LINE
        length = swatch + 5 + font.getlength(text)
        if left > GAP and left + length > width:
            left, top = GAP, top + LINE + 6
        places.append((left, top, swatch, text, colour))
        left += round(length) + 16
    picture = Image.new("RGB", (width, top + LINE + GAP if entries else 0), "white")
    pen = ImageDraw.Draw(picture)
    for left, top, swatch, text, colour in places:
        if swatch:
            bar = colormaps[colour](np.linspace(0, 1, swatch))[:, :3] if isinstance(colour, str) else [colour] * swatch
            picture.paste(Image.fromarray(np.rint(np.tile(bar, (LINE, 1, 1)) * 255).astype(np.uint8)), (left, top))
        pen.text((left + swatch + 5 * bool(swatch), top), text, "black", font)
    return picture


def drawable(text):
    """Text with characters that no font can draw replaced, such as control characters in names."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _tile(picture, cmap, frame=None, width=TILE):
    """Picture in [0,1] → a Pillow image `width` pixels wide; narrower if it would be over three times as high."""
    picture = np.clip(picture, 0, 1)
    if cmap is not None:
        picture = colormaps[cmap](picture)[..., :3]
    picture = np.rint(picture * 255).astype(np.uint8)
    scale = min(width / picture.shape[1], 3 * width / picture.shape[0])
    size = tuple(max(1, round(side * scale)) for side in picture.shape[:2])
    picture = resize(picture, size, nearest=scale > 1)
    if frame is not None:
        inner = np.s_[FRAME:-FRAME, FRAME:-FRAME]
        framed = np.full_like(picture, np.rint(np.array(frame) * 255).astype(np.uint8))
        framed[inner] = picture[inner]
        picture = framed
    return Image.fromarray(picture)


def draw_scene(path, scene, title=""):
    """One scene over several rows, as written beside every fused image. `scene` as in `scene_panels`."""
    panels = scene_panels(scene)
    columns = min(6, math.ceil(len(panels) / 2))
    draw_grid(path, [panels[i : i + columns] for i in range(0, len(panels), columns)], title, scene_legend(scene))


def draw_scenes(path, scenes, titles):
    """One scene per row: partial, completions, winner map, fused, original. `scenes` as in `scene_panels`."""
    wanted = ("partial", "comp", "winner", "fused", "original")
    rows = [[panel for panel in scene_panels(scene) if panel[0].startswith(wanted)] for scene in scenes]
    columns = max(len(row) for row in rows)
    for row, title in zip(rows, titles):
        row[0] = (f"{title}\npartial", *row[0][1:])
        # right-aligned: the same panels stand below each other for any number of completions
        row[len(row) - 3 : len(row) - 3] = [None] * (columns - len(row))
    draw_grid(path, rows, owned=True)


def read_history(metrics_file):
    """Lines of a metrics.jsonl, {"train": […], "val": […]}, without steps that a resumed run repeated.

    Damaged and unknown lines are ignored: a curve must not stop a run.
    """
    records = {"train": [], "val": []}
    for line in Path(metrics_file).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or record.get("kind") not in records or not isinstance(record.get("step"), int):
            continue
        for history in records.values():
            while history and history[-1]["step"] >= record["step"] + (history is not records[record["kind"]]):
                history.pop()  # steps that were repeated after a resume
        records[record["kind"]].append(record)
    return records


def draw_curves(path, metrics_file):
    """Loss and PSNR over the steps of a metrics.jsonl."""
    train, val = read_history(metrics_file).values()
    figure = Figure(figsize=(10, 3.5))
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in train], [r["loss"] for r in train], label="train", alpha=0.7)
    left.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", label="validation (EMA)")
    left.set(xlabel="step", ylabel="loss (L1 in the hole + LPIPS)")
    if train or val:
        left.legend()
    for key, label in (("psnr", "ours"), ("visible_fit_psnr", "visible fit"), ("oracle_psnr", "oracle")):
        right.plot([r["step"] for r in val], [r[key] for r in val], "o-", label=label)
    right.set(xlabel="step", ylabel="PSNR in the hole, dB")
    right.legend()
    figure.tight_layout()
    save_figure(figure, path, owned=True)


def draw_bars(path, charts):
    """Charts of bars with error bars; charts: title → {name: (mean, low, high)}."""
    figure = Figure(figsize=(5 * len(charts), 3.5))
    for axes, (title, bars) in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts.items()):
        means, lows, highs = np.array(list(bars.values())).T
        errors = np.nan_to_num([means - lows, highs - means])
        axes.barh(list(bars), means, xerr=errors, color=["tab:orange", *["tab:blue"] * (len(bars) - 2), "tab:gray"])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
    figure.tight_layout()
    save_figure(figure, path, owned=True)


def draw_selection(path, scenes):
    """Which completions were kept (green) and dropped (red), a few rows per scene.

    Args:
        scenes: per scene a list of (title, uint8 picture RGB or RGBA, True kept / False dropped / None).
    """
    columns, rows = 9, []
    for panels in scenes:
        row = []
        for title, picture, kept in panels:
            # saves memory with many completions of a large photo
            scale = min(1, TILE / picture.shape[1], 3 * TILE / picture.shape[0])
            image = resize(picture, tuple(max(1, round(side * scale)) for side in picture.shape[:2])) / np.float32(255)
            image = on_checkerboard(image) if image.shape[2] == 4 else image
            row.append((title, image, None, {True: KEPT, False: DROPPED, None: None}[kept]))
        rows += [row[i : i + columns] for i in range(0, len(row), columns)]
    framed = any(panel[3] is not None for row in rows for panel in row)
    draw_grid(path, rows, legend=[("kept", KEPT), ("dropped", DROPPED)] if framed else (), owned=True)
