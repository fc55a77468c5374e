"""Endless training scenes from photos with real completions: each draw cuts another hole.

A photo with completed layers (RGBA, full frame) has real mistakes of real models, and the photo is the target. But the
hole is cut after the completion: the model of its front layer saw the truth there. In a hole that was there before no
layer has this advantage. Composed scenes (synthesizer.py) teach that case, so training mixes both.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from amodal_fusion.data.images import resize
from amodal_fusion.data.masks import cut_hole
from amodal_fusion.data.scenes import Scene, find_scenes, read_files
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.hole_cutting import detect_masked_photo
from amodal_fusion.ingest.layouts import find_raw_scenes
from amodal_fusion.ingest.loading import read_pictures
from amodal_fusion.ingest.selection import select_completions
from amodal_fusion.synthesis.degradations import damage_edges, on_white, redraw

LONGEST_SIDE = 640  # px; photos are scaled down to it in memory
KEPT_IN_MEMORY = 64  # photos per process
LEAST_ALPHA = 1e-3  # share of the picture; a layer with less is empty
ATTEMPTS = 100  # draws for one scene
MISPLACED = 2  # px of the photo; largest shift of a layer


@dataclass(eq=False)  # compared and hashed by identity, which the cache needs
class Source:
    """The files of one photo and its layers: a prepared scene with original, or a raw scene of any layout."""

    id: str
    folder: Path
    raw: object = None  # RawScene; None for a prepared scene


def find_layered_photos(folder):
    """The photos with completions below `folder`: a prepared data set with originals, or raw results.

    Returns:
        list of Source, and a list of faults: lines about scenes without a photo or without completions.

    Raises:
        SceneError: the folder does not exist or has nothing usable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SceneError(f"{folder}: no such folder of photos with layers")
    if (folder / "dataset.yaml").exists():  # written by create and synthesize
        found = {scene_id: (folder / scene_id / "original.png").exists() for scene_id in find_scenes(folder)}
        sources = [Source(scene_id, folder / scene_id) for scene_id, complete in found.items() if complete]
        faults = [f"{folder / scene_id}: no original.png" for scene_id, complete in found.items() if not complete]
    else:
        raw_scenes, unread = find_raw_scenes(folder)
        sources = [Source(raw.id, raw.folder, raw) for raw in raw_scenes if raw.original and raw.completions]
        faults = [f"{raw.folder}: no photo or no completions" for raw in raw_scenes
                  if not (raw.original and raw.completions)] + list(unread.values())
    if not sources:
        raise SceneError("\n".join([f"{folder}: no photo with completions in it; give raw results that "
                                    "prepare_dataset.py create reads, or a data set with originals", *faults[:5]]))
    return sources, faults


@functools.lru_cache(KEPT_IN_MEMORY)
def read_layered_photo(source):
    """Photo (H,W,3) and layers, list of (H,W,4), uint8, at most LONGEST_SIDE px long.

    Raises:
        SceneError: a file cannot be read, or all layers are empty.
    """
    if source.raw is None:
        scene = read_files(source.folder, need_original=True)
        photo, layers = scene.original, list(scene.completions)
    else:
        pictures = read_pictures(detect_masked_photo(source.raw))
        if pictures.faults or pictures.original is None:
            raise SceneError("\n".join(map(str, pictures.faults or [f"{source.folder}: no photo without a hole"])))
        photo = pictures.original
        layers = [layer for layer, kind in zip(pictures.completions, pictures.kinds)
                  if kind not in ("checkerboard", "silhouette")]
    scale = LONGEST_SIDE / max(photo.shape[:2])
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in photo.shape[:2])
        photo, layers = resize(photo, size), [resize(layer, size) for layer in layers]
    layers = [layer for layer in layers if (layer[..., 3] > 127).mean() > LEAST_ALPHA]
    if not layers:
        raise SceneError(f"{source.folder}: all its layers are empty")
    return photo, layers


