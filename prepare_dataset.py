"""Turn amodal completion results into a clean data set, split it, check it, or compose one out of cut-outs.

    python prepare_dataset.py create --input_dir AMODAL_RESULTS --output_dir DATA --n_max_completions 5 \\
        --img_size 256 --resize --split
    python prepare_dataset.py split --data_dir DATA --val_fraction 0.1 --test_fraction 0.1
    python prepare_dataset.py check --data_dir DATA
    python prepare_dataset.py synthesize --objects CUTOUTS --backgrounds PHOTOS --output_dir DATA --n_scenes 1000

Exit status: 0 all is well, 1 too many scenes were bad (create) or there are faults (check), 2 wrong usage.
"""

import csv
import dataclasses
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import yaml
from tqdm import tqdm

from amodal_fusion.config import option, parse_command
from amodal_fusion.data.checks import check_scene
from amodal_fusion.data.dataset_folder import (
    add_record,
    check_own,
    clear_leftovers,
    digest,
    is_done,
    leave_only,
    present,
    put_scene,
    read_records,
    remove_scene,
    tidy_records,
    tidy_rows,
)
from amodal_fusion.data.masks import HOLES
from amodal_fusion.data.names import printable
from amodal_fusion.data.scenes import find_scenes, read_list, read_scene
from amodal_fusion.data.splits import LISTS, SplitOptions, write_lists
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.evaluation.figures import draw_selection
from amodal_fusion.files import atomic_file, plain_cell, take_output, write_text
from amodal_fusion.ingest.hole_cutting import NewHole
from amodal_fusion.ingest.layouts import find_raw_scenes
from amodal_fusion.ingest.matting import BACKGROUNDS
from amodal_fusion.ingest.raw_scenes import read_raw_scene
from amodal_fusion.ingest.report import REPORT_COLUMNS, append_report, one_of_each, print_report, selection_panels
from amodal_fusion.pools import Failure, Helpers
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.synthesizer import STYLES, Synthesizer

PREVIEWED_SCENES = 8
HOPELESS = 10  # scenes that could not be composed, and none that could: the material is to blame


@dataclass
class SplitConfig(SplitOptions):
    """Rewrite train_list.txt, val_list.txt and test_list.txt of an existing data set."""

    data_dir: str = option("", "data set whose lists to rewrite", "data")


@dataclass
class CreateConfig(SplitOptions):
    """Make a data set from a folder of amodal results."""

    input_dir: str = option("", "folder of amodal results, searched at every depth", "data")
    output_dir: str = option("", "data set to write; running again continues", "data")
    photos: str | None = option(None, "folder of the photos, named as the scenes or their folders, for results that "
                                      "lie without them", "data")
    cut_hole: str | None = option(None, "cut a hole by this policy where completions meet, in scenes that bring none; "
                                        "the photo is the target", "data", HOLES)
    remove_object: str | None = option(None, "number or name of an object: where the photo shows it becomes the hole, "
                                             "in scenes that bring none; they have no target", "data")
    n_max_completions: int = option(5, "completions to keep per scene, the most useful first", "data", least=1)
    resize: bool = option(False, "make every scene img_size × img_size; otherwise sizes stay", "data")
    img_size: int = option(256, "side in pixels, with --resize", "data", least=16)
    mask_hole: str = option("auto", "the mask's value in the hole; auto finds it from the pixels, scene by scene",
                            "data", ("auto", "black", "white"))
    background: str = option("auto", "what stands behind completions without alpha; auto keys out a border that "
                                     "is flat, of whatever colour", "data", BACKGROUNDS)
    max_bad: float = option(0.1, "exit with status 1 when a larger share of the scenes is bad", "data", least=0, most=1)
    overwrite: bool = option(False, "make all scenes anew, also those that are there, and remove the others", "data")
    workers: int = option(os.cpu_count() or 1, "processes", "data", least=1)
    split: bool = option(False, "write the lists as well", "split")


@dataclass
class CheckConfig:
    """Read every file of a data set as training would, and name every fault with its file."""

    data_dir: str = option("", "data set to read", "data")
    workers: int = option(os.cpu_count() or 1, "processes", "data", least=1)


