"""What completion models make of an object that is partly hidden, good and bad.

Three styles. "copy" keeps the visible pixels exactly (PCNet and its kin), "redraw" draws the whole object again
(diffusion), "pix2gestalt" draws it again through a lossy codec on white, many times at several granularities, and the
alpha is keyed from the white.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from amodal_fusion.synthesis.degradations import (
    convex_hull,
    damage_edges,
    grow_alpha,
    hallucinate,
    imagine_shape,
    inpaint,
    leave_traces,
    on_white,
    redraw,
    through_jpeg,
)


@dataclass
class SceneObject:
    """One object of a photo."""

    whole: np.ndarray  # (H,W,4) uint8, straight alpha
    visible: np.ndarray  # (H,W) bool, where no other object covers it in the photo
    true: bool  # whether `whole` is also right where the object is covered


def as_received(photo, objects, rng):
    """The photo and its objects as the completer had them: often saved again, or at its own size and scaled back, so
    that its copies are nearly exact, and its masks softer than the photo's edges."""
    size, draw = photo.shape[0], rng.random()
    if draw < 0.3:
        return photo, objects
    if draw < 0.75:
        small = int(size * rng.uniform(0.35, 1))
        enlarge = cv2.INTER_LINEAR if rng.random() < 0.5 else cv2.INTER_CUBIC

        def scaled(image):
            return cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (size, size),
                              interpolation=enlarge)

        photo = scaled(photo)
        objects = [replace(item, whole=_with_alpha(item.whole, scaled(item.whole[..., 3]))) for item in objects]
    if draw > 0.6:
        photo = through_jpeg(photo, rng.integers(60, 96))
    return photo, objects


def _with_alpha(rgba, alpha):
    """Another alpha; where there was none, colours go on."""
    beyond = (alpha > 0) & (rgba[..., 3] == 0)
    rgba = rgba.copy()
    rgba[..., 3] = alpha
    if beyond.any():
        window = _window(alpha, 2)
        inside = rgba[window]
        inside[beyond[window], :3] = inpaint(inside[..., :3], ~beyond[window] & (inside[..., 3] > 200))[beyond[window]]
    return rgba


