"""Holes to cut into training pictures."""

import cv2
import numpy as np

HOLES = ("mixed", "box", "centre", "strokes", "grid", "scatter", "silhouette", "polygon")
LARGEST = 0.5  # of the picture


def cut_hole(policy, cover, silhouette, least, rng):
    """A random hole, placed where objects are.

    Args:
        policy: one of HOLES; "mixed" draws one of the others.
        cover: (H,W) int, how many objects stand at a pixel; silhouette: (H,W) bool, one object's shape.
        least: smallest share of the picture, in (0, 0.5).

    Returns:
        (H,W) bool, True = hole, or None when the draw is smaller than `least` or larger than half of the picture.
    """
    if policy == "mixed":
        policy = rng.choice(HOLES[1:], p=(0.35, 0.1, 0.2, 0.05, 0.05, 0.1, 0.15))
    size = cover.shape[0]
    overlap = cover >= 2
    rows, columns = np.nonzero(overlap if overlap.any() and rng.random() < 0.75 else cover >= 1)
    if not len(rows):
        return None
    at = rng.integers(len(rows), size=6)
    points = np.stack([columns[at], rows[at]], 1).astype(np.float64)  # (6, 2) as x, y, on objects
    mask = np.zeros(cover.shape, np.uint8)
    share = np.exp(rng.uniform(np.log(least), np.log(LARGEST)))
    side = np.sqrt(share) * size
    if policy in ("box", "centre"):
        middle = points[0] + rng.normal(0, size * 0.08, 2) if policy == "box" else np.full(2, size / 2)
        aspect = np.exp(rng.normal(0, 0.25)) if policy == "box" else 1
        _box(mask, middle, side * aspect, side / aspect)
    elif policy == "strokes":
        for point in points[: rng.integers(2, 6)]:
            here = point
            thick = max(2, int(side * rng.uniform(0.1, 0.3)))
            for _ in range(rng.integers(1, 5)):
                there = here + rng.normal(0, side * 0.4, 2)
                cv2.line(mask, _int(here), _int(there), 1, thick)
                here = there
            if rng.random() < 0.4:
                _box(mask, point, side * rng.uniform(0.2, 0.7), side * rng.uniform(0.2, 0.7))
    elif policy == "grid":
        cells = int(rng.integers(3, 9))
        step, filled = size / cells, np.sqrt(share)
        for row in range(cells):
            for column in range(cells):
                _box(mask, ((column + 0.5) * step, (row + 0.5) * step), filled * step, filled * step)
    elif policy == "scatter":
        count = int(rng.integers(4, 14))
        for _ in range(count):
            _box(mask, rng.uniform(0, size, 2), *(side * rng.uniform(0.5, 1.6, 2) / np.sqrt(count)))
    elif policy == "silhouette":
        radius = int(rng.integers(1, max(2, size // 16)))
        mask = cv2.dilate(silhouette.astype(np.uint8), np.ones((radius, radius), np.uint8))
        shift = rng.normal(0, size * 0.08, 2)
        mask = cv2.warpAffine(mask, np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), mask.shape[::-1])
    else:
        corners = points[0] + side * 0.75 * rng.normal(0, 1, (int(rng.integers(4, 9)), 2))
        cv2.fillPoly(mask, [cv2.convexHull(np.rint(corners).astype(np.int32))], 1)
    return mask.astype(bool) if least <= mask.mean() <= LARGEST else None


def _int(point):
    return tuple(int(v) for v in np.clip(point, -1e4, 1e4))


def _box(mask, middle, width, height):
    size = mask.shape[0]
    width, height = min(width, size), min(height, size)
    x = int(np.clip(middle[0] - width / 2, 0, size - width))
    y = int(np.clip(middle[1] - height / 2, 0, size - height))
    mask[y : y + max(1, round(height)), x : x + max(1, round(width))] = 1
