"""Which scenes train, which validate: lists that never have one photo on both sides."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amodal_fusion.config import option
from amodal_fusion.data.images import read_image, resize
from amodal_fusion.data.names import fault_of_id, photo_of, printable
from amodal_fusion.data.scenes import find_scenes
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.files import write_text

LISTS = ("train_list.txt", "val_list.txt", "test_list.txt")
THUMBNAIL = (8, 8)
SAME_PHOTO = 2.5  # levels between thumbnails; the same photo as JPEG and as PNG stays below 1


@dataclass
class SplitOptions:
    """How scenes are divided, for `create --split` and `split`."""

    val_fraction: float = option(0.1, "share of scenes for validation", "split", least=0, most=1)
    test_fraction: float = option(0.0, "share of scenes for testing", "split", least=0, most=1)
    group_by: str | None = option(None, "regular expression; scenes whose ids share what it matches at their start "
                                        "(its first group, if it has one) stay together, for scenes cut from one "
                                        "photo; scenes with the same original do in any case", "split")
    seed: int = option(0, "another seed, another split", "split", least=0)


def write_lists(data_dir, options):
    """Write the three lists; scenes without an original are test scenes.

    Groups are put in the order of a hash of their name and the seed: the split does not depend on the order of
    files, and a scene that is added moves few others.

    Returns:
        0, or 1 when scenes were left out because of their names (they are printed).
    """
    try:
        pattern = re.compile(options.group_by) if options.group_by else None
    except re.error as error:
        raise ConfigError(f"--group_by {options.group_by}: not a regular expression ({error})") from None
    shares = (options.val_fraction, options.test_fraction)
    if min(shares) < 0 or sum(shares) >= 1:
        raise ConfigError("--val_fraction and --test_fraction are shares: not below 0, together below 1")
    faults = {scene_id: fault for scene_id in find_scenes(data_dir) if (fault := fault_of_id(scene_id))}
    for scene_id, fault in faults.items():
        print(f"left out: {printable(data_dir / scene_id)}: {fault}")
    scene_ids = [scene_id for scene_id in find_scenes(data_dir) if scene_id not in faults]
    trainable = [scene_id for scene_id in scene_ids if os.path.isfile(data_dir / scene_id / "original.png")]

    group_of = {scene_id: photo_of(scene_id, pattern) or scene_id for scene_id in trainable}
    twins, joined = same_photo(data_dir, trainable), {}
    for scene_id, other in twins:
        _join(joined, group_of[scene_id], group_of[other])
    groups = {}
    for scene_id, group in group_of.items():
        groups.setdefault(_root(joined, group), []).append(scene_id)
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{options.seed}:{name}".encode()).digest())

    lists = {name: [] for name in LISTS}
    for name, share in zip(LISTS[1:], shares):
        size = max(1, round(share * len(trainable))) if share > 0 else 0
        while len(order) > 1 and len(lists[name]) < size:
            # many scenes of one photo would take most of the others' place; the smallest group if there is no other
            fitting = (group for group in order if len(lists[name]) + len(groups[group]) <= max(size + 1, 1.5 * size))
            group = next(fitting, None) or min(order, key=lambda group: len(groups[group]))
            order.remove(group)
            lists[name] += groups[group]
    lists[LISTS[0]] = [scene_id for name in order for scene_id in groups[name]]
    with_original = set(trainable)
    lists[LISTS[2]] += [scene_id for scene_id in scene_ids if scene_id not in with_original]
    for name, members in lists.items():
        if members or name != LISTS[2]:
            write_text(data_dir / name, "".join(f"{scene_id}\n" for scene_id in sorted(members)))
        else:
            (data_dir / name).unlink(missing_ok=True)
    print("split: " + ", ".join(f"{len(members)} in {name}" for name, members in lists.items()))
    for name, share in zip(LISTS[1:], shares):
        if len(lists[name]) > max(2, 2 * share * len(trainable)):
            print(f"{name} has more than its share, {share:g}: scenes of one photo or group stay together")
    short = [name for name, share in zip(LISTS[1:], shares) if share > 0 and trainable and not lists[name]]
    if short:
        print(f"nothing left for {' and '.join(short)}: the {len(trainable)} scenes with an original are of "
              f"{len(groups)} photo{'s' if len(groups) > 1 else ''} or groups, which stay whole; add scenes of other "
              "photos, or train with --val_dir on a second folder")
    if twins:
        print(f"{len({scene_id for pair in twins for scene_id in pair})} scenes share their photo with another; those "
              f"stay in one list (as {', '.join(twins[0])})")
    return 1 if faults else 0


def same_photo(data_dir, scene_ids):
    """Pairs of scenes with the same original, as many as it takes to connect all that share one.

    Compared are thumbnails: the same photo as PNG and as JPEG counts, too. Originals that cannot be read are nobody's
    twin; `check` names them.
    """
    def thumbnail(scene_id):
        try:
            photo = read_image(Path(data_dir) / scene_id / "original.png", "RGB")
        except SceneError:
            return None
        return resize(photo, THUMBNAIL).astype(np.float32).ravel()

    with ThreadPoolExecutor(8) as pool:
        jobs = pool.map(thumbnail, scene_ids)
        known = [(scene_id, small) for scene_id, small in
                 zip(scene_ids, tqdm(jobs, "photos", len(scene_ids), disable=None, leave=False)) if small is not None]
    if len(known) < 2:
        return []
    known.sort(key=lambda entry: entry[1].mean())  # twins are as bright as each other
    thumbnails = np.stack([small for _, small in known])
    brightness = thumbnails.mean(1)
    ends = np.searchsorted(brightness, brightness + SAME_PHOTO, side="right")
    pairs, joined = [], {}
    for i, end in enumerate(ends):
        for j in i + 1 + np.flatnonzero((np.abs(thumbnails[i + 1 : end] - thumbnails[i]) <= SAME_PHOTO).all(1)):
            if _join(joined, i, int(j)):
                pairs.append(tuple(sorted((known[i][0], known[j][0]))))
    return sorted(pairs)


def _join(joined, one, other):
    """Make two groups one, named like the first of the two; whether they were not that already."""
    first, second = sorted(_root(joined, name) for name in (one, other))
    if first == second:
        return False
    joined[second] = first
    return True


def _root(joined, name):
    """The group that `name` has become part of; `joined` maps a group to the one it went into."""
    while name in joined:
        name = joined[name]
    return name
