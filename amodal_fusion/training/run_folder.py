"""The folder of a run: one run at a time, visible to all its processes, never overwritten by another run."""

import contextlib
import os
import secrets
import time
from pathlib import Path

from amodal_fusion import distributed
from amodal_fusion.checkpoints import check_archive, check_writable, load_checkpoint
from amodal_fusion.errors import ConfigError, UserError
from amodal_fusion.files import (
    WRITTEN,
    check_ours,
    is_temporary,
    launcher_hint,
    lock_run_dir,
    record_written,
    remove_temporary,
    temporary_path,
    write_text,
)
from amodal_fusion.training.loaders import uses_layers_alone


def lock_checkpoint_dir(config, process):
    """Make the run's folder and lock it.

    Returns:
        the lock, to be held until the process ends.

    Raises:
        UserError: another run is writing there, or not every process sees the folder.
    """
    folder = Path(config.checkpoint_dir)
    lock = lock_run_dir(folder) if process.is_main else None
    if process.any(process.is_main and lock is None):
        raise UserError(f"{folder}: another run is writing there; wait for it, or choose another folder"
                        + launcher_hint(), "checkpoint_dir")
    path, word = temporary_path(folder / "run"), secrets.token_hex()
    if process.is_main:
        write_text(path, word)
    name, word = process.gather((path.name, word))[0]  # the others wait until it is there
    differs = process.any(not has_text(folder / name, word))
    if process.is_main:
        path.unlink()
    if differs:
        raise UserError(f"not every process sees the same {folder}; put it on a disk that all nodes share",
                        "checkpoint_dir")
    return lock


def has_text(path, text, patience=10):
    """Whether a file has this text; a shared disk may show it some seconds later."""
    for _ in range(10 * patience):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return True
        time.sleep(0.1)
    return False


def checkpoint_to_resume(config, process):
    """The checkpoint to resume, None for a new run.

    Raises:
        UserError: the folder holds a run that would be overwritten.
    """
    folder = Path(config.checkpoint_dir)
    last = folder / "last.pth"
    if config.resume == "auto":
        return last if last.exists() else None
    if distributed.restarted():
        launch = process.gather(distributed.launch_name())[0]
        if last.exists() and load_checkpoint(last).get("launch") == launch:
            return last  # after a restart: last.pth is newer than the checkpoint of `resume`
    if last.exists() and (config.resume is None or Path(config.resume).resolve().parent != folder.resolve()):
        raise UserError(f"{folder} holds a run already; resume it, or choose another folder for a new one",
                        terminal=f"{folder} holds a run already; resume it with --resume auto, or choose another "
                                 "--checkpoint_dir for a new one")
    return config.resume


def claim_files(config, checkpoint):
    """Refuse to overwrite what this program did not write; a run of an earlier version, without a record, gets one.

    Args:
        checkpoint: of `checkpoint_to_resume`.

    Raises:
        UserError: the folder has a file of somebody else, with a name that the run needs.
    """
    folder = Path(config.checkpoint_dir)
    best, log = folder / "best_model.pth", folder / "metrics.jsonl"
    goes_on = checkpoint is not None and Path(checkpoint).resolve() == (folder / "last.pth").resolve()
    if goes_on:  # the log is this run's, also when a disk has damaged it
        names = ("metrics.jsonl", *(() if (folder / WRITTEN).exists() else ("best_model.pth", "curves.png")))
        record_written(folder, {name: folder / name for name in names if (folder / name).is_file()})
    check_ours((best, log), (log,))


def check_start(config):
    """Check what the run reads and exports, before its folder is made.

    Raises:
        ConfigError: a folder of scenes is missing. UserError: the checkpoint to begin from is missing or none, or as
            in `check_export`.
    """
    composed = config.synthesize or uses_layers_alone(config)
    if not config.data_dir and not (config.val_dir and (config.train_dir or composed)):
        raise ConfigError("no data set: name its folder", "data_dir")
    if config.export:
        check_export(config)
    for own in ("val_dir",) if composed else ("train_dir", "val_dir"):
        name = own if getattr(config, own) else "data_dir"
        if not Path(getattr(config, name)).is_dir():
            raise ConfigError(f"{getattr(config, name)}: no such folder", name)
    if distributed.restarted():
        return  # the run's folder has a newer checkpoint
    if config.resume not in (None, "auto"):
        check_archive(config.resume, "resume")
    elif config.init_from and not (config.resume and (Path(config.checkpoint_dir) / "last.pth").exists()):
        check_archive(config.init_from, "init_from")


def check_export(config):
    """Raise UserError if `export` cannot be written or would replace a checkpoint of the run."""
    export, folder = Path(config.export).resolve(), Path(config.checkpoint_dir).resolve()
    if export in (folder / "last.pth", folder / "best_model.pth"):
        raise ConfigError(f"{config.export}: would replace a checkpoint of the run by weights alone; choose another "
                          "name", "export")
    if config.init_share and not config.init_from:
        raise ConfigError("a share of the starting weights needs these weights", "init_share", "init_from")
    check_writable(config.export)
    if export.exists():
        load_checkpoint(export)  # a file of another kind is not replaced
    for name in os.listdir(export.parent):  # left by a run that was killed while exporting
        if is_temporary(name) and name.startswith(f".{export.stem[:40]}.") and name.endswith(export.suffix):
            remove_temporary(export.parent / name)
