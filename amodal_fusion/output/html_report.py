"""report.html: a page to look through all fused scenes and to correct them, opened from disk, without network.

The page has a line about each scene. The pixels of a scene are in OUT/<id>/page.js, which the page loads when the scene
is opened: a page from disk may show pictures, but scripts cannot read their pixels.
"""

import base64
import json
import math
import os
import re
import shlex
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.colors import to_hex
from tqdm import tqdm

from amodal_fusion.data.images import open_picture, read_image, resize
from amodal_fusion.data.scenes import completion_paths, numbers_of, read_large, sources_of, stem_of
from amodal_fusion.errors import SceneError
from amodal_fusion.evaluation.figures import WINNER_COLOURS
from amodal_fusion.evaluation.metrics import DECIDED
from amodal_fusion.evaluation.rules import best_rule
from amodal_fusion.files import write_text
from amodal_fusion.model.blending import fill_pixels
from amodal_fusion.output.locks import FULL
from amodal_fusion.output.records import read_record

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("recompose.js", "editor.js", "gallery.js")
PIXELS = "page.js"  # of one scene
MOST_PIXELS = 2**22  # candidates × pixels of the hole on the page; larger scenes are corrected on a smaller copy
# metrics of scene.json → their names on the page
METRICS = {"psnr": "ours_psnr", "overlap": "ours_psnr_overlap", "oracle": "oracle_psnr", "lpips": "ours_lpips"}


def write_report(data_dir, output_dir, scene_ids, workers=1, command="", results=None):
    """Write OUT/report.html: a gallery and a table of the fused scenes, and their corrections.

    The page links to the pictures in `output_dir` and `data_dir` by relative paths.

    Args:
        workers: threads that read the pictures; command: what applies a locks.yaml, for the page to show;
            results: scene id → metrics of inpainters, see `Results.measure`, for the table.

    Returns:
        path of the page.

    Raises:
        SceneError: as in `describe_scene`.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    scene_ids = [i for i in scene_ids if (output_dir / i / "fused.png").exists()]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = pool.map(lambda scene_id: _add_scene(data_dir / scene_id, output_dir / scene_id), scene_ids)
        scenes = list(tqdm(jobs, "report", len(scene_ids), disable=None))
    columns = []
    for scene in scenes:
        row = (results or {}).get(scene["id"], {})
        columns = columns or [key for key in row if key.endswith(("_psnr", "_lpips"))]
        scene.update({key: round(row[key], 4) for key in columns if key in row})
    report = {"results": columns, "scenes": scenes, "data": _link(data_dir, output_dir), "command": command,
              "colours": [to_hex(c) for c in WINNER_COLOURS]}
    # the name of a scene may contain </script>
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = (PAGE / "report.html").read_text(encoding="utf-8").replace("@SCRIPT@", script).replace("@REPORT@", text)
    write_text(output_dir / "report.html", page, owned=True)
    return output_dir / "report.html"


def rewrite_report(data_dir, output_dir, scene_ids, workers=1):
    """Write the page of an earlier run again, of which scenes were recomputed: its scenes and `scene_ids`, its command.

    Returns:
        path of the page.

    Raises:
        SceneError: as in `describe_scene`.
    """
    text = (Path(output_dir) / "report.html").read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)
    earlier = json.loads(match[1]) if match else {"scenes": [], "command": ""}
    shown = dict.fromkeys([*(scene["id"] for scene in earlier["scenes"]), *scene_ids])
    left = [scene_id for scene_id in shown if (Path(data_dir) / scene_id / "mask.png").exists()]
    return write_report(data_dir, output_dir, left, workers, earlier["command"])


def command_of(config):
    """The command line of this run without its locks, from the options that are not at their defaults."""
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in ("lock", "locks", "overwrite", "report"):
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    program = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join([*program, *words, '--report'])}"


def _link(data_dir, output_dir):
    """URL of `data_dir` relative to a page in `output_dir`."""
    try:
        return quote(Path(os.path.relpath(data_dir.resolve(), output_dir.resolve())).as_posix())
    except ValueError:  # on another drive
        return data_dir.resolve().as_uri()


def _add_scene(data, output):
    """`describe_scene`; writes page.js unless it is there, which fusing the scene again removes."""
    row = describe_scene(data, output)
    if not (output / PIXELS).exists():
        pixels = json.dumps(pack_scene(data, output, [entry["number"] for entry in row["completions"]]))
        write_text(output / PIXELS, f"receive({json.dumps(row['id'])}, {pixels});\n", owned=True)
    return row


def describe_scene(data, output):
    """The page's data about one scene, a dict, from its two folders.

    Raises:
        SceneError: a mask cannot be read, or has another size than the fused image.
    """
    residual = read_image(output / "residual_mask.png", "L") >= 128
    hole = read_image(data / "mask.png", "L") >= 128
    if hole.shape != residual.shape:
        raise SceneError(f"{data / 'mask.png'}: not of the size of {output / 'residual_mask.png'}; recompute "
                         "the scene", "overwrite")
    record = read_record(output) or {}
    metrics = record.get("metrics") or {}
    numbers = {name: metrics[column] for name, column in METRICS.items() if metrics.get(column) is not None}
    if metrics.get("ours_psnr") is not None:
        numbers["gain"] = metrics["ours_psnr"] - metrics[f"{best_rule(metrics)}_psnr"]
    completions = _completions(data, output)
    numbers["undecided"] = metrics.get("ours_undecided")
    if numbers["undecided"] is None:
        numbers["undecided"] = _undecided(output, completions, hole)
    return {
        "id": output.name, "width": hole.shape[1], "height": hole.shape[0], "count": len(completions),
        "completions": completions, "locks": record.get("asked", {}).get("locks", []),
        "hole": round(float(hole.mean()), 4), "residual": round(float(residual.sum() / max(1, hole.sum())), 4),
        "original": (data / "original.png").exists(), "figure": (output / "figure.png").exists(),
        "order": _order(output / "order.json"), **{name: round(value, 4) for name, value in numbers.items()},
    }


def _completions(data, output):
    """[{file, number, name}] of the completions that have a weight map."""
    paths = completion_paths(data)
    sources = sources_of(data, paths) or [None] * len(paths)
    return [{"file": path.name, "number": number, "name": stem_of(source or path.name)}
            for path, number, source in zip(paths, numbers_of(paths), sources)
            if (output / f"weight_{number}.png").exists()]


def _undecided(output, completions, hole):
    """Share of the hole where no weight, that of the fill included, reaches DECIDED."""
    weights = np.stack([_levels(output, entry["number"])[hole] for entry in completions]) / np.float32(FULL)
    return float(np.mean(np.maximum(weights.max(0), 1 - weights.sum(0)) < DECIDED))


def _levels(output, number):
    """The network's own weight map of a completion, before locks, (H,W) uint16."""
    unlocked = output / f"unlocked_{number}.png"
    with open_picture(unlocked if unlocked.exists() else output / f"weight_{number}.png") as image:
        return np.asarray(image).astype(np.uint16)


