"""What each scene of a data set was made from, so that a run that continues knows what is done, and still true."""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path

from fusion.files import atomic_file

RECORDS = "made_from.csv"
TO_BE_MADE = "to be made anew"  # no digest
COLUMNS = ("scene", "made_from", "files")


def digest(source):
    """Hexadecimal digest of a dataclass, list or None; paths in it count by the name, time and size of their files."""
    def plain(value):
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        if isinstance(value, Path):
            state = value.stat() if value.exists() else None
            is_file = state is not None and value.is_file()
            return [value.name, state.st_size, state.st_mtime_ns] if is_file else value.name
        return value

    text = json.dumps(plain(source), default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def read_records(output):
    """Scene id → (digest, names of its files); the last line of a scene counts, torn lines do not."""
    path, records = Path(output) / RECORDS, {}
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and row[2].endswith(".png")]
        records = {scene_id: (made_from, files) for scene_id, made_from, files in rows}
    return records


def add_record(output, scene_id, made_from):
    """Note that the scene's folder is whole."""
    path = Path(output) / RECORDS
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow((scene_id, made_from, _files(Path(output) / scene_id)))


def is_done(output, scene_id, records, made_from):
    """Whether the scene is there, whole, and from the same files with the same options; what an earlier version of this
    program wrote has no record and passes when it is whole."""
    folder = Path(output) / scene_id
    files = _files(folder)
    if scene_id in records:
        return records[scene_id] == (made_from, files)
    names = set(files.split())
    return {"mask.png", "partial.png", "comp1.png"} <= names and all((folder / name).stat().st_size for name in names)


def _files(folder):
    return " ".join(sorted(path.name for path in folder.glob("*.png"))) if folder.is_dir() else ""


def tidy_rows(path, scene_ids, key=0):
    """Rewrite a CSV file that was appended to: only scenes that are there, of each only what was written last.

    Args:
        key: the column that tells rows of one scene apart; when it repeats, the rows before are of an earlier run.
    """
    if not path.exists():
        return
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    scene_ids, kept = set(scene_ids), {}
    for row in rows:
        if len(row) == len(head) and row[0] in scene_ids:
            before = kept.setdefault(row[0], [])
            if any(row[key] == other[key] for other in before):
                before.clear()
            before.append(row)
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *(row for rows in kept.values() for row in rows)])
