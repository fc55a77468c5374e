"""From a raw scene to a prepared scene: read the files, find the hole, check the pictures, choose completions."""

import os
import re
from pathlib import Path

import numpy as np

from amodal_fusion.data.consistency import WHOLE_FRAME, grown, misfit, photo_fault
from amodal_fusion.data.scenes import Scene
from amodal_fusion.errors import SceneError, message_of
from amodal_fusion.ingest.hole_cutting import detect_masked_photo, has_blanked_hole, make_hole
from amodal_fusion.ingest.hole_detection import find_hole
from amodal_fusion.ingest.loading import read_pictures
from amodal_fusion.ingest.selection import select_completions

UNUSABLE = {  # kinds of completions that are left out → why
    "checkerboard": "a drawn checkerboard instead of transparency, left out; export a real alpha channel",
    "silhouette": "only black and white, so a mask and no completion, left out; name the mask of comp1.png "
                  "comp1_mask.png",
}


def read_raw_scene(raw, n_max_completions, mask_hole="auto", background="auto", new_hole=None):
    """Turn a raw scene into a prepared one.

    Args:
        raw: RawScene.
        n_max_completions: completions to keep.
        mask_hole: the mask's value in the hole, "black" or "white"; "auto" finds it from the pixels.
        background: of completions without alpha, see `key_background`.
        new_hole: NewHole for a scene without a hole; with None such a scene is an error.

    Returns:
        Scene at its own size, and a report: dict of hole (how it was found), hole_share, notes, and per completion
        the rows of `select_completions` with file and background added.

    Raises:
        SceneError: with all faults of the scene.
    """
    raw = detect_masked_photo(raw)
    pictures = read_pictures(raw, background)
    hole, how, removed = _find_or_make_hole(raw, pictures, mask_hole, new_hole)
    if pictures.faults:
        found = [f"hole {how}, {hole.mean():.1%} of the picture"] if how else []
        below = found + pictures.notes
        raise SceneError("\n".join([*map(str, pictures.faults), *below]),
                         terminal="\n".join([*map(message_of, pictures.faults), *below]))

    partial = _visible(pictures, hole)
    if removed:
        pictures.original = None
    left_out = dict.fromkeys(removed, "removed") | {
        i: kind for i, kind in enumerate(pictures.kinds) if kind in UNUSABLE}
    for i in left_out:
        pictures.completions[i] = np.zeros_like(pictures.completions[i])
    kept, rows = select_completions(pictures.completions, hole, partial, n_max_completions, pictures.visible)
    for row, files, kind in zip(rows, pictures.files, pictures.kinds):
        row |= {"file": Path(os.path.relpath(files.path, raw.folder)).as_posix(), "background": kind}
    for i, reason in left_out.items():
        rows[i]["reason"] = reason
    notes = [*pictures.notes, *_warnings(pictures, rows)]
    if not kept:
        reasons = ", ".join(sorted({row["reason"] for row in rows}))
        raise SceneError("\n".join([f"{raw.folder}: no completion shows anything in the hole ({reasons})", *notes]))
    visible = [pictures.visible[i] for i in kept]
    scene = Scene(raw.id, partial, hole, [pictures.completions[i] for i in kept], pictures.original,
                  visible if any(mask is not None for mask in visible) else None,
                  sources=[rows[i]["file"] for i in kept])
    return scene, {"hole": how, "hole_share": hole.mean(), "notes": notes, "completions": rows}


def keep_numbers(scene, report):
    """Give completions the numbers of their files, in place: comp4.png stays comp4.png. A note says where they cannot.

    Args:
        scene, report: of `read_raw_scene`.
    """
    found = [re.findall(r"\d+", Path(source).stem) for source in scene.sources]
    numbers = [int(digits[-1]) if digits else 0 for digits in found]
    if 0 in numbers or len(set(numbers)) < len(numbers):
        report["notes"].append(f"the numbers of {', '.join(scene.sources)} cannot be kept, they must differ and begin "
                               "at 1; completions are numbered from 1")
        return
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    for row in report["completions"]:
        row["kept_as"] = row["kept_as"] and numbers[row["kept_as"] - 1]
    scene.numbers = [numbers[i] for i in order]
    scene.completions, scene.sources = ([values[i] for i in order] for values in (scene.completions, scene.sources))
    if scene.visible is not None:
        scene.visible = [scene.visible[i] for i in order]


