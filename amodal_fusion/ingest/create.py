"""Make a data set from a folder of raw results, with a report on every scene."""

import csv
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

from amodal_fusion.data.dataset_folder import (
    MANIFEST,
    RECORD_COLUMNS,
    RECORDS,
    add_record,
    agree_with_earlier_run,
    check_removable,
    clear_leftovers,
    existing_scenes,
    is_complete,
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
from amodal_fusion.errors import ConfigError, SceneError, UserError
from amodal_fusion.files import (
    Locked,
    alone,
    atomic_file,
    fingerprint,
    ignores_case,
    plain_cell,
    remove_ours,
    take_output,
)
from amodal_fusion.ingest.hole_cutting import NewHole
from amodal_fusion.ingest.layouts import find_raw_scenes
from amodal_fusion.ingest.raw_scenes import keep_numbers, read_raw_scene
from amodal_fusion.ingest.report import REPORT_COLUMNS, Summary, append_report, print_alike, print_report
from amodal_fusion.ingest.shards import (
    ENDED,
    Shard,
    check_count,
    remove_shards,
    shard_of,
    shards_in,
    take_over_tables,
    unfinished,
    write_ended,
)
from amodal_fusion.pools import Failure, Helpers

# Options that decide how scenes look: a resumed run must have the same values.
SHAPING = ("n_max_completions", "keep_numbers", "resize", "img_size", "mask_hole", "background", "cut_hole",
           "remove_object", "seed")

DEFAULT_SIZE = 256  # with resize
SKIPPED_COLUMNS = ("scene", "fault")
TABLES = {RECORDS: RECORD_COLUMNS, "report.csv": REPORT_COLUMNS, "skipped.csv": SKIPPED_COLUMNS}


@dataclass
class Created:
    """What one run of `create_dataset` did."""

    raw_scenes: list  # of RawScene, all that were found
    changed: bool  # whether this run wrote a scene
    skipped: dict  # scene id or folder → fault
    share_bad: float  # of all scenes
    shard: Shard | None = None  # all of this is about one shard
    missing: list = field(default_factory=list)  # numbers of the shards that have not ended


def create_dataset(config):
    """Write every scene below `config.input_dir` to `config.output_dir`, and with `config.split` the lists.

    With `config.shard`, or under a launcher, only this process's share. The shard that ends last merges all.

    Args:
        config: CreateConfig of amodal_fusion.prepare.

    Returns:
        Created.

    Raises:
        ConfigError: options or folders contradict each other, or the output is not a data set of this program.
    """
    output = Path(config.output_dir)
    shard = shard_of(config.shard)
    try:
        _check_options(config, output, shard)
        if config.resize and config.img_size is None:
            config = replace(config, img_size=DEFAULT_SIZE)
        created = _create_shard(config, output, shard) if shard else _create_all(config, output)
    except UserError as error:
        if shard:
            error.args, error.terminal = (f"{shard}: {error}",), error.terminal and f"{shard}: {error.terminal}"
        raise
    if created.missing:
        print(f"{shard} has ended, but not {', '.join(f'{number}/{shard.count}' for number in created.missing)}. The "
              "last to end merges all; a run without shards makes what is missing, and merges")
    if created.missing or created.shard is None:
        return created
    try:
        return _create_all(config, output)
    except Locked:
        print(f"{shard} has ended; another one merges")
        return created


def _create_shard(config, output, shard):
    """Make the scenes of one shard."""
    tables = shard.folder(output)
    raw_scenes, faults, unread = _find_scenes(config, output, shard)
    lock = take_data_set(output, TABLES, LISTS if config.split else (), [raw.id for raw in raw_scenes], shared=True)
    own_lock = take_output(tables)  # noqa: F841 held until this function returns
    with alone(lock):
        agree_with_earlier_run("create", SHAPING, config, output)
        check_count(output, shard)
        remove_ours(tables / ENDED)
    raw_scenes = _without_twins(raw_scenes, faults, output)
    made_from = {raw.id: fingerprint(raw) for raw in raw_scenes}
    print(f"{shard}:", end=" ")
    todo = _remove_outdated(raw_scenes, faults, made_from, config, output, shard)
    with alone(lock):
        if is_complete(output) or not (output / MANIFEST).exists():
            write_manifest("create", config, output, complete=False)
    summary, skipped = _create_scenes(todo, made_from, config, output, tables)
    skipped = {printable(name, ""): printable(fault, "") for name, fault in faults.items()} | skipped
    _print_report(raw_scenes, summary, skipped, unread, config)
    write_ended(output, shard, skipped, made_from)
    return Created(raw_scenes, summary.written[""] > 0, skipped,
                   len(skipped) / max(1, len(raw_scenes) + len(faults)), shard, unfinished(output, shard.count))


def _create_all(config, output):
    """Make all scenes that shards or earlier runs have not made, and the tables and lists of the data set."""
    raw_scenes, faults, unread = _find_scenes(config, output)
    lock = take_data_set(  # noqa: F841 held until this function returns
        output, TABLES, LISTS if config.split else (), [raw.id for raw in raw_scenes])
    agree_with_earlier_run("create", SHAPING, config, output)
    clear_leftovers(output)
    raw_scenes = _without_twins(raw_scenes, faults, output)
    bad = _take_over_shards(output)
    made_from = {raw.id: fingerprint(raw) for raw in raw_scenes}
    known = {scene_id: fault for scene_id, (digest, fault) in bad.items() if made_from.get(scene_id) == digest}
    todo = _remove_outdated(raw_scenes, faults, made_from, config, output)
    write_manifest("create", config, output, complete=False)
    summary, made_bad = _create_scenes([raw for raw in todo if raw.id not in known], made_from, config, output)
    skipped = {printable(name, ""): printable(fault, "") for name, fault in faults.items()}
    skipped |= dict(sorted((known | made_bad).items()))

    clear_leftovers(output)  # of processes that were killed
    tidy_rows(output / "report.csv", REPORT_COLUMNS, map(plain_cell, existing_scenes(output)),
              key=REPORT_COLUMNS.index("file"))
    tidy_records(output, existing_scenes(output))
    _print_report(raw_scenes, summary, skipped, unread, config)
    with atomic_file(output / "skipped.csv", owned=True) as temporary, \
            open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([SKIPPED_COLUMNS, *((plain_cell(name), plain_cell(fault))
                                                       for name, fault in sorted(skipped.items()))])
    remove_shards(output, TABLES)
    write_manifest("create", config, output, complete=True, skipped=skipped)
    found = len(raw_scenes) + len(faults)
    if config.split and found > len(skipped):
        write_lists(output, config)
    return Created(raw_scenes, summary.written[""] > 0 or bool(bad), skipped, len(skipped) / found)


def _without_twins(raw_scenes, faults, output):
    """The raw scenes but those whose folders would be one on a disk that ignores case; these go to `faults`."""
    if ignores_case(output):
        for pair in case_twins(raw.id for raw in raw_scenes).items():
            faults |= dict.fromkeys(pair, f"{output}: its disk ignores case, and {' and '.join(pair)} would be one "
                                          "folder; rename one")
        raw_scenes = [raw for raw in raw_scenes if raw.id not in faults]
    print_unportable([raw.id for raw in raw_scenes])
    return raw_scenes


def _take_over_shards(output):
    """Merge the tables of shards, if there are any; returns their bad scenes, see `take_over_tables`."""
    shards = shards_in(output)
    if not shards:
        return {}
    missing = [f"{number}/{count}" for count in {shard.count for shard in shards}
               for number in unfinished(output, count)]
    print(f"merging {len(shards)} shards" + (f"; {', '.join(missing)} did not end: this run makes what they lack"
                                             if missing else ""))
    return take_over_tables(output, {RECORDS: RECORD_COLUMNS, "report.csv": REPORT_COLUMNS})


def _print_report(raw_scenes, summary, skipped, unread, config):
    print_report(raw_scenes, summary, skipped, config.input_dir, LISTS[2])
    print_alike("not read", [(printable(folder), printable(text, "")) for folder, text in unread], {}, "")


def _check_options(config, output, shard):
    """Raise ConfigError if options contradict each other or a folder cannot be used."""
    if not Path(config.input_dir).is_dir():
        raise ConfigError(f"{config.input_dir}: no such folder", "input_dir")
    if Path(config.input_dir).resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"{output} lies inside the input folder and would be read as results; choose another one",
                          "output_dir")
    if shard and config.overwrite:
        raise ConfigError("shards only continue a data set; choose an empty output folder, or overwrite in a run "
                          "without shards", "overwrite", "shard")
    if config.img_size is not None and not config.resize:
        raise ConfigError("an image size has no effect without resizing; give both or none", "img_size", "resize")
    if config.cut_hole and config.remove_object:
        raise ConfigError("a scene gets one hole: cut it by a policy or remove an object, not both", "cut_hole",
                          "remove_object")
    if config.photos and not Path(config.photos).is_dir():
        raise ConfigError(f"{config.photos}: no such folder", "photos")


