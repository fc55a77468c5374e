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
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import yaml
from tqdm import tqdm

from fusion.config import option, parse_command
from fusion.data.checks import check_scene
from fusion.data.holes import HOLES
from fusion.data.keying import BACKGROUNDS
from fusion.data.layouts import find_raw_scenes
from fusion.data.names import printable
from fusion.data.new_holes import NewHole
from fusion.data.raw_scenes import read_raw_scene
from fusion.data.report import append_report, one_of_each, print_report, selection_panels
from fusion.data.scenes import find_scenes, read_list, read_scene, write_scene
from fusion.data.splits import LISTS, SplitOptions, write_lists
from fusion.data.synthesis import STYLES, Synthesizer
from fusion.errors import ConfigError, SceneError
from fusion.figures import draw_selection
from fusion.files import atomic_file, write_text

PREVIEWED_SCENES = 8


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
    overwrite: bool = option(False, "make all scenes anew, also those that are there", "data")
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
    backgrounds: str | None = option(None, "folder of photos to put them on", "data")
    coco: str | None = option(None, "COCO-style instance annotations beside their photos, as well or instead", "data")
    output_dir: str = option("", "data set to write; running again continues", "data")
    n_scenes: int = option(1000, "scenes to compose", "data", least=1)
    img_size: int = option(256, "side of the scenes in pixels", "data", least=16)
    n_max_completions: int = option(5, "most completions of a scene", "data", least=1)
    hole: str = option("mixed", "how holes are cut", "data", HOLES)
    style: str = option("mixed", "how completions are drawn: visible pixels copied, all redrawn, or redrawn on white "
                                 "with many near-duplicates", "data", STYLES)
    overwrite: bool = option(False, "compose all scenes anew, also those that are there", "data")
    preview: bool = option(True, "write preview.png, a sheet of the first scenes", "data")
    workers: int = option(os.cpu_count() or 1, "processes", "data", least=1)
    split: bool = option(True, "write the lists as well", "split")


# What a scene on disk depends on: a run that continues must agree with the one before.
SHAPING = {"create": ("n_max_completions", "resize", "img_size", "mask_hole", "background", "photos", "cut_hole",
                      "remove_object"),
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
    output.mkdir(parents=True, exist_ok=True)
    agree_with_earlier_run("create", config, output)
    clear_leftovers(output)
    raw_scenes, faults = find_raw_scenes(config.input_dir, config.photos)
    if not raw_scenes and not faults:
        raise ConfigError(f"--input_dir {config.input_dir}: no scene in it (original, partial, mask, comp1 … in one "
                          "folder each, or <id>.jpg, <id>_partial.jpg, <id>_comp1.png …); docs/formats.md has all "
                          "that is understood")
    todo = [raw for raw in raw_scenes if config.overwrite or not (output / raw.id).is_dir()]
    there = len(raw_scenes) - len(todo)
    print(f"{len(raw_scenes)} scenes below {config.input_dir}" + (f", {there} already there" if there else ""))

    write_manifest("create", config, output, complete=False)
    reports, skipped = {}, {printable(name): printable(fault) for name, fault in faults.items()}
    with ProcessPoolExecutor(config.workers) as pool:
        jobs = {pool.submit(create_scene, raw, config): raw for raw in todo}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="create", disable=None):
            raw = jobs[job]
            try:
                reports[raw.id] = job.result()
                append_report(output / "report.csv", raw, reports[raw.id])
            except SceneError as error:
                skipped[raw.id] = printable(error)
            except OSError as error:  # a full disk or a folder that cannot be written stops nobody else's scene
                skipped[raw.id] = printable(f"{error.filename or output}: {error.strerror}")

    print_report(raw_scenes, reports, skipped, config.input_dir, LISTS[2])
    with atomic_file(output / "skipped.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("scene", "fault"), *sorted(skipped.items())])
    good = one_of_each([raw for raw in raw_scenes if raw.id in reports], PREVIEWED_SCENES)
    if good:
        panels = [selection_panels(raw, reports[raw.id], output / raw.id) for raw in good]
        draw_selection(output / "report.png", panels)
        print(f"completions kept and dropped in {len(good)} scenes: {output / 'report.png'}, in all: report.csv")
    write_manifest("create", config, output, complete=True, skipped=skipped)
    if config.split and len(raw_scenes) + len(faults) > len(skipped):
        write_lists(output, config)
    share = len(skipped) / (len(raw_scenes) + len(faults))
    if share > config.max_bad:
        print(f"error: {share:.0%} of the scenes are bad, more than --max_bad {config.max_bad:.0%}", file=sys.stderr)
        return 1
    return 0


def agree_with_earlier_run(command, config, output):
    """Raise ConfigError when the data set at `output` was made by another command or with other options."""
    path = output / "dataset.yaml"
    if config.overwrite or not path.exists():
        return
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        made_by = manifest["made_by"].split()[-1]
        shaping = SHAPING.get(made_by, ()) + (("seed",) if getattr(config, "cut_hole", None) else ())
        # an option that the data set does not know was added since, and it had its default
        earlier = {name: manifest["options"].get(name, getattr(type(config), name, None)) for name in shaping}
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: does not tell how the data set was made ({error!r}); use another --output_dir, or "
                          "--overwrite") from None
    if made_by != command:
        raise ConfigError(f"{output} was made by {made_by}; use another --output_dir, or --overwrite")
    for name, value in earlier.items():
        if value != getattr(config, name):
            raise ConfigError(f"{output} was made with {name}={value}, not {getattr(config, name)}; use another "
                              "--output_dir, the same option, or --overwrite")


