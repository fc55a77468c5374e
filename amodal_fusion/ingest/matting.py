"""The alpha of a completion: its own, that of a mask beside it, or from its background (matting)."""

import cv2
import numpy as np

from amodal_fusion.data.consistency import largest
from amodal_fusion.data.images import FEW

SOFT_EDGE = 5  # pixels; width of a keyed edge that is un-mixed


def cut_out(rgba, background="auto"):
    """Alpha of a completion from its own picture.

    Args:
        rgba: (H,W,4) uint8 as read, 255 everywhere when the file has no alpha; background: see `key_background`.

    Returns:
        (H,W,4) uint8 with straight alpha; its source: "alpha", "premultiplied alpha", "checkerboard" (drawn:
        unusable), or as in `key_background`.
    """
    alpha = cv2.extractChannel(rgba, 3)
    least = alpha.min()
    is_constant = least > 0 and least == alpha.max()
    if is_constant or np.count_nonzero(alpha < 250) <= FEW * alpha.size:
        rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
        if background == "auto" and is_checkerboard(rgb):
            return cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA), "checkerboard"
        return key_background(rgb, background)
    if alpha.max() == 1:  # alpha of 0 and 1
        rgba = np.dstack([rgba[..., :3], alpha * np.uint8(255)])
    if is_premultiplied(rgba):
        alpha = rgba[..., 3:].astype(np.float32)
        colour = np.clip(np.rint(rgba[..., :3] * (255 / np.maximum(alpha, 1))), 0, 255).astype(np.uint8)
        return np.dstack([colour, rgba[..., 3]]), "premultiplied alpha"
    return rgba, "alpha"


def is_silhouette(picture):
    """Whether a completion with alpha is only black or white: a mask that is named as a completion.

    A white or black object has texture or noise; a mask is flat, except where a codec blurs its edge.
    """
    colours = picture[picture[..., 3] > 127][:, :3].astype(np.int16)
    if len(colours) < 50:
        return False
    colour = np.median(colours, 0)
    off = np.abs(colours - colour).max(1)
    flat = (off <= 8).mean() > 0.85 and np.median(off) <= 1  # 0.75 at most in pictures, 0.86 in a mask as JPEG
    return bool(flat and (colour.max() <= 8 or colour.min() >= 247))


def is_premultiplied(rgba):
    """Whether colours are multiplied by alpha: none exceeds it, and soft pixels are darker than the object by it.

    Soft pixels near an opaque one decide. Without any, both readings are equal.
    """
    alpha = cv2.extractChannel(rgba, 3)
    soft = (alpha > 16) & (alpha < 240)
    if np.count_nonzero(soft) < 8:
        return False
    values = rgba[soft].astype(np.float32)
    if np.mean(values[:, :3].max(1) > values[:, 3] + 2) > 0.002:  # tolerates noise of lossy codecs
        return False
    opaque = alpha > 250
    if not opaque.any():
        return bool(np.percentile(values[:, :3].max(1) / values[:, 3], 95) > 0.3)  # else too dark to decide
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
    """A completion with the alpha of a mask file.

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
    """Whether mask files of a scene's completions, all named alike, are "alpha" or "modal".

    An alpha contains the whole drawing. A modal mask leaves out what the completer invented.

    Args:
        drawn: list of (H,W) bool, the object by its alpha or a keyed background, None without either; masks: list of
            (H,W) bool, None where there is no mask.

    Returns:
        "alpha" or "modal", "" if undecided; and the share of the drawings outside of the masks.
    """
    of_drawing = beyond_mask = beyond_drawing = most = 0
    for drawing, mask in zip(drawn, masks):
        if drawing is None or mask is None or not mask.any() or drawing.shape != mask.shape:
            continue
        around = np.ones((5, 5), np.uint8)  # edges differ by some pixels
        beyond = np.count_nonzero(drawing & (cv2.dilate(mask.astype(np.uint8), around) == 0))
        most = max(most, beyond / max(1, np.count_nonzero(drawing)))
        of_drawing += np.count_nonzero(drawing)
        beyond_mask += beyond
        beyond_drawing += np.count_nonzero(mask & (cv2.dilate(drawing.astype(np.uint8), around) == 0))
    if not of_drawing:
        return "", 0.0
    share = beyond_mask / of_drawing
    leaves_out = share > 0.03 or most > 0.2  # one partly hidden object is enough
    return ("modal" if leaves_out and beyond_mask > beyond_drawing else "alpha"), share


TOLERANCE = 24  # levels; a diffusion model's white is rarely 255
BACKGROUNDS = ("auto", "white", "black", "opaque")
EXACT = 1.5  # levels between mean colours of the background and of a few of its pixels, besides noise
CODEC = 3  # pixels around an edge where a lossy codec changes the background
SMALLEST_GAP = 20  # pixels
DARKEST_SHADOW = 120  # levels below the background
FLAT = 4  # standard deviation in levels of a background that is neither white nor black; JPEG stays below 2


def key_background(rgb, background="auto"):
    """Cut an object out of the flat background around it.

    The background is what touches the picture's border or repeats its colour and noise in a gap of the object; see
    `_background`. The object's edge, two pixels wide, is un-mixed: it takes the colour of the nearest inner pixel, and
    its alpha is the position of its own colour between the background's and that one.

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
    outside = _background(rgb, colour)
    result = np.zeros((*rgb.shape[:2], 4), np.uint8)
    rows, columns = (np.flatnonzero(~outside.all(axis)) for axis in (1, 0))
    if len(rows):
        box = tuple(slice(max(0, places[0] - 4), places[-1] + 5) for places in (rows, columns))
        result[box] = _soft_edge(np.ascontiguousarray(rgb[box]), outside[box], colour.astype(np.float32))
    return result, background