def _find_scenes(config, output, shard=None):
    """As `find_raw_scenes`, with what is not read, [(folder, text)]; of one shard, if given.

    Raises:
        ConfigError: there is no scene, or one lies in the output folder.
    """
    unread = []
    raw_scenes, faults = find_raw_scenes(config.input_dir, config.photos, unread, *([shard.has] if shard else ()))
    if shard:
        faults = {name: fault for name, fault in faults.items() if shard.has(name)}
        unread = [entry for entry in unread if shard.has(str(entry[0]))]
    elif not raw_scenes and not faults:
        print_alike("not read", [(printable(folder), printable(text, "")) for folder, text in unread], {}, "")
        raise ConfigError(f"{config.input_dir}: no scene in it (original, partial, mask, comp1 … in one folder each, "
                          "or <id>.jpg, <id>_partial.jpg, <id>_comp1.png …); docs/formats.md lists all formats",
                          "input_dir")
    for folder in {raw.folder for raw in raw_scenes}:
        if output.resolve() in folder.resolve().parents:
            raise ConfigError(f"{folder} is a link into the output folder, whose scenes would be read as results; "
                              "remove the link", "output_dir")
    return raw_scenes, faults, unread


def _remove_outdated(raw_scenes, faults, made_from, config, output, shard=None):
    """Remove scenes of earlier runs that are out of date; returns the raw scenes still to be read."""
    records = read_records(output)
    if shard:
        records |= read_records(shard.folder(output))
    todo = [raw for raw in raw_scenes
            if config.overwrite or not is_done(output, raw.id, records, made_from[raw.id])]
    changed = sum((output / raw.id).is_dir() for raw in todo)
    bad_now = set(faults) & set(records) - set(made_from)
    check_removable(output, {*(raw.id for raw in todo), *bad_now}, config.overwrite)
    for scene_id in bad_now:
        remove_scene(output / scene_id)
    print(printable(f"{len(raw_scenes)} scenes below {config.input_dir}, {len(raw_scenes) - len(todo)} already there")
          + (f", {changed} are made again because their files changed" if changed and not config.overwrite else ""))
    if not shard:
        remove_or_report_others(made_from, output, config.overwrite, sure=not faults)
    return todo


def _create_scenes(todo, made_from, config, output, tables=None):
    """Make scenes in `config.workers` processes; returns their Summary and {scene id: fault}.

    Args:
        tables: folder for made_from.csv and report.csv; None: the data set.
    """
    tables, summary, skipped = tables or output, Summary(), {}
    with Helpers(partial(create_scene, config=config), config.workers) as helpers:
        jobs = helpers.map(todo, 4 * config.workers)
        for raw, report in tqdm(jobs, total=len(todo), desc="create", disable=None):
            if isinstance(report, Failure):  # of this scene; the others continue
                skipped[raw.id] = printable(report)
                remove_scene(output / raw.id)
                continue
            summary.add(raw, report)
            append_report(tables / "report.csv", raw, report)
            add_record(output, raw.id, made_from[raw.id], tables)
    return summary, skipped


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
