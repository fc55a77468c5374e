"""What scenes are composed of: cut-outs, photos and annotated photos, decoded seldom and kept small.

Every process keeps what it used last, in the resolutions it needed: about half a GiB at most, whatever there is.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from amodal_fusion.data.images import IMAGE_SUFFIXES, ORIENTATION, open_picture, read_image, resize
from amodal_fusion.data.names import is_rubbish
from amodal_fusion.errors import SceneError

SIDES = (64, 128, 256, 512)  # longer sides in which cut-outs are kept
CACHE_BYTES = 2**27  # for each of them, and for the photos
MARGIN = 2  # transparent pixels around a cut-out


def find_pictures(folder):
    """Paths of all pictures below `folder`, sorted, and faults: a line for each folder that cannot be read.

    Raises:
        SceneError: there are none.
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
    """A cut-out, cropped to what is not transparent.

    Args:
        longer_side: in pixels, of what will be drawn; the result is not smaller, unless the file is or above 512.

    Returns:
        (H,W,4) uint8, read-only, straight alpha; with MARGIN transparent pixels around it, in which colours go on, so
        that it may be scaled and turned like any picture. None when all of it is transparent, or when the file is
        damaged, which `damaged_cutouts` tells.
    """
    side = next((side for side in SIDES if side >= longer_side), SIDES[-1])
    return _CUTOUTS[side](path)


def _cutout(path, side):
    if side < SIDES[-1]:
        rgba = _CUTOUTS[2 * side](path)  # so that no file is decoded for each side anew
        rgba = None if rgba is None else rgba[MARGIN:-MARGIN, MARGIN:-MARGIN]
    else:
        try:
            rgba = read_image(path, "RGBA")
        except SceneError as error:
            _DAMAGED[path] = str(error)
            return None
        rows, columns = (np.flatnonzero(rgba[..., 3].max(axis) > 20) for axis in (1, 0))
        rgba = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else None
    if rgba is None:
        return None
    # premultiplied in 8 bits: coarse where alpha is low, where nobody sees it
    rgba = cv2.cvtColor(np.ascontiguousarray(rgba), cv2.COLOR_RGBA2mRGBA)
    scale = min(1, side / max(rgba.shape[:2]))
    height, width = (max(1, round(length * scale)) for length in rgba.shape[:2])
    rgba = cv2.resize(rgba, (width, height), interpolation=cv2.INTER_AREA)
    rgba = cv2.copyMakeBorder(rgba, *[MARGIN] * 4, cv2.BORDER_CONSTANT, value=(0, 0, 0, 0))
    around = cv2.cvtColor(cv2.blur(rgba, (2 * MARGIN + 1,) * 2), cv2.COLOR_mRGBA2RGBA)
    around[..., 3] = 0
    return np.where(rgba[..., 3:] > 0, cv2.cvtColor(rgba, cv2.COLOR_mRGBA2RGBA), around)


def _cached(side):
    @lru_cache(maxsize=CACHE_BYTES // (4 * side**2))
    def cutout(path):
        return _cutout(path, side)
    return cutout


def damaged_cutouts():
    """Lines about the cut-outs that this process tried in vain."""
    return list(_DAMAGED.values())


_DAMAGED = {}
_CUTOUTS = {side: _cached(side) for side in SIDES}


@lru_cache(maxsize=512)
def read_photo(path, side):
    """A photo whose shorter side is about `side` pixels or what the file has, (H,W,3) uint8, read-only."""
    photo = read_image(path, "RGB", least=side)
    scale = side / min(photo.shape[:2])
    return resize(photo, tuple(round(length * scale) for length in photo.shape[:2])) if scale < 1 else photo


@lru_cache(maxsize=65536)
def stored_size(path):
    """(height, width) of a picture as annotations count it, from its header."""
    with open_picture(path) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return image.size if turned else image.size[::-1]


@dataclass
class Annotations:
    """What people marked in one photo."""

    photo: Path
    outlines: list  # per object a list of polygons [x, y, x, y …] in pixels of the photo as stored
    ordered: bool  # COCOA: outlines are amodal, whole where something nearer covers them, and stand from back to front


def read_annotations(path):
    """The photos of a COCO or COCOA file; photos lie beside it or in a folder of its name.

    COCO annotates instances as far as they can be seen (`segmentation`), COCOA (Zhu et al., Semantic Amodal
    Segmentation, 2017) regions as they go on beneath others (`regions`), with an `order` from 1, in front, to the back.

    Returns:
        list of Annotations, and faults: lines about photos that are not there.

    Raises:
        SceneError: no annotation file, or none of its photos is there.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        instances, regions, nameless, runs = {}, {}, 0, 0
        for annotation in content["annotations"]:
            image = annotation["image_id"]
            nameless += image not in names
            if "regions" in annotation:  # one annotation is one person's view of the whole photo
                ordered = sorted(annotation["regions"], key=lambda region: -region["order"])
                regions.setdefault(image, [_polygons(region["segmentation"]) for region in ordered])
            elif annotation.get("iscrowd"):
                continue  # no single object
            elif isinstance(annotation["segmentation"], list):
                instances.setdefault(image, []).append(_polygons(annotation["segmentation"]))
            else:
                runs += 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SceneError(f"{path}: not a COCO annotation file ({error!r})") from None
    if runs and not instances and not regions:
        raise SceneError(f"{path}: its {runs} annotations are run lengths (RLE); convert them to polygons")
    photos = [Annotations(_beside(path, names[image]), outlines, found is regions)
              for found in (instances, regions) for image, outlines in sorted(found.items()) if image in names]
    missing = [entry.photo for entry in photos if not entry.photo.is_file()]
    photos = [entry for entry in photos if entry.photo.is_file()]
    if not photos:
        raise SceneError(f"{path}: none of its photos lies in {path.parent} or {path.with_suffix('').name}/")
    faults = [f"{path}: {nameless} annotations of photos that it does not name"] if nameless else []
    faults += [f"{path}: {runs} annotations are run lengths (RLE), not read; convert them to polygons"] if runs else []
    faults += [f"{photo}: no such file, {path.name} annotates it" for photo in missing]
    return photos, faults


def _beside(path, name):
    """A photo of the annotation file `path`: beside it, or in a folder of its name."""
    inside = path.with_suffix("") / name
    return inside if inside.is_file() else path.parent / name


def _polygons(segmentation):
    """COCOA writes one polygon as a flat list."""
    flat = bool(segmentation) and not isinstance(segmentation[0], list)
    polygons = [segmentation] if flat else segmentation
    return [[float(value) for value in polygon[: len(polygon) // 2 * 2]] for polygon in polygons]
