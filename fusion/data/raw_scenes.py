"""Raw scenes made sense of by their pixels: where the hole is, what is object, what background."""

import cv2
import numpy as np

from fusion.data.images import read_image, resize
from fusion.data.keying import key_background
from fusion.data.new_holes import make_hole, photo_or_partial
from fusion.data.scenes import Scene
from fusion.data.selection import select_completions
from fusion.errors import SceneError

DIFFERENT_PHOTO = 12  # mean difference in levels between photo and partial image; JPEG noise stays below 5
BLANK = 20  # levels from black or white that JPEG noise leaves in a blanked hole


def read_raw_scene(raw, n_max_completions, mask_hole="auto", background="auto", new_hole=None):
    """Read one raw scene and turn it into a clean one.

    Args:
        raw: RawScene.
        n_max_completions: completions to keep.
        mask_hole: the mask's value in the hole, "black" or "white"; "auto" finds it from the pixels.
        background: of completions without alpha, see `key_background`.
        new_hole: NewHole, what to do when the scene brings no hole; None is an error then.

    Returns:
        Scene at its own size, and a report: dict of hole (how it was found), hole_share, notes, and per completion
        the rows of `select_completions` with file and background added.

    Raises:
        SceneError: with all faults of the scene.
    """
    raw = photo_or_partial(raw)
    faults, notes = [], list(raw.notes)
    scene_files = {"original": raw.original, "partial": raw.partial, "mask": raw.mask}
    pictures = {}
    for role, path in scene_files.items():
        try:
            pictures[role] = None if path is None else read_image(path, "L" if role == "mask" else "RGB")
        except SceneError as error:
            faults.append(str(error))
            pictures[role] = None
    original, partial, mask = pictures["original"], pictures["partial"], pictures["mask"]
    if raw.original is None and raw.partial is None:
        faults.append(f"{raw.folder}: neither a photo nor a partial image of {raw.id}; if its photo lies elsewhere, "
                      "give --photos DIR")
    if not raw.completions:
        faults.append(f"{raw.folder}: no completions of {raw.id} (comp1.png …)")
    brings_hole = raw.mask is not None or raw.partial is not None
    if raw.mask is None and raw.partial is not None:
        notes.append("no mask")

    frame = partial if partial is not None else original
    hole, how = None, ""
    if frame is not None:
        size = frame.shape[:2]
        original = _same_frame(original, size, raw.original, faults, notes)
        mask = _same_frame(mask, size, raw.mask, faults, notes, nearest=True)
        try:
            if brings_hole:
                hole, how = find_hole(raw, original, partial, mask, mask_hole)
            if original is not None and partial is not None:
                check_same_photo(raw, original, partial, hole)
        except SceneError as error:
            faults.append(str(error))
    if hole is not None:
        how += f", {hole.mean():.1%} of the picture"
    completions, kinds = [], []
    for completion in raw.completions:
        path = completion.path
        try:
            picture = read_image(path, "RGBA")
        except SceneError as error:
            faults.append(str(error))
            continue
        if (picture[..., 3] == 255).all() and not completion.as_drawn:
            picture, kind = key_background(picture[..., :3], background)
        else:
            kind = "alpha"
        if frame is not None:
            picture = _same_frame(picture, size, path, faults, notes)
        completions.append(picture)
        kinds.append(kind)
    removed = []
    if not brings_hole and not faults:
        hole, how, removed = make_hole(raw, original, completions, [None] * len(completions), new_hole)
        original = None if removed else original
        how += f", {hole.mean():.1%} of the picture"
    if faults:
        found = [f"hole {how}"] if how else []
        raise SceneError("\n".join(faults + found + notes))

    partial = np.where(hole[..., None], 0, frame).astype(np.uint8)
    for i in removed:
        completions[i] = np.zeros_like(completions[i])
    kept, rows = select_completions(completions, hole, partial, n_max_completions)
    for row, path, kind in zip(rows, (completion.path for completion in raw.completions), kinds):
        row |= {"file": path.name, "background": kind}
    for i in removed:
        rows[i]["reason"] = "removed"
    if not kept:
        reasons = ", ".join(sorted({row["reason"] for row in rows}))
        raise SceneError(f"{raw.folder}: no completion shows anything in the hole ({reasons})")
    scene = Scene(raw.id, partial, hole, [completions[i] for i in kept], original)
    return scene, {"hole": how.split(",")[0], "hole_share": hole.mean(), "notes": notes, "completions": rows}


def _same_frame(picture, size, path, faults, notes, nearest=False):
    """Scale a picture of the same aspect to `size`; another aspect is a fault."""
    if picture is None or picture.shape[:2] == size:
        return picture
    height, width = picture.shape[:2]
    if abs(height * size[1] - width * size[0]) > 0.01 * height * size[1]:
        faults.append(f"{path}: {width}×{height}, but the scene is {size[1]}×{size[0]}; all pictures of a scene "
                      "show the same frame")
        return None
    notes.append(f"{path.name} scaled from {width}×{height} to {size[1]}×{size[0]}")
    return resize(picture, size, nearest)


