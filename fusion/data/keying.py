"""Alpha for completions that came without one: an object on a flat background."""

import cv2
import numpy as np

TOLERANCE = 24  # levels; a diffusion model's white is rarely 255
BACKGROUNDS = ("auto", "white", "black", "opaque")
FLAT = 4  # standard deviation in levels of a background that is neither white nor black; JPEG stays below 2


def key_background(rgb, background="auto"):
    """Cut an object out of the flat background around it.

    The background is what a flood fill from the picture's border reaches, so a white shirt stays. The object's
    edge, two pixels wide, is un-mixed: alpha from how far its colour is on the way from the background to the
    nearest inner pixel, whose colour it takes.

    Args:
        rgb: (H,W,3) uint8.
        background: "white" or "black" forces that colour, "opaque" keys nothing, "auto" takes the border's colour if
            it is flat.

    Returns:
        (H,W,4) uint8 with straight alpha, and what was keyed: "white", "black", a colour as "#808080", or "opaque".
    """
    if background == "auto":
        background, colour = border_colour(rgb)
    else:
        border = _border(rgb, 1)
        near = border[_near(border, background)] if background != "opaque" else ()
        colour = np.median(near, 0) if len(near) else np.full(3, 255.0 if background == "white" else 0.0)
    if background == "opaque":
        return cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA), "opaque"
    outside = _flood_from_border(cv2.inRange(rgb, *_range(colour)) > 0)
    result = np.zeros((*rgb.shape[:2], 4), np.uint8)
    rows, columns = (np.flatnonzero(~outside.all(axis)) for axis in (1, 0))
    if len(rows):
        box = tuple(slice(max(0, places[0] - 4), places[-1] + 5) for places in (rows, columns))
        result[box] = _soft_edge(np.ascontiguousarray(rgb[box]), outside[box], colour.astype(np.float32))
    return result, background


def border_colour(rgb):
    """What the picture's border says about its background.

    White and black are so common that a flat part of 15 % will do (a floor leaves white at the top of the frame
    only); any other colour has to fill half of the border, and be flatter than an overcast sky.

    Returns:
        "white", "black", a colour as "#808080", or "opaque"; and the colour, (3,) float, None with "opaque".
    """
    border = _border(rgb, 2).astype(np.float32)
    best = ("opaque", None, 0.0)
    for name in ("white", "black"):
        near = _near(border, name)
        if near.mean() > max(0.15, best[2]) and border[near].std(0).max() <= 8:
            best = (name, np.median(border[near], 0), near.mean())
    if best[2] < 0.5:
        colour = np.median(border, 0)  # what fills half of the border is its median
        near = np.abs(border - colour).max(1) <= TOLERANCE
        if near.mean() > 0.5 and border[near].std(0).max() <= FLAT:
            best = ("#" + "".join(f"{round(float(level)):02x}" for level in colour), colour, near.mean())
    return best[:2]


def is_checkerboard(rgb):
    """Whether the background is a drawn checkerboard: what viewers show for transparency, saved as if it were real.

    Two light or dark neutral greys take turns along the border in runs of one length.
    """
    for side in (rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]):
        line = side.astype(np.int16)
        grey = line[:, 1]
        if len(line) < 16 or grey.std() < 4 or np.abs(line - grey[:, None]).max() > 12:
            continue
        low, high = np.percentile(grey, (10, 90))
        is_high = grey > (low + high) / 2
        if not 8 <= high - low <= 128 or np.abs(grey - np.where(is_high, high, low)).mean() > 3:
            continue
        changes = np.flatnonzero(np.diff(is_high))
        runs = np.diff(changes)
        if len(runs) >= 3 and runs.min() >= 2 and np.ptp(runs) <= 1 + 0.1 * runs.max():
            return True
    return False


def _border(rgb, width):
    return np.concatenate([rgb[:width].reshape(-1, 3), rgb[-width:].reshape(-1, 3), rgb[:, :width].reshape(-1, 3),
                           rgb[:, -width:].reshape(-1, 3)])


def _near(colours, name):
    return colours.min(-1) >= 255 - TOLERANCE if name == "white" else colours.max(-1) <= TOLERANCE


def _range(colour):
    return np.ceil(colour - TOLERANCE).clip(0, 255), np.floor(colour + TOLERANCE).clip(0, 255)


def _flood_from_border(like_background):
    """The parts of a (H,W) bool region that touch the picture's border."""
    _, labels = cv2.connectedComponents(like_background.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    is_outside = np.zeros(labels.max() + 1, bool)
    is_outside[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    is_outside[0] = False
    return is_outside[labels]


def _soft_edge(rgb, outside, colour):
    inner = cv2.dilate(outside.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    result = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA)
    result[outside] = 0
    if inner.any():
        # nearest inner pixel of every other pixel
        distance, labels = cv2.distanceTransformWithLabels(
            (~inner).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        places = np.zeros(labels.max() + 1, int)
        places[labels[inner]] = np.flatnonzero(inner)
        edge = ~outside & ~inner & (distance < 5)  # thin parts have no inner pixel near them and stay as they are
        pure = rgb.reshape(-1, 3)[places[labels[edge]]].astype(np.float32)
        mixture = rgb[edge]
        way = pure - colour
        length = (way**2).sum(1)
        mixed = ((mixture - colour) * way).sum(1) / np.maximum(length, 1)
        mixed = np.where(length < 30**2, 1.0, np.clip(mixed, 0, 1))
        colours = np.where(mixed[:, None] < 0.95, pure, mixture)
        result[edge] = np.rint(np.column_stack([colours, mixed * 255])).astype(np.uint8)
    return result
