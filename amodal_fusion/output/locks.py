"""Locks: the user's decisions about a scene, which overrule the network.

    1>3                        1 is in front of 3
    0>3                        the fill is in front of 3: 3 is never used
    *>3                        forget 3: the other candidates take its place
    0>* in 40 20 90 20 90 70   none of the completions within this polygon, x y x y … in pixels

Completions are numbered as in weight_1.png …; 0 is the fill, * all the others. Locks on the whole picture are
applied first, together. Those within a polygon follow, in their order. `output/page/recompose.js` applies the same rule
to the same 16-bit weights, so that the page shows what the script will write.
"""

import math
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from amodal_fusion.config import yaml_fault
from amodal_fusion.data.scenes import completion_paths, numbers_of
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.model.blending import BLOCK, to_levels

FULL = np.iinfo(np.uint16).max  # the level of a weight of 1
ALL = -1  # "*"
# Added to the weights of candidates that take over where these are 0 in 16 bits: completions before the fill.
SHARE_OF_COMPLETION, SHARE_OF_FILL = 1e-3, 1e-6


class Lock(NamedTuple):
    """`front` takes the weight of `behind` where both cover a pixel. Numbers of candidates; one of them may be ALL."""

    front: int
    behind: int
    polygon: tuple = ()  # (x, y), …, corners in pixels; empty: the whole picture

    def __str__(self):
        pair = ">".join("*" if number == ALL else str(number) for number in self[:2])
        return pair + (" in " + " ".join(f"{x} {y}" for x, y in self.polygon) if self.polygon else "")


def parse_locks(texts, source):
    """["1>3", "0>2"] → [Lock(1, 3), Lock(0, 2)].

    Raises:
        ConfigError: a text is no lock, or the locks form a circle; the message starts with `source`.
    """
    locks = []
    for text in texts if isinstance(texts, list) else [texts]:
        match = re.fullmatch(r"\s*(\d+|\*)\s*>\s*(\d+|\*)\s*(?:in((?:\s+\d+\s+\d+){3,})\s*)?", str(text), re.ASCII)
        if match is None or match[1] == match[2]:
            raise ConfigError(f"{source}: {text!r} is no lock; write 1>3 for 1 in front of 3 (0 is none of them, * all "
                              "others), or '0>* in X Y X Y X Y' for none of them within a polygon")
        front, behind = (ALL if number == "*" else int(number) for number in match.groups()[:2])
        corners = list(map(int, (match[3] or "").split()))
        locks.append(Lock(front, behind, tuple(zip(corners[::2], corners[1::2]))))
    try:
        mentioned = max((number for lock in locks for number in lock[:2]), default=0)
        sort_pairs(pairs_of(locks, mentioned))
    except CycleError as error:
        circle = ">".join(map(str, error.args[1]))
        raise ConfigError(f"{source}: {circle} is a circle; remove one of these") from None
    return locks


