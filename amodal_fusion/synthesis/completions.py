"""Simulated completions: what a completion model draws for an object that is partly hidden.

Three styles. "copy" keeps the visible pixels exactly (PCNet and similar models). "redraw" draws the whole object again
(diffusion models). "pix2gestalt" draws it again on white through a lossy codec, several times and at several
granularities, and its alpha is keyed from the white.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from amodal_fusion.synthesis.degradations import (
    convex_hull,
    cut_short,
    damage_edges,
    grow_alpha,
    imagine_shape,
    inpaint,
    invent_content,
    leave_traces,
    on_white,
    redraw,
    smear,
    through_jpeg,
)


@dataclass
class SceneObject:
    """One object of a photo."""

    whole: np.ndarray  # (H,W,4) uint8, straight alpha
    visible: np.ndarray  # (H,W) bool, where the photo shows it
    true: bool  # whether the hidden part of `whole` is correct


@dataclass
class Completer:
    """A simulated completion model and what it saw of a scene."""

    style: str  # "copy", "redraw" or "pix2gestalt"
    quality: float  # in [0,1]; a better model invents less
    seen: np.ndarray  # (H,W) bool, where it saw the photo
    unrelated_texture: Callable  # rng → (H,W,3) uint8


def as_received(photo, objects, rng):
    """The photo and the objects as the completion model received them.

    Often they were compressed, or were scaled down and back. Then copies are only nearly exact, and masks are softer
    than the edges in the photo. PCNet's layers (19 of two photos, median and 10–90 %) have 0.96 (0.8–1.0) times the
    gradient energy of the photo and a residue of 6 (1–8) levels; MuLAn's, once aligned, 1.00 times and 4 (1–9) levels.
    """
    size, draw = photo.shape[0], rng.random()
    if draw < 0.2:
        return photo, objects
    if draw < 0.65:
        small = int(size * rng.uniform(0.5, 1))
        enlarge = cv2.INTER_LINEAR if rng.random() < 0.5 else cv2.INTER_CUBIC

        def scaled(image):
            return cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (size, size),
                              interpolation=enlarge)

        photo = scaled(photo)
        objects = [replace(item, whole=_replace_alpha(item.whole, scaled(item.whole[..., 3]))) for item in objects]
    if draw > 0.45:
        photo = through_jpeg(photo, rng.integers(50, 96))
    return photo, objects


def _replace_alpha(rgba, alpha):
    """`rgba` with another alpha; colours are continued where the old alpha was 0."""
    beyond = (alpha > 0) & (rgba[..., 3] == 0)
    rgba = rgba.copy()
    rgba[..., 3] = alpha
    if beyond.any():
        window = _bounding_window(alpha, 2)
        inside = rgba[window]
        inside[beyond[window], :3] = inpaint(inside[..., :3], ~beyond[window] & (inside[..., 3] > 200))[beyond[window]]
    return rgba


def complete(photo, objects, mask, style, unrelated_texture, rng):
    """Simulate the completions of all objects.

    Args:
        photo: (H,W,3) uint8, as the completion model received it.
        objects: list of SceneObject. mask: (H,W) bool, True = hole.
        style: "copy", "redraw" or "pix2gestalt".
        unrelated_texture: function of rng → (H,W,3) uint8, a texture of another photo.

    Returns:
        list of completions (H,W,4) uint8, straight alpha; and for each the index of its object, or None when it shows
        no single object.
    """
    # Either the model saw the whole photo and the hole was cut later, or the hole was there before.
    seen = np.ones_like(mask) if style == "copy" and rng.random() < 0.9 else ~mask
    completer = Completer(style, rng.uniform(0, 1), seen, unrelated_texture)
    completions, shown = [], []
    for index, item in enumerate(objects):
        samples = 1
        if style == "pix2gestalt":
            samples = rng.integers(1, 4)
        elif rng.random() < 0.15:
            samples = 2
        for _ in range(samples):
            misshapen = rng.random() < {"copy": 0, "redraw": 0.3, "pix2gestalt": 0.5}[style]
            drawn = _misshape(item, seen, mask, rng) if misshapen else item
            completions.append(_complete_object(completer, photo, mask, drawn, len(objects) > 1, rng))
            shown.append(index)
    for _ in range(rng.integers(0, 4) if style == "pix2gestalt" else 0):
        completions.append(_other_granularity(completions, rng))
        shown.append(None)
    if rng.random() < 0.06:  # a wrong object: one of these at another place
        wrong = completions[rng.integers(len(completions))]
        shift = rng.integers(-photo.shape[0] // 3, photo.shape[0] // 3, 2)
        completions.append(np.roll(wrong, shift, (0, 1)))
        shown.append(None)
    if rng.random() < 0.06:  # an almost empty completion
        speck = np.zeros_like(completions[0])
        at = rng.integers(0, photo.shape[0] - 3, 2)
        speck[at[0] : at[0] + 3, at[1] : at[1] + 3] = 255
        completions.append(speck)
        shown.append(None)
    return completions, shown


def _bounding_window(alpha, margin):
    """Two slices, rows and columns: the bounding box of what is not transparent, plus a margin in pixels."""
    x, y, width, height = cv2.boundingRect(alpha)
    return (slice(max(0, y - margin), min(alpha.shape[0], y + height + margin)),
            slice(max(0, x - margin), min(alpha.shape[1], x + width + margin)))


def _misshape(item, seen, mask, rng):
    """The object with an imagined shape in the hole, such as a wall that continues behind it or a cat that is too long.
    Often parts of the true shape are lost."""
    known = item.visible & seen
    if np.count_nonzero(known) < 0.003 * known.size:
        return item
    fills_hole = np.count_nonzero(known) > 0.04 * known.size and rng.random() < 0.35
    imagined = convex_hull(known | mask) if fills_hole else imagine_shape(known, rng) & mask
    whole = item.whole.copy()
    beyond = imagined & (whole[..., 3] < 128)
    whole[beyond, :3] = inpaint(whole[..., :3], known)[beyond]
    whole[beyond, 3] = 255
    if rng.random() < 0.35:
        whole[mask & ~imagined & ~known, 3] = 0
    return SceneObject(whole, item.visible & ~beyond, item.true)


def _complete_object(completer, photo, mask, item, has_neighbours, rng):
    """One object as the model completes it, (H,W,4) uint8. All work is done in a window around the object."""
    size, style = photo.shape[0], completer.style
    # Models that copy get clean masks and clear views in most cases, so what they keep can be trusted.
    careless = style != "copy" or rng.random() < 0.2
    grows = careless and has_neighbours and rng.random() < 0.3
    window = _bounding_window(item.whole[..., 3], size // 24 + 4 + (size // 12 if grows else 0))
    photo, whole, visible, seen, mask = (x[window] for x in (photo, item.whole, item.visible, completer.seen, mask))
    colour, alpha, known = whole[..., :3].copy(), whole[..., 3].copy(), visible & seen
    # The model sees the photo, where the edge of an object is mixed with the background.
    rim = (alpha > 0) & (alpha < 255) & (cv2.dilate(known.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0) & seen
    colour[rim] = photo[rim]
    hidden = (alpha > 0) & ~known & ~rim
    if hidden.any():
        unknown = hidden
        if rng.random() < 0.2 + 0.6 * completer.quality:  # the model is right, where the truth is known
            unknown = np.zeros_like(hidden) if item.true else hidden & ~visible
        invent_content(colour, known, unknown, lambda rng: completer.unrelated_texture(rng)[window], size, rng)
        if style != "copy":
            smear(colour, unknown, size, rng)
        cut_short(alpha, known, hidden, rng)
    if careless and rng.random() < 0.15:
        leave_traces(photo, mask, colour, known, alpha, rng)
    if grows:
        alpha = grow_alpha(colour, alpha, (whole[..., 3] > 200) | known, mask, size, rng)
    drawn = np.dstack([colour, alpha])
    if careless:
        drawn = damage_edges(drawn, rng)
    if style == "copy":
        kept = (known & (whole[..., 3] == 255)) | rim
        drawn = _keep_visible(drawn, np.dstack([photo, whole[..., 3]]), kept, rng)
    else:
        drawn = redraw(drawn, window, size, rng, strong=style == "pix2gestalt")
    completion = np.zeros((size, size, 4), np.uint8)
    completion[window] = drawn
    if style == "pix2gestalt":
        alpha = completion[..., 3]
        edge = np.mean([side.mean() for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])]) / 255
        completion[window] = on_white(drawn, edge, rng)
    return completion


def _keep_visible(drawn, modal, kept, rng):
    """In most cases copy the pixels `kept` of the photo with the object's own alpha, `modal` (h,w,4)."""
    if rng.random() < 0.85:
        drawn[kept] = modal[kept]
        if rng.random() < 0.5:  # many models write hard masks
            drawn[..., 3] = np.where(drawn[..., 3] > 127, 255, 0)
    return drawn


