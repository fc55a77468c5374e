"""Find the faults of prepared scenes: in their files, and between their pictures."""

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from amodal_fusion.data.consistency import agreement, blank_share, is_blank_exactly_in, misfit, photo_fault
from amodal_fusion.data.images import IMAGE_SUFFIXES
from amodal_fusion.data.scenes import SCENE_NAMES, completion_paths, find_scenes, modal_path, read_files, read_list
from amodal_fusion.data.splits import LISTS
from amodal_fusion.errors import SceneError
from amodal_fusion.files import fingerprint, write_text
from amodal_fusion.pools import Helpers

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def check_dataset(data_dir, workers):
    """Read every file of a data set as training does, in several processes.

    Returns:
        number of scenes, and a list of faults, each with its file.
    """
    scene_ids, faults = find_scenes(data_dir), _list_faults(data_dir)
    folders = [data_dir / scene_id for scene_id in scene_ids]
    with Helpers(check_scene, workers) as helpers:
        jobs = helpers.map(folders, 4 * workers)
        found = dict(tqdm(jobs, total=len(folders), desc="check", disable=None))  # folder → its faults or None
    return len(scene_ids), faults + [found[folder] if str(folder) in found[folder] else f"{folder}: {found[folder]}"
                                     for folder in folders if found[folder]]


def _list_faults(data_dir):
    """Faults of the lists of a data set: scenes in two lists, training scenes without an original."""
    faults, listed = [], set()
    for name in LISTS:
        path = data_dir / name
        if not path.exists() or (name != LISTS[0] and not path.stat().st_size):
            continue  # `split` may write an empty list
        try:
            members = read_list(path, data_dir)
        except SceneError as error:
            faults.append(str(error))
            continue
        faults += [f"{path}: {scene_id} is in another list, too" for scene_id in members if scene_id in listed]
        listed |= set(members)
        if name != LISTS[2]:
            faults += [f"{data_dir / scene_id / 'original.png'}: missing, but {name} names the scene"
                       for scene_id in members if not (data_dir / scene_id / "original.png").exists()]
    return faults


def check_scene(folder, need_original=False, max_completions=None):
    """All faults of a scene, one per line, or None.

    Faults are what `read_scene` refuses, ignored or truncated files, and pictures that contradict each other."""
    folder = Path(folder)
    try:
        scene = read_files(folder, max_completions, need_original, with_visible=True)
    except SceneError as error:
        return "\n".join([str(error), *_unread_files(folder)])
    files = [path for path in (folder / f"{name}.png" for name in ("partial", "mask", "original")) if path.exists()]
    files += completion_paths(folder)[:max_completions]
    faults = [f"{path}: truncated; write it again" for path in files if _is_cut_off(path)]
    faults += [*_unread_files(folder), *_contradictions(folder, scene)]
    return "\n".join(faults) or None


def _unread_files(folder):
    """Files that look like pictures of the scene but are not read: comp2.PNG, comp2.jpg, original.jpg."""
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    for name in sorted(names):
        stem, dot, suffix = name.rpartition(".")
        if not re.fullmatch(SCENE_NAMES, stem, re.IGNORECASE):
            continue
        if dot + suffix.lower() in IMAGE_SUFFIXES and stem.lower() + ".png" not in names:
            yield f"{folder / name}: not read; save it as {stem.lower()}.png, in small letters"
        elif name.endswith("_visible.png") and name.replace("_visible", "") not in names:
            yield f"{folder / name}: a modal mask without a completion"


