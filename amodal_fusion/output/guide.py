"""The guide for an inpainter: each pixel of the hole comes from one completion, or is left to be drawn."""

import cv2
import numpy as np

from amodal_fusion.data.scenes import Scene
from amodal_fusion.model.blending import Blend

CONFIDENCE, MIN_REGION = 0.5, 64  # defaults
SOLID = 128  # least alpha of a pixel that is taken from a completion
COVERED = 0.9  # a completion that covers this share of a small region may take it
OUTSIDE, DRAW = -1, 0  # labels; completions have their numbers 1 … N
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def make_guide(scene: Scene, blend: Blend, confidence: float = CONFIDENCE,
               min_region: int = MIN_REGION) -> tuple[np.ndarray, np.ndarray]:
    """Choose one completion for each pixel of the hole, or none.

    A completion is chosen where its weight is the largest, at least `confidence`, and its alpha at least a half. No
    region of one choice has fewer than `min_region` pixels, unless the hole is smaller.

    Args:
        confidence: from 0 to 1; min_region: px.

    Returns:
        guide (H,W,3) uint8, the smooth fill where nothing was chosen, `scene.partial` outside the hole; and
        inpaint_mask (H,W) bool, where an inpainter should draw.
    """
    labels = choose(scene, blend, confidence)
    solid = {number: scene.completions[number - 1][..., 3] >= SOLID
             for number in np.unique(labels[labels > DRAW]).tolist()}
    close_regions(labels, solid, min_region)
    guide = scene.partial.copy()
    guide[scene.mask] = np.rint(np.clip(blend.fill, 0, 1) * 255).astype(np.uint8)
    open_pixels = np.zeros(labels.shape, np.uint8)
    for number, covered in solid.items():
        region = labels == number
        guide[region] = scene.completions[number - 1][region][:, :3]
        open_pixels[region & ~covered] = 1
    if open_pixels.any():  # small gaps without a completion
        guide = cv2.inpaint(guide, open_pixels, 3, cv2.INPAINT_TELEA)
    return guide, labels == DRAW


def choose(scene, blend, confidence):
    """Label of each pixel, (H,W) int32: OUTSIDE the hole, the number of a completion, or DRAW."""
    full = np.iinfo(np.uint16).max if blend.weights.dtype == np.uint16 else 1
    best, label = blend.residual.copy(), np.zeros(len(blend.residual), np.int32)
    for number, (weight, completion) in enumerate(zip(blend.weights, scene.completions), 1):
        better = (weight >= best) & (completion[..., 3][scene.mask] >= SOLID)
        best[better], label[better] = weight[better], number
    label[best < confidence * full] = DRAW
    labels = np.full(scene.mask.shape, OUTSIDE, np.int32)
    labels[scene.mask] = label
    return labels


def close_regions(labels, solid, min_region):
    """Merge regions under `min_region` px into a neighbour, in place: islands first, then gaps between completions.

    Args:
        labels: as from `choose`; solid: number → (H,W) bool, where the completion may be used.
    """
    changed = True
    while changed:  # each change merges two regions
        changed = False
        for number in solid:
            for box, region, around in small_regions(labels, number, min_region):
                takers = [other for other in around if other == DRAW or solid[other][box][region].mean() >= COVERED]
                if around:
                    labels[box][region] = takers[0] if takers else DRAW
                    changed = True
    for box, region, around in small_regions(labels, DRAW, min_region):
        if around:
            labels[box][region] = around[0]


def small_regions(labels, label, min_region):
    """(box, region in it, labels of its neighbours in the hole, longest border first) per small region of `label`."""
    _, components, stats, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=4)
    for index in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] < min_region):
        if index == 0:  # the background
            continue
        left, top, width, height = stats[index, :4]
        box = np.s_[max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1]
        region = components[box] == index
        ring = (cv2.dilate(region.astype(np.uint8), CROSS) > 0) & ~region
        found, counts = np.unique(labels[box][ring], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        yield box, region, [other for other in found[order].tolist() if other not in (OUTSIDE, label)]
