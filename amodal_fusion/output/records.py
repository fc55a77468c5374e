"""scene.json beside every fused image: what made it, of which files, what was written, and its metrics.

It is written before fused.png, which comes last and says that the others are there. Metrics of a run are collected
from these files, so that an interrupted run loses none, and what another checkpoint or other options made is never
taken for this run's.
"""

import hashlib
import json
import math
import os
import re

from amodal_fusion.errors import SceneError
from amodal_fusion.files import fingerprint, write_text

RECORD = "scene.json"
KEYS = {"made_by", "input", "files", "metrics", "asked"}
# all that a run may have written into a scene's folder; with --overwrite nothing of an earlier one stays
OUTPUT = re.compile(r"fused\.png|residual_mask\.png|figure\.png|order\.json|weight_\d+\.png|scene\.json|\..*\.tmp.*")


def input_digest(folder):
    """A text that changes when any file of a scene's folder does.

    Raises:
        OSError: the folder cannot be read.
    """
    return fingerprint(sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")))


def weights_digest(model):
    """A name for the network's weights, the same for a checkpoint and for what was exported from it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_record(folder):
    """scene.json of an output folder; None when it is not there or not whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and set(record) >= KEYS else None


def write_record(folder, made_by, source, metrics, asked):
    """Write scene.json for what stands in `folder`, and fused.png, which is to follow.

    Args:
        made_by: dict of checkpoint digest and options; source: `input_digest`; metrics: a row of `evaluate_scene`, or
            None; asked: what the user decided for this scene alone, a dict.
    """
    files = [name for name in sorted(os.listdir(folder)) if OUTPUT.fullmatch(name) and not name.startswith(".")]
    if metrics is not None:
        metrics = {name: None if isinstance(value, float) and math.isnan(value) else value
                   for name, value in metrics.items()}
    record = {"made_by": made_by, "input": source, "files": [*files, "fused.png"], "metrics": metrics, "asked": asked}
    write_text(folder / RECORD, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def state_of(folder, input_folder, made_by, has_all):
    """What an earlier run has left of one scene.

    Args:
        made_by: as in `write_record`, of the run that asks; has_all(record): whether that has all that this run
            would write.

    Returns:
        "new"; "done"; "changed" when the scene's own files have changed or something is missing; "other" when other
        weights or options made it, or nobody knows what.
    """
    record = read_record(folder)
    if record is None:
        return "other" if (folder / "fused.png").exists() else "new"
    if record["made_by"] != made_by:
        return "other"
    try:
        same = record["input"] == input_digest(input_folder) and set(record["files"]) <= set(os.listdir(folder))
    except OSError:
        same = False  # reading it will tell what is wrong
    return "done" if same and has_all(record) else "changed"


def clear_outputs(folder):
    """Make the output folder of a scene, without anything of an earlier run.

    Raises:
        SceneError: it is a link: what it points to is nobody's to write to.
    """
    if folder.is_symlink():
        raise SceneError(f"{folder}: a link, which is not followed; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    remove_outputs(folder)


def remove_outputs(folder):
    """Remove what an earlier run wrote of a scene, fused.png first; nothing else, and nothing behind a link."""
    if folder.is_dir() and not folder.is_symlink():
        for name in sorted(os.listdir(folder), key=lambda name: name != "fused.png"):
            if OUTPUT.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
