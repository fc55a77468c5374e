"""The scene folders of a data set: a file at a time, mask.png last, and removed only where this program wrote them."""

import csv
import dataclasses
import io
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from sys import intern

import yaml

from amodal_fusion.data.scenes import write_scene
from amodal_fusion.errors import ConfigError, UserError
from amodal_fusion.files import (
    WRITTEN,
    alone,
    atomic_file,
    check_ours,
    clear_folder,
    is_ours,
    is_temporary,
    ours_in,
    plain_cell,
    publish,
    record_written,
    remove_temporary,
    take_output,
    write_text,
)

MANIFEST = "dataset.yaml"
REMEDY = "choose another output folder, or overwrite this one"


def existing_scenes(output):
    """Ids of the scenes in a data set."""
    return {path.name for path in output.iterdir()
            if not path.name.startswith(".") and os.path.isfile(path / "mask.png")}


def take_data_set(output, tables, names, scene_ids, shared=False):
    """Make the output folder and keep other runs out of it. Nothing has been touched when this raises.

    Args:
        tables: {name: columns} of the CSV files that a run writes beside dataset.yaml; names: its other files.
        scene_ids: the scenes that it may write; shared: other shards may write theirs meanwhile.

    Returns:
        the lock, to be held.

    Raises:
        ConfigError: a file or folder is there that this program did not write, or another run is writing there.
    """
    def check():
        written = [output / name for name in (MANIFEST, *tables, *names)]
        # A run that was killed has appended rows after it recorded the file. Earlier versions kept no record.
        killed = () if is_complete(output) else tuple(output / name for name in tables)
        old = [path for path in written if _is_of_earlier_version(path, tables)]
        try:
            check_ours([path for path in written if path not in old], killed)
        except UserError as error:
            raise ConfigError(str(error), "output_dir") from None
        taken = [] if (output / MANIFEST).exists() else [name for name in scene_ids if os.path.lexists(output / name)]
        for folder in (output / name for name in sorted(taken)):
            if not folder.is_dir() or folder.is_symlink() or any(folder.iterdir()):
                raise ConfigError(f"{folder} exists, but there is no {MANIFEST} beside it. This is no data set of this "
                                  "program and would be overwritten; choose another folder", "output_dir")
        return {path.name: path for path in old}

    check()
    lock = take_output(output, shared)
    with alone(lock) if shared else nullcontext():
        old = check()
        if old:
            record_written(output, old)
    return lock


def is_complete(output):
    """Whether the last run that wrote this data set came to its end."""
    return bool((_manifest(output) or {}).get("complete"))


def _manifest(output):
    """The content of dataset.yaml; None unless it is what this program writes, to the byte."""
    path = output / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = yaml.safe_load(text)
        ours = manifest["made_by"].startswith("prepare_dataset.py ") and isinstance(manifest["options"], dict)
        return manifest if ours and text == yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True) else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def _is_of_earlier_version(path, tables):
    """Whether the content of a file proves that a version of this program wrote it that kept no record.

    The record may also have been lost, or the file emptied, by a power failure.
    """
    record = path.parent / WRITTEN
    if path.is_symlink() or not path.is_file():
        return False
    if path.name in tables and path.stat().st_size == 0 and _manifest(path.parent) is not None:
        return True
    if record.exists() and record.stat().st_size:
        return False
    if path.name == MANIFEST:
        return _manifest(path.parent) is not None
    if path.name not in tables or _manifest(path.parent) is None:
        return False
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return file.readline() == ",".join(tables[path.name]) + "\r\n"


