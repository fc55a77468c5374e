"""Checkpoints: written atomically, and read without running code."""

import contextlib
import os
import pickle
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch

from amodal_fusion.errors import UserError
from amodal_fusion.files import atomic_file

# The shipped weights: inside an installed package, or beside it in the repository.
INSTALLED = Path(__file__).parent / "pretrained"
PRETRAINED = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1] / "pretrained"

KIND = "amodal_fusion_transformer"
VERSION = 4
EARLIER = {1: "f5cd88e", 2: "8160f9c", 3: "e5d7be6"}  # version → last commit that reads it


def save_checkpoint(path, state, owned=False):
    """Write `state` (tensors and plain Python values) so that a crash leaves the old file or the new one.

    Args:
        owned: see `atomic_file`.

    Raises:
        UserError: the disk is full or not writable; the older checkpoint is intact.
    """
    try:
        with atomic_file(path, owned) as temporary, open(temporary, "wb") as file:
            torch.save({"kind": KIND, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(os.path.dirname(os.path.abspath(path)))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: could not be written ({error}); the file from before is untouched") from error


def sync_folder(folder):
    """Flush a folder's new names to the disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(path):
    """Make the folder of `path`. Raise UserError unless a file can be written there: before training, not after."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name a file")
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_archive(path, *options):
    """Raise UserError unless `path` is an archive, as checkpoints are; its content is not read.

    Args:
        options: names of the options that name the file, for the message.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such checkpoint", *options)
    if not os.path.isfile(path):
        raise UserError(f"{path}: is not a regular file", *options)
    if os.access(path, os.R_OK) and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a whole checkpoint: it is another kind of file, or its end is missing; use "
                        "another one", *options)


def load_checkpoint(path, *options):
    """Read a checkpoint onto the CPU.

    Args:
        options: as in `check_archive`.

    Raises:
        UserError: the file is missing, damaged, holds code, is no checkpoint of this program, or has weights that are
            not finite.
    """
    check_archive(path, *options)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load ignores the checksums that torch.save wrote (pytorch#126952)
        if damaged:
            raise UserError(f"{path}: damaged ({damaged} fails its checksum); use another checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds pickled code, which is never run; only plain weights are read") from None
    except Exception as error:  # damaged archives raise many kinds of errors
        raise UserError(f"{path}: not a whole checkpoint ({error}); use another one", *options) from None
    if isinstance(state, dict) and "model_state_dict" in state:
        raise UserError(f"{path}: weights of another program's network (model_state_dict), which has other layers; "
                        "train this network on your data, best from the shipped weights", "init_from")
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise UserError(f"{path}: not a checkpoint of amodal_fusion_transformer.py")
    check_version(path, state.get("version"))
    odd = next(odd_tensors(state), None)
    if odd:
        raise UserError(f"{path}: {odd}; checkpoints of this program have ordinary tensors only; use another one")
    for part in ("model", "ema"):
        weights = state[part].items() if isinstance(state.get(part), dict) else ()
        broken = [name for name, tensor in weights if torch.is_tensor(tensor) and not tensor.isfinite().all()]
        if broken:
            raise UserError(f"{path}: {len(broken)} of its tensors hold numbers that are not finite ({broken[0]}, …): "
                            "the run that wrote it had gone wrong; use an older checkpoint")
    return state


def check_version(path, version):
    """Raise UserError unless this program reads checkpoints of this version."""
    if type(version) is not int:
        raise UserError(f"{path}: its version is no number: it is no checkpoint of this program")
    if version in EARLIER:
        raise UserError(f"{path}: checkpoint format {version} of an earlier version (up to commit {EARLIER[version]}), "
                        "which had another network; train from the start, or fine-tune the shipped weights",
                        "init_from")
    if version != VERSION:
        raise UserError(f"{path}: checkpoint format {version}, this program reads {VERSION}")


def odd_tensors(value, name="it"):
    """Lines about unusual tensors in `value`: sparse, quantized, complex or without data."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from odd_tensors(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from odd_tensors(inner, name)
    elif torch.is_tensor(value):
        kinds = {"sparse": value.layout != torch.strided, "without data": value.is_meta,
                 "quantized": value.is_quantized, "complex": value.is_complex()}
        yield from (f"{name} is a tensor that is {kind}" for kind, found in kinds.items() if found)


def averaged_weights(state):
    """The network's state dict in a checkpoint: the EMA of a training checkpoint, or the exported weights."""
    if "ema" not in state:
        return state["model"]
    return {key.removeprefix("module."): value for key, value in state["ema"].items() if key != "n_averaged"}


def check_shapes(build, config, weights):
    """Check that `weights` fit the network `build(config)`, without allocating it.

    Raises:
        KeyError, AttributeError, ValueError: a tensor is missing, is no tensor, or has another shape.
    """
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # warnings that tensors stay empty
        expected = build(config).state_dict()
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, its config says {tuple(tensor.shape)}")


def export_weights(checkpoint, path, start=None, start_share=0.0, **options):
    """Write a training checkpoint's averaged weights alone, a quarter of its size, with the options that made them.

    Options that are paths are left out, since they mean nothing elsewhere. `options` overrides others.

    Args:
        start, start_share: checkpoint that fine-tuning started from, and its share of the exported weights, in [0,1].
            A mean of weights before and after fine-tuning generalizes better than either (Wortsman et al. 2022, Robust
            fine-tuning of zero-shot models, equation 1).
    """
    state = load_checkpoint(checkpoint)
    weights = averaged_weights(state)
    if start_share:
        before = averaged_weights(load_checkpoint(start))
        weights = {name: torch.lerp(value, before[name].to(value.dtype), start_share) if value.is_floating_point()
                   else value for name, value in weights.items()}
    config = portable(state["config"]) | options
    kept = {name: state[name] for name in ("metrics", "epoch", "step")}
    if start_share:
        kept["metrics"] = {}  # the run's metrics are not those of the mean
    save_checkpoint(path, {"model": weights, "config": config, **kept})


def portable(config):
    """Options without paths, which mean nothing elsewhere."""
    return {name: value for name, value in config.items()
            if not isinstance(value, (str, tuple)) or name in ("optimizer", "lpips_net", "amp")}


def rng_state(device):
    """Random state of this process, in types that weights_only accepts; on the CPU without GPU state."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state, device):
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
