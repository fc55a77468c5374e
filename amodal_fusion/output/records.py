"""scene.json beside every fused image: the weights, options and input files that made it, outputs, and metrics.

fused.png is written last: if it exists, all outputs of the scene do. The metrics of a run are collected from these
files, so that an interrupted run loses none.
"""

import hashlib
import json
import math
import os
from contextlib import contextmanager

from amodal_fusion.data.scenes import completion_paths
from amodal_fusion.errors import SceneError
from amodal_fusion.files import clear_folder, fingerprint, publish, remove_ours, write_text

RECORD = "scene.json"
WHOLE = "fused.png"  # written last, so it means that all outputs of the scene exist
LIMIT = "n_max_completions"
KEYS = {"made_by", "input", "files", "metrics", "asked"}


def input_digest(folder):
    """A digest that changes with any file of a scene's folder.

    Raises:
        OSError: the folder cannot be read.
    """
    return fingerprint(sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")))


def weights_digest(model):
    """Digest of the network's weights, equal for a checkpoint and its exported weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_record(folder):
    """scene.json of an output folder; None if it is missing or incomplete."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and set(record) >= KEYS else None


def write_record(folder, made_by, source, metrics, asked):
    """Write scene.json for the files in `folder` and for fused.png, which follows.

    Args:
        made_by: dict of checkpoint digest and options; source: `input_digest`; metrics: a row of `evaluate_scene`, or
            None; asked: dict of the user's decisions for this scene.
    """
    files = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if metrics is not None:
        metrics = {name: None if isinstance(value, float) and math.isnan(value) else value
                   for name, value in metrics.items()}
    record = {"made_by": made_by, "input": source, "files": [*files, WHOLE], "metrics": metrics, "asked": asked}
    write_text(folder / RECORD, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def made_alike(one, other):
    """Whether two `made_by` agree, but perhaps in how many completions are used at most."""
    return isinstance(one, dict) and {**one, LIMIT: None} == {**other, LIMIT: None}


def state_of(folder, input_folder, made_by, is_complete):
    """State of a scene's outputs of an earlier run.

    Args:
        made_by: as in `write_record`, of this run; is_complete(record): whether all outputs of this run exist.

    Returns:
        "new"; "done"; "changed" if input files changed or outputs are missing; "other" if other or unknown weights or
        options made it.
    """
    record = read_record(folder)
    if record is None:
        return "other" if (folder / WHOLE).exists() else "new"
    if not made_alike(record["made_by"], made_by):
        return "other"
    try:
        count, limits = len(completion_paths(input_folder)), (record["made_by"].get(LIMIT), made_by.get(LIMIT))
        if limits[0] != limits[1] and any(limit is not None and limit < count for limit in limits):
            return "other"
        same = record["input"] == input_digest(input_folder) and set(record["files"]) <= set(os.listdir(folder))
    except OSError:
        same = False  # reading it later gives the message
    return "done" if same and is_complete(record) else "changed"


@contextmanager
def scene_outputs(folder):
    """Yield a temporary folder for the outputs of a scene; at the end they replace those in `folder`.

    Raises:
        SceneError: `folder` is a link, or would lose a file that this program did not write.
    """
    if folder.is_symlink():
        raise SceneError(f"{folder}: is a link, and links are not followed; remove it")
    with publish(folder, WHOLE) as stage:
        yield stage


def remove_outputs(folder):
    """Remove the outputs of a scene, fused.png first; no other files, and nothing behind a link."""
    if folder.is_dir() and not folder.is_symlink():
        remove_ours(folder / WHOLE)
        clear_folder(folder)
