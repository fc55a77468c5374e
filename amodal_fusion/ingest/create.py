"""Make a data set from a folder of raw results, with a report on every scene."""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

from amodal_fusion.data.dataset_folder import (
    RECORD_COLUMNS,
    RECORDS,
    add_record,
    agree_with_earlier_run,
    check_removable,
    clear_leftovers,
    existing_scenes,
    is_done,
    read_records,
    remove_or_report_others,
    remove_scene,
    take_data_set,
    tidy_records,
    tidy_rows,
    write_manifest,
    write_scene_folder,
)
from amodal_fusion.data.names import case_twins, print_unportable, printable
from amodal_fusion.data.splits import LISTS, write_lists
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.files import atomic_file, fingerprint, ignores_case, plain_cell
from amodal_fusion.ingest.hole_cutting import NewHole
from amodal_fusion.ingest.layouts import find_raw_scenes
from amodal_fusion.ingest.raw_scenes import keep_numbers, read_raw_scene
from amodal_fusion.ingest.report import REPORT_COLUMNS, append_report, print_alike, print_report
from amodal_fusion.pools import Failure, Helpers

# Options that decide how scenes look: a resumed run must have the same values.
SHAPING = ("n_max_completions", "keep_numbers", "resize", "img_size", "mask_hole", "background", "cut_hole",
           "remove_object", "seed")


SKIPPED_COLUMNS = ("scene", "fault")
TABLES = {RECORDS: RECORD_COLUMNS, "report.csv": REPORT_COLUMNS, "skipped.csv": SKIPPED_COLUMNS}


@dataclass
class Created:
    """What one run of `create_dataset` did."""

    raw_scenes: list  # of RawScene, all that were found
    reports: dict  # scene id → report of `read_raw_scene`, for scenes that this run wrote
    skipped: dict  # scene id or folder → fault
    share_bad: float  # of all scenes


def create_dataset(config):
    """Write every scene below `config.input_dir` to `config.output_dir`, and with `config.split` the lists.

    Args:
        config: CreateConfig of amodal_fusion.prepare.

    Returns:
        Created.

    Raises:
        ConfigError: options or folders contradict each other, or the output is not a data set of this program.
    """
    output = Path(config.output_dir)
    _check_options(config, output)
    raw_scenes, faults, unread = _find_scenes(config, output)
    lock = take_data_set(  # noqa: F841 held until this function returns
        output, TABLES, LISTS if config.split else (), [raw.id for raw in raw_scenes])
    agree_with_earlier_run("create", SHAPING, config, output)
    clear_leftovers(output)
    if ignores_case(output):
        for pair in case_twins(raw.id for raw in raw_scenes).items():
            faults |= dict.fromkeys(pair, f"{output}: its disk ignores case, and {' and '.join(pair)} would be one "
                                          "folder; rename one")
        raw_scenes = [raw for raw in raw_scenes if raw.id not in faults]
    print_unportable([raw.id for raw in raw_scenes])
    made_from = {raw.id: fingerprint(raw) for raw in raw_scenes}
    todo = _remove_outdated(raw_scenes, faults, made_from, config, output)
    write_manifest("create", config, output, complete=False)
    reports, skipped = _create_scenes(todo, made_from, config, output)
    skipped = {printable(name, ""): printable(fault, "") for name, fault in faults.items()} | skipped

    clear_leftovers(output)  # of processes that were killed
    tidy_rows(output / "report.csv", REPORT_COLUMNS, map(plain_cell, existing_scenes(output)),
              key=REPORT_COLUMNS.index("file"))
    tidy_records(output, existing_scenes(output))
    print_report(raw_scenes, reports, skipped, config.input_dir, LISTS[2])
    print_alike("not read", [(printable(folder), printable(text, "")) for folder, text in unread], {}, "")
    with atomic_file(output / "skipped.csv", owned=True) as temporary, \
            open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([SKIPPED_COLUMNS, *((plain_cell(name), plain_cell(fault))
                                                       for name, fault in sorted(skipped.items()))])
    write_manifest("create", config, output, complete=True, skipped=skipped)
    found = len(raw_scenes) + len(faults)
    if config.split and found > len(skipped):
        write_lists(output, config)
    return Created(raw_scenes, reports, skipped, len(skipped) / found)


