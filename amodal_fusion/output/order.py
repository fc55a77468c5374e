"""Who is in front of whom, by the network's weights and logits: order.json, and locks that overrule it.

Completions are numbered as in weight_1.png …; 0 is the fill, "none of these".
"""

import json
import math
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import yaml

from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.files import write_text

MOST_COUNTED = 2**26  # candidates times pixels; of larger scenes every second, third … row and column is counted


def find_order(weights, alpha, mask, pairwise, locks=()):
    """Order of each two completions that meet.

    Weights tell it inside the hole, as far as no third one hides both; the logits wherever the two meet.

    Args:
        weights, alpha: (N,H,W) in [0,1]; mask (H,W), 1 = hole.
        pairwise: (N,N) of `mean_margins`, > 0 where the row is in front of the column.
        locks: pairs (front, behind) decided by hand.

    Returns:
        dict of
        pairs: list of {front, behind, confidence, area, area_in_hole, pairwise[, weights][, locked]}: areas in
            pixels where both have alpha > 0.5; pairwise and weights are the shares, 0 to 1, that speak for `front`.
            Weights count as far as the two have any where they meet in the hole, logits for the rest; that makes the
            confidence, from 0.5, undecided, to 1.
        front_to_back: list of groups; each lies in front of the next where they meet. Objects in one group lie in
            front of each other in a circle, which woven or leaning things do.
        cycles: those groups of more than one.
    """
    covers, inside = (alpha > 0.5).reshape(len(alpha), -1), mask.reshape(-1) > 0.5  # (N,P), (P,)
    meet = count_pairs(covers, covers)
    meet_hidden = count_pairs(covers[:, inside], covers[:, inside])
    won = count_pairs(covers[:, inside] * weights.reshape(len(alpha), -1)[:, inside], covers[:, inside])
    pairs = []
    for i, j in zip(*np.nonzero(np.triu(meet, 1))):
        confidence, weight = 1 / (1 + math.exp(-np.clip(pairwise[i, j], -50, 50))), won[i, j] + won[j, i]
        shares = {"pairwise": confidence}
        if weight > 0:
            shares["weights"] = won[i, j] / weight
            decided = weight / meet_hidden[i, j]  # what lies behind a third one has hardly any weight
            confidence = decided * shares["weights"] + (1 - decided) * confidence
        front, behind = int(i) + 1, int(j) + 1
        locked = (front, behind) in locks or (behind, front) in locks
        if (behind, front) in locks or (confidence < 0.5 and not locked):
            front, behind, confidence = behind, front, 1 - confidence
            shares = {name: 1 - share for name, share in shares.items()}
        pair = {"front": front, "behind": behind, "confidence": 1.0 if locked else round(confidence, 4),
                "area": int(meet[i, j]), "area_in_hole": int(meet_hidden[i, j])}
        pair |= {name: round(share, 4) for name, share in shares.items()}
        pairs.append(pair | ({"locked": True} if locked else {}))
    groups = front_to_back(len(weights), [(pair["front"], pair["behind"]) for pair in pairs])
    return {"pairs": pairs, "front_to_back": groups, "cycles": [group for group in groups if len(group) > 1]}


def mean_margins(logits, alpha, mask):
    """How far the row's completion is ahead of the column's in logits, (N,N), antisymmetric.

    The mean over where they meet in the hole; where they meet in plain view alone, over that.

    Args:
        logits, alpha: (N,h,w); mask (h,w), 1 = hole.
    """
    covers, inside = (alpha > 0.5).reshape(len(alpha), -1), mask.reshape(-1) > 0.5  # (N,P), (P,)
    hidden, logits = covers & inside, logits.reshape(covers.shape)
    meet_hidden, meet = count_pairs(hidden, hidden), count_pairs(covers, covers)
    total_hidden, total = count_pairs(hidden * logits, hidden), count_pairs(covers * logits, covers)
    mean = np.where(meet_hidden > 0, total_hidden / np.maximum(meet_hidden, 1), total / np.maximum(meet, 1))
    return mean - mean.T


