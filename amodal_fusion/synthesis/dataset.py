"""Compose a whole data set of scenes with known truth."""

from functools import partial
from pathlib import Path

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
    write_manifest,
    write_scene_folder,
)
from amodal_fusion.data.names import printable
from amodal_fusion.data.splits import LISTS, write_lists
from amodal_fusion.errors import SceneError
from amodal_fusion.files import fingerprint
from amodal_fusion.ingest.report import print_alike
from amodal_fusion.pools import Failure, Helpers
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.synthesizer import Synthesizer

HOPELESS = 10  # after this many failures and no scene the run stops: the material is unusable

# Options that decide how scenes look: a resumed run must have the same values.
SHAPING = ("objects", "backgrounds", "coco", "img_size", "n_max_completions", "hole", "style", "seed")


def synthesize_dataset(config):
    """Write `config.n_scenes` scenes to `config.output_dir`, and with `config.split` the lists.

    Args:
        config: SynthesizeConfig of amodal_fusion.prepare.

    Returns:
        ids of the existing scenes, and {scene id: fault} of the others.

    Raises:
        ConfigError: the output is not a data set of this program, or was made with other options.
        SceneError: the material is missing, or no scene can be composed from it.
    """
    output = Path(config.output_dir)
    material = Material(config.objects, config.backgrounds, config.coco)
    synthesizer = Synthesizer(material, config.img_size, config.n_max_completions, config.hole, config.style,
                              config.seed)
    indices = {synthesizer.scene_id(index): index for index in range(config.n_scenes)}
    lock = take_data_set(  # noqa: F841 held until this function returns
        output, {RECORDS: RECORD_COLUMNS}, LISTS if config.split else (), indices)
    agree_with_earlier_run("synthesize", SHAPING, config, output)
    clear_leftovers(output)
    made_from, records = fingerprint(material.sizes()), read_records(output)
    todo = [index for scene_id, index in indices.items()
            if config.overwrite or not is_done(output, scene_id, records, made_from)]
    check_removable(output, map(synthesizer.scene_id, todo), config.overwrite)
    remove_or_report_others(indices, output, config.overwrite)
    write_manifest("synthesize", config, output, complete=False)
    odd, skipped = _compose_scenes(synthesizer, todo, made_from, config.workers, output)
    odd |= {f"left out: {fault}" for fault in material.faults}
    clear_leftovers(output)  # of processes that were killed
    tidy_records(output, existing_scenes(output))
    write_manifest("synthesize", config, output, complete=True, skipped=skipped)
    for kind in ("left out", "note"):
        lines = [printable(line).split(": ", 2)[1:] for line in sorted(odd) if line.startswith(f"{kind}: ")]
        print_alike(kind, [(line[0], line[-1]) for line in lines], {}, "")
    for scene_id, fault in sorted(skipped.items()):
        print(f"bad: {fault}" if scene_id in fault else f"bad: {scene_id}: {fault}")
    print(f"{config.n_scenes - len(skipped)} scenes in {output}" + (f", {len(skipped)} bad" if skipped else ""))
    if config.split:
        write_lists(output, config)
    return [scene_id for scene_id in indices if scene_id not in skipped], skipped


def _compose_scenes(synthesizer, todo, made_from, workers, output):
    """Compose scenes in processes; returns lines about odd material, and {scene id: fault}."""
    odd, skipped, made = set(), {}, 0
    with Helpers(partial(compose_scene, synthesizer, output), workers) as helpers:
        jobs = helpers.map(todo, 4 * workers)
        for index, faults in tqdm(jobs, total=len(todo), desc="synthesize", disable=None):
            scene_id = synthesizer.scene_id(index)
            if isinstance(faults, Failure):
                skipped[scene_id] = printable(faults)
                remove_scene(output / scene_id)
                if not made and len(skipped) == HOPELESS:
                    raise SceneError(f"none of {HOPELESS} scenes could be composed: {skipped[scene_id]}")
                continue
            made += 1
            odd.update(faults)
            add_record(output, scene_id, made_from)
    return odd, skipped


def compose_scene(synthesizer, output, index):
    """Compose scene `index` and write its folder; returns lines about odd material."""
    composition = synthesizer.compose(index)
    write_scene_folder(output, composition.scene)
    return composition.faults
