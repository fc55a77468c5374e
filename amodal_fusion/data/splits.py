"""Split scenes into training, validation and test lists; scenes of one photo stay in one list."""

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
from amodal_fusion.data.names import fault_of_id, photo_of, print_unportable, printable
from amodal_fusion.data.scenes import find_scenes
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.files import check_ours, remove_ours, write_text

LISTS = ("train_list.txt", "val_list.txt", "test_list.txt")
THUMBNAIL = (8, 8)
SAME_PHOTO = 2.5  # levels between thumbnails; JPEG and PNG of one photo stay below 1


@dataclass
class SplitOptions:
    """Options of the split, for `create` and `split`."""

    val_fraction: float = option(0.1, "share of scenes for validation", "split", least=0, most=1)
    test_fraction: float = option(0.0, "share of scenes for testing", "split", least=0, most=1)
    group_by: str | None = option(None, "regular expression for the start of ids; scenes with the same match (or "
                                        "first group) stay in one list. Scenes with the same original always do",
                                  "split")
    seed: int = option(0, "decides which scenes are in which list", "split", least=0)


def write_lists(data_dir, options):
    """Write the three lists; scenes without an original are test scenes.

    Groups are sorted by a hash of their name and the seed: the split does not depend on the order of files, and a new
    scene moves few others.

    Returns:
        0, or 1 if scenes were left out because of their names (these are printed).
    """
    try:
        pattern = re.compile(options.group_by) if options.group_by else None
    except re.error as error:
        raise ConfigError(f"{options.group_by}: not a regular expression ({error})", "group_by") from None
    shares = {LISTS[1]: options.val_fraction, LISTS[2]: options.test_fraction}
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise ConfigError("the shares of the lists must not be below 0, and together below 1", "val_fraction",
                          "test_fraction")
    check_ours([data_dir / name for name in LISTS])
    found = find_scenes(data_dir)
    faults = {scene_id: fault for scene_id in found if (fault := fault_of_id(scene_id))}
    for scene_id, fault in faults.items():
        print(f"left out: {printable(data_dir / scene_id)}: {fault}")
    scene_ids = [scene_id for scene_id in found if scene_id not in faults]
    print_unportable(scene_ids)
    trainable = [scene_id for scene_id in scene_ids if os.path.isfile(data_dir / scene_id / "original.png")]
    twins = same_photo(data_dir, trainable)
    groups = _groups(trainable, pattern, twins)
    lists = _divided(groups, shares, len(trainable), options.seed)
    lists[LISTS[2]] += sorted(set(scene_ids) - set(trainable))
    for name, members in lists.items():
        if members or name != LISTS[2]:
            write_text(data_dir / name, "".join(f"{scene_id}\n" for scene_id in sorted(members)), owned=True)
        else:
            remove_ours(data_dir / name)
    _print_split(lists, shares, len(trainable), len(groups), twins)
    return 1 if faults else 0


def _groups(scene_ids, pattern, twins):
    """{name: scene ids} of scenes that stay in one list: by `pattern` in their ids, or as `twins` of one photo."""
    group_of, joined, groups = {scene_id: photo_of(scene_id, pattern) or scene_id for scene_id in scene_ids}, {}, {}
    for scene_id, twin in twins:
        _join(joined, group_of[scene_id], group_of[twin])
    for scene_id, group in group_of.items():
        groups.setdefault(_root(joined, group), []).append(scene_id)
    return groups


def _divided(groups, shares, total, seed):
    """{list: scene ids} of whole groups; `shares` are of `total` scenes, train_list.txt gets the rest."""
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    lists = {name: [] for name in LISTS}
    for name, share in shares.items():
        size = max(1, round(share * total)) if share > 0 else 0
        while len(order) > 1 and len(lists[name]) < size:
            # a large group would displace most others; if all are large, take the smallest
            fitting = (group for group in order if len(lists[name]) + len(groups[group]) <= max(size + 1, 1.5 * size))
            group = next(fitting, None) or min(order, key=lambda group: len(groups[group]))
            order.remove(group)
            lists[name] += groups[group]
    lists[LISTS[0]] = [scene_id for name in order for scene_id in groups[name]]
    return lists


def _print_split(lists, shares, trainable, groups, twins):
    """Print the lengths of the lists, and why they differ from the shares; `trainable` and `groups` are numbers."""
    print("split: " + ", ".join(f"{len(members)} in {name}" for name, members in lists.items()))
    for name, share in shares.items():
        if len(lists[name]) > max(2, 2 * share * trainable):
            print(f"{name} has more than its share, {share:g}: scenes of one photo or group stay together")
    short = [name for name, share in shares.items() if share > 0 and trainable and not lists[name]]
    if short:
        print(f"nothing left for {' and '.join(short)}: the {trainable} scenes with an original are of {groups} "
              f"photo{'s' if groups > 1 else ''} or groups, which stay in one list; add scenes of other photos, or "
              "use a second folder for validation (--val_dir)")
    if twins:
        print(f"{len({scene_id for pair in twins for scene_id in pair})} scenes share their photo with another; those "
              f"stay in one list (as {', '.join(twins[0])})")


def same_photo(data_dir, scene_ids):
    """Pairs of scenes with the same original; they connect all scenes of one photo.

    Thumbnails are compared, so a photo as PNG and as JPEG is the same. Originals that cannot be read are left out;
    `check` names them.
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
    known.sort(key=lambda entry: entry[1].mean())  # twins are equally bright
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
    """Join two groups under the name that sorts first; returns False if they were one group already."""
    first, second = sorted(_root(joined, name) for name in (one, other))
    if first == second:
        return False
    joined[second] = first
    return True


def _root(joined, name):
    """The group that contains group `name` now; `joined` maps a group to the one that it was joined to."""
    while name in joined:
        name = joined[name]
    return name
