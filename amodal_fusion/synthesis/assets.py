"""The material of composed scenes: cut-outs, photos and annotated photos.

Each process caches the files it used last, at the sizes it needed: at most about half a GiB.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from amodal_fusion.data.images import IMAGE_SUFFIXES, open_picture, orientation, read_image, resize
from amodal_fusion.data.names import is_rubbish
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.matting import cut_out, is_silhouette

SIDES = (64, 128, 256, 512)  # pixels, longer sides at which cut-outs are cached
CACHE_BYTES = 2**27  # for cut-outs of one size
MARGIN = 2  # transparent pixels around a cut-out


class Material:
    """The files that scenes are composed of.

    Args:
        objects: folder of RGBA cut-outs, or None; it needs `backgrounds`.
        backgrounds: folder of photos, or None.
        coco: COCO or COCOA annotation file beside its photos, or None.

    Attributes:
        cutouts, backgrounds: sorted paths. photos: list of Annotations.
        faults: lines about folders that cannot be read and photos that are missing.

    Raises:
        SceneError: a folder is missing or has nothing usable.
    """

    def __init__(self, objects=None, backgrounds=None, coco=None):
        if not objects and not backgrounds and not coco:
            raise SceneError("nothing to compose scenes from: give a folder of cut-outs and one of backgrounds, or a "
                             "COCO file, or photos as backgrounds alone")
        if objects and not backgrounds:
            raise SceneError(f"{objects}: cut-outs need background photos; give a folder of them")
        self.cutouts, faults = find_pictures(objects) if objects else ([], [])
        self.backgrounds, more = find_pictures(backgrounds) if backgrounds else ([], [])
        self.photos, missing = read_annotations(coco) if coco else ([], [])
        self.annotation_files = [Path(coco)] if coco else []
        self.faults = faults + more + missing

    def sizes(self):
        """(name, bytes) of every file. Scenes depend on the files, so a change here means other scenes."""
        photos = [annotations.photo for annotations in self.photos]
        files = (*self.annotation_files, *self.cutouts, *self.backgrounds, *photos)
        return [(path.name, path.stat().st_size) for path in files]

    def random_photo(self, rng):
        """The path of any photo: a background, or an annotated photo where there are no backgrounds."""
        files = self.backgrounds or [annotations.photo for annotations in self.photos]
        return files[rng.integers(len(files))]


def find_pictures(folder):
    """Sorted paths of all pictures below `folder`, and a list of faults: a line for each folder that cannot be read.

    Raises:
        SceneError: there is no picture.
    """
    files, faults = [], []

    def unreadable(error):
        faults.append(f"{error.filename}: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not is_rubbish(name)]
        files += [Path(place, name) for name in names
                  if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise SceneError(faults[0] if faults else f"{folder}: no pictures in it")
    return files, faults


def read_cutout(path, longer_side):
    """A cut-out, cropped to its opaque part.

    Args:
        longer_side: pixels, the size at which the cut-out will be drawn. The result is at least as large, but never
            larger than the file or 512 pixels.

    A picture without alpha on a flat background is cut out as `create` cuts out completions.

    Returns:
        (H,W,4) uint8, straight alpha, read-only. The outer MARGIN pixels are transparent and continue the colours, so
        the picture can be scaled and rotated without dark rims. None when there is nothing in it to use;
        `odd_cutouts` says why.
    """
    side = next((side for side in SIDES if side >= longer_side), SIDES[-1])
    return _CUTOUTS[side](path)


def _decode_cutout(path, side):
    if side < SIDES[-1]:
        rgba = _CUTOUTS[2 * side](path)  # so a file is decoded once, not once for each side
        rgba = None if rgba is None else rgba[MARGIN:-MARGIN, MARGIN:-MARGIN]
    else:
        try:
            rgba = _only_object(path, read_image(path, "RGBA"))
        except SceneError as error:
            _ODD[path] = f"left out: {error}"
            return None
        rows, columns = (np.flatnonzero(rgba[..., 3].max(axis) > 20) for axis in (1, 0))
        rgba = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else None
    if rgba is None:
        return None
    # Premultiplied 8 bits are coarse where alpha is low, but there the error is invisible.
    rgba = cv2.cvtColor(np.ascontiguousarray(rgba), cv2.COLOR_RGBA2mRGBA)
    scale = min(1, side / max(rgba.shape[:2]))
    height, width = (max(1, round(length * scale)) for length in rgba.shape[:2])
    rgba = cv2.resize(rgba, (width, height), interpolation=cv2.INTER_AREA)
    rgba = cv2.copyMakeBorder(rgba, *[MARGIN] * 4, cv2.BORDER_CONSTANT, value=(0, 0, 0, 0))
    continued = cv2.cvtColor(cv2.blur(rgba, (2 * MARGIN + 1,) * 2), cv2.COLOR_mRGBA2RGBA)
    continued[..., 3] = 0
    return np.where(rgba[..., 3:] > 0, cv2.cvtColor(rgba, cv2.COLOR_mRGBA2RGBA), continued)


def _only_object(path, rgba):
    """A picture (H,W,4) as read, with straight alpha around its object. Raises SceneError if it has no alpha, and no
    flat background to cut an object out of."""
    rgba, kind = cut_out(rgba)
    if kind in ("opaque", "checkerboard"):
        raise SceneError(f"{path}: no alpha, and no flat background to cut the object out of; give an RGBA cut-out")
    if kind == "alpha":
        return rgba
    if kind != "premultiplied alpha":
        if is_silhouette(rgba):
            raise SceneError(f"{path}: only black and white, so a mask and no cut-out")
        kind = f"no alpha, its {kind} background was cut out"
    _ODD[path] = f"note: {path}: {kind}"
    return rgba


def _cached_reader(side):
    @lru_cache(maxsize=CACHE_BYTES // (4 * side**2))
    def cutout(path):
        return _decode_cutout(path, side)
    return cutout


def odd_cutouts():
    """A line for each cut-out that this process left out, or cut out of its background."""
    return list(_ODD.values())


_ODD = {}
_CUTOUTS = {side: _cached_reader(side) for side in SIDES}


@lru_cache(maxsize=512)
def read_photo(path, side):
    """A photo, (H,W,3) uint8, read-only. Its shorter side has about `side` pixels, or fewer if the file is smaller."""
    photo = read_image(path, "RGB", least=side)
    scale = side / min(photo.shape[:2])
    return resize(photo, tuple(round(length * scale) for length in photo.shape[:2])) if scale < 1 else photo


@lru_cache(maxsize=65536)
def stored_size(path):
    """(height, width) of a picture in pixels as it is stored, from its header, and its EXIF orientation, 1 to 8."""
    with open_picture(path) as image:
        turn = orientation(image)
        swapped = image.format == "TIFF" and turn >= 5  # Pillow gives the size of the upright picture
        return (image.size if swapped else image.size[::-1]), turn


@dataclass
class Annotations:
    """The annotated objects of one photo."""

    photo: Path
    outlines: list  # for each object a list of polygons [x, y, x, y …], in pixels of a photo of `size`
    ordered: bool  # COCOA: outlines are amodal (they include hidden parts) and are sorted from back to front
    size: tuple | None = None  # (height, width) as the annotation file says; None: that of the upright photo

    def upright(self):
        """The outlines as lists of (P,2) float arrays x, y in the upright photo, as shares of its width and height.

        An annotation file may be of a larger or smaller copy of the photo, or of the photo before EXIF rotation; its
        width and height tell.

        Raises:
            SceneError: its width and height are not those of the photo, scaled or not.
        """
        stored, turn = stored_size(self.photo)
        shown = stored[::-1] if turn >= 5 else stored
        height, width = self.size or shown
        as_stored = turn >= 5 and not _same_shape((height, width), shown)
        if not _same_shape((height, width), stored if as_stored else shown):
            raise SceneError(f"{self.photo}: {shown[1]}×{shown[0]}, but its annotations are of a picture of "
                             f"{width}×{height}; give the photo that was annotated")
        return [[_turned(np.reshape(polygon, (-1, 2)) / (width, height), turn if as_stored else 1)
                 for polygon in polygons if len(polygon) >= 6] for polygons in self.outlines]


def _same_shape(size, other):
    return abs(size[0] * other[1] - size[1] * other[0]) <= 0.01 * size[0] * other[1]


def _turned(points, turn):
    """Points x, y (P,2), as shares of the stored picture, in the upright one, by its EXIF orientation from 5 to 8."""
    x, y = points.T
    return np.stack({5: (y, x), 6: (1 - y, x), 7: (1 - y, 1 - x), 8: (y, 1 - x)}.get(turn, (x, y)), 1)


def read_annotations(path):
    """The photos of a COCO or COCOA file. The photos lie beside the file or in a folder of the same name.

    COCO marks the visible part of each instance (`segmentation`). COCOA (Zhu et al., Semantic Amodal Segmentation,
    2017) marks whole regions, with hidden parts (`regions`), and their `order`: 1 is the front.

    Returns:
        list of Annotations, and a list of faults: lines about missing photos and skipped annotations.

    Raises:
        SceneError: the file is no annotation file, or none of its photos exists.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]
                 if image.get("height") and image.get("width")}
        instances, regions, unnamed, run_lengths = {}, {}, 0, 0
        for annotation in content["annotations"]:
            image = annotation["image_id"]
            unnamed += image not in names
            if "regions" in annotation:  # one annotation holds all regions of a photo
                ordered = sorted(annotation["regions"], key=lambda region: -region["order"])
                regions.setdefault(image, [_polygons(region["segmentation"]) for region in ordered])
            elif annotation.get("iscrowd"):
                continue  # a crowd is no single object
            elif isinstance(annotation["segmentation"], list):
                instances.setdefault(image, []).append(_polygons(annotation["segmentation"]))
            else:
                run_lengths += 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SceneError(f"{path}: not a COCO annotation file ({error!r})") from None
    if run_lengths and not instances and not regions:
        raise SceneError(f"{path}: its {run_lengths} annotations are run lengths (RLE); convert them to polygons")
    photos = [Annotations(_photo_path(path, names[image]), outlines, found is regions, sizes.get(image))
              for found in (instances, regions) for image, outlines in sorted(found.items()) if image in names]
    missing = [entry.photo for entry in photos if not entry.photo.is_file()]
    photos = [entry for entry in photos if entry.photo.is_file()]
    if not photos:
        raise SceneError(f"{path}: none of its photos lies in {path.parent} or {path.with_suffix('').name}/")
    faults = [f"{path}: {unnamed} annotations belong to photos that the file does not list"] if unnamed else []
    if run_lengths:
        faults.append(f"{path}: {run_lengths} annotations are run lengths (RLE), not read; convert them to polygons")
    faults += [f"{photo}: file is missing, but {path.name} annotates it" for photo in missing]
    return photos, faults


def _photo_path(path, name):
    """Path of a photo of the annotation file `path`: beside the file, or in a folder of the same name."""
    inside = path.with_suffix("") / name
    return inside if inside.is_file() else path.parent / name


def _polygons(segmentation):
    """A list of polygons of floats. COCOA writes a single polygon as a flat list."""
    flat = bool(segmentation) and not isinstance(segmentation[0], list)
    polygons = [segmentation] if flat else segmentation
    return [[float(value) for value in polygon[: len(polygon) // 2 * 2]] for polygon in polygons]
