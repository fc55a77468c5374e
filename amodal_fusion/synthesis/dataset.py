"""Compose a whole data set of scenes with known truth."""

from functools import partial
from pathlib import Path

from tqdm import tqdm

from amodal_fusion.data.dataset_folder import (
    add_record,
    agree_with_earlier_run,
    check_removable,
    clear_leftovers,
    existing_scenes,
    is_done,
    read_records,
    remove_or_report_others,
    remove_scene,
    tidy_records,
    write_manifest,
    write_scene_folder,
)
from amodal_fusion.data.names import printable
from amodal_fusion.data.splits import write_lists
from amodal_fusion.errors import SceneError
from amodal_fusion.files import fingerprint, take_output
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
    lock = take_output(output)  # noqa: F841 held until this function returns
    agree_with_earlier_run("synthesize", SHAPING, config, output)
    clear_leftovers(output)
    material = Material(config.objects, config.backgrounds, config.coco)
    synthesizer = Synthesizer(material, config.img_size, config.n_max_completions, config.hole, config.style,
                              config.seed)
    made_from, records = fingerprint(material.sizes()), read_records(output)
    indices = {synthesizer.scene_id(index): index for index in range(config.n_scenes)}
    todo = [index for scene_id, index in indices.items()
            if config.overwrite or not is_done(output, scene_id, records, made_from)]
    check_removable(output, map(synthesizer.scene_id, todo), config.overwrite)
    remove_or_report_others(indices, output, config.overwrite)
    write_manifest("synthesize", config, output, complete=False)
    left_out, skipped = _compose_scenes(synthesizer, todo, made_from, config.workers, output)
    left_out |= set(material.faults)
    clear_leftovers(output)  # of processes that were killed
    tidy_records(output, existing_scenes(output))
    write_manifest("synthesize", config, output, complete=True, skipped=skipped)
    for fault in sorted(left_out):
        print(f"left out: {printable(fault)}")
    for scene_id, fault in sorted(skipped.items()):
        print(f"bad: {fault}" if scene_id in fault else f"bad: {scene_id}: {fault}")
    print(f"{config.n_scenes - len(skipped)} scenes in {output}" + (f", {len(skipped)} bad" if skipped else ""))
    if config.split:
        write_lists(output, config)
    return [scene_id for scene_id in indices if scene_id not in skipped], skipped


def _compose_scenes(synthesizer, todo, made_from, workers, output):
    """Compose scenes in processes; returns lines about unusable material, and {scene id: fault}."""
    left_out, skipped, made = set(), {}, 0
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
            left_out.update(faults)
            add_record(output, scene_id, made_from)
    return left_out, skipped


def compose_scene(synthesizer, output, index):
    """Compose scene `index` and write its folder; returns lines about unusable material."""
    composition = synthesizer.compose(index)
    write_scene_folder(output, composition.scene)
    return composition.faults
