"""The folder of a run: one run at a time, seen by all its processes, and written over by none that was not asked to."""

import contextlib
import os
import secrets
import time
from pathlib import Path

from amodal_fusion import distributed
from amodal_fusion.checkpoints import check_writable, load_checkpoint
from amodal_fusion.errors import ConfigError, UserError
from amodal_fusion.files import is_temporary, lock_run_dir, remove_temporary, write_text

WORD = ".run"  # file of a word that the main process writes and the others look for


def lock_checkpoint_dir(config, process):
    """Make the run's folder and keep other runs out of it.

    Returns:
        what holds the lock, to be kept until the process ends.

    Raises:
        UserError: another run is writing there, or not every process sees that folder.
    """
    folder = Path(config.checkpoint_dir)
    lock = lock_run_dir(folder) if process.is_main else None
    if process.any(process.is_main and lock is None):
        raise UserError(f"{folder}: another run is writing there; wait for it, or choose another folder",
                        "checkpoint_dir")
    word = secrets.token_hex()
    if process.is_main:
        write_text(folder / WORD, word)
    word = process.gather(word)[0]  # the others wait until it is there
    if process.any(not reads(folder / WORD, word)):
        raise UserError(f"not every process sees the same {folder}; put it on a disk that all nodes share",
                        "checkpoint_dir")
    return lock


def reads(path, text, patience=10):
    """Whether that is what stands in a file; a disk of several machines may take some seconds to show it."""
    for _ in range(10 * patience):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return True
        time.sleep(0.1)
    return False


def checkpoint_to_resume(config, process):
    """The checkpoint to go on from, None for a new run.

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
            return last  # what was done since --resume PATH is not done again
    if last.exists() and (config.resume is None or Path(config.resume).resolve().parent != folder.resolve()):
        raise UserError(f"{folder} holds a run already; resume it, or choose another folder for a new one",
                        terminal=f"{folder} holds a run already; resume it with --resume auto, or choose another "
                                 "--checkpoint_dir for a new one")
    return config.resume


def check_export(config):
    """Raise UserError when the weights of `export` cannot be written, or would replace a checkpoint of the run."""
    export, folder = Path(config.export).resolve(), Path(config.checkpoint_dir).resolve()
    if export in (folder / "last.pth", folder / "best_model.pth"):
        raise ConfigError(f"{config.export}: would replace a checkpoint of the run by weights alone; choose another "
                          "name", "export")
    if config.init_share and not config.init_from:
        raise ConfigError("a share of the starting weights needs these weights", "init_share", "init_from")
    check_writable(config.export)
    for name in os.listdir(export.parent):  # left by a run that was killed while exporting
        if is_temporary(name) and name.startswith(f".{export.stem[:40]}.") and name.endswith(export.suffix):
            remove_temporary(export.parent / name)