def pack_scene(data, output, numbers):
    """What the page needs to recompose a scene, at most MOST_PIXELS of it; `unpack` in page/recompose.js reads it.

    Args:
        numbers: of the completions, as in weight_1.png ….

    Returns:
        dict of width, height, count, scale (from its pixels to those of the scene, on x and y) and packed: base64 of
        zlib of bytes, each but the first the difference to the one before. mask (H,W), photo (3,H,W) with the hole
        filled, and for each completion at the P pixels of the hole: upper and lower byte of the weight, alpha, RGB.
    """
    scene = read_large(data, len(numbers))
    height, width = scene.mask.shape
    scale = min(1.0, math.sqrt(MOST_PIXELS / ((len(numbers) + 1) * scene.mask.sum())))
    small = scene.resized((max(1, round(height * scale)), max(1, round(width * scale))))
    photo = small.partial.copy()
    photo[small.mask] = np.rint(np.clip(fill_pixels(small), 0, 1) * 255).astype(np.uint8)
    planes = [small.mask, *np.moveaxis(photo, -1, 0)]
    for number, completion in zip(numbers, small.completions):
        levels = _levels(output, number)
        if scale < 1:  # outside the hole weights are 0, which must not dim those at its edge
            share = resize(scene.mask.astype(np.float32), small.mask.shape)
            levels = resize(levels.astype(np.float32), small.mask.shape) / np.maximum(share, 1e-3)
        levels = np.rint(levels[small.mask]).astype(np.uint16)
        rgba = completion[small.mask]
        rgba[rgba[:, 3] == 0] = 0  # hidden colours would only make the file larger
        planes += [levels >> 8, levels & 255, rgba[:, 3], *rgba[:, :3].T]
    differences = [np.diff(plane.astype(np.uint8).ravel(), prepend=np.uint8(0)) for plane in planes]
    packed = zlib.compress(np.concatenate(differences).tobytes())
    small_height, small_width = small.mask.shape
    return {"width": small_width, "height": small_height, "count": len(numbers),
            "scale": [width / small_width, height / small_height], "packed": base64.b64encode(packed).decode()}


def _order(path):
    """2 › 1 › (3 ↻ 4), front to back; "" where nothing overlaps or the file is missing."""
    if not path.exists():
        return ""
    order = json.loads(path.read_text(encoding="utf-8"))
    overlapping = {number for pair in order["pairs"] for number in (pair["front"], pair["behind"])}
    groups = [" ↻ ".join(map(str, group)) for group in order["front_to_back"] if overlapping & set(group)]
    return " › ".join(f"({group})" if "↻" in group else group for group in groups)
