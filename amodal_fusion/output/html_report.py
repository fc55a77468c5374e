"""One page to look through all fused scenes: report.html, opened from disk, with nothing from the network."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from matplotlib.colors import to_hex
from tqdm import tqdm

from amodal_fusion.data.images import read_image
from amodal_fusion.data.scenes import completion_paths
from amodal_fusion.errors import SceneError
from amodal_fusion.evaluation.figures import WINNER_COLOURS
from amodal_fusion.evaluation.rules import best_rule
from amodal_fusion.files import write_text
from amodal_fusion.output.records import read_record

PAGE = Path(__file__).with_name("report.html")
# what the page calls a metric of scene.json
METRICS = {"psnr": "ours_psnr", "overlap": "ours_psnr_overlap", "oracle": "oracle_psnr", "lpips": "ours_lpips"}


def write_report(data_dir, output_dir, scene_ids, workers=1):
    """Write OUT/report.html: a gallery and a table of the scenes that have been fused.

    The page refers to the pictures where they lie, in `output_dir` and `data_dir`, relative to itself.

    Args:
        workers: threads that read the masks.

    Returns:
        path of the page.

    Raises:
        SceneError: as in `describe_scene`.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    scene_ids = [i for i in scene_ids if (output_dir / i / "fused.png").exists()]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = pool.map(lambda scene_id: describe_scene(data_dir / scene_id, output_dir / scene_id), scene_ids)
        scenes = list(tqdm(jobs, "report", len(scene_ids), disable=None))
    report = {"scenes": scenes, "data": _link(data_dir, output_dir), "colours": [to_hex(c) for c in WINNER_COLOURS]}
    # a scene may be called </script>
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    write_text(output_dir / "report.html", PAGE.read_text(encoding="utf-8").replace("@REPORT@", text), owned=True)
    return output_dir / "report.html"


def _link(data_dir, output_dir):
    """URL of `data_dir` as seen from a page in `output_dir`."""
    try:
        return quote(Path(os.path.relpath(data_dir.resolve(), output_dir.resolve())).as_posix())
    except ValueError:  # on another drive
        return data_dir.resolve().as_uri()


def describe_scene(data, output):
    """What the page knows about one scene, by the folders of its pictures → dict.

    Raises:
        SceneError: a mask cannot be read, or is of another size than the fused image.
    """
    residual = read_image(output / "residual_mask.png", "L") >= 128
    hole = read_image(data / "mask.png", "L") >= 128
    if hole.shape != residual.shape:
        raise SceneError(f"{data / 'mask.png'}: not of the size of {output / 'residual_mask.png'}; recompute "
                         "the scene", "overwrite")
    metrics = (read_record(output) or {}).get("metrics") or {}
    count = sum(1 for _ in output.glob("weight_*.png"))
    numbers = {name: metrics[column] for name, column in METRICS.items() if metrics.get(column) is not None}
    if metrics.get("ours_psnr") is not None:
        numbers["gain"] = metrics["ours_psnr"] - metrics[f"{best_rule(metrics)}_psnr"]
    return {
        "id": output.name, "width": hole.shape[1], "height": hole.shape[0], "count": count,
        "completions": [path.name for path in completion_paths(data)[:count]],
        "hole": round(float(hole.mean()), 4), "residual": round(float(residual.sum() / max(1, hole.sum())), 4),
        "original": (data / "original.png").exists(), "figure": (output / "figure.png").exists(),
        "order": _order(output / "order.json"), **{name: round(value, 4) for name, value in numbers.items()},
    }


def _order(path):
    """2 › 1 › (3 ↻ 4), front to back; "" where nothing overlaps or the file is missing."""
    if not path.exists():
        return ""
    order = json.loads(path.read_text(encoding="utf-8"))
    meet = {number for pair in order["pairs"] for number in (pair["front"], pair["behind"])}
    groups = [" ↻ ".join(map(str, group)) for group in order["front_to_back"] if meet & set(group)]
    return " › ".join(f"({group})" if "↻" in group else group for group in groups)