def check_removable(output, scene_ids, overwrite):
    """Raise ConfigError when a folder that a run would empty holds anything that this program did not write.

    Args:
        scene_ids: the scenes that are made again or removed; with `overwrite` these are all.
    """
    for scene_id in sorted({*scene_ids, *(existing_scenes(output) if overwrite else ())}):
        folder = output / scene_id
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ConfigError(f"{folder}: a link or a file, and no folder that this program wrote; move it, or choose "
                              "another output folder", "output_dir")
        if not folder.is_dir():
            continue
        found = set(os.listdir(folder))
        strange = sorted(name for name in found - set(ours_in(folder)) - {WRITTEN} if not is_temporary(name))
        if strange and WRITTEN not in found:
            raise ConfigError(f"{folder}: has no record of what this program wrote there: it is of another program, or "
                              "of an earlier version; move it, or choose another output folder", "output_dir")
        if strange:
            raise ConfigError(f"{folder / strange[0]}: was not written by this program, or was changed since, and its "
                              "folder would be made again; move it, or choose another output folder", "output_dir")


def agree_with_earlier_run(command, shaping, config, output):
    """Raise ConfigError if the data set at `output` was made by another command or with other options.

    Args:
        shaping: names of the options that decide how scenes look.
    """
    path = output / MANIFEST
    if config.overwrite or not path.exists():
        return
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        made_by, options = manifest["made_by"].split()[-1], manifest["options"]
        # an option that is not in the file is newer than the data set, which has its default
        earlier = {name: options.get(name, getattr(type(config), name, None)) for name in shaping}
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: does not say how the data set was made ({error!r}); {REMEDY}",
                          "output_dir", "overwrite") from None
    if made_by != command:
        raise ConfigError(f"{output} was made by {made_by}; {REMEDY}", "output_dir", "overwrite")
    if command == "create":  # scenes without a hole may get one in this run
        earlier = {name: value for name, value in earlier.items()
                   if not (name == "seed" and not earlier["cut_hole"])
                   and not (name == "img_size" and not earlier["resize"])  # it had no effect
                   and not (name in ("cut_hole", "remove_object") and value is None)}
    for name, value in earlier.items():
        if value != getattr(config, name):
            raise ConfigError(f"{output} was made with {name}={value}, not {getattr(config, name)}; use that value, "
                              "choose another output folder, or overwrite this one", "output_dir", "overwrite")


def write_manifest(command, config, output, complete, skipped=None):
    """Write dataset.yaml: options, counts, image size, skipped scenes."""
    manifest = {
        "made_by": f"prepare_dataset.py {command}",
        "complete": complete,
        "options": {key: value for key, value in dataclasses.asdict(config).items() if key not in ("workers", "shard")},
        "image_size": [config.img_size] * 2 if getattr(config, "resize", True) else "as they came",
        "scenes": len(existing_scenes(output)),
        "skipped": skipped or {},
    }
    write_text(output / MANIFEST, yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True), owned=True)


def remove_or_report_others(scene_ids, output, overwrite, sure=True):
    """Remove scenes of earlier runs that are not among `scene_ids` with `overwrite`; else print their number.

    Args:
        sure: whether all inputs could be read; if not, nothing is removed, since the scenes may come from the others.
    """
    others = sorted(existing_scenes(output) - set(scene_ids))
    if overwrite:
        for scene_id in others if sure else ():
            remove_scene(output / scene_id)
        for scene_id in existing_scenes(output):
            add_record(output, scene_id, TO_BE_MADE)  # if this run is stopped, the next one continues
    if others:
        print(f"{len(others)} scenes of earlier runs are not among them"
              + (" and were removed" if overwrite and sure else
                 " and stay because some inputs could not be read" if overwrite else "; --overwrite removes them")
              + f" (such as {others[0]})")


def write_scene_folder(output, scene):
    """Write a scene's folder; mask.png comes last, and without it there is no scene.

    Raises:
        UserError: a file is there that this program did not write.
    """
    with publish(output / scene.id, "mask.png") as stage:
        write_scene(stage, scene)


def remove_scene(folder):
    """Remove what this program wrote there, mask.png first, and the folder if nothing else is in it."""
    if is_ours(folder / "mask.png") and not folder.is_symlink():
        (folder / "mask.png").unlink()
    clear_folder(folder)


