"""Find the hole of a raw scene: from its mask, with the polarity from the pixels, or from the blank region."""

import cv2
import numpy as np

from amodal_fusion.data.consistency import (
    BLANK,
    agreement,
    alike,
    blank_share,
    core,
    grown,
    is_blank_exactly_in,
    largest,
    outlined_object,
)
from amodal_fusion.data.images import resize
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.hole_cutting import has_blanked_hole

SURE = 1.5  # completions differ from the photo this many times more in the hole than outside
EXACTLY = 3  # levels around the colour of a blank region in a lossless file
UNMASKED = 3  # levels between original and partial image where the photo was copied


def find_hole(raw, pictures, mask_hole="auto"):
    """The hole of a raw scene, checked against the pictures.

    Args:
        raw: RawScene; pictures: RawPictures of it. An original that is the partial image is moved there.
        mask_hole: the mask's value in the hole, "black" or "white"; "auto": the pixels decide.

    Returns:
        (H,W) bool, True = hole, and how it was found.

    Raises:
        SceneError: there is no hole, the side of the mask is unclear, or the mask shows something else.
    """
    if pictures.mask is None:
        return _hole_without_mask(raw, pictures)
    mask = pictures.mask
    if np.count_nonzero((mask > 50) & (mask < 205)) > 0.5 * mask.size:
        raise SceneError(f"{raw.mask}: grey nearly everywhere: a picture, not a black and white mask")
    white = mask >= 128
    if white.all() or not white.any():
        raise SceneError(f"{raw.mask}: all {'white' if white.all() else 'black'}; a mask needs both")
    sides = {"black": ~white, "white": white}
    if mask_hole != "auto":
        _drop_blank_original(raw, pictures, sides[mask_hole])
        _note_contradiction(raw, pictures, sides, mask_hole)
        return _grown_to_blank(raw, pictures, mask_hole), f"{mask_hole} in the mask (as given)"
    _check_outline(raw, pictures, sides)
    if pictures.partial is None:
        for hole in sides.values():
            _drop_blank_original(raw, pictures, hole)
    if pictures.partial is not None:
        name = _blank_side(raw, pictures, sides)
        _check_partial(raw, pictures, sides[name])
        how = f"{name} in the mask"
    elif pictures.mask_is_photo:
        name, how = "black", "transparent in the mask"
    else:
        name = _redrawn_side(raw, pictures, sides)
        how = f"{name} in the mask (completions fit the photo outside)"
    return _grown_to_blank(raw, pictures, name), how


def _note_contradiction(raw, pictures, sides, given):
    if pictures.partial is None:
        return
    other = "white" if given == "black" else "black"
    blank = {name: blank_share(pictures.partial, hole) for name, hole in sides.items()}
    if blank[given] < 0.9 <= blank[other]:
        pictures.notes.append(f"{raw.partial.name} is blank where {raw.mask.name} is {other}, mask_hole says "
                              f"{given}")


def _with_soft_edge(pictures, name):
    """The hole with the soft edge of its mask, unless an original has the true colours of the darkened edge."""
    covered = pictures.mask if name == "white" else 255 - pictures.mask
    hole = covered >= 128
    if pictures.original is not None or np.count_nonzero((covered > 25) & ~hole) < 0.02 * np.count_nonzero(hole):
        return hole
    _, labels = cv2.connectedComponents((covered > 25).astype(np.uint8))
    touches = np.zeros(labels.max() + 1, bool)  # the others are noise of a codec
    touches[labels[hole]] = True
    return touches[labels]


def _grown_to_blank(raw, pictures, name):
    """The hole, grown to the blank region around it (a mask that was shrunk), unless an original has its colours."""
    hole = _with_soft_edge(pictures, name)
    if pictures.original is not None or pictures.partial is None:
        return hole
    blank = largest(np.abs(pictures.partial - np.median(pictures.partial[core(hole)], 0))) <= EXACTLY
    distance = cv2.distanceTransform((~hole).astype(np.uint8), cv2.DIST_C, 3)
    rings = (blank[distance == width + 1] for width in range(max(3, round(0.1 * max(hole.shape)))))
    width = next((width for width, ring in enumerate(rings) if not ring.size or ring.mean() < 0.9), None)
    if width is None:  # the photo itself is blank, too
        pictures.notes.append(f"{raw.partial.name} is blank around the hole as well; does {raw.mask.name} cover the "
                              "whole hole?")
    elif width > 0:
        pictures.notes.append(f"{raw.mask.name} grown by {width} pixels, to the blank region of {raw.partial.name}")
        hole |= blank & (distance <= width)
    return hole


