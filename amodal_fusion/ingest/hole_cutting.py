"""Holes for raw scenes that bring none: photos taken apart into objects, or completed object by object."""

import hashlib
import re
from dataclasses import dataclass, replace

import cv2
import numpy as np

from amodal_fusion.data.consistency import FITS, WHOLE_FRAME
from amodal_fusion.data.images import read_image, resize
from amodal_fusion.data.masks import cut_hole
from amodal_fusion.errors import SceneError

DRAWS = 120


@dataclass(frozen=True)
class NewHole:
    """What to do about scenes without a hole: cut one by a policy of `cut_hole`, or take an object out of the photo."""

    policy: str | None = None
    remove: str | None = None
    seed: int = 0


def photo_or_partial(raw):
    """`raw` with its photo as partial image when a hole was cut from that already, as pipelines do that mask first.

    Such a hole is large, pure black or white, and ends sharply, which the light of a window does not unless it is a
    box, too. Nothing is decided where the layout has a partial image of its own, or a mask and no other photo. A mask
    that is all modal masks together is none of a hole, and goes.
    """
    if raw.original and raw.mask and not raw.partial and _is_all_objects(raw):
        raw = replace(raw, mask=None, no_hole=f"{raw.mask.name} is the modal masks of all objects together")
    other = raw.photo if raw.photo != raw.original else None
    if not raw.masked_photo or not raw.original or raw.partial or (raw.mask and not other):
        return raw
    try:
        photo = read_image(raw.original, "RGB")
    except SceneError:
        return raw  # whoever reads the scene will say so
    if not has_blanked_hole(photo):
        return raw
    note = f"{raw.original.name} has its hole already: taken for the partial image"
    return replace(raw, original=other, partial=raw.original, no_hole="", notes=[*raw.notes, note])


def _is_all_objects(raw):
    paths = {completion.visible for completion in raw.completions} - {None}
    try:
        visible = [read_image(path, "L") > 127 for path in paths]
        mask = read_image(raw.mask, "L") > 127 if visible else None
    except SceneError:
        return False
    if mask is None or any(seen.shape != mask.shape for seen in visible):
        return False
    objects = np.any(visible, 0)
    return np.count_nonzero(mask & objects) > 0.9 * np.count_nonzero(mask | objects)


def has_blanked_hole(photo, colours=((0, 0, 0), (255, 255, 255)), any_colour=False):
    """Whether a photo (H,W,3) uint8 has a large sharp region of one of `colours`, or of any, as a cut leaves it."""
    colours = set(colours)
    if any_colour:
        packed = photo[::2, ::2].reshape(-1, 3).astype(np.int32) @ (65536, 256, 1)
        values, counts = np.unique(packed, return_counts=True)
        colours.add(tuple(int(values[counts.argmax()]) >> shift & 255 for shift in (16, 8, 0)))
    for colour in colours:
        blank = cv2.inRange(photo, *(np.clip(np.add(colour, step), 0, 255) for step in (-2, 2)))
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(blank, connectivity=4)
        for i in range(1, count):
            x, y, width, height, area = boxes[i]
            borders = (x == 0) + (y == 0) + (x + width == blank.shape[1]) + (y + height == blank.shape[0])
            if area < 0.01 * blank.size or borders > 2:
                continue  # too small, or the backdrop of a studio photo
            region = (labels == i).astype(np.uint8)
            near, far = (cv2.dilate(region, np.ones((side, side), np.uint8)) for side in (3, 5))
            around = photo[far > near].astype(int)
            unlike = (np.abs(around - photo[labels == i][0].astype(int)).max(1) > FITS).mean() if len(around) else 0
            if unlike > (0.3 if area > 0.98 * width * height else 0.95):
                return True
    return False


