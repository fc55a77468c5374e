"""Cut-outs and plain things put into a picture, each in the box that it fills."""

import cv2
import numpy as np

from fusion.data.material import MARGIN, read_cutout


def draw_thing(path, size, centre, side, rng):
    """Something placed, turned and lit a little.

    Args:
        path: of a cut-out; None for something plain: a plate, a sheet, a table top.
        size: side of the picture in pixels; centre: (row, column) and side: the longer one, both in pictures.

    Returns:
        box, two slices, rows and columns; and (h,w,4) uint8 in it, straight alpha, all 0 where that is 0. None when
        nothing of it lies in the picture.
    """
    longer_side = max(1.0, size * side)
    picture = _plain_thing(longer_side, rng) if path is None else read_cutout(path, longer_side)
    if picture is None:
        return None
    height, width = picture.shape[:2]
    scale = longer_side / (max(height, width) - 2 * MARGIN)
    if scale < 1:
        picture = cv2.resize(picture, (max(1, round(width * scale)), max(1, round(height * scale))),
                             interpolation=cv2.INTER_AREA)
        height, width, scale = *picture.shape[:2], 1.0
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.normal(0, 12), scale)
    matrix[:, 2] += centre[1] * size - width / 2, centre[0] * size - height / 2
    corners = matrix @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])  # (2, 4) as x, y
    left, top = (max(0, int(low) - 1) for low in corners.min(1))
    right, bottom = (min(size, int(high) + 2) for high in corners.max(1))
    if rng.random() < 0.5:  # mirrored
        matrix[:, 2] += matrix[:, 0] * (width - 1)
        matrix[:, 0] *= -1
    light = np.exp(rng.normal(0, 0.2)), rng.uniform(0.8, 1.1, 3)
    if left >= right or top >= bottom:
        return None
    matrix[:, 2] -= left, top
    placed = cv2.warpAffine(picture, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    levels = np.linspace(0, 1, 256)[:, None]
    table = np.clip(np.hstack([255 * levels ** light[0] * light[1], 255 * levels]), 0, 255)
    placed = cv2.LUT(placed, np.rint(table).astype(np.uint8)[None])
    placed[placed[..., 3] == 0] = 0
    return (slice(top, bottom), slice(left, right)), placed


def _plain_thing(longer_side, rng):
    """A plate, a sheet or a table top: photographs are full of them, collections of cut-outs are not."""
    size = int(np.clip(longer_side, 16, 256))
    y, x = np.mgrid[:size, :size].astype(np.float32) / (size / 2) - 1.0
    power = rng.choice((2, 2, 4, 16))  # an ellipse, a rounded rectangle, a sheet
    radius = (np.abs(x) ** power + np.abs(y / rng.uniform(0.5, 1)) ** power) ** (1 / power)
    light = rng.normal(0, 25, 2)
    shade = light[0] * x + light[1] * y
    shade = shade + rng.normal(0, 15) * np.clip((radius - rng.uniform(0.5, 0.9)) * 12, 0, 1)  # a rim
    grain = rng.normal(0, rng.uniform(0, 3), (size, size))
    colour = rng.uniform(30, 250) + rng.normal(0, 20, 3) + (shade + grain)[..., None]
    return np.dstack([np.clip(colour, 0, 255), 255 * np.clip((0.97 - radius) * size / 2, 0, 1)]).astype(np.uint8)


def paint(photo, box, rgba, where=True):
    """`rgba` over the photo (H,W,3) float32, in place, in the box and where told; returns the alpha that it took."""
    alpha = rgba[..., 3] * np.float32(1 / 255) * where
    region = photo[box]
    region += alpha[..., None] * (rgba[..., :3] - region)
    return alpha