def clear_leftovers(output):
    """Remove the half-written scene folders of a run that was killed."""
    for leftover in output.glob(".tmp-*"):
        shutil.rmtree(leftover)


def write_manifest(command, config, output, complete, skipped=None):
    """dataset.yaml: options, counts, image size, skipped scenes."""
    scenes = [path for path in output.iterdir() if (path / "mask.png").is_file()]
    manifest = {
        "made_by": f"prepare_dataset.py {command}",
        "complete": complete,
        "options": {key: value for key, value in dataclasses.asdict(config).items() if key != "workers"},
        "image_size": [config.img_size] * 2 if getattr(config, "resize", True) else "as they came",
        "scenes": len(scenes),
        "skipped": skipped or {},
    }
    write_text(output / "dataset.yaml", yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True))


def create_scene(raw, config):
    """Make one scene folder, whole or not at all; returns its report (see `read_raw_scene`)."""
    cv2.setNumThreads(0)  # one process per core is enough
    new_hole = NewHole(config.cut_hole, config.remove_object, config.seed)
    scene, report = read_raw_scene(raw, config.n_max_completions, config.mask_hole, config.background, new_hole)
    if config.resize:
        scene = scene.resized((config.img_size, config.img_size))
        if not scene.mask.any():
            raise SceneError(f"{raw.folder}: the hole is too small to survive --resize")
    report["trainable"] = scene.original is not None
    put_scene(Path(config.output_dir), scene)
    return report


def put_scene(output, scene):
    """Write a scene's folder whole or not at all."""
    folder, temporary = output / scene.id, output / f".tmp-{scene.id}"
    temporary.mkdir()
    write_scene(temporary, scene)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def synthesize(config):
    """`synthesize`: returns the exit status."""
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    agree_with_earlier_run("synthesize", config, output)
    clear_leftovers(output)
    synthesizer = Synthesizer(config.objects, config.backgrounds, config.coco, config.img_size,
                              config.n_max_completions, config.hole, config.style, config.seed)
    write_manifest("synthesize", config, output, complete=False)
    job = partial(write_synthetic_scene, synthesizer, output, config.overwrite)
    with ProcessPoolExecutor(config.workers) as pool:
        jobs = pool.map(job, range(config.n_scenes), chunksize=8)
        scene_ids = list(tqdm(jobs, total=config.n_scenes, desc="synthesize", disable=None))
    if config.preview:
        scenes = [read_scene(output / scene_id) for scene_id in scene_ids[:PREVIEWED_SCENES]]
        draw_selection(output / "preview.png", [
            [("original", s.original, None), ("partial", s.partial, None),
             *((f"comp{number}", c, None) for number, c in enumerate(s.completions, 1))] for s in scenes])
    write_manifest("synthesize", config, output, complete=True)
    print(f"{config.n_scenes} scenes in {output}")
    return write_lists(output, config) if config.split else 0


def write_synthetic_scene(synthesizer, output, overwrite, index):
    """Compose scene `index` and write its folder unless it is there; returns its id."""
    scene_id = synthesizer.scene_id(index)
    if overwrite or not (output / scene_id).is_dir():
        put_scene(output, synthesizer(index))
    return scene_id


def check(config):
    """`check`: returns the exit status."""
    data_dir = Path(config.data_dir)
    scene_ids, faults = find_scenes(data_dir), []
    listed = set()
    for name in LISTS:
        if (data_dir / name).exists():
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
    with ProcessPoolExecutor(config.workers) as pool:
        jobs = pool.map(check_scene, [data_dir / scene_id for scene_id in scene_ids], chunksize=8)
        faults += [fault for fault in tqdm(jobs, total=len(scene_ids), desc="check", disable=None) if fault]
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


if __name__ == "__main__":
    main()
