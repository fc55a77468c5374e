"""The scene folders of a data set: written whole or not at all, and removed only where they are its own."""

import csv
import dataclasses
import io
import os
import re
import shutil
from pathlib import Path

import yaml

from amodal_fusion.data.scenes import SCENE_NAMES, SOURCES, write_scene
from amodal_fusion.errors import ConfigError
from amodal_fusion.files import atomic_file, is_temporary, remove_temporary, temporary_path, write_text

REMEDY = "choose another output folder, or overwrite this one"


def present(output):
    """Ids of the scenes in a data set."""
    return {path.name for path in output.iterdir()
            if not path.name.startswith(".") and os.path.isfile(path / "mask.png")}


def check_own(output, scene_ids, overwrite):
    """Raise ConfigError when a folder that may be removed is nothing that this program has made: one of `scene_ids`,
    with `overwrite` any scene's."""
    made_here = (output / "dataset.yaml").exists()
    for scene_id in sorted({*scene_ids, *(present(output) if overwrite else ())}):
        folder = output / scene_id
        if folder.is_symlink() or not folder.is_dir():
            continue
        if not made_here:
            raise ConfigError(f"{folder} exists, but there is no dataset.yaml beside it. This is no data set of this "
                              "program and would be overwritten; choose another folder", "output_dir")
        strange = sorted(path.name for path in folder.iterdir()
                         if not re.fullmatch(rf"({SCENE_NAMES})\.png|{re.escape(SOURCES)}", path.name))
        if strange:
            raise ConfigError(f"{folder / strange[0]}: not a file of a data set, and would be removed with its folder; "
                              "move it, or choose another output folder", "output_dir")


def agree_with_earlier_run(command, shaping, config, output):
    """Raise ConfigError when the data set at `output` was made by another command or with other options.

    Args:
        shaping: names of the options that decide what a scene looks like.
    """
    path = output / "dataset.yaml"
    if config.overwrite or not path.exists():
        return
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        made_by, options = manifest["made_by"].split()[-1], manifest["options"]
        # an option that the file lacks is newer than the data set, which then has its default
        earlier = {name: options.get(name, getattr(type(config), name, None)) for name in shaping}
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: does not say how the data set was made ({error!r}); {REMEDY}",
                          "output_dir", "overwrite") from None
    if made_by != command:
        raise ConfigError(f"{output} was made by {made_by}; {REMEDY}", "output_dir", "overwrite")
    if command == "create":  # scenes that were refused for want of a hole may get one in this run
        earlier = {name: value for name, value in earlier.items()
                   if not (name == "seed" and not earlier["cut_hole"])
                   and not (name in ("cut_hole", "remove_object") and value is None)}
    for name, value in earlier.items():
        if value != getattr(config, name):
            raise ConfigError(f"{output} was made with {name}={value}, not {getattr(config, name)}; use that value, "
                              "choose another output folder, or overwrite this one", "output_dir", "overwrite")


def write_manifest(command, config, output, complete, skipped=None):
    """dataset.yaml: options, counts, image size, skipped scenes."""
    manifest = {
        "made_by": f"prepare_dataset.py {command}",
        "complete": complete,
        "options": {key: value for key, value in dataclasses.asdict(config).items() if key != "workers"},
        "image_size": [config.img_size] * 2 if getattr(config, "resize", True) else "as they came",
        "scenes": len(present(output)),
        "skipped": skipped or {},
    }
    write_text(output / "dataset.yaml", yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True))


def leave_only(scene_ids, output, overwrite, sure=True):
    """With `overwrite`, remove the scenes of earlier runs that are none of these; else say that there are some.

    Args:
        sure: whether all that there is could be read; if not, it may be among what could not.
    """
    others = sorted(present(output) - set(scene_ids))
    if overwrite:
        for scene_id in others if sure else ():
            remove_scene(output / scene_id)
        for scene_id in present(output):
            add_record(output, scene_id, TO_BE_MADE)  # should this run be stopped, the next one goes on from there
    if others:
        print(f"{len(others)} scenes of earlier runs are not among them"
              + (" and were removed" if overwrite and sure else
                 " and stay, as not all could be read" if overwrite else "; --overwrite removes them")
              + f" (as {others[0]})")


def put_scene(output, scene):
    """Write a scene's folder whole or not at all."""
    folder, temporary = output / scene.id, temporary_path(output / "scene")
    temporary.mkdir()
    write_scene(temporary, scene)
    remove_scene(folder)
    temporary.rename(folder)


def remove_scene(folder):
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def clear_leftovers(output):
    """Remove the half-written scene folders of a run that was killed."""
    for name in filter(is_temporary, os.listdir(output)):
        remove_temporary(output / name)


# ----------------------------------------------------------------------------
# What each scene of a data set was made from, so that a run that continues knows what is done, and still true.



RECORDS = "made_from.csv"
TO_BE_MADE = "to be made again"  # no digest
RECORD_COLUMNS = ("scene", "made_from", "files")


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
    append_rows(Path(output) / RECORDS, RECORD_COLUMNS, [(scene_id, made_from, _files(Path(output) / scene_id))])


def tidy_records(output, scene_ids):
    tidy_rows(Path(output) / RECORDS, RECORD_COLUMNS, scene_ids)


def is_done(output, scene_id, records, made_from):
    """Whether the scene is complete and was made from the same files with the same options.

    A scene without a record is not: a stopped run may have written its folder, but its sources are unknown."""
    return records.get(scene_id) == (made_from, _files(Path(output) / scene_id))


def _files(folder):
    return " ".join(sorted(path.name for path in folder.glob("*.png"))) if folder.is_dir() else ""


def append_rows(path, columns, rows):
    """Append to a CSV file that begins with `columns`, also when a killed run left it empty or within a line."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    with open(path, "a+b") as file:  # one write: rows are there, or they are not
        if not file.seek(0, os.SEEK_END):
            writer.writerow(columns)
        else:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                writer.writerow(())
        writer.writerows(rows)
        file.write(text.getvalue().encode())


def tidy_rows(path, columns, scene_ids, key=0):
    """Rewrite a CSV file that was appended to: only scenes that are there, of each only what was written last.

    Args:
        key: the column that tells rows of one scene apart; when it repeats, the rows before are of an earlier run.
    """
    if not path.exists():
        return
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.reader(file))
    scene_ids, kept = set(scene_ids), {}
    for row in rows:
        if len(row) == len(columns) and row[0] in scene_ids:
            before = kept.setdefault(row[0], [])
            if any(row[key] == other[key] for other in before):
                before.clear()
            before.append(row)
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *(row for rows in kept.values() for row in rows)])