def read_locks(path, data_dir):
    """Locks in a YAML file, with a line such as `abbey__0001: ["1>3", "2>4"]` per scene.

    Returns:
        dict scene id → list of Lock.

    Raises:
        ConfigError: the file is missing or has another form, or a scene does not exist.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        # all values as text: 0012 is a name
        node, table = (read(text, yaml.BaseLoader) for read in (yaml.compose, yaml.load))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "locks") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {yaml_fault(error)}", "locks") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", "locks") from None
    if not isinstance(table, dict):
        raise ConfigError(f'{path}: expected lines of the form  scene: ["1>3"]')
    names = [key.value for key, _ in node.value]
    unknown = [name for name in names if not (Path(data_dir) / name).is_dir()]
    if unknown:
        raise ConfigError(f"{path}: there is no scene {', '.join(map(repr, unknown[:5]))} in {data_dir}")
    if len(names) > len(table):
        raise ConfigError(f"{path}: {max(names, key=names.count)} is listed twice")
    return {scene_id: parse_locks(texts, f"{path}: {scene_id}") for scene_id, texts in table.items()}


def list_locks(lock, path, data_dir, scene_ids, max_completions=None):
    """{scene id: list of Lock}, from a text or a file.

    Raises:
        ConfigError: a text with more than one scene; a scene does not have a completion, or has it behind the first
            `max_completions`; or as in `parse_locks` and `read_locks`.
    """
    if lock and (path or len(scene_ids) != 1):
        raise ConfigError("a lock is for a single scene; for more write a file with a line per scene", "lock", "locks")
    if lock:
        locks = {scene_ids[0]: parse_locks(lock.split(","), f"lock {lock}")}
    else:
        locks = read_locks(path, data_dir) if path else {}
    for scene_id, listed in locks.items():  # before outputs of earlier runs are touched
        paths = completion_paths(Path(data_dir) / scene_id)[:max_completions]
        try:
            to_slots(listed, numbers_of(paths))
        except SceneError as error:
            raise ConfigError(f"{path or data_dir}: {scene_id}: {error}", "lock" if lock else "locks") from None
    return locks


def pairs_of(locks, count):
    """(front, behind) of candidates 0 … count: all pairs that locks on the whole picture decide.

    Forgotten completions (`*>3`) take nothing from each other.
    """
    everywhere = [lock[:2] for lock in locks if not lock.polygon]
    forgotten = {behind for front, behind in everywhere if front == ALL}
    pairs = []
    for front, behind in everywhere:
        fronts = [i for i in range(count + 1) if i not in forgotten] if front == ALL else [front]
        behinds = range(count + 1) if behind == ALL else [behind]
        pairs += [(i, j) for i in fronts for j in behinds if i != j]
    return list(dict.fromkeys(pairs))


def sort_pairs(pairs):
    """{behind: those in front of it}, hindmost first. Raises CycleError for a circle."""
    graph = {}
    for front, behind in pairs:
        graph.setdefault(behind, set()).add(front)
    return {number: sorted(graph[number]) for number in reversed(list(TopologicalSorter(graph).static_order()))
            if number in graph}


def to_slots(locks, numbers):
    """Locks with the completions' `numbers` → locks with their places 1 … N.

    Raises:
        SceneError: the scene has no completion of this number.
    """
    places = {ALL: ALL, 0: 0, **{number: place for place, number in enumerate(numbers, 1)}}
    wrong = [str(lock) for lock in locks if not {lock.front, lock.behind} <= places.keys()]
    if wrong:
        raise SceneError(f"lock {', '.join(wrong)}: the completions of the scene are {', '.join(map(str, numbers))}")
    return [lock._replace(front=places[lock.front], behind=places[lock.behind]) for lock in locks]


def within(polygon, size):
    """(H,W) bool: the pixels whose centre lies in a polygon [(x, y), …], by the even-odd rule."""
    inside, centres = np.zeros(size, bool), np.arange(size[1]) + 0.5
    for edge in zip(polygon, (*polygon[1:], polygon[0])):
        (x, y), (end_x, end_y) = sorted(edge, key=lambda corner: corner[1])
        rows = np.arange(max(0, math.ceil(y - 0.5)), min(size[0], math.ceil(end_y - 0.5)))
        if len(rows):
            crossing = x + (rows + 0.5 - y) * (end_x - x) / (end_y - y)
            inside[rows] ^= centres < crossing[:, None]
    return inside


def apply_locks(locks, weights, alpha, inside):
    """Move weight to the front candidate of each locked pair.

    It takes the share of the other's weight that its alpha covers. Several in front of one share it in the ratio of
    their weights before.

    Args:
        locks: list of Lock; weights, alpha: (M,P) float, the fill first, its alpha 1.
        inside: polygon → (P,) bool.

    Returns:
        new weights, of the same sum.
    """
    count = len(weights) - 1
    weights = take_over(pairs_of(locks, count), weights, alpha)
    for lock in locks:
        if lock.polygon:
            part = inside[lock.polygon]
            weights[:, part] = take_over(pairs_of([lock._replace(polygon=())], count), weights[:, part], alpha[:, part])
    return weights


def take_over(pairs, before, alpha):
    """As `apply_locks`, for pairs (front, behind)."""
    weights, count = before.copy(), len(before)
    share_of = before + np.array([SHARE_OF_FILL, *[SHARE_OF_COMPLETION] * (count - 1)], before.dtype)[:, None]
    for behind, fronts in sort_pairs(pairs).items():
        cover = alpha[fronts]  # (F,P)
        taken = weights[behind] * (1 - (1 - cover).prod(0))
        share = share_of[fronts] * cover
        weights[fronts] += taken * share / np.maximum(share.sum(0), 1e-9)
        weights[behind] -= taken
    return weights


def one_of(blend):
    """The number for a weight of 1 in a Blend."""
    return np.float32(FULL if blend.weights.dtype == np.uint16 else 1)


def lock_blend(locks, scene, blend, scale=(1, 1)):
    """Apply locks to the weights and colours of a Blend of `scene`, in place.

    Args:
        locks: of `to_slots`.
        scale: factors on x and y from the pixels of the polygons to those of the scene, if that is a smaller copy.

    Returns:
        places in `locks` of those that change nothing: their two do not overlap in the hole.
    """
    if not locks:
        return []
    count, size = blend.weights.shape
    pixels = np.empty((count, size, 4), np.uint8)
    for slot, completion in enumerate(scene.completions):
        pixels[slot] = completion[scene.mask]
    polygons = {lock.polygon for lock in locks if lock.polygon}
    inside = {polygon: within([(x * scale[0], y * scale[1]) for x, y in polygon], scene.mask.shape)[scene.mask]
              for polygon in polygons}
    met = np.zeros(len(locks), bool)
    step = max(64, BLOCK // (count + 1))
    for start in range(0, size, step):
        part = np.s_[start : start + step]
        chosen = {polygon: where[part] for polygon, where in inside.items()}
        met |= _lock_block(locks, blend, pixels[:, part], part, chosen)
    return np.flatnonzero(~met).tolist()


def _lock_block(locks, blend, pixels, part, inside):
    """`lock_blend` for some pixels of the hole, (N,b,4); returns which locks have both their candidates there."""
    levels = to_levels(blend.weights[:, part]).astype(np.float64)  # as in weight_1.png: the page starts from these, too
    before = np.concatenate([np.maximum(FULL - levels.sum(0), 0)[None], levels]) / FULL  # (M,b)
    alpha = np.concatenate([np.ones_like(before[:1]), pixels[..., 3] / 255])
    after = apply_locks(locks, before, alpha, inside)
    changed = np.flatnonzero((after != before).any(1))
    for number in changed:
        colours = blend.fill[part] if number == 0 else pixels[number - 1, :, :3] / np.float32(255)
        blend.colours[part] += (after[number] - before[number]).astype(np.float32)[:, None] * colours
        values = after[number] if one_of(blend) == 1 else np.rint(after[number] * FULL)
        (blend.residual if number == 0 else blend.weights[number - 1])[part] = values
    covers = {ALL: True, **dict(enumerate(alpha > 0))}
    return [bool(np.any(covers[lock.front] & covers[lock.behind] & inside.get(lock.polygon, True))) for lock in locks]
