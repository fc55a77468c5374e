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
FEW = 64  # thumbnails that are compared one by one
AT_ONCE = 1024  # photos that wait to be read


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
        left, most = [], max(size + 1, 1.5 * size)  # a larger group would displace most others
        for number, group in enumerate(order):
            others = len(left) + len(order) - number - 1  # one group at least stays
            fits = others and len(lists[name]) < size and len(lists[name]) + len(groups[group]) <= most
            (lists[name].extend(groups[group]) if fits else left.append(group))
        if len(left) > 1 and len(lists[name]) < size:  # all are large
            smallest = min(left, key=lambda group: len(groups[group]))
            left.remove(smallest)
            lists[name] += groups[smallest]
        order = left
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
        return resize(photo, THUMBNAIL).ravel()

    known, thumbnails = [], np.empty((len(scene_ids), 3 * THUMBNAIL[0] * THUMBNAIL[1]), np.uint8)
    with ThreadPoolExecutor(8) as pool, tqdm(
            desc="photos", total=len(scene_ids), disable=None, leave=False) as progress:
        for start in range(0, len(scene_ids), AT_ONCE):
            part = scene_ids[start : start + AT_ONCE]
            for scene_id, small in zip(part, pool.map(thumbnail, part)):
                progress.update()
                if small is not None:
                    thumbnails[len(known)] = small
                    known.append(scene_id)
    pairs, joined = [], {}
    for i, j in _near(thumbnails, np.arange(len(known))):
        if _join(joined, i, j):
            pairs.append(tuple(sorted((known[i], known[j]))))
    return sorted(pairs)


def _near(thumbnails, members):
    """Pairs of rows of `thumbnails` (n,192) that differ nowhere by more than SAME_PHOTO, among the rows `members`.

    The rows are halved at the median of their widest column, again and again, so time grows as n log n; where too many
    equal the median, in the middle of their range. Rows near a cut go to both halves; some pairs thus come twice. The
    pairs connect all rows of one photo.
    """
    while len(members) > 1:
        values = thumbnails[members]
        low, high = values.min(0).astype(np.int16), values.max(0).astype(np.int16)
        widest = int((high - low).argmax())
        if high[widest] - low[widest] <= SAME_PHOTO:
            yield from ((int(members[0]), int(other)) for other in members[1:])
            return
        column = values[:, widest].astype(np.float32)
        for cut in (np.median(column), (low[widest] + high[widest]) / 2):
            halves = members[column <= cut + SAME_PHOTO / 2], members[column >= cut - SAME_PHOTO / 2]
            if len(members) > FEW and sum(map(len, halves)) < 1.2 * len(members):
                break
        else:
            values = values.astype(np.int16)
            for number, row in enumerate(values):
                same = (np.abs(values[number + 1 :] - row) <= SAME_PHOTO).all(1)
                yield from ((int(members[number]), int(members[number + 1 + other])) for other in np.flatnonzero(same))
            return
        smaller, members = sorted(halves, key=len)
        yield from _near(thumbnails, smaller)


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
        above = joined[name]
        joined[name] = joined.get(above, above)  # a shorter way for the next time
        name = above
    return name