@dataclass
class SynthesizeConfig(SplitOptions):
    """Compose scenes with known truth out of cut-outs on backgrounds, or of annotated photos."""

    objects: str | None = option(None, "folder of RGBA cut-outs", "data")
    backgrounds: str | None = option(None, "folder of photos to put them on, or, without --objects, to take regions "
                                           "of as objects", "data")
    coco: str | None = option(None, "COCO or COCOA annotations beside their photos, as well or instead", "data")
    output_dir: str = option("", "data set to write; running again continues", "data")
    n_scenes: int = option(1000, "scenes to compose", "data", least=1)
    img_size: int = option(256, "side of the scenes in pixels", "data", least=16)
    n_max_completions: int = option(5, "most completions of a scene", "data", least=1)
    hole: str = option("mixed", "how holes are cut", "data", HOLES)
    style: str = option("mixed", "how completions are drawn: visible pixels copied, all redrawn, or redrawn on white "
                                 "with many near-duplicates", "data", STYLES)
    overwrite: bool = option(False, "compose all scenes anew, also those that are there, and remove the others", "data")
    preview: bool = option(True, "write preview.png, a sheet of the first scenes", "data")
    workers: int = option(os.cpu_count() or 1, "processes", "data", least=1)
    split: bool = option(True, "write the lists as well", "split")


# What a scene on disk depends on: a run that continues must agree with the one before.
SHAPING = {"create": ("n_max_completions", "resize", "img_size", "mask_hole", "background", "cut_hole", "remove_object",
                      "seed"),
           "synthesize": ("objects", "backgrounds", "coco", "img_size", "n_max_completions", "hole", "style", "seed")}


def create(config):
    """`create`: returns the exit status."""
    output = Path(config.output_dir)
    if not Path(config.input_dir).is_dir():
        raise ConfigError(f"--input_dir {config.input_dir}: no such folder")
    if Path(config.input_dir).resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"--output_dir {output} lies inside --input_dir, it would be read as results; move it")
    if config.cut_hole and config.remove_object:
        raise ConfigError("--cut_hole and --remove_object: a scene gets one hole, give one of them")
    if config.photos and not Path(config.photos).is_dir():
        raise ConfigError(f"--photos {config.photos}: no such folder")
    lock = take_output(output)  # noqa: F841 held until the process ends
    agree_with_earlier_run("create", config, output)
    clear_leftovers(output)
    raw_scenes, faults = find_raw_scenes(config.input_dir, config.photos)
    if not raw_scenes and not faults:
        raise ConfigError(f"--input_dir {config.input_dir}: no scene in it (original, partial, mask, comp1 … in one "
                          "folder each, or <id>.jpg, <id>_partial.jpg, <id>_comp1.png …); docs/formats.md has all "
                          "that is understood")
    for folder in {raw.folder for raw in raw_scenes}:
        if output.resolve() in folder.resolve().parents:
            raise ConfigError(f"{folder} is a link into --output_dir, scenes would be read as results; remove the link")
    made_from = {raw.id: digest(raw) for raw in raw_scenes}
    records = read_records(output)
    todo = [raw for raw in raw_scenes
            if config.overwrite or not is_done(output, raw.id, records, made_from[raw.id])]
    changed = sum((output / raw.id).is_dir() for raw in todo)
    bad_now = set(faults) & set(records) - set(made_from)
    check_own(output, {*(raw.id for raw in todo), *bad_now}, config.overwrite)
    for scene_id in bad_now:
        remove_scene(output / scene_id)
    print(printable(f"{len(raw_scenes)} scenes below {config.input_dir}, {len(raw_scenes) - len(todo)} already there")
          + (f", {changed} of another state to be made anew" if changed and not config.overwrite else ""))
    leave_only(made_from, output, config.overwrite, sure=not faults)

    write_manifest("create", config, output, complete=False)
    reports, skipped = {}, {printable(name, ""): printable(fault, "") for name, fault in faults.items()}
    with Helpers(partial(create_scene, config=config), config.workers) as helpers:
        jobs = helpers.map(todo, 4 * config.workers)
        for raw, report in tqdm(jobs, total=len(todo), desc="create", disable=None):
            if isinstance(report, Failure):  # of this scene: it stops nobody else's
                skipped[raw.id] = printable(report)
                remove_scene(output / raw.id)
                continue
            reports[raw.id] = report
            append_report(output / "report.csv", raw, report)
            add_record(output, raw.id, made_from[raw.id])
    clear_leftovers(output)  # of processes that were killed
    tidy_rows(output / "report.csv", REPORT_COLUMNS, map(plain_cell, present(output)), key=REPORT_COLUMNS.index("file"))
    tidy_records(output, present(output))

    print_report(raw_scenes, reports, skipped, config.input_dir, LISTS[2])
    with atomic_file(output / "skipped.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("scene", "fault"), *((plain_cell(name), plain_cell(fault))
                                                          for name, fault in sorted(skipped.items()))])
    write_manifest("create", config, output, complete=True, skipped=skipped)
    if config.split and len(raw_scenes) + len(faults) > len(skipped):
        write_lists(output, config)
    good = one_of_each([raw for raw in raw_scenes if raw.id in reports], PREVIEWED_SCENES)
    if good and draw(output / "report.png", (selection_panels(raw, reports[raw.id], output / raw.id) for raw in good)):
        print(f"completions kept and dropped in {len(good)} scenes: {output / 'report.png'}, in all: report.csv")
    share = len(skipped) / (len(raw_scenes) + len(faults))
    if share > config.max_bad:
        print(f"error: {share:.0%} of the scenes are bad, more than --max_bad {config.max_bad:.0%}", file=sys.stderr)
        return 1
    return 0


