"""Which completion is in front, by the network's weights and logits: order.json.

Completions are numbered as in weight_1.png …; 0 is the fill ("none of these").
"""

import json
import math
from graphlib import TopologicalSorter

import numpy as np

from amodal_fusion.data.tensors import first_copies
from amodal_fusion.files import write_text
from amodal_fusion.model.compositing import ABSENT
from amodal_fusion.output.locks import one_of, pairs_of

MOST_COUNTED = 2**26  # candidates × pixels; in larger scenes only every second, third … row and column is used


def find_order(weights, alpha, mask, pairwise, locks=()):
    """Order of each pair of overlapping completions.

    Weights decide it inside the hole unless a third one hides both; logits decide it wherever the two overlap.

    Args:
        weights, alpha: (N,H,W) in [0,1]; mask (H,W), 1 = hole.
        pairwise: (N,N) of `mean_margins`, > 0 where the row is in front of the column.
        locks: pairs (front, behind) set by the user.

    Returns:
        dict of
        pairs: list of {front, behind, confidence, area, area_in_hole, pairwise[, weights][, locked]}: areas in
            pixels where both have alpha > 0.5; pairwise and weights are the evidence for `front`, from 0 to 1. The
            confidence, from 0.5 (undecided) to 1, mixes them: weights by their sum in the overlap, logits for the rest.
        front_to_back: list of groups; each lies in front of the next where they overlap. Objects in one group lie in
            front of each other in a circle, as woven or leaning objects do.
        cycles: the groups of more than one.
    """
    covers, inside = (alpha > 0.5).reshape(len(alpha), -1), mask.reshape(-1) > 0.5  # (N,P), (P,)
    overlap = count_pairs(covers, covers)
    overlap_in_hole = count_pairs(covers[:, inside], covers[:, inside])
    won = count_pairs(covers[:, inside] * weights.reshape(len(alpha), -1)[:, inside], covers[:, inside])
    pairs = []
    for i, j in zip(*np.nonzero(np.triu(overlap, 1))):
        confidence, weight = 1 / (1 + math.exp(-np.clip(pairwise[i, j], -50, 50))), won[i, j] + won[j, i]
        shares = {"pairwise": confidence}
        if weight > 0:
            shares["weights"] = won[i, j] / weight
            decided = weight / overlap_in_hole[i, j]  # behind a third one both have little weight
            confidence = decided * shares["weights"] + (1 - decided) * confidence
        front, behind = int(i) + 1, int(j) + 1
        locked = (front, behind) in locks or (behind, front) in locks
        if (behind, front) in locks or (confidence < 0.5 and not locked):
            front, behind, confidence = behind, front, 1 - confidence
            shares = {name: 1 - share for name, share in shares.items()}
        pair = {"front": front, "behind": behind, "confidence": 1.0 if locked else round(confidence, 4),
                "area": int(overlap[i, j]), "area_in_hole": int(overlap_in_hole[i, j])}
        pair |= {name: round(share, 4) for name, share in shares.items()}
        pairs.append(pair | ({"locked": True} if locked else {}))
    groups = front_to_back(len(weights), [(pair["front"], pair["behind"]) for pair in pairs])
    return {"pairs": pairs, "front_to_back": groups, "cycles": [group for group in groups if len(group) > 1]}


def mean_margins(logits, alpha, mask):
    """Mean difference in logits, row minus column, (N,N), antisymmetric.

    The mean over the overlap in the hole; if there is none, over the overlap outside.

    Args:
        logits, alpha: (N,h,w); mask (h,w), 1 = hole.
    """
    covers, inside = (alpha > 0.5).reshape(len(alpha), -1), mask.reshape(-1) > 0.5  # (N,P), (P,)
    hidden, logits = covers & inside, logits.reshape(covers.shape)
    overlap_in_hole, overlap = count_pairs(hidden, hidden), count_pairs(covers, covers)
    total_in_hole, total = count_pairs(hidden * logits, hidden), count_pairs(covers * logits, covers)
    mean = np.where(overlap_in_hole > 0, total_in_hole / np.maximum(overlap_in_hole, 1), total / np.maximum(overlap, 1))
    return mean - mean.T


