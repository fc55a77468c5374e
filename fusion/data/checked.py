"""Reading every scene once before training, and remembering what was read.

A damaged file shall stop a long run before its first step, not in the middle; but 100,000 scenes take a quarter of an
hour, and a run is resumed many times.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from fusion.data.checks import check_scene
from fusion.files import write_text

MEMORY = ".checked.json"  # in the data set: scene id → state of its files when they were read without a fault
FORMAT = 2  # another number when the check looks for more


def files_state(folder, max_completions):
    """Digest of the names, sizes and times of all files of a scene; None when they cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    except OSError:
        return None
    text = f"{max_completions} {files}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recall(data_dir):
    """What `remember` wrote, {} when there is nothing of use."""
    with contextlib.suppress(OSError, ValueError):
        memory = json.loads((Path(data_dir) / MEMORY).read_text(encoding="utf-8"))
        if isinstance(memory, dict) and memory.get("format") == FORMAT and isinstance(memory.get("scenes"), dict):
            return memory["scenes"]
    return {}


def remember(data_dir, states):
    """Write down scenes that were read without a fault. Returns False where the folder cannot be written."""
    try:
        write_text(Path(data_dir) / MEMORY, json.dumps({"format": FORMAT, "scenes": states}, ensure_ascii=False))
    except OSError:
        return False
    return True


def check_scenes(data_dir, scene_ids, max_completions, known, quiet=True):
    """Read the files of training scenes, in threads: decoding and waiting let others run.

    Args:
        max_completions: only so many are read of each.
        known: scene id → `files_state`; scenes that are still as they were then are not read again.

    Returns:
        list of faults, and scene id → `files_state` of all without one.
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
        except BaseException:  # a signal: what is left is read for nobody
            pool.shutdown(cancel_futures=True)
            raise
    return faults, states