def draw(path, scenes):
    """A sheet of scenes, an iterable of lists of panels; without it everything else is whole. Returns whether it is
    there."""
    try:
        draw_selection(path, scenes)
    except (SceneError, OSError, MemoryError) as error:
        print(f"warning: no {path}: {str(error) or 'memory ran out'}", file=sys.stderr)
        path.unlink(missing_ok=True)  # an earlier run's would show other scenes
        return False
    return True


def agree_with_earlier_run(command, config, output):
    """Raise ConfigError when the data set at `output` was made by another command or with other options."""
    path = output / "dataset.yaml"
    if config.overwrite or not path.exists():
        return
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        made_by = manifest["made_by"].split()[-1]
        # an option that the data set does not know was added since, and it had its default
        earlier = {name: manifest["options"].get(name, getattr(type(config), name, None))
                   for name in SHAPING.get(made_by, ())}
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: does not tell how the data set was made ({error!r}); use another --output_dir, or "
                          "--overwrite") from None
    if made_by != command:
        raise ConfigError(f"{output} was made by {made_by}; use another --output_dir, or --overwrite")
    if command == "create":  # a run that refused scenes without a hole goes on with them once it is told what to do
        earlier = {name: value for name, value in earlier.items()
                   if not (name == "seed" and not earlier["cut_hole"])
                   and not (name in ("cut_hole", "remove_object") and value is None)}
    for name, value in earlier.items():
        if value != getattr(config, name):
            raise ConfigError(f"{output} was made with {name}={value}, not {getattr(config, name)}; use another "
                              "--output_dir, the same option, or --overwrite")


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


def create_scene(raw, config):
    """Make one scene folder, whole or not at all; returns its report (see `read_raw_scene`)."""
    cv2.setNumThreads(0)  # one process per core is enough
    new_hole = NewHole(config.cut_hole, config.remove_object, config.seed)
    try:
        scene, report = read_raw_scene(raw, config.n_max_completions, config.mask_hole, config.background, new_hole)
    except (ValueError, IndexError, ArithmeticError, cv2.error) as error:  # odd files shall not cost the other scenes
        raise SceneError(f"{raw.folder}: something in it was not foreseen ({error!r}); please report it") from error
    if config.resize:
        scene = scene.resized((config.img_size, config.img_size))
        if not scene.mask.any():
            raise SceneError(f"{raw.folder}: the hole is too small to survive --resize")
    report["trainable"] = scene.original is not None
    put_scene(Path(config.output_dir), scene)
    return report