def order_of(scene, blend, logits, locks=()):
    """`find_order` of a Scene and its Blend, with logits (M,h,w), the fill first. locks: list of Lock.

    Exact copies share logits and weights, so that all have the same place; between two of them nothing is decided.
    """
    step = math.ceil(math.sqrt(max(1, len(scene.completions) * scene.mask.size / MOST_COUNTED)))
    sparse = np.s_[::step, ::step]
    coarse = np.ix_(*((np.arange(few) * many + many // 2) // few  # the pixel nearest to each logit
                      for few, many in zip(logits.shape[1:], scene.mask.shape)))
    shapes = [[completion[..., 3][grid] >= 128 for grid in (sparse, coarse)] for completion in scene.completions]
    alpha, coarse_alpha = map(np.stack, zip(*shapes))
    weights = np.stack([blend.on_picture(weight)[sparse] for weight in blend.weights]) / one_of(blend)
    logits = logits[1:]
    if (logits[:, 0, 0] == ABSENT).any():  # only the first of equal ones has logits
        firsts = first_copies(scene.resized(logits.shape[1:]).completions)
        firsts = np.array([index if first is None else first for index, first in enumerate(firsts)])
        logits = logits[firsts]
        weights = np.stack([weights[firsts == first].sum(0) for first in firsts])
    pairwise = mean_margins(logits, coarse_alpha, scene.mask[coarse])
    order = find_order(weights, alpha, scene.mask[sparse], pairwise, pairs_of(locks, len(alpha)))
    for pair in order["pairs"]:
        pair |= {name: pair[name] * step**2 for name in ("area", "area_in_hole")}
    return order


def count_pairs(values, covers):
    """(N,P) and (N,P) → (N,N) float64: sum of the row's values over the pixels that the column covers."""
    total, block = np.zeros((len(covers), len(covers))), 2**20
    for start in range(0, covers.shape[1], block):  # float32 is exact for one block
        part = np.s_[:, start : start + block]
        total += values[part].astype(np.float32) @ covers[part].astype(np.float32).T
    return total


def front_to_back(count, pairs):
    """Numbers 1 … count in groups, front to back; a circle of numbers is one group.

    Args:
        pairs: (front, behind), at most one per two numbers.
    """
    reach = np.eye(count + 1, dtype=bool)
    for front, behind in pairs:
        reach[front, behind] = True
    for via in range(1, count + 1):  # Warshall: what reaches `via` also reaches what `via` reaches
        reach |= reach[:, via : via + 1] & reach[via]
    circle = reach & reach.T
    leader = circle.argmax(1)  # the lowest number represents its group
    behind = {int(leader[i]): set() for i in range(1, count + 1)}
    for front, back in pairs:
        if leader[front] != leader[back]:
            behind[int(leader[back])].add(int(leader[front]))
    return [np.flatnonzero(circle[i]).tolist() for i in TopologicalSorter(behind).static_order()]


def write_order(path, scene, order):
    """Write order.json, readable: one pair per line. Completions have their numbers in the scene's folder."""
    numbers = scene.numbered()
    pairs = [pair | {name: numbers[pair[name] - 1] for name in ("front", "behind")} for pair in order["pairs"]]
    names = dict(zip(map(str, numbers), scene.source_names()))
    lines = [f'  "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in (("scene", scene.id),
                                                                                        ("completions", names))]
    lines.append('  "pairs": [\n    {}\n  ]'.format(",\n    ".join(map(json.dumps, pairs))))
    lines += [f'  "{name}": {json.dumps([[numbers[place - 1] for place in group] for group in order[name]])}'
              for name in ("front_to_back", "cycles")]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
