"""Files that are whole or not there, and folders that one run at a time writes to."""

import dataclasses
import hashlib
import json
import os
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

from amodal_fusion.errors import ConfigError


@contextmanager
def atomic_file(path):
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds, remove it if not."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem[:40]}.", suffix=".tmp" + path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain_cell(text):
    """Text for a CSV file that a spreadsheet takes as text, whatever it begins with: '=…' would be run as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def fingerprint(source):
    """Hexadecimal digest of a dataclass, list, tuple or plain value.

    A path in it counts by the name, size and time of its file; a folder or a file that is not there by its name.
    """
    def plain(value):
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        if isinstance(value, Path):
            try:
                state = value.stat()
            except OSError:
                return value.name
            return [value.name, state.st_size, state.st_mtime_ns] if stat.S_ISREG(state.st_mode) else value.name
        return value

    text = json.dumps(plain(source), default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def lock_run_dir(folder):
    """Make `folder` and keep other runs out of it for as long as this process lives, however it ends.

    What killed runs were writing there is removed.

    Returns:
        the open lock file, to be kept; None when another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # on Windows, where nobody watches over this
        return lock
    try:
        # lockf, not flock: loader processes would inherit the latter and outlive a killed run for seconds
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    for leftover in folder.glob(".*.tmp*"):  # of an `atomic_file` whose process was killed
        leftover.unlink(missing_ok=True)
    return lock


def take_output(output):
    """Make the output folder and keep other runs out of it; returns the lock, to be held.

    Raises:
        ConfigError: another run is writing to it.
    """
    lock = lock_run_dir(output)
    if lock is None:
        raise ConfigError(f"{output}: another run is writing to it; wait for it, or use another --output_dir")
    return lock
