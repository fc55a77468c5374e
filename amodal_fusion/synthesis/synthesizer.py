"""Training scenes with known truth out of cut-outs, backgrounds and annotated photos.

A scene is a photo in which several objects overlap, a hole in it, and for every object what a completion model might
have drawn: right where the object could be seen, and any of the mistakes that such models make where it could not.
Scene number i of a seed is the same on every machine and for any number of workers.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from amodal_fusion.data.masks import cut_hole
from amodal_fusion.data.scenes import Scene
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.selection import select_completions
from amodal_fusion.synthesis.assets import damaged_cutouts, find_pictures, read_annotations
from amodal_fusion.synthesis.completions import as_received, complete, whole_background
from amodal_fusion.synthesis.composition import add_clutter, compose_cutouts, open_annotated, open_photo, random_crop

STYLES = ("mixed", "copy", "redraw", "pix2gestalt")
USUAL_HOLES = ("box", "box", "centre", "strokes", "grid", "scatter")  # that are cut without a look at the objects


@dataclass
class Composition:
    """A scene and what only its maker knows."""

    scene: Scene
    objects: list  # of SceneObject, from back to front
    shown: list  # per completion the number of its object; None when it stands for no single one
    faults: list = field(default_factory=list)  # lines about files that this process could not use so far


class Synthesizer:
    """Scene `index` of an endless data set.

    Args:
        objects: folder of RGBA cut-outs, or None; backgrounds: folder of photos, needed with `objects`. Some scenes are
            such a photo as it is, with its own regions as objects; all of them when nothing else is given.
        coco: COCO-style instance annotations beside their photos, or None. As many scenes come from these as from
            cut-outs when both are given.
        img_size: side of the scenes in pixels; n_max_completions: of a scene, at least one.
        hole: one of amodal_fusion.data.masks.HOLES; style: one of STYLES, how the completer draws.
        seed: another seed, other scenes.

    `faults` says what of the material cannot be used: photos that are not there, folders that cannot be read. Files
    that turn out to be damaged are passed over, and other ones drawn.

    Raises:
        SceneError: a folder is missing or holds nothing to use.
    """

    def __init__(self, objects=None, backgrounds=None, coco=None, img_size=256, n_max_completions=5, hole="mixed",
                 style="mixed", seed=0):
        if not objects and not backgrounds and not coco:
            raise SceneError("nothing to compose scenes from: give a folder of cut-outs and one of backgrounds, or a "
                             "COCO file, or photos as backgrounds alone")
        if objects and not backgrounds:
            raise SceneError(f"{objects}: cut-outs need photos to stand on, give a folder of backgrounds")
        self.cutouts, faults = find_pictures(objects) if objects else ([], [])
        self.backgrounds, more = find_pictures(backgrounds) if backgrounds else ([], [])
        self.photos, missing = read_annotations(coco) if coco else ([], [])
        self.annotations = [Path(coco)] if coco else []
        self.faults, self._told = faults + more + missing, set()
        self.img_size, self.n_max, self.hole, self.style, self.seed = img_size, n_max_completions, hole, style, seed

    def material(self):
        """(name, bytes) of every file that scenes are made of: with others, other scenes come out."""
        photos = [annotations.photo for annotations in self.photos]
        files = (*self.annotations, *self.cutouts, *self.backgrounds, *photos)
        return [(path.name, path.stat().st_size) for path in files]

    @staticmethod
    def scene_id(index):
        return f"synthetic_{index:07d}"

    def __call__(self, index):
        """Scene `index`; says once in this process which files cannot be used."""
        composition = self.compose(index)
        for fault in set(composition.faults) - self._told:
            print(f"left out: {fault}", file=sys.stderr)
        self._told.update(composition.faults)
        return composition.scene

    def compose(self, index):
        """Scene `index` with its objects, as a Composition."""
        cv2.setNumThreads(0)
        faults = []
        for attempt in range(100):  # some draws have no overlap, or a hole that misses every object
            rng = np.random.default_rng((self.seed, index, attempt))
            try:
                composition = self._draw(rng, self.scene_id(index))
            except SceneError as error:
                faults.append(str(error))
                continue
            if composition is not None:
                composition.faults = faults + damaged_cutouts()
                return composition
        raise SceneError(f"{self.scene_id(index)}: 100 draws without two objects in one hole; are the cut-outs "
                         "transparent?" + "".join(f"\n{fault}" for fault in sorted({*faults, *damaged_cutouts()})[:5]))

    def _draw(self, rng, scene_id):
        style = self.style if self.style != "mixed" else rng.choice(STYLES[1:], p=(0.4, 0.15, 0.45))
        drawn = self._photo(style, rng)
        if drawn is None:
            return None
        photo, objects, behind = drawn
        mask = self._hole(objects, style, rng)
        if mask is None:
            return None
        if self.cutouts and rng.random() < (0.75 if style != "pix2gestalt" else 0.4):
            photo, objects = add_clutter(photo, objects, mask, self.cutouts, rng)
        received = as_received(photo, objects, rng) if style == "copy" else (photo, objects)
        completions, shown = complete(*received, mask, style, self._foreign, rng)
        if rng.random() < 0.05:
            completions.append(whole_background(*received, mask, behind, rng))
            shown.append(None)
        useful = [np.count_nonzero((c[..., 3] > 127) & mask) > 0.005 * np.count_nonzero(mask) for c in completions]
        if not any(useful):
            return None
        partial = photo.copy()
        partial[mask] = 0
        kept = range(len(completions))
        if rng.random() < 0.8:
            # as `create` does: with a random choice the front object would often be missing, and a network would
            # learn to distrust whatever alone covers a pixel; what does not reach the hole goes, and may still stand
            # in front of something that does
            kept, rows = select_completions(completions, mask, partial, self.n_max)
            if rng.random() < 0.3:  # proposals miss things; here only such as the hole hardly touches
                kept = [i for i in kept if rows[i]["hole_share"] > 0.08]
        kept = rng.permutation(kept)[: self.n_max]
        if not any(useful[i] for i in kept):
            return None
        scene = Scene(scene_id, partial, mask, [completions[i] for i in kept], photo)
        return Composition(scene, objects, [shown[i] for i in kept])

    def _photo(self, style, rng):
        """A photo, its objects, and what is behind them or None; None when there are too few objects."""
        kinds = {"composed": bool(self.cutouts), "annotated": bool(self.photos), "as it is": bool(self.backgrounds)}
        if kinds["as it is"] and (kinds["composed"] or kinds["annotated"]):
            kinds["as it is"] = 0.8 if style == "pix2gestalt" else 0.2
        shares = np.array(list(kinds.values()), float)
        kind = rng.choice(list(kinds), p=shares / shares.sum())
        if kind == "annotated":
            return open_annotated(self.photos[rng.integers(len(self.photos))], self.img_size, rng)
        if kind == "as it is":
            return open_photo(self.backgrounds[rng.integers(len(self.backgrounds))], self.img_size, rng)
        return compose_cutouts(self.cutouts, self.backgrounds, self.img_size, rng)

    def _hole(self, objects, style, rng):
        """A hole in which there is something to decide, (H,W) bool, or None."""
        alphas = [item.whole[..., 3] > 127 for item in objects]
        cover = np.sum(alphas, 0, dtype=np.uint8)
        policy, least = self.hole, 0.04
        if style == "pix2gestalt" and rng.random() < 0.7:
            least = 0.2
            policy = rng.choice(USUAL_HOLES) if policy == "mixed" else policy
        mask = cut_hole(policy, cover, alphas[rng.integers(len(alphas))], least, rng)
        if mask is None or (cover[mask] >= 1).mean() < 0.15:
            return None
        return None if (cover[mask] >= 2).mean() < 0.02 and rng.random() < 0.7 else mask

    def _foreign(self, rng):
        """Some texture that does not belong to the scene, (H,W,3)."""
        files = self.backgrounds or [annotations.photo for annotations in self.photos]
        return random_crop(files[rng.integers(len(files))], self.img_size, rng)
