"""Turn amodal completion results into a data set, split it, check it, or compose one from cut-outs.

Exit status: 0 success, 1 too many bad scenes (create) or faults (check), 2 wrong usage.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from amodal_fusion.config import option, parse_command
from amodal_fusion.data.checks import check_dataset
from amodal_fusion.data.masks import HOLES
from amodal_fusion.data.packed import ShardWriter, check_packed, is_packed, pack_scenes
from amodal_fusion.data.scenes import find_scenes, read_scene
from amodal_fusion.data.splits import SplitOptions, write_lists
from amodal_fusion.errors import ConfigError, UserError, message_of
from amodal_fusion.evaluation.figures import draw_selection
from amodal_fusion.files import plain_cell, remove_ours
from amodal_fusion.ingest.create import create_dataset
from amodal_fusion.ingest.matting import BACKGROUNDS
from amodal_fusion.ingest.report import examples_of_layouts, selection_panels
from amodal_fusion.pools import usable_cpus
from amodal_fusion.synthesis.dataset import synthesize_dataset
from amodal_fusion.synthesis.synthesizer import STYLES

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
    photos: str | None = option(None, "folder of the photos, with the names of scenes or their folders, for results "
                                      "without photos", "data")
    cut_hole: str | None = option(None, "cut a hole by this policy where completions overlap, in scenes without one; "
                                        "the photo is the target", "data", HOLES)
    remove_object: str | None = option(None, "number or name of an object; its visible region becomes the hole, in "
                                             "scenes without one; these have no target", "data")
    n_max_completions: int = option(5, "completions to keep per scene, the most useful first", "data", least=1)
    keep_numbers: bool = option(False, "comp4.png stays comp4.png; otherwise the most useful completion is comp1.png",
                                "data")
    resize: bool = option(False, "make every scene img_size × img_size; otherwise sizes stay", "data")
    img_size: int | None = option(None, "side in pixels, with --resize; None: 256", "data", least=16)
    mask_hole: str = option("auto", "the mask's value in the hole; auto: found from the pixels of each scene",
                            "data", ("auto", "black", "white"))
    background: str = option("auto", "background of completions without alpha; auto keys out a flat border of "
                                     "any colour", "data", BACKGROUNDS)
    shard: str | None = option(None, "2/6 makes the second of six shares, for six processes or machines that share the "
                                     "work; the last to end merges. A launcher sets it (torchrun, srun)", "data")
    max_bad: float = option(0.1, "exit with status 1 if a larger share of scenes is bad", "data", least=0, most=1)
    overwrite: bool = option(False, "make all scenes again, and remove scenes that are not in the results", "data")
    workers: int = option(usable_cpus(), "processes", "data", least=1)
    split: bool = option(False, "write the lists as well", "split")
    seed: int = option(0, "decides where --cut_hole cuts and, with --split, the lists", "split",
                       least=0)


@dataclass
class CheckConfig:
    """Read every file of a data set as training does, and print every fault with its file."""

    data_dir: str = option("", "data set to read", "data")
    workers: int = option(usable_cpus(), "processes", "data", least=1)


@dataclass
class PackConfig:
    """Pack a data set into a few large files, which training reads many times faster. Running again updates them."""

    data_dir: str = option("", "data set to pack; scenes without an original are left out", "data")
    output_dir: str = option("", "folder of the packed set, to be given to training as --data_dir", "data")
    img_size: int = option(256, "side of the packed scenes in pixels, the img_size of training", "data", least=16)
    n_max_completions: int = option(5, "completions to pack per scene, the first ones", "data", least=1)
    workers: int = option(usable_cpus(), "processes", "data", least=1)


@dataclass
class SynthesizeConfig(SplitOptions):
    """Compose scenes with known truth from cut-outs on backgrounds, or from annotated photos."""

    objects: str | None = option(None, "folder of RGBA cut-outs", "data")
    backgrounds: str | None = option(None, "folder of photos as backgrounds; without --objects their regions are the "
                                           "objects", "data")
    coco: str | None = option(None, "COCO or COCOA annotations beside their photos, in addition or instead", "data")
    output_dir: str = option("", "data set to write; running again continues", "data")
    n_scenes: int = option(1000, "scenes to compose", "data", least=1)
    img_size: int = option(256, "side of the scenes in pixels", "data", least=16)
    n_max_completions: int = option(5, "largest number of completions per scene", "data", least=1)
    hole: str = option("mixed", "how holes are cut", "data", HOLES)
    style: str = option("mixed", "how completions are drawn: visible pixels copied, all redrawn, or redrawn on white "
                                 "with many near-duplicates", "data", STYLES)
    overwrite: bool = option(False, "compose all scenes again, and remove those beyond --n_scenes", "data")
    preview: bool = option(True, "write preview.png, a sheet of the first scenes", "data")
    workers: int = option(usable_cpus(), "processes", "data", least=1)
    split: bool = option(True, "write the lists as well", "split")
    seed: int = option(0, "decides every scene and the lists", "split", least=0)


def create(config):
    """Run `create`; returns the exit status."""
    created, output = create_dataset(config), Path(config.output_dir)
    if created.shard is None and (created.changed or not (output / "report.png").exists()):
        draw_report(created.raw_scenes, output)
    if created.share_bad > config.max_bad:
        who = f"{created.shard}: " if created.shard else ""
        print(f"error: {who}{created.share_bad:.0%} of the scenes are bad, more than --max_bad {config.max_bad:.0%}",
              file=sys.stderr)
        return 1
    return 0


def draw_report(raw_scenes, output):
    """Draw report.png: what was kept and dropped in a few scenes of each layout."""
    if not (output / "report.csv").exists():
        return
    raw_by_id = {plain_cell(raw.id): raw for raw in raw_scenes}
    shown = [(raw_by_id[name], rows) for name, rows in examples_of_layouts(output / "report.csv", PREVIEWED_SCENES)
             if name in raw_by_id]
    panels = (selection_panels(raw, rows, output / raw.id) for raw, rows in shown)
    if shown and draw(output / "report.png", panels):
        print(f"completions kept and dropped in {len(shown)} scenes: {output / 'report.png'}, in all: report.csv")


def split(config):
    """Run `split`; returns the exit status."""
    return write_lists(Path(config.data_dir), config)


def check(config):
    """Run `check`; returns the exit status."""
    folder = Path(config.data_dir)
    scenes, faults = check_packed(folder) if is_packed(folder) else check_dataset(folder, config.workers)
    for fault in faults:
        print(fault)
    print(f"{scenes} scenes read, {len(faults)} faults")
    return 1 if faults else 0


def pack(config):
    """Run `pack`; returns the exit status."""
    folder, output = Path(config.data_dir), Path(config.output_dir)
    found = find_scenes(folder)
    scene_ids = [scene_id for scene_id in found if (folder / scene_id / "original.png").exists()]
    if not scene_ids:
        raise UserError(f"{folder}: no scene has an original.png, so none can be trained on")
    pack_scenes(ShardWriter(folder, output, config.img_size, config.n_max_completions), scene_ids, config.workers)
    size = sum(path.stat().st_size for path in output.glob("*.npy"))
    print(f"{len(scene_ids)} scenes packed, {size / 1e6:.1f} MB, {size / 1e3 / len(scene_ids):.0f} kB a scene"
          + (f"; {len(found) - len(scene_ids)} without an original were left out" * (len(found) > len(scene_ids))))
    return 0


def synthesize(config):
    """Run `synthesize`; returns the exit status."""
    good, skipped = synthesize_dataset(config)
    if config.preview:
        output = Path(config.output_dir)
        draw(output / "preview.png", (scene_panels(read_scene(output / name)) for name in good[:PREVIEWED_SCENES]))
    return 1 if skipped else 0


def scene_panels(scene):
    """[(title, picture, None)] of a prepared scene."""
    return [("original", scene.original, None), ("partial", scene.partial, None),
            *((f"comp{number}", completion, None) for number, completion in enumerate(scene.completions, 1))]


def draw(path, scenes):
    """Draw scenes, an iterable of lists of panels, on a sheet. Returns False, with a warning, if that fails."""
    try:
        draw_selection(path, scenes)
    except (UserError, OSError, MemoryError) as error:
        print(f"warning: no {path}: {message_of(error) or 'memory ran out'}", file=sys.stderr)
        remove_ours(path)  # the sheet of an earlier run shows other scenes
        return False
    return True


COMMANDS = {  # name → options, function, options that must be given
    "create": (CreateConfig, create, ("input_dir", "output_dir")),
    "split": (SplitConfig, split, ("data_dir",)),
    "check": (CheckConfig, check, ("data_dir",)),
    "pack": (PackConfig, pack, ("data_dir", "output_dir")),
    "synthesize": (SynthesizeConfig, synthesize, ("output_dir",)),
}


def main(description=__doc__):
    command, config = parse_command({name: entry[0] for name, entry in COMMANDS.items()}, description)
    _, run, required = COMMANDS[command]
    try:
        for name in required:
            if not getattr(config, name):
                raise ConfigError(f"{command} needs a folder", name)
        sys.exit(run(config))
    except ConfigError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as error:
        sys.exit(f"error: {message_of(error)}")
    except KeyboardInterrupt:
        continues = command in ("create", "pack", "synthesize")
        resume = "; what is finished stays, the same command continues" if continues else ""
        print(f"\ninterrupted{resume}", file=sys.stderr)
        sys.exit(130)
