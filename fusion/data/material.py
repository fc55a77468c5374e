"""What scenes are composed of: cut-outs, photos and annotated photos, decoded seldom and kept small.

Every process keeps what it used last, in the resolutions it needed: about half a GiB at most, whatever there is.
"""

import json
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from fusion.data.images import IMAGE_SUFFIXES, read_image, resize
from fusion.errors import SceneError

SIDES = (64, 128, 256, 512)  # longer sides in which cut-outs are kept
CACHE_BYTES = 2**27  # for each of them, and for the photos
MARGIN = 2  # transparent pixels around a cut-out


def find_pictures(folder):
    """Paths of all pictures below `folder`, sorted; SceneError when there are none."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise SceneError(f"{folder}: no pictures in it")
    return files


def read_cutout(path, longer_side):
    """A cut-out, cropped to what is not transparent.

    Args:
        longer_side: in pixels, of what will be drawn; the result is not smaller, unless the file is or above 512.

    Returns:
        (H,W,4) uint8, read-only, straight alpha; with MARGIN transparent pixels around it, in which colours go on, so
        that it may be scaled and turned like any picture. None when all of it is transparent.
    """
    side = next((side for side in SIDES if side >= longer_side), SIDES[-1])
    return _CUTOUTS[side](path)


def _cutout(path, side):
    if side < SIDES[-1]:
        rgba = _CUTOUTS[2 * side](path)  # so that no file is decoded for each side anew
        rgba = None if rgba is None else rgba[MARGIN:-MARGIN, MARGIN:-MARGIN]
    else:
        rgba = read_image(path, "RGBA")
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
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return image.size if turned else image.size[::-1]
    except OSError as error:
        raise SceneError(f"{path}: {error.strerror or 'not a picture'}") from None


def annotated_photos(coco):
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
