"""scene.json beside every fused image: weights, options and input files that made it, outputs, and metrics.

fused.png comes after it: then all outputs of the scene are there. The metrics of a run are collected from these files,
so that an interrupted run loses none. Outputs of another checkpoint or of other options are not this run's.
"""

import hashlib
import json
import math
import os
from contextlib import contextmanager

from amodal_fusion.errors import SceneError
from amodal_fusion.files import clear_folder, fingerprint, publish, remove_ours, write_text

RECORD = "scene.json"
WHOLE = "fused.png"  # comes last: while it is there, all outputs of the scene are
KEYS = {"made_by", "input", "files", "metrics", "asked"}


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
    files = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if metrics is not None:
        metrics = {name: None if isinstance(value, float) and math.isnan(value) else value
                   for name, value in metrics.items()}
    record = {"made_by": made_by, "input": source, "files": [*files, WHOLE], "metrics": metrics, "asked": asked}
    write_text(folder / RECORD, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def state_of(folder, input_folder, made_by, has_all):
    """What an earlier run has left of one scene.

    Args:
        made_by: as in `write_record`, of the run that asks; has_all(record): whether that has all that this run
            would write.

    Returns:
        "new"; "done"; "changed" when the scene's own files have changed or something is missing; "other" when other
        weights or options made it, or it is unknown what made it.
    """
    record = read_record(folder)
    if record is None:
        return "other" if (folder / WHOLE).exists() else "new"
    if record["made_by"] != made_by:
        return "other"
    try:
        same = record["input"] == input_digest(input_folder) and set(record["files"]) <= set(os.listdir(folder))
    except OSError:
        same = False  # reading it will tell what is wrong
    return "done" if same and has_all(record) else "changed"


@contextmanager
def scene_outputs(folder):
    """Yield a temporary folder for the outputs of a scene; they take the place of an earlier run's in `folder`.

    Raises:
        SceneError: `folder` is a link, or a file in it that is not ours has the name of an output.
    """
    if folder.is_symlink():
        raise SceneError(f"{folder}: a link; links are not followed, remove it")
    with publish(folder, WHOLE) as stage:
        yield stage


def remove_outputs(folder):
    """Remove what earlier runs wrote of a scene, fused.png first; nothing else, and nothing behind a link."""
    if folder.is_dir() and not folder.is_symlink():
        remove_ours(folder / WHOLE)
        clear_folder(folder)
