"""Atomic writes, a record of the files that this program wrote, and locks of folders.

This program deletes and overwrites only files that it wrote itself. In each folder WRITTEN records the size, time and
digest of every such file. The name of a temporary file contains a check sum that no other program uses.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from amodal_fusion.errors import ConfigError, UserError

WRITTEN = ".written_by_amodal_fusion.json"  # in a folder: name of a file → its states, see `record_written`
TEMPORARY = re.compile(r"\.(?P<name>.*\.[0-9a-f]{8})(?P<check>[0-9a-f]{16})\.tmp(\..+)?", re.DOTALL)
UMASK = os.umask(0)  # read once at import: reading sets it, which is not safe in threads
os.umask(UMASK)


class Locked(ConfigError):
    """Another run is writing to the output folder."""


def temporary_path(path):
    """A free hidden name beside `path` that `is_temporary` recognizes."""
    while True:
        name = f"{path.stem[:40]}.{secrets.token_hex(4)}"
        temporary = path.with_name(f".{name}{_check_sum(name)}.tmp{path.suffix}")
        if not os.path.lexists(temporary):
            return temporary


def is_temporary(name):
    """Whether this program made this name for an unfinished file or folder."""
    match = TEMPORARY.fullmatch(name)
    return match is not None and match["check"] == _check_sum(match["name"])


def _check_sum(name):
    return hashlib.blake2b(name.encode(errors="surrogateescape"), key=b"amodal_fusion", digest_size=8).hexdigest()


@contextmanager
def atomic_file(path, owned=False):
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds, remove it if not.

    Args:
        owned: never overwrite a file of others, and record the new one as ours.

    Raises:
        UserError: `owned`, and the file at `path` is not ours.
    """
    path = Path(path)
    if owned:
        check_ours([path])
    temporary = temporary_path(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        yield temporary
        with suppress(OSError):  # some file systems lack permissions
            os.chmod(temporary, 0o666 & ~UMASK)
        if owned:
            record_written(path.parent, {path.name: temporary})
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text, owned=False):
    """Write UTF-8 text atomically; see `atomic_file`."""
    with atomic_file(path, owned) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _record(folder):
    """The record of a folder, {name: [[size, time, digest], …]}; {} if missing or empty, None if it is not ours."""
    try:
        text = (folder / WRITTEN).read_text(encoding="utf-8")
        if not text:  # emptied by a power failure
            return {}
        content = json.loads(text)
        return dict(content["files"]) if content["written_by"] == "amodal_fusion" else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _digest(path, size):
    """Digest of the first `size` bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _has_state(path, states, grown=False):
    """Whether the file at `path`, no link, has one of these states or is empty; with `grown`, or begins so."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            return False
        if states and not found.st_size:  # emptied by a power failure; there is nothing to lose
            return True
        for size, time, digest in states:
            if found.st_size == size and found.st_mtime_ns == time:
                return True
            if (found.st_size == size or (grown and found.st_size > size > 0)) and _digest(path, size) == digest:
                return True
        return False
    except (OSError, ValueError, TypeError):
        return False


def record_written(folder, files):
    """Record files as written by this program, before or after they get their names.

    The old state of a name is kept beside the new one, so that the file is known even if the run is killed between.
    Only one process or thread at a time may do this in a folder.

    Args:
        folder: Path; files: {name: Path of the content, the file itself or a temporary one}.

    Raises:
        UserError: the record's name is taken by a file of others.
    """
    record = _record(folder)
    if record is None:
        raise UserError(f"{folder / WRITTEN}: was not written by this program; move it elsewhere")
    for name, content in files.items():
        found = os.stat(content)
        state = [found.st_size, found.st_mtime_ns, _digest(content, found.st_size)]
        record[name] = [*(old for old in record.get(name, ()) if _has_state(folder / name, [old], grown=True)), state]
    _write_record(folder, record)


def _write_record(folder, record):
    with atomic_file(folder / WRITTEN) as temporary:
        temporary.write_text(json.dumps({"written_by": "amodal_fusion", "files": record}, ensure_ascii=True))


def is_ours(path, grown=False):
    """Whether this program wrote the file at `path`, and the file is unchanged.

    Args:
        grown: rows may have been appended.
    """
    path = Path(path)
    if path.name == WRITTEN:
        return not path.is_symlink() and bool(_record(path.parent))
    return _has_state(path, (_record(path.parent) or {}).get(path.name, ()), grown)


def check_ours(paths, grown=()):
    """Raise UserError if a file at one of `paths` is not ours; those in `grown` may have new rows."""
    for path in paths:
        if os.path.lexists(path) and not is_ours(path, path in grown):
            raise UserError(f"{path}: was not written by this program, or was changed since; move it elsewhere, or "
                            "choose another output folder")