def make_hole(raw, photo, completions, visible, new_hole):
    """A hole in the photo of a scene that brings none.

    Args:
        raw: RawScene; photo: (H,W,3) uint8, or None; completions: list of (H,W,4) uint8 in the photo's frame;
        visible: their modal masks, (H,W) bool each or None; new_hole: NewHole, or None.

    Returns:
        (H,W) bool, True = hole; how it was made; indices of the completions that go because their object is taken
        out: with any, the photo shows in the hole what is gone, and is no target.

    Raises:
        SceneError: no hole was requested, no draw of the policy lies over objects, no such object, or the photo does
            not show what was completed.
    """
    if new_hole is None or not (new_hole.policy or new_hole.remove):
        why = f" ({raw.no_hole})" if raw.no_hole else " (neither a mask nor a partial image)"
        raise SceneError(f"{raw.folder}: no hole in {raw.id}{why}; cut one, or remove an object from the photo",
                         "cut_hole", "remove_object")
    if photo is None:
        raise SceneError(f"{raw.folder}: no photo of {raw.id} to cut a hole into; name the folder of the photos",
                         "photos")
    errors = [np.abs(completion[..., :3].astype(np.int16) - photo).max(2) for completion in completions]
    shapes = [completion[..., 3] > 127 for completion in completions]
    shown = [shape if seen is None else seen for shape, seen in zip(shapes, visible)]
    fitting = [(error[place] <= FITS).mean() for error, place in zip(errors, shown) if place.any()]
    # a single object may well be hidden, of several at least one is in view
    if len(fitting) > 1 and max(fitting) < 0.05:
        raise SceneError(f"{raw.folder}: no completion agrees with {raw.original} anywhere; is that its photo?")
    things = {}  # samples of one object are one thing that stands there
    for completion, shape in zip(raw.completions, shapes):
        if shape.mean() < WHOLE_FRAME:
            name = completion.object or completion.path.stem
            things[name] = things.get(name, False) | shape
    if new_hole.remove:
        return _object_region(raw, things, shapes, errors, visible, new_hole.remove)
    digest = hashlib.sha256(f"{new_hole.seed}:{raw.id}".encode()).digest()
    hole = _cut(new_hole.policy, list(things.values()), np.random.default_rng(list(digest)))
    if hole is None:
        raise SceneError(f"{raw.folder}: no {new_hole.policy} hole over objects of {raw.id} in {DRAWS} draws; use "
                         "another policy", "cut_hole")
    return hole, f"cut ({new_hole.policy})", []


def _cut(policy, shapes, rng):
    """A hole of `policy` over a place where objects meet, as far as any do; None when no draw lies over objects."""
    if not shapes:
        return None
    side = max(shapes[0].shape)  # policies draw in a square
    square = [resize(shape.astype(np.uint8), (side, side), nearest=True) for shape in shapes]
    cover = np.sum(square, 0, dtype=np.int32)
    meet = (cover >= 2).any()
    for draw in range(DRAWS):
        silhouette = square[rng.integers(len(square))] > 0
        hole = cut_hole(policy, cover, silhouette, 0.04, rng)
        if hole is None:
            continue
        covered, overlap = (cover[hole] >= 1).mean(), (cover[hole] >= 2).mean()
        # content with less, the longer it takes
        ease = 1 if draw < DRAWS // 3 else 0.25 if draw < 2 * DRAWS // 3 else 0
        if covered > max(0.02, 0.2 * ease) and (overlap > 0.02 * ease or not meet or ease == 0):
            return resize(hole.astype(np.uint8), shapes[0].shape, nearest=True) > 0
    return None


def _object_region(raw, things, shapes, errors, visible, wanted):
    """Where the photo shows the object `wanted`, a little more than that, and the completions that draw it."""
    numbered = {name: re.search(r"\d+$", name) for name in things}
    names = [name for name in things if name == wanted] or [
        name for name, number in numbered.items() if number and wanted.isdecimal() and int(number[0]) == int(wanted)]
    if len(names) != 1:
        raise SceneError(f"{raw.folder}: {wanted} names {len(names)} objects of {raw.id}, which has "
                         f"{', '.join(things) or 'none'}", "remove_object")
    own = [i for i, completion in enumerate(raw.completions)
           if (completion.object or completion.path.stem) == names[0]]
    if len(own) == len(raw.completions):
        raise SceneError(f"{raw.folder}: {names[0]} is the only object of {raw.id}; without it nothing is left to fuse")
    seen = [visible[i] for i in own if visible[i] is not None]
    if seen:
        region = np.any(seen, 0)
    else:  # where it fits the photo, and nothing else there fits better
        best = np.min([np.where(shapes[i], errors[i], 999) for i in own], 0)
        rest = [np.where(shape, error, 999) for i, (shape, error) in enumerate(zip(shapes, errors)) if i not in own]
        region = (best <= FITS) & (best <= np.min(rest, 0) + 4)
        region = cv2.morphologyEx(region.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        region = cv2.morphologyEx(region, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)) > 0
    if region.mean() < 1e-3:
        raise SceneError(f"{raw.folder}: {names[0]} cannot be seen in the photo of {raw.id}; remove another object")
    margin = 2 * max(2, round(max(region.shape) / 128)) + 1  # its edge is mixed with what is behind it
    hole = cv2.dilate(region.astype(np.uint8), np.ones((margin, margin), np.uint8)) > 0
    return hole, "an object taken out", own
