"""Read pictures of many formats as 8-bit arrays, and write PNG files."""

import os
import stat
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from amodal_fusion.errors import SceneError
from amodal_fusion.files import atomic_file

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# Pillow would open dozens more by content, whatever the name, and run Ghostscript for EPS files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # MPO is opened as JPEG
MOST_PIXELS = 64 * 2**20  # enough for a camera; Pillow's limit of 180 megapixels takes gigabytes in float
FEW = 0.005  # share of pixels that may be transparent in an opaque picture, by a codec or a stray stroke
ORIENTATION = 0x0112  # in EXIF

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MOST_PIXELS is the stricter limit


def read_image(path, mode, notes=None, least=None):
    """Decode one picture completely.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF; 8 or 16 bit; RGB(A), grey, palette or CMYK. EXIF orientation is
            applied. 16 bits are scaled to 8; 16-bit files with 8- or 12-bit values are scaled by these.
        mode: "RGB" (H,W,3), "RGBA" (H,W,4) or "L" (H,W). With "RGB", transparent pixels come out black.
        notes: list; a line is added if a 16-bit file was read as 8 or 12 bits.
        least: JPEGs may be read at a half, a quarter or an eighth of their size, which is faster, as long as both
            sides have at least this many pixels. None: full size.

    Returns:
        uint8 array.

    Raises:
        SceneError: the file is missing, truncated, animated, larger than MOST_PIXELS, or no picture.
    """
    with open_picture(path) as image:
        try:
            # An MPO of a phone is a JPEG plus a preview; other files with several frames are ambiguous.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise SceneError(f"{path}: has {image.n_frames} frames; save one of them as a PNG")
            is_deep = image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in image.tile)
            if least:
                image.draft(None, (least, least))
            image.load()  # open() and verify() accept half a file, only decoding fails
            picture = _from_16_bits(image, path, notes) if is_deep else image
            return _to_array(ImageOps.exif_transpose(picture), mode)
        except SceneError:
            raise
        except Exception as error:  # decoders raise many kinds of errors for damaged data
            raise SceneError(f"{path}: damaged or truncated picture ({error}); write it again") from None


def open_picture(path):
    """A picture with its header read, not decoded: PIL.Image.Image, to be closed. Errors as in `read_image`."""
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # opening a pipe would wait forever
            raise SceneError(f"{path}: not a regular file; put a picture there")
        image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            image.close()
            raise SceneError(f"{path}: {image.width}×{image.height}, more than {MOST_PIXELS >> 20} megapixels; scale "
                             "the picture down first")
        return image
    except FileNotFoundError:
        raise SceneError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise SceneError(f"{path}: {error}; scale the picture down first") from None
    except UnidentifiedImageError:
        size = os.path.getsize(path)
        raise SceneError(f"{path}: {'empty file' if size == 0 else 'not a picture (PNG, JPEG, WebP, BMP or TIFF)'}; "
                         "write it again") from None
    except SceneError:
        raise
    except Exception as error:
        raise SceneError(f"{path}: damaged or truncated picture ({error}); write it again") from None


def _from_16_bits(image, path, notes):
    """A loaded 16-bit picture → 8 bits, scaled by the bits that are used: 8, 12 or 16.

    Pillow clips 16-bit grey at 255 and drops the low bytes of colours, which hold most of 12-bit values.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
    else:
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
        if values is None or values.dtype != np.uint16:
            return image
        values = values.astype(np.float32)
        if values.ndim == 3:
            values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    most = values.max()  # an opaque alpha shows the bits of dark colours
    bits = 8 if most <= 255 else 12 if most < 4096 else 16
    if bits != 16 and most > 1 and notes is not None:
        notes.append(f"{path.name}: {bits}-bit values in a 16-bit file, scaled accordingly")
    scaled = np.clip(values * (255 / (2**bits - 1)), 0, 255)
    picture = Image.fromarray(scaled.round().astype(np.uint8))
    if ORIENTATION in image.getexif():
        picture.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
    return picture


def _to_array(image, mode):
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save 8 or 16 bits")
    if mode == "L":
        return np.asarray(image.convert("L"))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return rgba if mode == "RGBA" else np.rint(rgba[..., :3] * (rgba[..., 3:] / 255.0)).astype(np.uint8)
    return np.asarray(image.convert(mode))


def border(picture):
    """The outermost pixels of (H,W) or (H,W,C), in a row."""
    return np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])


def resize(image, size, nearest=False):
    """Scale (H,W), (H,W,3) or (H,W,4) uint8 to `size` = (height, width).

    Area filter when shrinking, bilinear when growing. RGBA is straight alpha and is filtered premultiplied, so
    that the colour of transparent pixels never bleeds into an edge. Masks need `nearest`.
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
    *colours, alpha = cv2.split(image)  # plane by plane: many times faster than numpy along a short axis
    scaled = cv2.resize(alpha.astype(np.float32), (width, height), interpolation=method)
    planes = [cv2.resize(cv2.multiply(colour, alpha, dtype=cv2.CV_32F), (width, height), interpolation=method)
              for colour in colours]
    weight = 1 / np.maximum(scaled, 1e-3)
    planes = [cv2.multiply(plane, weight, dtype=cv2.CV_8U) for plane in planes]  # rounds and clips
    return cv2.merge([*planes, cv2.multiply(scaled, 1, dtype=cv2.CV_8U)])


def write_image(path, array, comment=None):
    """Write uint8 (H,W), (H,W,3), (H,W,4) or uint16 (H,W) as PNG, atomically, with `comment` in its header."""
    header = PngInfo()
    if comment:
        header.add_text("Comment", comment)
    with atomic_file(path) as temporary:
        # Level 1 is several times faster than the default 6 for a few per cent more bytes.
        Image.fromarray(np.ascontiguousarray(array)).save(temporary, format="PNG", compress_level=1, pnginfo=header)


def comment_of(path):
    """The comment that `write_image` put into the header of a picture; "" if there is none."""
    with open_picture(path) as image:
        return image.info.get("Comment", "")