def clear_leftovers(output):
    """Remove the half-written scene folders of a run that was killed."""
    for name in filter(is_temporary, os.listdir(output)):
        remove_temporary(output / name)


# What each scene was made from: a resumed run repeats the scenes whose sources changed.
RECORDS = "made_from.csv"
TO_BE_MADE = "to be made again"  # no digest
RECORD_COLUMNS = ("scene", "made_from", "files")


def read_records(output):
    """Scene id → (digest, names of its files). The last line of a scene counts; incomplete lines are ignored."""
    path, records = Path(output) / RECORDS, {}
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = (row for row in csv.reader(file) if len(row) == 3 and row[2].endswith(".png"))
            # as `plain_cell` wrote them
            records = {cell[plain_cell(cell[1:]) == cell :]: (made_from, intern(files))
                       for cell, made_from, files in rows}
    return records


def add_record(output, scene_id, made_from, tables=None):
    """Record that the scene's folder is complete; `tables`: folder of the record, if not the data set."""
    row = plain_cell(scene_id), made_from, _files(Path(output) / scene_id)
    append_rows(Path(tables or output) / RECORDS, RECORD_COLUMNS, [row])


def tidy_records(output, scene_ids):
    tidy_rows(Path(output) / RECORDS, RECORD_COLUMNS, map(plain_cell, scene_ids))


def is_done(output, scene_id, records, made_from):
    """Whether the scene is complete and was made from the same files with the same options.

    A scene without a record is not done: a stopped run may have written its folder, but its sources are unknown."""
    return records.get(scene_id) == (made_from, _files(Path(output) / scene_id))


def _files(folder):
    """Names of the pictures in a scene's folder, without those that a power failure emptied."""
    return " ".join(sorted(path.name for path in folder.glob("*.png") if path.stat().st_size))


def append_rows(path, columns, rows):
    """Append to a CSV file that begins with `columns`, even if a killed run left half a line or an empty file."""
    if not os.path.lexists(path) or path.stat().st_size == 0:
        write_text(path, ",".join(columns) + "\r\n", owned=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    with open(path, "r+b") as file:  # one write: all rows or none
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            writer.writerow(())
        writer.writerows(rows)
        file.write(text.getvalue().encode())


def append_table(path, columns, table):
    """Append the rows of another CSV file with the same columns, if there is one."""
    if table.exists():
        append_rows(path, columns, ())
        with open(table, "rb") as source, open(path, "ab") as target:
            source.readline()
            shutil.copyfileobj(source, target)


def tidy_rows(path, columns, scene_ids, key=0):
    """Rewrite a CSV file that was appended to: existing scenes in the order of their ids, of each the latest rows.

    Rows of a scene are appended together. Only their places are kept in memory.

    Args:
        key: column with a different value in every row of a scene; if a value repeats, the rows before are older.
    """
    if not path.exists():
        return
    scene_ids, places, scene, keys = set(scene_ids), {}, None, set()
    with open(path, "rb") as file:
        for row, begin, end in _rows_with_places(file):
            if len(row) != len(columns):
                scene = None
                continue
            if row[0] != scene or row[key] in keys:
                scene, first, keys = row[0], begin, set()
            keys.add(row[key])
            if scene in scene_ids:
                places[scene] = first, end
        record_written(path.parent, {path.name: path})  # as it has grown
        with atomic_file(path, owned=True) as temporary, open(temporary, "wb") as tidy:
            tidy.write((",".join(columns) + "\r\n").encode())
            for scene in sorted(places):
                first, end = places[scene]
                file.seek(first)
                tidy.write(file.read(end - first).rstrip(b"\r\n") + b"\r\n")


def _rows_with_places(file):
    """(row, position of its first byte, position after it) of a CSV file that is open for bytes."""
    begin = end = 0

    def lines():
        nonlocal end
        for line in file:
            end += len(line)
            yield line.decode(errors="replace")

    for row in csv.reader(lines()):
        yield row, begin, end
        begin = end