def _find_or_make_hole(raw, pictures, mask_hole, new_hole):
    """The hole of a scene: found in its files, else made.

    Returns:
        (H,W) bool or None; how it was found, "" without one; indices of the completions of a removed object. Faults
        are appended to `pictures.faults`.
    """
    hole, how, removed = None, "", []
    brings_hole = raw.mask is not None or raw.partial is not None or pictures.erased is not None
    try:
        if brings_hole and (pictures.original is not None or pictures.partial is not None):
            hole, how = find_hole(raw, pictures, mask_hole)
            if pictures.original is not None and pictures.partial is not None:
                check_same_photo(raw, pictures, hole)
        elif not pictures.faults:
            hole, how, removed = make_hole(raw, pictures.original, pictures.completions, pictures.visible, new_hole)
            if has_blanked_hole(pictures.original, any_colour=True):
                pictures.notes.append(f"{raw.original.name}: has a sharp region of one colour; is a hole cut already? "
                                      "If so, name the folder of whole photos (--photos)")
        if hole is not None:
            check_completions_fit(raw, pictures, hole)
    except SceneError as error:
        pictures.faults.append(error)
    return hole, how, removed


def check_same_photo(raw, pictures, hole):
    """Raise SceneError if the partial image shows another photo than the original, or a shifted one."""
    soft = hole if pictures.mask is None else hole | ((pictures.mask > 25) & (pictures.mask < 230))
    fault = photo_fault(pictures.original, pictures.partial, soft)
    if fault:
        raise SceneError(f"{raw.partial}: {fault} {raw.original.name}; make both from the same photo")


def check_completions_fit(raw, pictures, hole):
    """Raise SceneError if completions fit the photo only mirrored, transparent or with red and blue swapped.

    Completions that never agree with the photo get a note."""
    photo = pictures.partial if pictures.partial is not None else pictures.original
    fault, best = misfit(photo, pictures.completions, pictures.visible, hole)
    if fault:
        raise SceneError(f"{raw.folder}: {fault}")
    if best is not None and best < (0.3 if pictures.scaled else 0.05):
        pictures.notes.append("no completion agrees with the photo anywhere outside the hole; do they show another "
                              "photo, or enlarged crops?")


def _visible(pictures, hole):
    """The photo (H,W,3), black in the hole.

    The edge around the hole comes from the original: soft masks and codecs darken the partial image there.
    """
    shown = pictures.partial if pictures.partial is not None else pictures.original
    if pictures.original is not None and pictures.partial is not None:
        edge = grown(hole, 4)
        if pictures.mask is not None:
            edge |= (pictures.mask > 0) & (pictures.mask < 255)
        shown = np.where(edge[..., None], pictures.original, shown)
    return np.where(hole[..., None], 0, shown).astype(np.uint8)


def _warnings(pictures, rows):
    for kind, what in UNUSABLE.items():
        files = [row["file"] for row in rows if row["background"] == kind]
        if files:
            yield f"{', '.join(files)}: {what}"
    whole = [(picture[..., 3] > 127).mean() >= WHOLE_FRAME for picture in pictures.completions]
    if all(whole):
        yield ("all completions cover the whole frame: they have no alpha, and no flat background to key out; give "
               "alpha, masks beside them, or --background")
    else:
        unlike = [row["file"] for row, covers, files in zip(rows, whole, pictures.files)
                  if covers and row["visible_error"] > 0.15 and not files.keep_alpha]
        if unlike:
            yield (f"{', '.join(unlike)}: covers the whole frame and differs from the photo; is there a background "
                   "that could not be keyed out? Give alpha, or a mask beside it")