def border_colour(rgb):
    """The background's colour, from the picture's border.

    White and black are common: 15 % of the border is enough (above a floor only the top is white). Another colour must
    fill half of the border, and be flatter than an overcast sky.

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
        colour = np.median(border, 0)  # a colour of half of the border is its median
        near = np.abs(border - colour).max(1) <= TOLERANCE
        if near.mean() > 0.5 and border[near].std(0).max() <= FLAT:
            best = ("#" + "".join(f"{round(float(level)):02x}" for level in colour), colour, near.mean())
    return best[:2]


def is_checkerboard(rgb):
    """Whether the background is a drawn checkerboard, the sign for transparency in image viewers.

    Two neutral greys alternate along the border in runs of one length.
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


def _background(rgb, colour):
    """Where the background is, (H,W) bool.

    First comes a flood fill from the border over all that is within TOLERANCE of `colour`. Three corrections follow.
    A gap in the object, which the fill cannot reach, is background if it repeats the background's colour and noise. A
    filled region that does not repeat them is white of the object: it has shading and an edge. A soft shadow does not
    repeat them either, but it has no edge, and its colour is neutral; it stays background.
    """
    like = cv2.inRange(rgb, *_range(colour)) > 0
    reached = _flood_from_border(like)
    margin = np.zeros_like(reached)
    margin[:4] = margin[-4:] = margin[:, :4] = margin[:, -4:] = True
    margin &= reached
    if np.count_nonzero(margin) < 50:
        return reached
    pixels = rgb[margin].astype(np.float32)
    colour, noise = pixels.mean(0), float(pixels.std(0).max())
    mean = cv2.boxFilter(rgb, cv2.CV_32F, (3, 3))
    variance = cv2.transform(cv2.sqrBoxFilter(rgb, cv2.CV_32F, (3, 3)) - mean * mean, np.full((1, 3), 1 / 3))
    spread = cv2.sqrt(np.maximum(variance, 0))
    edge = ~reached
    ring = spread[_dilated(edge, 13) & ~_dilated(edge, 5)]
    rings = max(noise, float(np.percentile(ring, 75))) if len(ring) else noise  # noise of a lossy codec beside edges
    repeats = like & (largest(np.abs(mean - colour)) <= EXACT + 0.7 * rings) & (spread <= 2 * rings + 1)
    if noise > 0.5:
        repeats &= cv2.blur(spread, (5, 5)) >= 0.3 * noise
    outside = _flood_from_border(repeats | margin)
    shadow = _shadow(rgb, outside, colour, noise, spread)
    own_white = reached & ~_dilated(outside, 3)
    core = cv2.erode(own_white.astype(np.uint8), np.ones((2 * CODEC + 1,) * 2, np.uint8)) > 0
    own_white &= _dilated(core, 2 * CODEC + 1) & ~(shadow & _dilated(like, 3))
    return (reached & ~own_white) | (_gaps(rgb, repeats & ~reached, colour, noise, rings) & like) | shadow