def _drop_blank_original(raw, pictures, hole):
    """Remove an original that is blank exactly in the hole: it is the partial image, not a target."""
    if pictures.original is None or not is_blank_exactly_in(pictures.original, hole):
        return
    pictures.notes.append(f"{raw.original.name} is blank exactly in the hole: no target, the scene is for inference "
                          "only")
    if pictures.partial is None:
        pictures.partial = pictures.original
    pictures.original = None


def _blank_side(raw, pictures, sides):
    """The side of the mask where the partial image is blank; on the other side it shows the photo."""
    partial, original = pictures.partial, pictures.original
    blank = {name: blank_share(partial, hole) for name, hole in sides.items()}
    scores, shows = dict(blank), dict.fromkeys(sides, False)
    if original is not None:
        for name, hole in sides.items():
            scores[name] += agreement(original, partial, ~hole)
            shows[name] = _shows_photo(original, partial, hole)
        if min(blank.values()) >= 0.9 and shows["black"] != shows["white"]:  # the photo is as dark as the hole
            scores = {name: score - shows[name] for name, score in scores.items()}
    best, other = sorted(scores, key=scores.get, reverse=True)
    if shows[best] and not is_blank_exactly_in(partial, sides[best]):
        raise SceneError(f"{raw.partial}: shows the same as {raw.original.name} in the hole, nothing is blank; is "
                         f"{raw.mask.name} the mask of a hole? Blank the partial image there, remove it, or say which "
                         "side of the mask is the hole", "mask_hole")
    if blank[best] < 0.9 or scores[best] - scores[other] < 0.1:
        raise SceneError(
            f"{raw.mask}: the partial image is {blank['black']:.0%} blank where the mask is black and "
            f"{blank['white']:.0%} where it is white, which does not tell the hole; say which side it is", "mask_hole"
        )
    return best


def _shows_photo(original, partial, region):
    region = core(region)
    return cv2.absdiff(original[region], partial[region]).mean() <= UNMASKED


def _check_partial(raw, pictures, hole):
    """Raise SceneError if the partial image is blank outside the hole."""
    _drop_blank_original(raw, pictures, hole)
    if pictures.original is None:
        return
    colour = np.median(pictures.partial[core(hole)], 0)
    blank = (largest(np.abs(pictures.partial - colour)) <= BLANK) & ~grown(hole, 4)
    blank &= largest(cv2.absdiff(pictures.original, pictures.partial)) > 2 * BLANK
    left_out = cv2.morphologyEx(blank.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)).mean()
    rim = grown(hole, 5) & ~grown(hole, 4)
    if rim.any() and blank[rim].mean() > 0.3:  # the mask was shrunk
        left_out = max(left_out, blank.mean(), 0.006)
    if left_out > 0.005:
        raise SceneError(f"{raw.partial}: also blank outside of {raw.mask.name}, on {left_out:.1%} of the picture; "
                         "does the mask cover the whole hole?")


def _redrawn_side(raw, pictures, sides):
    """Without a partial image: the side of the mask where completions differ from the photo.

    A completer copies or redraws what it sees and invents the rest. At each pixel the completion nearest to the photo
    counts. Hidden parts of objects also differ from the photo, but only in part of a side.
    """
    photo = pictures.original
    size = tuple(max(1, round(side * min(1, 128 / max(photo.shape[:2])))) for side in photo.shape[:2])
    photo, nearest = resize(photo, size), np.full(size, 255, np.uint8)
    for completion in pictures.completions:
        small = resize(completion, size)
        inside = cv2.erode(small[..., 3], np.ones((3, 3), np.uint8)) > 200
        nearest[inside] = np.minimum(nearest, largest(cv2.absdiff(small[..., :3], photo)))[inside]
    distances = {}
    for name, side in sides.items():
        here = nearest[resize(side.astype(np.uint8), size, nearest=True) > 0]
        distances[name] = here[here < 255]
    middle = {name: np.median(here) if len(here) >= 20 else np.nan for name, here in distances.items()}
    best, other = ("white", "black") if middle["white"] >= middle["black"] else ("black", "white")
    fits = {name: (here <= middle[other] + 4).mean() if len(here) else 0.0 for name, here in distances.items()}
    most = 0.45 if sides[best].mean() < 0.5 else 0.25  # the hole is rarely the larger side
    # also unclear if a side has no completion
    if not middle[best] > SURE * middle[other] + 4 or fits[best] > most or fits[other] < 0.7:
        raise SceneError(f"{raw.mask}: there is no partial image that shows the hole, and completions fit the photo on "
                         f"{fits['black']:.0%} of their area where the mask is black, {fits['white']:.0%} where it is "
                         "white, which does not tell the hole; say which side it is", "mask_hole")
    return best