class LayeredScenes:
    """Scene `index` of an endless data set of photos with layers; the same on every machine for one seed.

    A draw crops, scales and mirrors a photo, cuts a hole where layers overlap or nearly meet, adds near-duplicates and
    an object of another photo, and may degrade the layers further, as `Synthesizer` does.

    Args:
        folders: folders that `find_layered_photos` reads; img_size: side of the scenes, px;
        n_max_completions: of a scene; hole: a policy of `cut_hole`; seed: another seed, other scenes.

    Raises:
        SceneError: a folder holds nothing to use, or (from a call) no photo gives a scene.
    """

    def __init__(self, folders, img_size=256, n_max_completions=5, hole="mixed", seed=0):
        self.sources, self.faults = [], []
        for folder in folders:
            sources, faults = find_layered_photos(folder)
            self.sources += sources
            self.faults += faults
        self.img_size, self.n_max, self.hole, self.seed = img_size, n_max_completions, hole, seed
        self._reported = set()

    def find_faults(self, rank=0, world_size=1):
        """Read this process's share of the photos; a list of messages about those that cannot be used."""
        faults = []
        for source in self.sources[rank::world_size]:
            try:
                read_layered_photo(source)
            except SceneError as error:
                faults.append(str(error))
        return faults

    def __call__(self, index):
        """Scene `index`, with its original. A photo that cannot be read is reported once, and another one is drawn."""
        cv2.setNumThreads(0)
        faults = set()
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((self.seed, index, attempt, 1))  # the 1 makes it differ from composed scenes
            source = self.sources[rng.integers(len(self.sources))]
            try:
                scene = self._draw(source, rng, f"layers_{index:07d}")
            except SceneError as error:
                faults.add(str(error))
                continue
            finally:
                self._report(faults)
            if scene is not None:
                return scene
        raise SceneError("\n".join([f"no hole over completions in {ATTEMPTS} draws of photos with layers; do the "
                                    "layers show anything?", *sorted(faults)[:5]]))

    def _report(self, faults):
        for fault in faults - self._reported:
            print(f"left out: {fault}", file=sys.stderr)
        self._reported |= faults

    def _draw(self, source, rng, scene_id):
        photo, layers = read_layered_photo(source)
        photo, layers = crop(photo, layers, self.img_size, rng)
        alphas = [layer[..., 3] > 127 for layer in layers]
        if not any(alpha.any() for alpha in alphas):
            return None
        # Layers that nearly touch count as overlapping, since their soft edges and mistakes overlap.
        near = np.ones((self.img_size // 20 * 2 + 1,) * 2, np.uint8)
        cover = np.sum([cv2.dilate(alpha.astype(np.uint8), near) for alpha in alphas], 0, dtype=np.int32)
        mask = cut_hole(self.hole, cover, alphas[rng.integers(len(alphas))], 0.02, rng)
        if mask is None or (np.any(alphas, 0)[mask]).mean() < 0.15 or \
                ((cover[mask] >= 2).mean() < 0.05 and rng.random() < 0.8):
            return None
        layers = degraded(layers, rng)
        layers += near_duplicates(layers, rng)
        if rng.random() < 0.25:
            layers.append(self._distractor(mask, rng))
        partial = np.where(mask[..., None], 0, photo).astype(np.uint8)
        kept = np.arange(len(layers))
        if rng.random() < 0.8:  # as `create` does
            kept, _ = select_completions(layers, mask, partial, self.n_max)
        kept = rng.permutation(kept)[: self.n_max]
        if not any((layers[i][..., 3] > 127)[mask].mean() > 0.005 for i in kept):
            return None
        return Scene(scene_id, partial, mask, [layers[i] for i in kept], photo)

    def _distractor(self, mask, rng):
        """A layer of a random photo, at a random place in the hole."""
        photo, layers = read_layered_photo(self.sources[rng.integers(len(self.sources))])
        layer = layers[rng.integers(len(layers))]
        _, (layer,) = crop(photo, [layer], self.img_size, rng)
        rows, columns = np.nonzero(layer[..., 3] > 127)
        if not len(rows):
            return layer
        targets = np.argwhere(mask)
        shift = targets[rng.integers(len(targets))] - (int(rows.mean()), int(columns.mean()))
        matrix = np.float32([[1, 0, shift[1]], [0, 1, shift[0]]])
        return cv2.warpAffine(layer, matrix, layer.shape[1::-1], flags=cv2.INTER_NEAREST)


def crop(photo, layers, size, rng):
    """A random window of all pictures, mostly where layers overlap, as a square of `size` px; half of them mirrored.

    In half of the windows each layer is moved by a pixel or two. Otherwise registration would reveal the order: in
    some pipelines rear layers are slightly shifted and front layers are not.
    """
    height, width = photo.shape[:2]
    side = np.exp(rng.uniform(np.log(0.35), 0)) * min(height, width)
    sides = np.minimum((side * np.exp(rng.normal(0, 0.08)), side * np.exp(rng.normal(0, 0.08))), (height, width))
    cover = np.sum([layer[::4, ::4, 3] > 127 for layer in layers], 0)
    places = np.argwhere(cover >= (2 if (cover >= 2).any() and rng.random() < 0.8 else 1))
    centre = (places[rng.integers(len(places))] * 4 if len(places) else np.array([height, width]) / 2)
    centre = centre + rng.normal(0, 0.15, 2) * sides
    corner = np.clip(centre - sides / 2, 0, (height, width) - sides).astype(int)
    most = MISPLACED * (rng.random() < 0.5)
    shifts = [(0, 0), *rng.integers(-most, most + 1, (len(layers), 2))]
    pictures = []
    for picture, shift in zip((photo, *layers), shifts):
        top, left = np.clip(corner + shift, 0, (height, width) - sides).astype(int)
        window = picture[top : top + int(sides[0]), left : left + int(sides[1])]
        pictures.append(resize(np.ascontiguousarray(window), (size, size)))
    if rng.random() < 0.5:
        pictures = [np.ascontiguousarray(picture[:, ::-1]) for picture in pictures]
    return pictures[0], pictures[1:]


def degraded(layers, rng):
    """The layers as other pipelines would deliver them: half of the scenes unchanged, the others damaged further."""
    draw, size = rng.random(), layers[0].shape[0]
    everything = slice(0, size), slice(0, size)
    if draw < 0.5:
        return list(layers)
    if draw < 0.7:
        return [damage_edges(layer.copy(), rng) if rng.random() < 0.6 else layer for layer in layers]
    if draw < 0.85:
        return [redraw(layer, everything, size, rng, strong=False) if rng.random() < 0.7 else layer for layer in layers]
    keyed = []
    for layer in layers:  # RGB on near-white, keyed out again
        alpha = layer[..., 3]
        edge = np.mean([side.mean() for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])]) / 255
        drawn = redraw(layer, everything, size, rng, strong=rng.random() < 0.5)
        keyed.append(drawn if edge > 0.7 else on_white(drawn, edge, rng))
    return keyed


def near_duplicates(layers, rng):
    """Up to two more samples of layers, redrawn."""
    size = layers[0].shape[0]
    everything = slice(0, size), slice(0, size)
    count = rng.choice(3, p=(0.6, 0.3, 0.1))
    return [redraw(layers[rng.integers(len(layers))], everything, size, rng, strong=rng.random() < 0.3)
            for _ in range(count)]
