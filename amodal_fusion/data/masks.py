"""Random holes for training pictures, and the three masks of a published protocol."""

import cv2
import numpy as np

LARGEST = 0.85  # share of the picture
# Masks for measuring large-mask inpainting with guides (Heo and Cho, CSF-Net, WACV 2026): a centred box of
# 50 % and of 80 % of the side, and random strokes and boxes over 50 to 80 % of the area.
PROTOCOL = ("centre_50", "centre_80", "random_50_80")
HOLES = ("mixed", "box", "centre", "strokes", "grid", "scatter", "silhouette", "polygon", *PROTOCOL)
SHARES_OF_MIXED = (0.27, 0.07, 0.16, 0.04, 0.04, 0.08, 0.11, 0.08, 0.07, 0.08)  # of HOLES without "mixed"


def cut_hole(policy, cover, silhouette, least, rng):
    """A random hole over objects. The protocol's masks ignore the objects.

    Args:
        policy: one of HOLES; "mixed" draws one of the others.
        cover: (H,H) int, number of objects at a pixel; silhouette: (H,H) bool, one object's shape.
        least: smallest share of the picture, in (0, 0.5).

    Returns:
        (H,H) bool, True = hole, or None if the draw is smaller than `least` or larger than `LARGEST`.
    """
    if policy == "mixed":
        policy = rng.choice(HOLES[1:], p=SHARES_OF_MIXED)
    points = _points_on_objects(cover, rng)
    if points is None:
        return None
    size = cover.shape[0]
    # A quarter of the areas is large; the others are drawn on a logarithmic scale up to a half.
    most = 0.5 if rng.random() < 0.75 else LARGEST
    share = np.exp(rng.uniform(np.log(least if most == 0.5 else 0.4), np.log(most)))
    mask = np.zeros(cover.shape, np.uint8)
    if policy in ("centre_50", "centre_80"):
        side = size * (0.5 if policy == "centre_50" else 0.8)
        _box(mask, (size / 2, size / 2), side, side)
    elif policy == "random_50_80":
        _strokes_and_boxes(mask, rng.uniform(0.5, 0.8), rng)
    elif policy == "silhouette":
        mask = _around(silhouette, rng)
    else:
        DRAWN_BY[policy](mask, points, share, rng)
    return mask.astype(bool) if least <= mask.mean() <= LARGEST else None


def _points_on_objects(cover, rng):
    """Six points on objects, mostly where two overlap, (6,2) as x, y; None without objects."""
    overlap = cover >= 2
    rows, columns = np.nonzero(overlap if overlap.any() and rng.random() < 0.75 else cover >= 1)
    if not len(rows):
        return None
    at = rng.integers(len(rows), size=6)
    return np.stack([columns[at], rows[at]], 1).astype(np.float64)


def _draw_box(mask, points, share, rng):
    size = mask.shape[0]
    side, aspect = np.sqrt(share) * size, np.exp(rng.normal(0, 0.25))
    _box(mask, points[0] + rng.normal(0, size * 0.08, 2), side * aspect, side / aspect)


def _draw_centre(mask, points, share, rng):  # noqa: ARG001
    size = mask.shape[0]
    _box(mask, (size / 2, size / 2), np.sqrt(share) * size, np.sqrt(share) * size)


def _draw_strokes(mask, points, share, rng):
    side = np.sqrt(share) * mask.shape[0]
    for point in points[: rng.integers(2, 6)]:
        _stroke(mask, point, side * 0.4, max(2, int(side * rng.uniform(0.1, 0.3))), rng)
        if rng.random() < 0.4:
            _box(mask, point, side * rng.uniform(0.2, 0.7), side * rng.uniform(0.2, 0.7))


def _draw_grid(mask, points, share, rng):  # noqa: ARG001
    cells = int(rng.integers(3, 9))
    step, filled = mask.shape[0] / cells, np.sqrt(share)
    for row in range(cells):
        for column in range(cells):
            _box(mask, ((column + 0.5) * step, (row + 0.5) * step), filled * step, filled * step)


def _draw_scatter(mask, points, share, rng):  # noqa: ARG001
    size, count = mask.shape[0], int(rng.integers(4, 14))
    for _ in range(count):
        _box(mask, rng.uniform(0, size, 2), *(np.sqrt(share) * size * rng.uniform(0.5, 1.6, 2) / np.sqrt(count)))


def _draw_polygon(mask, points, share, rng):
    corners = points[0] + np.sqrt(share) * mask.shape[0] * 0.75 * rng.normal(0, 1, (int(rng.integers(4, 9)), 2))
    cv2.fillPoly(mask, [cv2.convexHull(np.rint(corners).astype(np.int32))], 1)


DRAWN_BY = {"box": _draw_box, "centre": _draw_centre, "strokes": _draw_strokes, "grid": _draw_grid,
            "scatter": _draw_scatter, "polygon": _draw_polygon}


def _around(silhouette, rng):
    """An object's shape, a little wider and shifted."""
    size = silhouette.shape[0]
    radius = int(rng.integers(1, max(2, size // 16)))
    mask = cv2.dilate(silhouette.astype(np.uint8), np.ones((radius, radius), np.uint8))
    shift = rng.normal(0, size * 0.08, 2)
    return cv2.warpAffine(mask, np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), mask.shape[::-1])


def _strokes_and_boxes(mask, share, rng):
    """Thick strokes and boxes anywhere until `share` of the picture is covered, mostly at most 3 % more."""
    size = mask.shape[0]
    for _ in range(200):
        missing = share - mask.mean()
        if missing <= 0:
            return
        part, point = min(missing, 0.12), rng.uniform(0, size, 2)
        if rng.random() < 0.5:
            aspect = np.exp(rng.normal(0, 0.4))
            _box(mask, point, np.sqrt(part) * size * aspect, np.sqrt(part) * size / aspect)
        else:
            _stroke(mask, point, size * 0.25, max(2, int(size * part * rng.uniform(0.8, 1.6))), rng)


def _stroke(mask, start, reach, thickness, rng):
    """A line of one to four parts, each with a step of `reach` px (standard deviation)."""
    here = start
    for _ in range(rng.integers(1, 5)):
        there = here + rng.normal(0, reach, 2)
        cv2.line(mask, _int(here), _int(there), 1, thickness)
        here = there


def _int(point):
    return tuple(int(v) for v in np.clip(point, -1e4, 1e4))


def _box(mask, middle, width, height):
    size = mask.shape[0]
    width, height = min(width, size), min(height, size)
    x = int(np.clip(middle[0] - width / 2, 0, size - width))
    y = int(np.clip(middle[1] - height / 2, 0, size - height))
    mask[y : y + max(1, round(height)), x : x + max(1, round(width))] = 1