def order_of(scene, blend, logits, locks=()):
    """`find_order` of a Scene and its Blend, made of logits (M,h,w), the fill's first."""
    step = math.ceil(math.sqrt(max(1, len(scene.completions) * scene.mask.size / MOST_COUNTED)))
    sparse = np.s_[::step, ::step]
    coarse = np.ix_(*((np.arange(few) * many + many // 2) // few  # the nearest pixel to each logit
                      for few, many in zip(logits.shape[1:], scene.mask.shape)))
    shapes = [[completion[..., 3][grid] >= 128 for grid in (sparse, coarse)] for completion in scene.completions]
    alpha, coarse_alpha = map(np.stack, zip(*shapes))
    pairwise = mean_margins(logits[1:], coarse_alpha, scene.mask[coarse])
    weights = np.stack([blend.on_picture(weight)[sparse] for weight in blend.weights]) / _one(blend)
    order = find_order(weights, alpha, scene.mask[sparse], pairwise, locks)
    for pair in order["pairs"]:
        pair |= {name: pair[name] * step**2 for name in ("area", "area_in_hole")}
    return order


def _one(blend):
    """What stands for a weight of 1 in a Blend."""
    return np.float32(np.iinfo(np.uint16).max if blend.weights.dtype == np.uint16 else 1)


def count_pairs(values, covers):
    """(N,P) and (N,P) → (N,N) float64: the sum of each one's values over the pixels that the other covers."""
    total, block = np.zeros((len(covers), len(covers))), 2**20
    for start in range(0, covers.shape[1], block):  # float32 counts a block exactly
        part = np.s_[:, start : start + block]
        total += values[part].astype(np.float32) @ covers[part].astype(np.float32).T
    return total


def front_to_back(count, pairs):
    """Numbers 1 … count in groups, front to back; those that lie in front of each other in a circle share one.

    Args:
        pairs: (front, behind), at most one per two numbers.
    """
    reach = np.eye(count + 1, dtype=bool)
    for front, behind in pairs:
        reach[front, behind] = True
    for via in range(1, count + 1):  # Warshall: whoever reaches `via` reaches what it reaches
        reach |= reach[:, via : via + 1] & reach[via]
    circle = reach & reach.T
    leader = circle.argmax(1)  # the lowest number of its group stands for all of it
    behind = {int(leader[i]): set() for i in range(1, count + 1)}
    for front, back in pairs:
        if leader[front] != leader[back]:
            behind[int(leader[back])].add(int(leader[front]))
    return [np.flatnonzero(circle[i]).tolist() for i in TopologicalSorter(behind).static_order()]


def write_order(path, scene_id, order):
    """order.json, one pair a line, so that a person can read it, too."""
    pairs = ",\n    ".join(map(json.dumps, order["pairs"]))
    lines = [f'  "scene": {json.dumps(scene_id, ensure_ascii=False)}', f'  "pairs": [\n    {pairs}\n  ]']
    lines += [f'  "{name}": {json.dumps(order[name])}' for name in ("front_to_back", "cycles")]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def parse_locks(texts, source):
    """["1>3", "0>2"] → [(1, 3), (0, 2)].

    Raises:
        ConfigError: one is no such pair, or they go round in a circle; the message starts with `source`.
    """
    locks = []
    for text in texts if isinstance(texts, list) else [texts]:
        match = re.fullmatch(r"\s*(\d+)\s*>\s*(\d+)\s*", str(text))
        if match is None or int(match[1]) == int(match[2]):
            raise ConfigError(f"{source}: {text!r} is no lock; write 1>3 for 1 in front of 3 (0 is none of them)")
        locks.append((int(match[1]), int(match[2])))
    try:
        sort_locks(locks)
    except CycleError as error:
        circle = ">".join(map(str, error.args[1]))
        raise ConfigError(f"{source}: {circle} goes round in a circle; leave one of these out") from None
    return locks


def read_locks(path, data_dir):
    """Pairs decided by hand: a YAML file with a line such as `abbey__0001: ["1>3", "2>4"]` per scene.

    Returns:
        dict scene id → list of (front, behind).

    Raises:
        ConfigError: no such file, not YAML of that form, or a scene that is not there.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        node, table = (read(text, yaml.BaseLoader) for read in (yaml.compose, yaml.load))  # all text, as 0012 is a name
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(table, dict):
        raise ConfigError(f'{path}: expected lines of the form  scene: ["1>3"]')
    names = [key.value for key, _ in node.value]
    unknown = [name for name in names if not (Path(data_dir) / name).is_dir()]
    if unknown:
        raise ConfigError(f"{path}: there is no scene {', '.join(map(repr, unknown[:5]))} in {data_dir}")
    if len(names) > len(table):
        raise ConfigError(f"{path}: {max(names, key=names.count)} stands there twice")
    return {scene_id: parse_locks(texts, f"{path}: {scene_id}") for scene_id, texts in table.items()}


def list_locks(lock, path, data_dir, scene_ids):
    """{scene id: pairs decided by hand}, by a text or by a file.

    Raises:
        ConfigError: a text for more than one scene; and as in `parse_locks` and `read_locks`.
    """
    if lock and (path or len(scene_ids) != 1):
        raise ConfigError("locks as a text are for a single scene; for more write a file with a line for each", "lock",
                          "locks")
    if lock:
        return {scene_ids[0]: parse_locks(lock.split(","), f"lock {lock}")}
    return read_locks(path, data_dir) if path else {}


def sort_locks(locks):
    """{behind: those in front of it}, hindmost first; CycleError if there is none."""
    graph = {}
    for front, behind in locks:
        graph.setdefault(behind, set()).add(front)
    return {number: sorted(graph[number]) for number in reversed(list(TopologicalSorter(graph).static_order()))
            if number in graph}


def check_numbers(locks, count):
    """Raise SceneError for a lock on a completion that the scene does not have."""
    wrong = [f"{front}>{behind}" for front, behind in locks if max(front, behind) > count]
    if wrong:
        raise SceneError(f"lock {', '.join(wrong)}: the scene has completions 1 to {count}")


def apply_locks(locks, weights, residual, alpha):
    """Weights in which the front one of each locked pair has taken what the other had.

    It takes as much as it covers: where it is opaque all, at a soft edge its alpha. Several in front of one share in
    the ratio of their own weights.

    Args:
        locks: of `parse_locks`; weights, alpha: (N,…) float32; residual (…).

    Returns:
        weights and residual of the same shapes, their sum as before.
    """
    all_weights = np.concatenate([residual[None], weights])  # (M,…), the fill first, as in the locks
    alpha = np.concatenate([np.ones_like(residual)[None], alpha])
    for behind, fronts in sort_locks(locks).items():
        cover = alpha[fronts]  # (F,…)
        taken = all_weights[behind] * (1 - (1 - cover).prod(0))
        share = (all_weights[fronts] + np.float32(1e-6)) * cover
        all_weights[fronts] += taken * share / np.maximum(share.sum(0), np.float32(1e-9))
        all_weights[behind] -= taken
    return all_weights[1:], all_weights[0]


def lock_blend(locks, scene, blend):
    """Apply locks to the weights and colours of a Blend of `scene`, in place; SceneError as in `check_numbers`.

    Returns:
        those locks whose two do not meet in the hole, and that change nothing.
    """
    if not locks:
        return []
    numbers = sorted({0, *(number for lock in locks for number in lock)})
    check_numbers(locks, len(blend.weights))
    rgba = np.stack([scene.completions[number - 1][scene.mask] for number in numbers[1:]]) / np.float32(255)  # (K,P,4)
    slots = [number - 1 for number in numbers[1:]]
    full = _one(blend)
    weights, residual = blend.weights[slots] / full, blend.residual / full
    renumbered = [tuple(map(numbers.index, lock)) for lock in locks]
    new_weights, new_residual = apply_locks(renumbered, weights, residual, rgba[..., 3])
    blend.colours += ((new_weights - weights)[..., None] * rgba[..., :3]).sum(0)
    blend.colours += (new_residual - residual)[:, None] * blend.fill
    if full > 1:
        new_weights, new_residual = np.rint(new_weights * full), np.rint(new_residual * full)
    blend.weights[slots], blend.residual[:] = new_weights, new_residual
    covers = {0: True, **{number: rgba[i, :, 3] > 0 for i, number in enumerate(numbers[1:])}}
    return [(front, behind) for front, behind in locks if not np.any(covers[front] & covers[behind])]
