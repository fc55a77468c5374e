"""The scene folders of a data set: written completely or not at all, removed only if this program wrote them."""

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


def existing_scenes(output):
    """Ids of the scenes in a data set."""
    return {path.name for path in output.iterdir()
            if not path.name.startswith(".") and os.path.isfile(path / "mask.png")}


def check_removable(output, scene_ids, overwrite):
    """Raise ConfigError if a scene folder that may be removed was not made by this program.

    These are the folders of `scene_ids`, and with `overwrite` of all scenes."""
    made_here = (output / "dataset.yaml").exists()
    for scene_id in sorted({*scene_ids, *(existing_scenes(output) if overwrite else ())}):
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
    """Raise ConfigError if the data set at `output` was made by another command or with other options.

    Args:
        shaping: names of the options that decide how scenes look.
    """
    path = output / "dataset.yaml"
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
        "options": {key: value for key, value in dataclasses.asdict(config).items() if key != "workers"},
        "image_size": [config.img_size] * 2 if getattr(config, "resize", True) else "as they came",
        "scenes": len(existing_scenes(output)),
        "skipped": skipped or {},
    }
    write_text(output / "dataset.yaml", yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True))


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
    """Write a scene's folder completely or not at all."""
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


# What each scene was made from: a resumed run repeats the scenes whose sources changed.
RECORDS = "made_from.csv"
TO_BE_MADE = "to be made again"  # no digest
RECORD_COLUMNS = ("scene", "made_from", "files")


def read_records(output):
    """Scene id → (digest, names of its files). The last line of a scene counts; incomplete lines are ignored."""
    path, records = Path(output) / RECORDS, {}
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and row[2].endswith(".png")]
        records = {scene_id: (made_from, files) for scene_id, made_from, files in rows}
    return records


def add_record(output, scene_id, made_from):
    """Record that the scene's folder is complete."""
    append_rows(Path(output) / RECORDS, RECORD_COLUMNS, [(scene_id, made_from, _files(Path(output) / scene_id))])


def tidy_records(output, scene_ids):
    tidy_rows(Path(output) / RECORDS, RECORD_COLUMNS, scene_ids)


def is_done(output, scene_id, records, made_from):
    """Whether the scene is complete and was made from the same files with the same options.

    A scene without a record is not done: a stopped run may have written its folder, but its sources are unknown."""
    return records.get(scene_id) == (made_from, _files(Path(output) / scene_id))


def _files(folder):
    return " ".join(sorted(path.name for path in folder.glob("*.png"))) if folder.is_dir() else ""


def append_rows(path, columns, rows):
    """Append to a CSV file that begins with `columns`, even if a killed run left it empty or with half a line."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    with open(path, "a+b") as file:  # one write: all rows or none
        if not file.seek(0, os.SEEK_END):
            writer.writerow(columns)
        else:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                writer.writerow(())
        writer.writerows(rows)
        file.write(text.getvalue().encode())


def tidy_rows(path, columns, scene_ids, key=0):
    """Rewrite a CSV file that was appended to: only existing scenes, of each only the latest rows.

    Args:
        key: column with a different value in every row of a scene; if a value repeats, the rows before are older.
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