def _check_outline(raw, pictures, sides):
    """Raise SceneError if the mask follows the visible outline of a completion: it is an object's mask."""
    for white_or_black, side in sides.items():
        index = None
        for i, visible in enumerate(pictures.visible):
            if visible is not None and (visible & side).sum() > 0.9 * (visible | side).sum():
                index = i
        if index is None and not _is_box(side):
            index = outlined_object(side, [completion[..., 3] for completion in pictures.completions])
            if index is not None and pictures.original is not None and not _fits(
                    pictures.completions[index], pictures.original, side):
                index = None  # a completion that ends at the hole's edge
        if index is not None:
            raise SceneError(f"{raw.mask}: {white_or_black} follows the visible outline of "
                             f"{pictures.files[index].path.name}, so it is the mask of that object, not of a hole; if "
                             "it is the hole, say which side, else cut holes", "mask_hole", "cut_hole")


def _is_box(region):
    *_, width, height = cv2.boundingRect(region.astype(np.uint8))
    return np.count_nonzero(region) >= 0.9 * width * height


def _fits(completion, original, region):
    """Whether a completion agrees with the photo in `region`, as where its completer saw it."""
    seen = region & (completion[..., 3] > 127)
    return alike(original[seen], completion[seen][:, :3]).mean() >= 0.5


def _hole_without_mask(raw, pictures):
    original, partial = pictures.original, pictures.partial
    if pictures.erased is not None:
        if partial is None:
            _drop_blank_original(raw, pictures, pictures.erased)
        return pictures.erased, "transparent in the picture"
    if partial is None:
        raise SceneError(f"{raw.folder}: neither a mask nor a partial image of {raw.id} to find the hole in")
    if original is not None and not _differing(original, partial).any():
        pictures.notes.append(f"{raw.original.name} is the same picture as {raw.partial.name}: no target, the scene is "
                              "for inference only")
        original = pictures.original = None
    return _hole_from_blank(raw, original, partial), "found from the partial image"


def _differing(original, partial):
    apart = largest(cv2.absdiff(original, partial))
    changed = apart > 0
    if changed.any() and (partial[changed] == np.median(partial[changed], 0)).all(1).mean() > 0.99:
        return changed  # one colour, the rest is exact: dark parts of the photo were blanked, too
    differs = (apart > 2 * BLANK).astype(np.uint8)
    return cv2.morphologyEx(differs, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0  # without JPEG's noise at edges


def _largest_part(region):
    """Pixels of the largest connected part of `region` (H,W) bool."""
    *_, boxes, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8))
    return boxes[1:, cv2.CC_STAT_AREA].max(initial=0)


def _hole_from_blank(raw, original, partial):
    """Where the partial image is black or white and the photo is not; without a photo, the large blank regions."""
    differs = np.ones(partial.shape[:2], bool) if original is None else _differing(original, partial)
    smallest = 2e-4 if original is not None else 1e-2  # share of the picture; photos have black spots
    blanks = [partial.max(2) <= BLANK, partial.min(2) >= 255 - BLANK]
    # a white sky and a black hole, or a hole in a night photo
    if original is None and all(_largest_part(blank) >= smallest * blank.size for blank in blanks):
        cut = [has_blanked_hole(partial, [colour]) for colour in ((0, 0, 0), (255, 255, 255))]
        if cut[0] == cut[1]:
            raise SceneError(f"{raw.partial}: no mask, and large black and white regions; add the mask of the hole")
        blanks = [blanks[cut.index(True)]]
    blank = max(blanks, key=lambda b: (b & differs).sum())
    seeds = (blank & differs).astype(np.uint8)
    # remove specks of JPEG noise, close spots where the photo is as dark as the blank
    seeds = cv2.morphologyEx(seeds, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    reach = 2 * round(max(seeds.shape) * 0.02) + 1
    padded = cv2.copyMakeBorder(seeds, reach, reach, reach, reach, cv2.BORDER_REFLECT)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8))[reach:-reach, reach:-reach]
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(closed)
    hole = np.zeros(seeds.shape, bool)
    for i in range(1, count):
        x, y, width, height, area = boxes[i]
        if area < smallest * seeds.size:
            continue
        box = np.s_[y : y + height, x : x + width]
        if blank[box].mean() > 0.97:  # most pipelines cut boxes; the photo may be dark at their edge
            hole[box] = True
        else:
            hole |= (labels == i) & grown(blank, 1)
    if hole.mean() < 1e-3:
        raise SceneError(f"{raw.partial}: no mask, and no blank region where the photo is not")
    return grown(hole, 1)  # JPEG darkens a ring around the blank
