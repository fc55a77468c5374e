"""What is object in a completion's picture: by its alpha, by a mask beside it, or by the background it stands on."""

import cv2
import numpy as np

from fusion.data.images import FEW
from fusion.data.keying import is_checkerboard, key_background

SOFT_EDGE = 5  # pixels: how wide a keyed edge is un-mixed


def cut_out(rgba, background="auto"):
    """Alpha of a completion from its own picture.

    Args:
        rgba: (H,W,4) uint8 as read, 255 everywhere when the file has no alpha; background: see `key_background`.

    Returns:
        (H,W,4) uint8 with straight alpha; what it was taken from: "alpha", "premultiplied alpha", "checkerboard" (a
        drawn one: not to be used), or what `key_background` says.
    """
    alpha = cv2.extractChannel(rgba, 3)
    least = alpha.min()
    is_constant = least > 0 and least == alpha.max()
    if is_constant or np.count_nonzero(alpha < 250) <= FEW * alpha.size:
        rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
        if background == "auto" and is_checkerboard(rgb):
            return cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA), "checkerboard"
        return key_background(rgb, background)
    if alpha.max() == 1:  # a program that counts alpha from 0 to 1
        rgba = np.dstack([rgba[..., :3], alpha * np.uint8(255)])
    if is_premultiplied(rgba):
        alpha = rgba[..., 3:].astype(np.float32)
        colour = np.clip(np.rint(rgba[..., :3] * (255 / np.maximum(alpha, 1))), 0, 255).astype(np.uint8)
        return np.dstack([colour, rgba[..., 3]]), "premultiplied alpha"
    return rgba, "alpha"


def is_silhouette(picture):
    """Whether a completion, cut out, is black or white and nothing else: a mask that was taken for one."""
    colours = picture[picture[..., 3] > 127][:, :3].astype(np.int16)
    if len(colours) < 50:
        return False
    colour = np.median(colours, 0)
    flat = (np.abs(colours - colour).max(1) <= 8).mean() > 0.85  # 0.75 at most in pictures, 0.86 in a mask as JPEG
    return bool(flat and (colour.max() <= 8 or colour.min() >= 247))


def is_premultiplied(rgba):
    """Whether colours were multiplied by alpha: none exceeds it, and soft pixels are darker than the object by just it.

    Decided by the soft pixels that have an opaque one near them; a picture without any reads alike both ways.
    """
    alpha = cv2.extractChannel(rgba, 3)
    soft = (alpha > 16) & (alpha < 240)
    if np.count_nonzero(soft) < 8:
        return False
    values = rgba[soft].astype(np.float32)
    if np.mean(values[:, :3].max(1) > values[:, 3] + 2) > 0.002:  # a lossy codec's noise is forgiven
        return False
    opaque = alpha > 250
    if not opaque.any():
        return bool(np.percentile(values[:, :3].max(1) / values[:, 3], 95) > 0.3)  # else too dark to tell
    distance, labels = cv2.distanceTransformWithLabels((~opaque).astype(np.uint8), cv2.DIST_L2, 5,
                                                       labelType=cv2.DIST_LABEL_PIXEL)
    places = np.zeros(labels.max() + 1, int)
    places[labels[opaque]] = np.flatnonzero(opaque)
    near = distance[soft] < 6
    if near.sum() < 8:
        return False
    pure = rgba.reshape(-1, 4)[places[labels[soft][near]], :3].astype(np.float32)
    values = values[near]
    as_straight = np.abs(values[:, :3] - pure).mean()
    as_premultiplied = np.abs(values[:, :3] - pure * values[:, 3:] / 255).mean()
    return bool(as_premultiplied < 0.5 * as_straight)


def with_silhouette(rgb, cut, kind, silhouette):
    """A completion with the alpha of a picture beside it.

    Args:
        rgb: (H,W,3) uint8 as read; cut, kind: what `cut_out` made of it; silhouette: (H,W) uint8, 255 = object.

    Returns:
        (H,W,4) uint8. Where a background was keyed, the silhouette's edge keeps the un-mixed colours and alpha.
    """
    if kind in ("opaque", "checkerboard"):
        return np.dstack([rgb, silhouette])
    around, keyed = np.ones((SOFT_EDGE, SOFT_EDGE), np.uint8), cut[..., 3]
    is_inside = (silhouette > 127).astype(np.uint8)
    edge = (is_inside > cv2.erode(is_inside, around)) & (cv2.dilate(keyed, around) > 0)
    colour = np.where(keyed[..., None] > 0, cut[..., :3], rgb)
    return np.dstack([colour, np.where(edge, np.minimum(silhouette, keyed), silhouette)])


def masks_beside(drawn, masks):
    """What masks beside a scene's completions are, all of one name: "alpha" or "modal".

    An alpha contains what is drawn; a modal mask, of what the completer saw, leaves out what it made up.

    Args:
        drawn: list of (H,W) bool, where a background that was keyed or the picture's own alpha shows the object, None
            where neither does; masks: list of (H,W) bool, None where there is no mask.

    Returns:
        "alpha" or "modal"; "" when the pixels do not tell; and the share of the drawings outside of the masks.
    """
    of_drawing = beyond_mask = beyond_drawing = most = 0
    for drawing, mask in zip(drawn, masks):
        if drawing is None or mask is None or not mask.any() or drawing.shape != mask.shape:
            continue
        around = np.ones((5, 5), np.uint8)  # edges are never exact
        beyond = np.count_nonzero(drawing & (cv2.dilate(mask.astype(np.uint8), around) == 0))
        most = max(most, beyond / max(1, np.count_nonzero(drawing)))
        of_drawing += np.count_nonzero(drawing)
        beyond_mask += beyond
        beyond_drawing += np.count_nonzero(mask & (cv2.dilate(drawing.astype(np.uint8), around) == 0))
    if not of_drawing:
        return "", 0.0
    share = beyond_mask / of_drawing
    leaves_out = share > 0.03 or most > 0.2  # one hidden object among many in full view tells enough
    return ("modal" if leaves_out and beyond_mask > beyond_drawing else "alpha"), share