def _gaps(rgb, repeats, colour, noise, rings):
    """The parts of `repeats` with the background's mean colour and noise, grown by one pixel."""
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(repeats.astype(np.uint8), connectivity=4)
    if count == 1:
        return repeats
    places, number = labels[repeats], np.maximum(boxes[:, 4], 1)
    pixels = rgb[repeats].astype(np.float32).T
    sums = np.stack([[np.bincount(places, plane**power, count) for plane in pixels] for power in (1, 2)]) / number
    off = np.abs(sums[0] - colour[:, None]).max(0)
    spread = np.sqrt(np.maximum(sums[1] - sums[0] ** 2, 0)).max(0)
    is_gap = (boxes[:, 4] >= SMALLEST_GAP) & (off <= 1 + 2 * noise / np.sqrt(number) + 0.5 * (rings - noise))
    is_gap &= (spread <= 1.5 * rings + 0.7) & (spread >= 0.5 * noise - 0.3)
    is_gap[0] = False
    return _dilated(is_gap[labels], 3)


def _shadow(rgb, outside, colour, noise, spread):
    """Smooth neutral regions that border on the background without an edge, (H,W) bool."""
    mean = cv2.boxFilter(rgb, cv2.CV_32F, (5, 5))
    red, green, blue = cv2.split(np.float32(colour) - mean)  # how much darker than the background
    unequal = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    neutral = (unequal <= 3 + 0.1 * green) & (green > -1) & (green < DARKEST_SHADOW) & (spread <= 2 * noise + 1.5)
    slope, wide = _slope(green), _slope(cv2.blur(green, (9, 9)))
    is_flat = slope <= 1.5 + 0.3 * noise
    is_gradual = is_flat | (slope <= 1.3 * wide)  # blurring halves the slope of an edge, not that of a shadow
    soft = (neutral & is_gradual & ~outside).astype(np.uint8)
    soft = cv2.morphologyEx(soft, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(soft, connectivity=4)
    rim = _dilated(outside, 7) & ~outside & (soft > 0)
    begins = np.bincount(labels[rim], minlength=count)
    depth = 3 * cv2.min(slope, wide)  # of a shadow at the end of the rim, which is 3 pixels wide
    gently = rim & (cv2.max(cv2.max(red, green), blue) <= 2 * EXACT + noise + depth)
    is_shadow = (begins >= 12) & (np.bincount(labels[gently], minlength=count) >= 0.7 * begins) & (boxes[:, 4] >= 40)
    # shading of an object that is nearly neutral is as gradual
    is_shadow &= ((np.bincount(labels[is_flat], minlength=count) >= 0.9 * boxes[:, 4])
                  | (np.bincount(labels.ravel(), unequal.ravel(), count) <= (1.5 + noise / 2) * boxes[:, 4]))
    is_shadow[0] = False
    return _dilated(is_shadow[labels], 5) & neutral


def _slope(plane):
    """Length of the gradient of (H,W) float32, per pixel."""
    return cv2.magnitude(*(cv2.Sobel(plane, cv2.CV_32F, *order, scale=0.125) for order in ((1, 0), (0, 1))))


def _dilated(region, side):
    return cv2.dilate(region.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


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
        edge = ~outside & ~inner & (distance < 5)  # thin parts have no inner pixel nearby and stay unchanged
        pure = rgb.reshape(-1, 3)[places[labels[edge]]].astype(np.float32)
        mixture = rgb[edge]
        way = pure - colour
        length = (way**2).sum(1)
        mixed = ((mixture - colour) * way).sum(1) / np.maximum(length, 1)
        mixed = np.where(length < 30**2, 1.0, np.clip(mixed, 0, 1))
        colours = np.where(mixed[:, None] < 0.95, pure, mixture)
        result[edge] = np.rint(np.column_stack([colours, mixed * 255])).astype(np.uint8)
    return result