def complete(photo, objects, mask, style, foreign, rng):
    """Completions of all objects.

    Args:
        photo (H,W,3) uint8, as the completer had it; objects: list of SceneObject; mask (H,W) bool, True = hole.
        style: "copy", "redraw" or "pix2gestalt".
        foreign: function of rng → (H,W,3), some other texture.

    Returns:
        list of (H,W,4) uint8, straight alpha, and for each the number of its object, None when it stands for no single
        one.
    """
    # Either the completer saw the whole photo and the hole came later, or it had to work around the hole.
    seen = np.ones_like(mask) if style == "copy" and rng.random() < 0.9 else ~mask
    quality = rng.uniform(0, 1)  # models differ in how often they are right
    completions, shown = [], []
    for number, item in enumerate(objects):
        samples = 1
        if style == "pix2gestalt":
            samples = rng.integers(1, 4)
        elif rng.random() < 0.15:
            samples = 2
        for _ in range(samples):
            spreads = rng.random() < {"copy": 0, "redraw": 0.3, "pix2gestalt": 0.5}[style]
            drawn = _spread(item, seen, mask, rng) if spreads else item
            completions.append(_complete_one(photo, drawn, len(objects) > 1, seen, mask, style, quality, foreign, rng))
            shown.append(number)
    for _ in range(rng.integers(0, 4) if style == "pix2gestalt" else 0):
        completions.append(_other_granularity(completions, rng))
        shown.append(None)
    if rng.random() < 0.06:  # a wrong object: one of these somewhere else
        wrong = completions[rng.integers(len(completions))]
        shift = rng.integers(-photo.shape[0] // 3, photo.shape[0] // 3, 2)
        completions.append(np.roll(wrong, shift, (0, 1)))
        shown.append(None)
    if rng.random() < 0.06:
        nothing = np.zeros_like(completions[0])
        at = rng.integers(0, photo.shape[0] - 3, 2)
        nothing[at[0] : at[0] + 3, at[1] : at[1] + 3] = 255
        completions.append(nothing)
        shown.append(None)
    return completions, shown


def _window(alpha, margin):
    """Two slices, rows and columns: the box of what is not transparent, and a margin."""
    x, y, width, height = cv2.boundingRect(alpha)
    return (slice(max(0, y - margin), min(alpha.shape[0], y + height + margin)),
            slice(max(0, x - margin), min(alpha.shape[1], x + width + margin)))


def _spread(item, seen, mask, rng):
    """The object with a shape in the hole that somebody imagined: a wall that goes on behind the hole, a cat that lies
    longer than it is. Often the true shape is lost."""
    known = item.visible & seen
    if np.count_nonzero(known) < 0.003 * known.size:
        return item
    everywhere = np.count_nonzero(known) > 0.04 * known.size and rng.random() < 0.35
    imagined = convex_hull(known | mask) if everywhere else imagine_shape(known, rng) & mask
    whole = item.whole.copy()
    beyond = imagined & (whole[..., 3] < 128)
    whole[beyond, :3] = inpaint(whole[..., :3], known)[beyond]
    whole[beyond, 3] = 255
    if rng.random() < 0.35:
        whole[mask & ~imagined & ~known, 3] = 0
    return SceneObject(whole, item.visible & ~beyond, item.true)


def _complete_one(photo, item, others, seen, mask, style, quality, foreign, rng):
    """One object as the completer draws it, (H,W,4); all work is done in a window around it."""
    size = photo.shape[0]
    # Those that copy are given clean masks and clear views, mostly: what they keep can be trusted.
    careless = style != "copy" or rng.random() < 0.2
    grows = careless and others and rng.random() < 0.3
    window = _window(item.whole[..., 3], size // 24 + 4 + (size // 12 if grows else 0))
    photo, whole, visible, seen, mask = (x[window] for x in (photo, item.whole, item.visible, seen, mask))
    colour, alpha, known = whole[..., :3].copy(), whole[..., 3].copy(), visible & seen
    # It knows the photo, where an object's rim is mixed with what lies behind, and never the object alone.
    rim = (alpha > 0) & (alpha < 255) & (cv2.dilate(known.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0) & seen
    colour[rim] = photo[rim]
    hidden = (alpha > 0) & ~known & ~rim
    if hidden.any():
        unknown = hidden
        if rng.random() < 0.2 + 0.6 * quality:  # a model that got it right, as far as anybody knows
            unknown = np.zeros_like(hidden) if item.true else hidden & ~visible
        colour, alpha = hallucinate(colour, alpha, known, hidden, unknown, lambda rng: foreign(rng)[window], size, rng,
                                    smears=style != "copy")
    if careless and rng.random() < 0.15:
        colour = leave_traces(photo, mask, colour, known, alpha, rng)
    if grows:
        alpha = grow_alpha(colour, alpha, (whole[..., 3] > 200) | known, mask, size, rng)
    result = np.dstack([colour, alpha])
    if careless:
        result = damage_edges(result, rng)
    if style != "copy":
        result = redraw(result, window, size, rng, strong=style == "pix2gestalt")
    elif rng.random() < 0.85:
        # copied exactly where the object can be seen, up to its rim
        kept = (known & (whole[..., 3] == 255)) | rim
        result[kept] = np.dstack([photo, whole[..., 3]])[kept]
        if rng.random() < 0.5:  # many completers write hard masks
            result[..., 3] = np.where(result[..., 3] > 127, 255, 0)
    completion = np.zeros((size, size, 4), np.uint8)
    completion[window] = result
    if style == "pix2gestalt":
        alpha = completion[..., 3]
        edge = np.mean([side.mean() for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])]) / 255
        completion[window] = on_white(result, edge, rng)
    return completion


def _other_granularity(completions, rng):
    """A part of one object, or two objects as one: proposals come at several granularities."""
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


def whole_background(photo, objects, mask, behind, rng):
    """The scene without its objects as one more completion that covers the whole frame.

    Args:
        behind: (H,W,3) the true background, or None when nobody knows it.
    """
    covered = np.max([item.whole[..., 3] for item in objects], 0) > 0
    known = ~cv2.dilate((covered | mask).astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    if behind is None or rng.random() < 0.6:
        colour = np.where(known[..., None], photo, inpaint(photo, known))
    else:
        colour = behind
    result = np.dstack([colour, np.full(photo.shape[:2], 255, np.uint8)]).astype(np.uint8)
    everything = slice(0, photo.shape[0]), slice(0, photo.shape[1])
    return result if rng.random() < 0.5 else redraw(result, everything, photo.shape[0], rng, strong=False)
