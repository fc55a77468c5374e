"""One page to look through all fused scenes: report.html, opened from disk, with nothing from the network."""

import csv
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from matplotlib.colors import to_hex
from tqdm import tqdm

from fusion.data.images import read_image
from fusion.data.scenes import completion_paths
from fusion.errors import SceneError
from fusion.figures import WINNER_COLOURS
from fusion.files import write_text

PAGE = Path(__file__).with_name("report.html")
# what the page calls a column of metrics.csv
METRICS = {"psnr": "ours_psnr", "overlap": "ours_psnr_overlap", "oracle": "oracle_psnr", "lpips": "ours_lpips"}


def write_report(data_dir, output_dir, scene_ids, workers=1):
    """Write OUT/report.html: a gallery and a table of the scenes that have been fused.

    The page refers to the pictures where they lie, in `output_dir` and `data_dir`, relative to itself.

    Args:
        workers: threads that read the masks.

    Returns:
        path of the page, and {scene id: why it is not in there}.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    metrics = {}
    if (output_dir / "metrics.csv").exists():
        with open(output_dir / "metrics.csv", newline="", encoding="utf-8") as file:
            metrics = {row["scene"]: row for row in csv.DictReader(file)}
    scene_ids = [i for i in scene_ids if (output_dir / i / "fused.png").exists()]
    scenes, failed = [], {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = [pool.submit(describe_scene, data_dir / i, output_dir / i, metrics.get(i, {})) for i in scene_ids]
        for scene_id, job in zip(scene_ids, tqdm(jobs, "report", disable=None)):
            try:
                scenes.append(job.result())
            except SceneError as error:
                failed[scene_id] = str(error)
    report = {"scenes": scenes, "data": _link(data_dir, output_dir), "colours": [to_hex(c) for c in WINNER_COLOURS]}
    # a scene may be called </script>
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    write_text(output_dir / "report.html", PAGE.read_text(encoding="utf-8").replace("@REPORT@", text))
    return output_dir / "report.html", failed


def _link(data_dir, output_dir):
    """URL of `data_dir` as seen from a page in `output_dir`."""
    try:
        return quote(Path(os.path.relpath(data_dir.resolve(), output_dir.resolve())).as_posix())
    except ValueError:  # on another drive
        return data_dir.resolve().as_uri()


def describe_scene(data, output, metrics):
    """What the page knows about one scene: folders of its pictures, its row of metrics.csv → dict.

    Raises:
        SceneError: a mask cannot be read, or is of another size than the fused image.
    """
    residual = read_image(output / "residual_mask.png", "L") >= 128
    hole = read_image(data / "mask.png", "L") >= 128
    if hole.shape != residual.shape:
        raise SceneError(f"{data / 'mask.png'}: not of the size of {output / 'residual_mask.png'}; fuse the scene "
                         "again with --overwrite")
    count = sum(1 for _ in output.glob("weight_*.png"))
    numbers = {name: _number(metrics.get(column)) for name, column in METRICS.items()}
    rule = _number(metrics.get("visible_fit_psnr"))
    if None not in (numbers["psnr"], rule):
        numbers["gain"] = round(numbers["psnr"] - rule, 4)
    return {
        "id": output.name, "width": hole.shape[1], "height": hole.shape[0], "count": count,
        "completions": [path.name for path in completion_paths(data)[:count]],
        "hole": round(float(hole.mean()), 4), "residual": round(float(residual.sum() / max(1, hole.sum())), 4),
        "original": (data / "original.png").exists(), "figure": (output / "figure.png").exists(),
        "order": _order(output / "order.json"), **numbers,
    }


def _number(text):
    value = float(text or "nan")
    return round(value, 4) if math.isfinite(value) else None  # JSON knows no nan


def _order(path):
    """2 › 1 › (3 ↻ 4), front to back; "" where nothing overlaps or nobody wrote it."""
    if not path.exists():
        return ""
    order = json.loads(path.read_text(encoding="utf-8"))
    meet = {number for pair in order["pairs"] for number in (pair["front"], pair["behind"])}
    groups = [" ↻ ".join(map(str, group)) for group in order["front_to_back"] if meet & set(group)]
    return " › ".join(f"({group})" if "↻" in group else group for group in groups)