def remove_ours(path, grown=False):
    """Remove the file at `path` if it is ours; returns whether `path` is free now."""
    if is_ours(path, grown):
        Path(path).unlink()
    return not os.path.lexists(path)


def clear_folder(folder):
    """Remove our files in a folder, and then the folder if it is empty. A link to a folder is not followed.

    Returns:
        names of the remaining files.
    """
    if folder.is_symlink() or not folder.is_dir():
        return []
    record = _record(folder) or {}
    for name, states in record.items():
        if "/" not in name and _has_state(folder / name, states):
            (folder / name).unlink()
    for name in filter(is_temporary, os.listdir(folder)):
        remove_temporary(folder / name)
    left = [name for name in os.listdir(folder) if name != WRITTEN]
    if not left:
        if record:
            (folder / WRITTEN).unlink()
        with suppress(OSError):
            folder.rmdir()
    return left


def ours_in(folder):
    """Names of the files in a folder that are ours, sorted."""
    record = _record(folder) or {}
    return sorted(name for name, states in record.items() if "/" not in name and _has_state(folder / name, states))


@contextmanager
def publish(folder, last=None, keep=False):
    """Yield a temporary folder; if the block succeeds, its files replace all of ours in `folder`.

    Args:
        folder: Path, made if missing.
        last: name of the file that is removed first and moved last: while it exists, all others exist.
        keep: our files with other names stay.

    Raises:
        UserError: a file of the same name is not ours; nothing is changed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage = temporary_path(folder / "stage")
    stage.mkdir()
    try:
        yield stage
        names = sorted(os.listdir(stage), key=lambda name: (name == last, name))
        check_ours([folder / name for name in names])
        before = [] if keep else ours_in(folder)
        record_written(folder, {name: stage / name for name in names})
        for name in sorted(before, key=lambda name: name != last):
            (folder / name).unlink()
        for name in names:
            os.replace(stage / name, folder / name)
    finally:
        remove_temporary(stage)


def remove_temporary(path):
    """Remove an unfinished file or folder of a run that was killed."""
    assert is_temporary(path.name)
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            with suppress(OSError):
                inner.unlink()
        with suppress(OSError):
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


def plain_cell(text):
    """Text for a CSV cell that a spreadsheet never runs as a formula, even if it begins with '='."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def fingerprint(source):
    """Hexadecimal digest of a dataclass, list, tuple or plain value.

    A path contributes name, size and time of its file; a folder or missing file only its name.
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


def lock_run_dir(folder, shared=False):
    """Make `folder` and lock it until this process ends.

    Unfinished files of killed runs are removed.

    Args:
        shared: several processes hold this lock together, and none of them removes files; see `alone`.

    Returns:
        the open lock file, to be kept open; None if another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        import fcntl

        # lockf, not flock: loader processes would inherit a flock and hold it after a killed run
        if shared:  # the first byte; the second is for `alone`, and who wants the file alone takes all bytes
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 0)
        else:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        return None
    except (ImportError, OSError) as error:  # Windows has no fcntl; some network file systems have no locks
        print(f"note: {folder} cannot be locked ({error}); do not start a second run there", file=sys.stderr)
    for name in () if shared else filter(is_temporary, os.listdir(folder)):
        remove_temporary(folder / name)
    return lock


def ignores_case(folder):
    """Whether the disk of a folder that `lock_run_dir` made takes names that differ only in case for one."""
    return (folder / ".LOCK").exists() and (folder / ".LOCK").samefile(folder / ".lock")


@contextmanager
def alone(lock):
    """In this context no other holder of the same shared lock is in it; waits for them."""
    try:
        import fcntl

        fcntl.lockf(lock, fcntl.LOCK_EX, 1, 1)
    except (ImportError, OSError):  # no locks here, as `lock_run_dir` said
        yield
        return
    try:
        yield
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, 1)


def take_output(output, shared=False):
    """Make the output folder and lock it as `lock_run_dir`; returns the lock, to be held.

    Raises:
        Locked: another run is writing to it.
    """
    lock = lock_run_dir(output, shared)
    if lock is None:
        raise Locked(f"{output}: another run is writing to it; wait for it, or use another output folder"
                          + launcher_hint(), "output_dir")
    return lock


def launcher_hint():
    """What to say when a launcher started several copies of a program that takes them for separate runs; else ""."""
    for name in ("OMPI_COMM_WORLD", "PMI", "PMIX", "SLURM"):
        size = os.environ.get("SLURM_NTASKS" if name == "SLURM" else f"{name}_SIZE", "1")
        if "RANK" not in os.environ and size.isdigit() and int(size) > 1:
            return (f". The launcher started {size} copies ({name}_…), each a run of its own; start one, or for one "
                    "run over several processes use torchrun")
    return ""