def synthesize(config):
    """`synthesize`: returns the exit status."""
    output = Path(config.output_dir)
    lock = take_output(output)  # noqa: F841 held until the process ends
    agree_with_earlier_run("synthesize", config, output)
    clear_leftovers(output)
    material = Material(config.objects, config.backgrounds, config.coco)
    synthesizer = Synthesizer(material, config.img_size, config.n_max_completions, config.hole, config.style,
                              config.seed)
    made_from, records = digest(material.sizes()), read_records(output)
    indices = {synthesizer.scene_id(index): index for index in range(config.n_scenes)}
    todo = [index for scene_id, index in indices.items()
            if config.overwrite or not is_done(output, scene_id, records, made_from)]
    check_own(output, map(synthesizer.scene_id, todo), config.overwrite)
    leave_only(indices, output, config.overwrite)
    write_manifest("synthesize", config, output, complete=False)
    left_out, skipped, made = set(material.faults), {}, 0
    with Helpers(partial(compose_scene, synthesizer, output), config.workers) as helpers:
        jobs = helpers.map(todo, 4 * config.workers)
        for index, faults in tqdm(jobs, total=len(todo), desc="synthesize", disable=None):
            scene_id = synthesizer.scene_id(index)
            if isinstance(faults, Failure):
                skipped[scene_id] = printable(faults)
                remove_scene(output / scene_id)
                if not made and len(skipped) == HOPELESS:
                    raise SceneError(f"none of {HOPELESS} scenes could be composed: {skipped[scene_id]}")
                continue
            made += 1
            left_out.update(faults)
            add_record(output, scene_id, made_from)
    clear_leftovers(output)  # of processes that were killed
    tidy_records(output, present(output))
    write_manifest("synthesize", config, output, complete=True, skipped=skipped)
    for fault in sorted(left_out):
        print(f"left out: {printable(fault)}")
    for scene_id, fault in sorted(skipped.items()):
        print(f"bad: {fault}" if scene_id in fault else f"bad: {scene_id}: {fault}")
    print(f"{config.n_scenes - len(skipped)} scenes in {output}" + (f", {len(skipped)} bad" if skipped else ""))
    if config.split:
        write_lists(output, config)
    if config.preview:
        good = [scene_id for scene_id in indices if scene_id not in skipped][:PREVIEWED_SCENES]
        draw(output / "preview.png", (scene_panels(read_scene(output / scene_id)) for scene_id in good))
    return 1 if skipped else 0


def compose_scene(synthesizer, output, index):
    """Compose scene `index` and write its folder; returns what material could not be used."""
    composition = synthesizer.compose(index)
    put_scene(output, composition.scene)
    return composition.faults


def scene_panels(scene):
    """(title, picture, None) of a prepared scene."""
    return [("original", scene.original, None), ("partial", scene.partial, None),
            *((f"comp{number}", completion, None) for number, completion in enumerate(scene.completions, 1))]


def check(config):
    """`check`: returns the exit status."""
    data_dir = Path(config.data_dir)
    scene_ids, faults = find_scenes(data_dir), []
    listed = set()
    for name in LISTS:
        path = data_dir / name
        if path.exists() and (path.stat().st_size or name == LISTS[0]):  # `split` may have had no photo left for it
            try:
                members = read_list(data_dir / name, data_dir)
                faults += [f"{data_dir / name}: {scene_id} is in another list, too" for scene_id in members
                           if scene_id in listed]
                listed |= set(members)
                if name != LISTS[2]:
                    faults += [f"{data_dir / scene_id / 'original.png'}: missing, but {name} names the scene"
                               for scene_id in members if not (data_dir / scene_id / "original.png").exists()]
            except SceneError as error:
                faults.append(str(error))
    folders = [data_dir / scene_id for scene_id in scene_ids]
    with Helpers(check_scene, config.workers) as helpers:
        jobs = helpers.map(folders, 4 * config.workers)
        found = dict(tqdm(jobs, total=len(folders), desc="check", disable=None))  # None, or what is wrong
    faults += [found[folder] if str(folder) in found[folder] else f"{folder}: {found[folder]}"
               for folder in folders if found[folder]]
    for fault in faults:
        print(fault)
    print(f"{len(scene_ids)} scenes read, {len(faults)} faults")
    return 1 if faults else 0


COMMANDS = {
    "create": (CreateConfig, create, ("input_dir", "output_dir")),
    "split": (SplitConfig, lambda config: write_lists(Path(config.data_dir), config), ("data_dir",)),
    "check": (CheckConfig, check, ("data_dir",)),
    "synthesize": (SynthesizeConfig, synthesize, ("output_dir",)),
}


def main():
    command, config = parse_command({name: entry[0] for name, entry in COMMANDS.items()}, __doc__)
    _, run, required = COMMANDS[command]
    try:
        for name in required:
            if not getattr(config, name):
                raise ConfigError(f"{command} needs --{name}")
        sys.exit(run(config))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (SceneError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        goes_on = "; scenes that are done stay, the same command goes on from there" if command in SHAPING else ""
        print(f"\ninterrupted{goes_on}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
