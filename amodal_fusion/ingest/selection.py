"""Which completions to keep: those that cover most of the hole, each object once."""

import cv2
import numpy as np

from amodal_fusion.data.consistency import WHOLE_FRAME
from amodal_fusion.data.images import resize

SAME_SHAPE = 0.85  # IoU of alphas: above, two completions may show one object
SAME_COLOUR = 0.08  # mean colour difference in [0,1]: below, they do
SEEN_SHAPE, SEEN_COLOUR = 0.6, 0.15  # the same if modal masks say that they show one object
LEAST_SHARE = 0.005  # of the hole; a smaller completion is dropped


def select_completions(completions, mask, partial, n_max, visible=None):
    """Choose up to `n_max` completions, the most useful first.

    Greedy by new hole coverage. Of near-duplicates (samples of one object, or one object at several granularities)
    the one that agrees best with the visible photo is kept. Whole-frame pictures come last. Modal masks say where a
    completion can be compared with the photo, and which completions show one object even if they differ.

    Args:
        completions: list of (H,W,4) uint8; mask (H,W) bool, True = hole; partial (H,W,3) uint8.
        visible: modal masks, list of (H,W) bool or None per completion; None when there are none.

    Returns:
        the kept indices in order, and per completion a dict of kept_as (1… or None), reason, hole_share,
        new_share (of the hole, when it was chosen) and visible_error (mean colour difference in [0,1]).
    """
    scale = min(1, 128 / max(mask.shape))  # areas need no full resolution
    size = tuple(max(1, round(side * scale)) for side in mask.shape)
    hole = resize(mask.astype(np.uint8), size, nearest=True).astype(bool)
    hole = hole if hole.any() else np.ones(size, bool)
    photo = resize(partial, size) / 255.0
    small = [resize(completion, size) for completion in completions]
    alphas = [completion[..., 3] > 127 for completion in small]
    colours = [completion[..., :3] / 255.0 for completion in small]
    # without the pixels beside the hole: resizing mixed them with its black
    outside = cv2.dilate(hole.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0
    modal = [None if modal is None else resize(modal.astype(np.uint8), size, nearest=True) > 0
             for modal in visible or [None] * len(completions)]

    rows, pool = [], []
    for alpha, colour, shown in zip(alphas, colours, modal):
        seen = alpha & outside
        if shown is not None and (seen & shown).sum() > 4:
            seen &= shown
        row = {"kept_as": None, "reason": "", "hole_share": (alpha & hole).sum() / hole.sum(), "new_share": 0.0,
               "visible_error": np.abs(colour[seen] - photo[seen]).mean() if seen.sum() > 4 else np.nan}
        if alpha.mean() < 5e-4:
            row["reason"] = "empty"
        elif row["hole_share"] < LEAST_SHARE:
            row["reason"] = "outside the hole" if row["hole_share"] == 0 else "tiny part of the hole"
        else:
            pool.append(len(rows))
        rows.append(row)

    kept, covered = [], np.zeros_like(hole)
    while pool and len(kept) < n_max:
        def worth(i, covered=covered):
            new = (alphas[i] & hole & ~covered).sum() / hole.sum()
            return alphas[i].mean() < WHOLE_FRAME, new + 0.05 * rows[i]["hole_share"]

        first = max(pool, key=worth)
        group = [i for i in pool if i == first or _same(alphas[i], alphas[first], colours[i], colours[first],
                                                        modal[i], modal[first])]
        best = min(group, key=lambda i: (np.nan_to_num(rows[i]["visible_error"], nan=1.0), i != first))
        kept.append(best)
        rows[best]["kept_as"], rows[best]["reason"] = len(kept), "kept"
        rows[best]["new_share"] = (alphas[best] & hole & ~covered).sum() / hole.sum()
        covered = covered | alphas[best] & hole
        for i in group:
            if i != best:
                rows[i]["reason"] = f"duplicate of number {len(kept)}"
        pool = [i for i in pool if i not in group]
    for i in pool:
        rows[i]["reason"] = "whole frame, no slot left" if alphas[i].mean() >= WHOLE_FRAME else "no slot left"
    return kept, rows


def _same(alpha, other_alpha, colour, other_colour, modal, other_modal):
    least_shape, most_colour = SAME_SHAPE, SAME_COLOUR
    if modal is not None and other_modal is not None:
        shared = (modal & other_modal).sum() / max(1, (modal | other_modal).sum())
        if shared < 0.2:  # two similar objects, one behind the other
            return False
        if shared > SAME_SHAPE:
            least_shape, most_colour = SEEN_SHAPE, SEEN_COLOUR
    both = alpha & other_alpha
    if both.sum() < least_shape * (alpha | other_alpha).sum():
        return False
    return np.abs(colour[both] - other_colour[both]).mean() <= most_colour
