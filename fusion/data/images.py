"""Pictures in and out: every file format a researcher brings, 8-bit arrays inside."""

import os

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fusion.errors import SceneError
from fusion.files import atomic_file

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def read_image(path, mode, least=None):
    """Decode one picture completely.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF; 8 or 16 bit; RGB(A), grey, palette or CMYK. EXIF orientation is
            applied. 16-bit grey is scaled to 8 bits.
        mode: "RGB" (H,W,3), "RGBA" (H,W,4) or "L" (H,W). With "RGB", transparent pixels come out black.
        least: JPEGs may come at a half, a quarter or an eighth of their size, which decodes faster, while both sides
            are not below this many pixels. None: at full size.

    Returns:
        uint8 array.

    Raises:
        SceneError: the file is missing, truncated, animated, too large or no picture.
    """
    try:
        with Image.open(path) as image:
            # A phone's MPO is a JPEG with a preview behind it, everything else with frames is ambiguous.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise SceneError(f"{path}: has {image.n_frames} frames; save the one you mean as a PNG")
            if least:
                image.draft(None, (least, least))
            image.load()  # open() and verify() both accept half a file, only decoding notices
            return _to_array(ImageOps.exif_transpose(image), mode)
    except FileNotFoundError:
        raise SceneError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise SceneError(f"{path}: {error}; scale the picture down first") from None
    except UnidentifiedImageError:
        size = os.path.getsize(path)
        raise SceneError(f"{path}: {'empty file' if size == 0 else 'not a picture'}; write it again") from None
    except SceneError:
        raise
    except Exception as error:  # decoders of damaged data raise whatever they stumble over
        raise SceneError(f"{path}: damaged or truncated picture ({error}); write it again") from None


def _to_array(image, mode):
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it at 255
        grey = np.asarray(image).astype(np.float32)
        image = Image.fromarray((grey / 257 if grey.max() > 255 else grey).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save 8 or 16 bits")
    if mode == "L":
        return np.asarray(image.convert("L"))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return rgba if mode == "RGBA" else np.rint(rgba[..., :3] * (rgba[..., 3:] / 255.0)).astype(np.uint8)
    return np.asarray(image.convert(mode))


def resize(image, size, nearest=False):
    """Scale (H,W), (H,W,3) or (H,W,4) uint8 to `size` = (height, width).

    Area filter when shrinking, bilinear when growing. RGBA is straight alpha and is filtered premultiplied, so
    that the colour of transparent pixels never bleeds into an edge. Masks want `nearest`.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if nearest:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    if image.ndim == 2 or image.shape[2] == 3:
        return cv2.resize(image, (width, height), interpolation=method)
    alpha = image[..., 3:].astype(np.float32)
    premultiplied = np.concatenate([image[..., :3] * (alpha / 255), alpha], axis=2)
    premultiplied = cv2.resize(premultiplied, (width, height), interpolation=method)
    premultiplied[..., :3] *= 255 / np.maximum(premultiplied[..., 3:], 1e-3)
    return np.clip(np.rint(premultiplied), 0, 255).astype(np.uint8)


def write_image(path, array):
    """Write uint8 (H,W), (H,W,3), (H,W,4) or uint16 (H,W) as PNG, atomically."""
    with atomic_file(path) as temporary:
        # Level 1 is several times faster than the default 6 for a few per cent more bytes.
        Image.fromarray(np.ascontiguousarray(array)).save(temporary, format="PNG", compress_level=1)