def _check_options(config, output):
    """Raise ConfigError if options contradict each other or a folder cannot be used."""
    if not Path(config.input_dir).is_dir():
        raise ConfigError(f"{config.input_dir}: no such folder", "input_dir")
    if Path(config.input_dir).resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"{output} lies inside the input folder and would be read as results; choose another one",
                          "output_dir")
    if config.cut_hole and config.remove_object:
        raise ConfigError("a scene gets one hole: cut it by a policy or remove an object, not both", "cut_hole",
                          "remove_object")
    if config.photos and not Path(config.photos).is_dir():
        raise ConfigError(f"{config.photos}: no such folder", "photos")


def _find_scenes(config, output):
    """As `find_raw_scenes`, with what is not read, [(folder, text)].

    Raises:
        ConfigError: there is no scene, or one lies in the output folder.
    """
    unread = []
    raw_scenes, faults = find_raw_scenes(config.input_dir, config.photos, unread)
    if not raw_scenes and not faults:
        print_alike("not read", [(printable(folder), printable(text, "")) for folder, text in unread], {}, "")
        raise ConfigError(f"{config.input_dir}: no scene in it (original, partial, mask, comp1 … in one folder each, "
                          "or <id>.jpg, <id>_partial.jpg, <id>_comp1.png …); docs/formats.md lists all formats",
                          "input_dir")
    for folder in {raw.folder for raw in raw_scenes}:
        if output.resolve() in folder.resolve().parents:
            raise ConfigError(f"{folder} is a link into the output folder, whose scenes would be read as results; "
                              "remove the link", "output_dir")
    return raw_scenes, faults, unread


def _remove_outdated(raw_scenes, faults, made_from, config, output):
    """Remove scenes of earlier runs that are out of date; returns the raw scenes still to be read."""
    records = read_records(output)
    todo = [raw for raw in raw_scenes
            if config.overwrite or not is_done(output, raw.id, records, made_from[raw.id])]
    changed = sum((output / raw.id).is_dir() for raw in todo)
    bad_now = set(faults) & set(records) - set(made_from)
    check_removable(output, {*(raw.id for raw in todo), *bad_now}, config.overwrite)
    for scene_id in bad_now:
        remove_scene(output / scene_id)
    print(printable(f"{len(raw_scenes)} scenes below {config.input_dir}, {len(raw_scenes) - len(todo)} already there")
          + (f", {changed} are made again because their files changed" if changed and not config.overwrite else ""))
    remove_or_report_others(made_from, output, config.overwrite, sure=not faults)
    return todo


def _create_scenes(todo, made_from, config, output):
    """Make scenes in `config.workers` processes; returns {scene id: report} and {scene id: fault}."""
    reports, skipped = {}, {}
    with Helpers(partial(create_scene, config=config), config.workers) as helpers:
        jobs = helpers.map(todo, 4 * config.workers)
        for raw, report in tqdm(jobs, total=len(todo), desc="create", disable=None):
            if isinstance(report, Failure):  # of this scene; the others continue
                skipped[raw.id] = printable(report)
                remove_scene(output / raw.id)
                continue
            reports[raw.id] = report
            append_report(output / "report.csv", raw, report)
            add_record(output, raw.id, made_from[raw.id])
    return reports, skipped


def create_scene(raw, config):
    """Write one scene folder, complete or not at all; returns its report (see `read_raw_scene`)."""
    cv2.setNumThreads(0)  # one process per core is enough
    new_hole = NewHole(config.cut_hole, config.remove_object, config.seed)
    try:
        scene, report = read_raw_scene(raw, config.n_max_completions, config.mask_hole, config.background, new_hole)
    except (ValueError, IndexError, ArithmeticError, cv2.error) as error:  # an odd file must not stop other scenes
        raise SceneError(f"{raw.folder}: unforeseen error ({error!r}); please report it") from error
    if config.keep_numbers:
        keep_numbers(scene, report)
    if config.resize:
        scene = scene.resized((config.img_size, config.img_size))
        if not scene.mask.any():
            raise SceneError(f"{raw.folder}: the hole vanishes at this size; use a larger one", "img_size", "resize")
    report["trainable"] = scene.original is not None
    write_scene_folder(Path(config.output_dir), scene)
    return report