def _other_granularity(completions, rng):
    """A part of one object, or two objects as one: segmenters propose regions at several granularities."""
    first = completions[rng.integers(len(completions))]
    if rng.random() < 0.5:
        second = completions[rng.integers(len(completions))]
        return np.where(second[..., 3:] > 127, second, first)
    size = first.shape[0]
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle, part = rng.uniform(0, 2 * np.pi), first.copy()
    along = x * np.cos(angle) + y * np.sin(angle)
    inside = first[..., 3] > 0
    if inside.any():
        part[along > np.quantile(along[inside], rng.uniform(0.3, 0.8))] = 0
    return part


def whole_background(photo, objects, mask, background, rng):
    """A completed background: the scene without its objects, as one more completion over the full frame.

    Args:
        background: (H,W,3) uint8, the true background, or None when it is unknown.
    """
    covered = np.max([item.whole[..., 3] for item in objects], 0) > 0
    known = ~cv2.dilate((covered | mask).astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    if background is None or rng.random() < 0.6:
        colour = np.where(known[..., None], photo, inpaint(photo, known))
    else:
        colour = background
    result = np.dstack([colour, np.full(photo.shape[:2], 255, np.uint8)]).astype(np.uint8)
    everything = slice(0, photo.shape[0]), slice(0, photo.shape[1])
    return result if rng.random() < 0.5 else redraw(result, everything, photo.shape[0], rng, strong=False)
