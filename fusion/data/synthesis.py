"""Training scenes with known truth out of cut-outs, backgrounds and annotated photos.

A scene is a photo in which several objects overlap, a hole in it, and for every object what a completion model might
have drawn: right where the object could be seen, and any of the mistakes that such models make where it could not.
Scene number i of a seed is the same on every machine and for any number of workers.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from fusion.data.completers import as_received, complete, whole_background
from fusion.data.holes import cut_hole
from fusion.data.images import IMAGE_SUFFIXES, read_image, resize
from fusion.data.scenes import Scene
from fusion.data.selection import select_completions
from fusion.errors import SceneError

STYLES = ("mixed", "copy", "redraw", "pix2gestalt")


@dataclass
class Layer:
    """One object of a photo: whole (H,W,4) uint8; visible (H,W) bool, where no other object covers it in the photo;
    true, whether `whole` is also right where the object is covered."""

    whole: np.ndarray
    visible: np.ndarray
    true: bool


class Synthesizer:
    """Scene `index` of an endless data set.

    Args:
        objects: folder of RGBA cut-outs, or None; backgrounds: folder of photos, needed with `objects`.
        coco: COCO-style instance annotations beside their photos, or None. Half of the scenes come from each when
            both are given.
        img_size: side of the scenes in pixels; n_max_completions: of a scene, at least one.
        hole: one of fusion.data.holes.HOLES; style: one of STYLES, how the completer draws.
        seed: another seed, other scenes.

    Raises:
        SceneError: a folder is missing or holds nothing to use.
    """

    def __init__(self, objects=None, backgrounds=None, coco=None, img_size=256, n_max_completions=5, hole="mixed",
                 style="mixed", seed=0):
        self.cutouts = _pictures(objects) if objects else []
        self.backgrounds = _pictures(backgrounds) if objects else []
        self.photos = _annotated_photos(coco) if coco else []
        if not self.cutouts and not self.photos:
            raise SceneError("nothing to compose scenes from: give a folder of cut-outs and one of backgrounds, or a "
                             "COCO file")
        self.img_size, self.n_max, self.hole, self.style, self.seed = img_size, n_max_completions, hole, style, seed

    @staticmethod
    def scene_id(index):
        return f"synthetic_{index:07d}"

    def __call__(self, index):
        """Scene `index`."""
        cv2.setNumThreads(0)
        for attempt in range(100):  # some draws have no overlap, or a hole that misses every object
            rng = np.random.default_rng((self.seed, index, attempt))
            scene = self._draw(rng, self.scene_id(index))
            if scene is not None:
                return scene
        raise SceneError(f"scene {index}: 100 draws without two objects in one hole; are the cut-outs transparent?")

    def _draw(self, rng, scene_id):
        style = self.style if self.style != "mixed" else rng.choice(STYLES[1:], p=(0.5, 0.2, 0.3))
        annotated = bool(self.photos) and (not self.cutouts or rng.random() < 0.5)
        drawn = self._annotated(rng) if annotated else self._composed(rng)
        if drawn is None:
            return None
        photo, layers, behind = drawn
        cover = sum((layer.whole[..., 3] > 127).astype(np.int32) for layer in layers)
        least = 0.25 if style == "pix2gestalt" and rng.random() < 0.7 else 0.04
        mask = cut_hole(self.hole, cover, layers[rng.integers(len(layers))].whole[..., 3] > 127, least, rng)
        if mask is None or (cover[mask] >= 1).mean() < 0.15:
            return None
        if (cover[mask] >= 2).mean() < 0.02 and rng.random() < 0.7:
            return None  # nothing to decide there
        if self.cutouts and rng.random() < 0.75:
            photo, layers = self._cluttered(photo, layers, mask, rng)
        received = as_received(photo, layers, rng) if style == "copy" else (photo, layers)
        completions = complete(*received, mask, style, self._foreign, rng)
        if rng.random() < 0.05:
            completions.append(whole_background(*received, mask, behind, rng))
        useful = [c for c in completions if (c[..., 3] > 127)[mask].mean() > 0.005]
        if not useful:
            return None
        partial = np.where(mask[..., None], 0, photo).astype(np.uint8)
        kept = range(len(completions))
        if rng.random() < 0.8:
            # as `create` does: with a random choice the front object would often be missing, and a network would
            # learn to distrust whatever alone covers a pixel; what does not reach the hole goes, and may still stand
            # in front of something that does
            kept, rows = select_completions(completions, mask, partial, self.n_max)
            if rng.random() < 0.3:  # proposals miss things; here only such as the hole hardly touches
                kept = [i for i in kept if rows[i]["hole_share"] > 0.08]
        chosen = [completions[i] for i in rng.permutation(kept)[: self.n_max]]
        if not any(c is u for c in chosen for u in useful):
            return None
        return Scene(scene_id, partial, mask, chosen, photo)

    def _composed(self, rng):
        """Cut-outs over a background: everything is known, also what is covered."""
        size = self.img_size
        background = _random_crop(_read(self.backgrounds[rng.integers(len(self.backgrounds))], "RGB"), size, rng)
        wholes = []
        for side, place, plain in self._arrangement(rng):
            whole = self._thing(place, side, rng, plain)
            if (whole[..., 3] > 127).mean() > 0.01:
                wholes.append(whole)
        if len(wholes) < 2:
            return None
        photo, winner = background.astype(np.float32), np.full((size, size), -1)
        for i, whole in enumerate(wholes):
            photo, winner = _paint(photo, winner, whole, i)
        if len(wholes) >= 3 and rng.random() < 0.15:
            # a cyclic overlap: the rearmost comes over the foremost, wherever nothing else is between them
            others = np.max([whole[..., 3] for whole in wholes[1:-1]], 0) > 0
            photo, winner = _paint(photo, winner, wholes[0], 0, (wholes[-1][..., 3] > 0) & ~others)
        photo = np.clip(np.rint(photo), 0, 255).astype(np.uint8)
        layers = [Layer(whole, (winner == i) & (whole[..., 3] > 127), True) for i, whole in enumerate(wholes)]
        layers = [layer for layer in layers if layer.visible.mean() > 0.003]
        if len(layers) < 2:
            return None
        return photo, layers, background

    @staticmethod
    def _arrangement(rng):
        """What stands where, back to front: [(longer side, centre, probability of a plain thing)], in pictures."""
        draw, centre = rng.random(), rng.uniform(0.3, 0.7, 2)
        if draw < 0.5:  # a laid table, a shelf, a close-up: large things carry many small ones, all over the picture
            large, small = rng.integers(1, 4), rng.integers(3, 10)
            sides = [*rng.uniform(0.6, 1.4, large), *np.exp(rng.uniform(np.log(0.15), np.log(0.6), small))]
            return [(side, rng.uniform(0.1, 0.9, 2), 0.5 if i < large else 0.1) for i, side in enumerate(sides)]
        spread, count = rng.uniform(0.06, 0.22), rng.integers(2, 7)
        carried = draw < 0.75  # often a large thing carries the others, as plates and tables do
        smallest, largest = (0.15, 0.5) if carried else (0.2, 0.9)
        sides = np.exp(rng.uniform(np.log(smallest), np.log(largest), count))
        if carried:
            sides[0] = rng.uniform(0.8, 1.4)
        plain = [0.5 if carried and i == 0 else 0.08 for i in range(count)]
        return [(side, centre + rng.normal(0, spread, 2), p) for side, p in zip(sides, plain)]

    def _cluttered(self, photo, layers, mask, rng):
        """Things on the objects, beside the hole, that nobody completed: what stands behind one disagrees with the
        photo there, and is right in the hole all the same. Returns the photo and its layers anew."""
        on, things, largest_thing, enough = range(len(layers)), rng.integers(1, 13), 1.1, 0
        if rng.random() < 0.7:  # all on the largest, as on a laid table, most of which may be hidden
            areas = [(layer.visible & ~mask).sum() for layer in layers]
            on, things, largest_thing, enough = [np.argmax(areas)], 60, 0.7, max(areas) * rng.uniform(0.2, 0.8)
        for _ in range(things):
            beneath = layers[rng.choice(on)].visible & ~mask
            if beneath.sum() <= enough:
                break
            rows, columns = np.nonzero(beneath)
            at = rng.integers(len(rows))
            centre, side = np.array([rows[at], columns[at]]) / self.img_size, np.sqrt(beneath.mean())
            thing = self._thing(centre, side * rng.uniform(0.3, largest_thing), rng)
            if not (thing[..., 3] > 0)[mask].any():
                photo = _over(photo, thing, thing[..., 3] / 255)
                layers = [Layer(x.whole, x.visible & (thing[..., 3] < 128), x.true) for x in layers]
        return np.clip(np.rint(photo), 0, 255).astype(np.uint8), layers

    def _thing(self, centre, side, rng, plain=0.0):
        """A cut-out, or with probability `plain` something plain, at `centre`, its longer side `side` pictures."""
        if rng.random() < plain:
            cutout = _plain_thing(rng)
        else:
            cutout = _read(self.cutouts[rng.integers(len(self.cutouts))], "RGBA")
        return _placed(cutout, self.img_size, centre * self.img_size, self.img_size * side, rng)

    def _annotated(self, rng):
        """A photo with its own objects: what lies under a nearer one is unknown and has to be made up."""
        path, annotations = self.photos[rng.integers(len(self.photos))]
        picture = _read(path, "RGB")
        masks = _instance_masks(path, annotations, picture.shape[:2])
        crop, side = _crop_box(picture.shape[:2], rng)
        size, flip = (self.img_size, self.img_size), rng.random() < 0.5

        def cropped(array, nearest=False):
            array = resize(array[crop[0] : crop[0] + side, crop[1] : crop[1] + side], size, nearest)
            return array[:, ::-1].copy() if flip else array

        photo = cropped(picture)
        instances = [cropped(mask, nearest=True).astype(bool) for mask in masks]
        instances = sorted((m for m in instances if 0.01 < m.mean() < 0.8), key=np.sum, reverse=True)[:7]
        if not instances:
            return None
        # Who is in front is not annotated. Large things are behind, mostly, and otherwise both may happen.
        order = range(len(instances)) if rng.random() < 0.6 else rng.permutation(len(instances))
        layers = []
        for rank, i in enumerate(order):
            nearer = np.zeros(size, bool)
            for j in order[rank + 1 :]:
                nearer |= instances[j]
            visible = instances[i] & ~nearer
            if visible.mean() < 0.005:
                continue
            alpha = visible | (_grown_shape(visible, rng) & nearer)
            alpha = cv2.GaussianBlur(alpha.astype(np.float32), (0, 0), 0.6)
            layers.append(Layer(np.dstack([photo, np.rint(alpha * 255).astype(np.uint8)]), visible, False))
        return (photo, layers, None) if layers else None

    def _foreign(self, rng):
        """Some texture that does not belong to the scene, (H,W,3)."""
        files = self.backgrounds or [path for path, _ in self.photos]
        return _random_crop(_read(files[rng.integers(len(files))], "RGB"), self.img_size, rng)


def _pictures(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise SceneError(f"{folder}: no pictures in it")
    return files


def _annotated_photos(coco):
    """[(photo, its polygon annotations)] of a COCO file; photos lie beside it or in a folder of its name."""
    coco = Path(coco)
    try:
        content = json.loads(coco.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        by_image = {}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd") and isinstance(annotation["segmentation"], list):
                by_image.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SceneError(f"{coco}: not a COCO annotation file ({error!r})") from None
    photos = [(coco.parent / names[i], polygons) for i, polygons in sorted(by_image.items())]
    photos = [(path, polygons) for path, polygons in photos if path.is_file()]
    if not photos:
        raise SceneError(f"{coco}: none of its photos lies in {coco.parent}")
    return photos


@lru_cache(maxsize=1024)
def _read(path, mode):
    image = read_image(path, mode)
    scale = 512 / max(image.shape[:2])  # scenes are small; big photos would fill the memory of every worker
    return resize(image, (round(image.shape[0] * scale), round(image.shape[1] * scale))) if scale < 1 else image


def _instance_masks(path, annotations, size):
    """Polygons (in pixels of the photo as stored) → one uint8 mask each, at the size that `_read` gave."""
    height, width = _stored_size(path)
    scale = np.array([size[1] / width, size[0] / height])
    masks = []
    for polygons in annotations:
        mask = np.zeros(size, np.uint8)
        points = [np.rint(np.reshape(p, (-1, 2)) * scale).astype(np.int32) for p in polygons if len(p) >= 6]
        cv2.fillPoly(mask, points, 1)
        masks.append(mask)
    return masks


@lru_cache(maxsize=4096)
def _stored_size(path):
    return read_image(path, "L").shape


def _crop_box(size, rng):
    side = int(min(size) * rng.uniform(0.7, 1))
    return (rng.integers(size[0] - side + 1), rng.integers(size[1] - side + 1)), side


def _random_crop(picture, size, rng):
    (top, left), side = _crop_box(picture.shape[:2], rng)
    crop = resize(picture[top : top + side, left : left + side], (size, size))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _placed(cutout, size, centre, longer_side, rng):
    """The cut-out on a transparent square, its longer side and its centre as told, turned and lit a little."""
    rows, columns = (np.flatnonzero(cutout[..., 3].max(axis) > 20) for axis in (1, 0))
    canvas = np.zeros((size, size, 4), np.uint8)
    if not len(rows):
        return canvas
    cutout = cutout[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = cutout.shape[:2]
    scale = longer_side / max(height, width)
    if scale < 1:
        cutout = resize(cutout, (max(1, round(height * scale)), max(1, round(width * scale))))
        height, width, scale = *cutout.shape[:2], 1.0
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.normal(0, 12), scale)
    if rng.random() < 0.5:
        cutout = cutout[:, ::-1]
    matrix[:, 2] += (centre[1] - width / 2, centre[0] - height / 2)
    premultiplied = cutout.astype(np.float32)
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255
    placed = cv2.warpAffine(premultiplied, matrix, (size, size), flags=cv2.INTER_LINEAR)
    colour = placed[..., :3] * 255 / np.maximum(placed[..., 3:], 1e-3)
    colour = 255 * (np.clip(colour, 0, 255) / 255) ** np.exp(rng.normal(0, 0.2)) * rng.uniform(0.8, 1.1, 3)
    canvas[..., :3] = np.clip(colour, 0, 255)
    canvas[..., 3] = np.rint(placed[..., 3])
    canvas[canvas[..., 3] == 0] = 0
    return canvas


def _plain_thing(rng):
    """A plate, a sheet or a table top, (256,256,4): photographs are full of them, collections of cut-outs are not."""
    size = 256
    y, x = np.mgrid[:size, :size] / (size / 2) - 1.0
    power = rng.choice((2, 2, 4, 16))  # an ellipse, a rounded rectangle, a sheet
    radius = (np.abs(x) ** power + np.abs(y / rng.uniform(0.5, 1)) ** power) ** (1 / power)
    light = rng.normal(0, 25, 2)
    shade = light[0] * x + light[1] * y
    shade = shade + rng.normal(0, 15) * np.clip((radius - rng.uniform(0.5, 0.9)) * 12, 0, 1)  # a rim
    grain = rng.normal(0, rng.uniform(0, 3), (size, size))
    colour = rng.uniform(30, 250) + rng.normal(0, 20, 3) + (shade + grain)[..., None]
    return np.dstack([np.clip(colour, 0, 255), 255 * np.clip((0.98 - radius) * size / 2, 0, 1)]).astype(np.uint8)


def _over(photo, whole, alpha):
    return photo + alpha[..., None] * (whole[..., :3] - photo)


def _paint(photo, winner, whole, number, where=True):
    """`whole` over the photo, where told; `winner` says who is in front."""
    alpha = whole[..., 3] / 255 * where
    return _over(photo, whole, alpha), np.where(alpha > 0.5, number, winner)


def _grown_shape(visible, rng):
    """What shape an object whose visible part is known may really have: its hull, itself mirrored, or dilated."""
    kind = rng.integers(3)
    binary = visible.astype(np.uint8)
    if kind == 0:
        contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        hull = cv2.convexHull(np.concatenate(contours))
        return cv2.fillPoly(np.zeros_like(binary), [hull], 1).astype(bool)
    if kind == 1:
        rows, columns = np.nonzero(visible)
        centre = (float(columns.mean()), float(rows.mean()))
        turned = cv2.warpAffine(binary, cv2.getRotationMatrix2D(centre, rng.uniform(90, 270), 1), binary.shape[::-1])
        return (turned > 0) | visible
    radius = max(2, int(np.sqrt(visible.sum()) * rng.uniform(0.1, 0.4)))
    return cv2.dilate(binary, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)).astype(bool)
