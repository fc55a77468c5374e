"""Cut a hole into raw scenes that have none: photos split into objects, or completed object by object."""

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
    """How scenes without a hole get one: cut by a policy of `cut_hole`, or where the photo shows an object."""

    policy: str | None = None
    remove: str | None = None
    seed: int = 0


def detect_masked_photo(raw):
    """`raw` with its photo as the partial image if the photo has a blank hole already, as in pipelines that mask first.

    Such a hole is large, pure black or white, and has a sharp edge. Unchanged if the layout has a partial image, or a
    mask and no other photo. A mask that is the union of all modal masks is no hole and is removed.
    """
    if raw.original and raw.mask and not raw.partial and _is_all_objects(raw):
        raw = replace(raw, mask=None, no_hole=f"{raw.mask.name} is the modal masks of all objects together")
    other = raw.photo if raw.photo != raw.original else None
    if not raw.masked_photo or not raw.original or raw.partial or (raw.mask and not other):
        return raw
    try:
        photo = read_image(raw.original, "RGB")
    except SceneError:
        return raw  # reading the scene reports it
    if not has_blanked_hole(photo):
        return raw
    note = f"{raw.original.name} has its hole already: taken as the partial image"
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
    """Whether a photo (H,W,3) uint8 has a large region with a sharp edge of one of `colours`, or of any colour."""
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
                continue  # too small, or the background of a studio photo
            region = (labels == i).astype(np.uint8)
            near, far = (cv2.dilate(region, np.ones((side, side), np.uint8)) for side in (3, 5))
            around = photo[far > near].astype(int)
            unlike = (np.abs(around - photo[labels == i][0].astype(int)).max(1) > FITS).mean() if len(around) else 0
            if unlike > (0.3 if area > 0.98 * width * height else 0.95):
                return True
    return False


def make_hole(raw, photo, completions, visible, new_hole):
    """Make a hole in the photo of a scene without one.

    Args:
        raw: RawScene; photo: (H,W,3) uint8, or None; completions: list of (H,W,4) uint8 in the photo's frame;
        visible: their modal masks, (H,W) bool each or None; new_hole: NewHole, or None.

    Returns:
        (H,W) bool, True = hole; how it was made; indices of the completions of the removed object. If there are any,
        the photo is no target: it shows the object in the hole.

    Raises:
        SceneError: no hole was requested, no draw of the policy covers objects, the object does not exist, or the
            photo does not show the completed objects.
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
    # one object may be hidden, of several at least one is visible
    if len(fitting) > 1 and max(fitting) < 0.05:
        raise SceneError(f"{raw.folder}: no completion agrees with {raw.original} anywhere; is that its photo?")
    objects = {}  # object → its alpha, of all samples together
    for completion, shape in zip(raw.completions, shapes):
        if shape.mean() < WHOLE_FRAME:
            name = completion.object or completion.path.stem
            objects[name] = objects.get(name, False) | shape
    if new_hole.remove:
        return _object_region(raw, objects, shapes, errors, visible, new_hole.remove)
    digest = hashlib.sha256(f"{new_hole.seed}:{raw.id}".encode()).digest()
    hole = _cut_over_objects(new_hole.policy, list(objects.values()), np.random.default_rng(list(digest)))
    if hole is None:
        raise SceneError(f"{raw.folder}: no {new_hole.policy} hole over objects of {raw.id} in {DRAWS} draws; use "
                         "another policy", "cut_hole")
    return hole, f"cut ({new_hole.policy})", []


def _cut_over_objects(policy, shapes, rng):
    """A hole of `policy` where objects overlap, if they do; None if no draw covers objects."""
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
        # after a third of the draws less coverage is enough
        strictness = 1 if draw < DRAWS // 3 else 0.25 if draw < 2 * DRAWS // 3 else 0
        if covered > max(0.02, 0.2 * strictness) and (overlap > 0.02 * strictness or not meet or strictness == 0):
            return resize(hole.astype(np.uint8), shapes[0].shape, nearest=True) > 0
    return None


def _object_region(raw, objects, shapes, errors, visible, wanted):
    """Where the photo shows the object `wanted`, with a margin, and the indices of its completions."""
    numbered = {name: re.search(r"\d+$", name) for name in objects}
    names = [name for name in objects if name == wanted] or [
        name for name, number in numbered.items() if number and wanted.isdecimal() and int(number[0]) == int(wanted)]
    if len(names) != 1:
        raise SceneError(f"{raw.folder}: {wanted} names {len(names)} objects of {raw.id}, which has "
                         f"{', '.join(objects) or 'none'}", "remove_object")
    own = [i for i, completion in enumerate(raw.completions)
           if (completion.object or completion.path.stem) == names[0]]
    if len(own) == len(raw.completions):
        raise SceneError(f"{raw.folder}: {names[0]} is the only object of {raw.id}; without it nothing is left to fuse")
    seen = [visible[i] for i in own if visible[i] is not None]
    if seen:
        region = np.any(seen, 0)
    else:  # where it fits the photo and no other completion fits better
        best = np.min([np.where(shapes[i], errors[i], 999) for i in own], 0)
        rest = [np.where(shape, error, 999) for i, (shape, error) in enumerate(zip(shapes, errors)) if i not in own]
        region = (best <= FITS) & (best <= np.min(rest, 0) + 4)
        region = cv2.morphologyEx(region.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        region = cv2.morphologyEx(region, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)) > 0
    if region.mean() < 1e-3:
        raise SceneError(f"{raw.folder}: {names[0]} cannot be seen in the photo of {raw.id}; remove another object")
    margin = 2 * max(2, round(max(region.shape) / 128)) + 1  # pixels of its edge are mixed with the background
    hole = cv2.dilate(region.astype(np.uint8), np.ones((margin, margin), np.uint8)) > 0
    return hole, "an object taken out", own