def _contradictions(folder, scene):
    """Contradictions between the pictures, which `create` never writes."""
    mask, partial, original = scene.mask, scene.partial, scene.original
    blank = blank_share(partial, mask)
    is_photo_inside = original is not None and agreement(original, partial, mask) > 0.9
    if blank < 0.9 and not mask.all() and (
            blank_share(partial, ~mask) > 0.97
            or (is_photo_inside and agreement(original, partial, ~mask) < 0.5)):
        yield (f"{folder / 'mask.png'}: inverted (partial.png is blank where the mask says visible, and not in the "
               "hole); 255 is the hole")
        return
    if blank < 0.9:
        yield (f"{folder / 'partial.png'}: not blank in the hole, {1 - blank:.0%} of it shows something; blank it, or "
               "check whether mask.png belongs to it")
    if original is not None:
        fault = photo_fault(original, partial, mask)
        if fault:
            yield f"{folder / 'partial.png'}: {fault} original.png"
        elif is_blank_exactly_in(original, mask):
            yield (f"{folder / 'original.png'}: blank in the hole, so it is no target; remove it, then the scene is "
                   "for inference only")
    fault, _ = misfit(partial, scene.completions, scene.visible or [None] * len(scene.completions), mask)
    if fault:
        yield f"{folder}: {fault}"
    for path, completion, visible in zip(completion_paths(folder), scene.completions, scene.visible or ()):
        if visible is not None and (visible & (completion[..., 3] > 0)).sum() <= 0.5 * visible.sum():
            yield f"{modal_path(path)}: empty or outside its completion; remove it, or check whose mask it is"


def _is_cut_off(path):
    """Whether the end of a PNG is missing. Decoders may not notice that the last few bytes are."""
    with open(path, "rb") as file:
        if file.read(len(PNG_START)) != PNG_START:
            return False  # another format, named .png
        file.seek(-len(PNG_END), 2)
        # some programs append data after the end
        return file.read() != PNG_END and PNG_END not in path.read_bytes()


# Training reads every scene once before its first step, so that a damaged file does not stop a long run later. Reading
# 100,000 scenes takes a quarter of an hour, so a resumed run skips the scenes that were read before.


MEMORY = ".checked.json"  # in the data set: scene id → state of its files when they were without fault
FORMAT = 2  # raised when the check finds more faults


def files_state(folder, max_completions):
    """Fingerprint of all files of a scene and of the number of completions to read; None if they cannot be listed."""
    try:
        return fingerprint([max_completions, sorted(Path(folder).iterdir())])
    except OSError:
        return None


def read_checked(data_dir):
    """What `write_checked` wrote; {} if there is nothing usable."""
    with contextlib.suppress(OSError, ValueError):
        memory = json.loads((Path(data_dir) / MEMORY).read_text(encoding="utf-8"))
        if isinstance(memory, dict) and memory.get("format") == FORMAT and isinstance(memory.get("scenes"), dict):
            return memory["scenes"]
    return {}


def write_checked(data_dir, states):
    """Write the states of scenes without fault. Returns False if the folder is not writable."""
    try:
        write_text(Path(data_dir) / MEMORY, json.dumps({"format": FORMAT, "scenes": states}, ensure_ascii=False))
    except OSError:
        return False
    return True


def check_scenes(data_dir, scene_ids, max_completions, known, quiet=True):
    """Read the files of training scenes in threads, which decode in parallel.

    Args:
        max_completions: completions to read per scene; None reads all.
        known: scene id → `files_state`; scenes with an equal state are skipped.

    Returns:
        list of faults, and scene id → `files_state` of all without fault.
    """
    def check(scene_id):
        folder = Path(data_dir) / scene_id
        state = files_state(folder, max_completions)
        if state is not None and known.get(scene_id) == state:
            return None, state
        return check_scene(folder, need_original=True, max_completions=max_completions), state

    faults, states = [], {}
    with ThreadPoolExecutor(16) as pool:
        try:
            jobs = {scene_id: pool.submit(check, scene_id) for scene_id in scene_ids}
            for scene_id, job in tqdm(jobs.items(), "check", disable=quiet, leave=False):
                fault, state = job.result()
                if fault:
                    faults.append(fault)
                elif state:
                    states[scene_id] = state
        except BaseException:  # a signal: the remaining results are not needed
            pool.shutdown(cancel_futures=True)
            raise
    return faults, states
