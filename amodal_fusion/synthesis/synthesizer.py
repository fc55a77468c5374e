"""Composed training scenes with a known truth, made of cut-outs, backgrounds and annotated photos.

A scene is a photo of several overlapping objects, a hole in it, and simulated completions of the objects. A completion
is right where the object was visible. Elsewhere it may have any mistake that completion models make.
Scene i of a seed is the same on every machine and for any number of workers.
"""

import sys
from dataclasses import dataclass, field

import cv2
import numpy as np

from amodal_fusion.data.masks import cut_hole
from amodal_fusion.data.scenes import Scene
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.selection import select_completions
from amodal_fusion.synthesis.assets import odd_cutouts
from amodal_fusion.synthesis.completions import as_received, complete, whole_background
from amodal_fusion.synthesis.composition import add_clutter, compose_cutouts, open_annotated, open_photo, random_crop

STYLES = ("mixed", "copy", "redraw", "pix2gestalt")
# Hole policies that ignore the objects' shapes.
USUAL_HOLES = ("box", "box", "centre", "strokes", "grid", "scatter")


@dataclass
class Composition:
    """A scene with its truth."""

    scene: Scene
    objects: list  # of SceneObject, from back to front
    shown: list  # for each completion the index of its object, or None when it shows no single object
    faults: list = field(default_factory=list)  # lines about files that this process left out or changed so far


class Synthesizer:
    """An endless data set: `synthesizer(i)` is composed scene i.

    Scenes are composed of cut-outs on backgrounds, of annotated photos, or of single photos whose regions are the
    objects. When the material has cut-outs and annotated photos, both are equally frequent.

    Args:
        material: Material.
        img_size: side of the scenes in pixels.
        n_max_completions: of one scene.
        hole: one of amodal_fusion.data.masks.HOLES.
        style: one of STYLES, how the simulated model draws.
        seed: another seed gives other scenes.

    Damaged files are skipped and replaced by other random ones.
    """

    def __init__(self, material, img_size=256, n_max_completions=5, hole="mixed", style="mixed", seed=0):
        self.material, self.img_size, self.n_max = material, img_size, n_max_completions
        self.hole, self.style, self.seed = hole, style, seed
        self._reported = set()

    @staticmethod
    def scene_id(index):
        return f"synthetic_{index:07d}"

    def __call__(self, index):
        """Scene `index`. Files that cannot be used are reported on stderr, once in each process.

        Raises:
            SceneError: 100 draws gave no scene.
        """
        composition = self.compose(index)
        for fault in sorted(set(composition.faults) - self._reported):
            print(fault, file=sys.stderr)
        self._reported.update(composition.faults)
        return composition.scene

    def compose(self, index):
        """Scene `index` as a Composition.

        Raises:
            SceneError: 100 draws gave no scene.
        """
        cv2.setNumThreads(0)
        faults = []
        for attempt in range(100):  # some draws have no overlap, or a hole without objects
            rng = np.random.default_rng((self.seed, index, attempt))
            try:
                composition = self._draw(rng, self.scene_id(index))
            except SceneError as error:
                faults.append(f"left out: {error}")
                continue
            if composition is not None:
                composition.faults = faults + odd_cutouts()
                return composition
        raise SceneError(f"{self.scene_id(index)}: 100 draws without two objects in one hole; are the cut-outs "
                         "transparent?" + "".join(f"\n{fault}" for fault in sorted({*faults, *odd_cutouts()})[:5]))

    def _draw(self, rng, scene_id):
        style = self.style if self.style != "mixed" else rng.choice(STYLES[1:], p=(0.4, 0.15, 0.45))
        drawn = self._draw_photo(style, rng)
        if drawn is None:
            return None
        photo, objects, background = drawn
        mask = self._draw_hole(objects, style, rng)
        if mask is None:
            return None
        cutouts = self.material.cutouts
        if cutouts and rng.random() < (0.75 if style != "pix2gestalt" else 0.4):
            photo, objects = add_clutter(photo, objects, mask, cutouts, rng)
        received = as_received(photo, objects, rng) if style == "copy" else (photo, objects)
        completions, shown = complete(*received, mask, style, self._unrelated_texture, rng)
        if rng.random() < 0.05:
            completions.append(whole_background(*received, mask, background, rng))
            shown.append(None)
        partial = photo.copy()
        partial[mask] = 0
        kept = self._select(completions, mask, partial, rng)
        if not len(kept):
            return None
        scene = Scene(scene_id, partial, mask, [completions[i] for i in kept], photo)
        return Composition(scene, objects, [shown[i] for i in kept])

    def _select(self, completions, mask, partial, rng):
        """Indices of the completions that the scene keeps, in random order. Empty when none of them matters."""
        useful = [np.count_nonzero((c[..., 3] > 127) & mask) > 0.005 * np.count_nonzero(mask) for c in completions]
        if not any(useful):
            return []
        kept = range(len(completions))
        if rng.random() < 0.8:
            # Select as `create` does. A random choice would often lose the front object, and the network would learn
            # to distrust a completion that alone covers a pixel.
            kept, rows = select_completions(completions, mask, partial, self.n_max)
            if rng.random() < 0.3:  # a segmenter misses objects; here only those that hardly reach the hole
                kept = [i for i in kept if rows[i]["hole_share"] > 0.08]
        kept = rng.permutation(kept)[: self.n_max]
        return kept if any(useful[i] for i in kept) else []

    def _draw_photo(self, style, rng):
        """A photo, its objects, and its background or None. None when there are too few objects."""
        material = self.material
        sources = {"cut-outs": bool(material.cutouts), "annotated": bool(material.photos),
                   "regions": bool(material.backgrounds)}
        if sources["regions"] and (sources["cut-outs"] or sources["annotated"]):
            sources["regions"] = 0.8 if style == "pix2gestalt" else 0.2
        shares = np.array(list(sources.values()), float)
        source = rng.choice(list(sources), p=shares / shares.sum())
        if source == "annotated":
            return open_annotated(material.photos[rng.integers(len(material.photos))], self.img_size, rng)
        if source == "regions":
            return open_photo(material.backgrounds[rng.integers(len(material.backgrounds))], self.img_size, rng)
        return compose_cutouts(material.cutouts, material.backgrounds, self.img_size, rng)

    def _draw_hole(self, objects, style, rng):
        """A hole with objects to choose from, (H,W) bool, or None."""
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

    def _unrelated_texture(self, rng):
        """A texture of another photo, (H,W,3) uint8."""
        return random_crop(self.material.random_photo(rng), self.img_size, rng)