def find_hole(raw, original, partial, mask, mask_hole="auto"):
    """The hole of a raw scene.

    From the mask, whose polarity is taken from the pixels: inside the hole the partial image is blank, outside it
    agrees with the photo. Without a mask, from where the partial image is blank and the photo is not.

    Returns:
        (H,W) bool, True = hole, and how it was found.

    Raises:
        SceneError: no hole, or no telling which side of the mask it is.
    """
    if mask is None:
        if partial is None:
            raise SceneError(f"{raw.folder}: neither a mask nor a partial image of {raw.id} to find the hole in")
        return _hole_from_blank(raw, original, partial), "found from the partial image"
    white = mask >= 128
    if white.all() or not white.any():
        raise SceneError(f"{raw.mask}: all {'white' if white.all() else 'black'}; a mask has a hole and a rest")
    if mask_hole != "auto":
        return (white if mask_hole == "white" else ~white), f"{mask_hole} in the mask (as told)"
    if partial is None:
        return white, "white in the mask (assumed, there is no partial image)"
    scores = {}
    for name, hole in (("black", ~white), ("white", white)):
        scores[name] = _blank_share(partial, hole)
        if original is not None:
            scores[name] += _agreement(original, partial, ~hole)
    best, other = sorted(scores, key=scores.get, reverse=True)
    hole = white if best == "white" else ~white
    if _blank_share(partial, hole) < 0.9 or scores[best] - scores[other] < 0.1:
        raise SceneError(
            f"{raw.mask}: the partial image is {_blank_share(partial, ~white):.0%} blank where the mask is black and "
            f"{_blank_share(partial, white):.0%} where it is white; cannot tell the hole, use --mask_hole"
        )
    return hole, f"{best} in the mask"


def _core(region):
    """`region` without the pixels at its edge, where JPEG mixes both sides; the region itself when it is thin."""
    inner = cv2.erode(region.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    return inner if inner.any() else region


def _blank_share(partial, region):
    pixels = partial[_core(region)].astype(np.int16)
    return (np.abs(pixels - np.median(pixels, 0)).max(1) <= BLANK).mean()


def _agreement(original, partial, region):
    region = _core(region)
    difference = np.abs(original[region].astype(np.int16) - partial[region])
    return (difference.max(1) <= 2 * BLANK).mean()


def _hole_from_blank(raw, original, partial):
    """Where the partial image is black or white and the photo is not; without a photo, its large blank regions."""
    differs = np.ones(partial.shape[:2], bool)
    if original is not None:
        differs = np.abs(original.astype(np.int16) - partial).max(2) > 2 * BLANK
    smallest = 2e-4 if original is not None else 1e-2  # of the picture; photos have black spots of their own
    blanks = [partial.max(2) <= BLANK, partial.min(2) >= 255 - BLANK]
    blank = max(blanks, key=lambda b: (b & differs).sum())
    seeds = (blank & differs).astype(np.uint8)
    # specks of JPEG noise go, spots where the photo itself is as dark as the blank are closed
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
        if blank[box].mean() > 0.97:  # most pipelines cut boxes; a photo may be dark up to their very edge
            hole[box] = True
        else:
            hole |= (labels == i) & cv2.dilate(blank.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    if hole.mean() < 1e-3:
        raise SceneError(f"{raw.partial}: no mask, and no blank region where the photo is not")
    # JPEG darkens a ring around the blank
    return cv2.dilate(hole.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)


def check_same_photo(raw, original, partial, hole):
    """Raise SceneError when the partial image is another photo, or the same one shifted."""
    visible = cv2.dilate(hole.astype(np.uint8), np.ones((9, 9), np.uint8)) == 0
    visible[:2] = visible[-2:] = visible[:, :2] = visible[:, -2:] = False
    if not visible.any():
        return
    shown = partial[visible].astype(np.float32)

    def distance(dy, dx):
        return np.abs(np.roll(original, (dy, dx), (0, 1))[visible] - shown).mean()

    here = distance(0, 0)
    if here > 2:
        shifts = range(-2, 3)
        moved = min((distance(dy, dx), dy, dx) for dy in shifts for dx in shifts)
        if moved[0] < 0.5 * here:
            raise SceneError(f"{raw.partial}: shifted by {moved[2]},{moved[1]} pixels against {raw.original.name}; "
                             "make both with the same resize")
    if here > DIFFERENT_PHOTO:
        raise SceneError(f"{raw.partial}: differs from {raw.original.name} by {here:.0f} levels outside the hole; "
                         "another photo?")
