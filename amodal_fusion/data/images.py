"""Read pictures of many formats as 8-bit arrays, and write PNG files."""

import io
import os
import stat
import warnings
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from amodal_fusion.errors import SceneError
from amodal_fusion.files import atomic_file

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# Files with these suffixes are reported as not read.
OTHER_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".gif", ".psd", ".psb", ".xcf", ".kra", ".tga", ".exr",
                  ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".svg", ".pdf", ".eps", ".pgm", ".ppm", ".npy",
                  ".npz"}
# Pillow would open dozens more by content, whatever the name, and run Ghostscript for EPS files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # MPO is opened as JPEG
MOST_PIXELS = 64 * 2**20  # enough for a camera; Pillow's limit of 180 megapixels takes gigabytes in float
FEW = 0.005  # share of pixels that may be transparent in an opaque picture, by a codec or a stray stroke
ORIENTATION = 0x0112  # in EXIF

turns = Image.Transpose
UPRIGHT = {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
           6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90}  # EXIF orientation → what undoes it

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MOST_PIXELS is the stricter limit
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # about odd EXIF tags; the pixels decide
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes; some programs store their workflow


def read_image(path, mode, notes=None, least=None):
    """Decode one picture completely.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF; 8 or 16 bit; RGB(A), grey, palette or CMYK. EXIF orientation is
            applied. 16 bits are scaled to 8; 16-bit files with 8- or 12-bit values are scaled by these. Colours with
            an ICC profile are converted to sRGB, except for "L"; a profile that cannot be used is ignored.
        mode: "RGB" (H,W,3), "RGBA" (H,W,4) or "L" (H,W). With "RGB", transparent pixels come out black.
        notes: list; a line is added if a 16-bit file was read as 8 or 12 bits, or colours were converted.
        least: JPEGs may be read at a half, a quarter or an eighth of their size, which is faster, as long as both
            sides have at least this many pixels. None: full size.

    Returns:
        uint8 array.

    Raises:
        SceneError: the file is missing, truncated, animated, larger than MOST_PIXELS, no picture, or a TIFF
            whose tags give its numbers a meaning that is not read.
    """
    with open_picture(path) as image:
        try:
            # An MPO of a phone is a JPEG plus a preview; other files with several frames are ambiguous.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise SceneError(f"{path}: has {image.n_frames} frames; save one of them as a PNG")
            if image.format == "TIFF":
                _check_tiff(path, image.tag_v2)
            alpha = _bmp_alpha(image, path)
            is_deep = image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in image.tile)
            if least:
                image.draft(None, (least, least))
            image.load()  # open() and verify() accept half a file, only decoding fails
            picture = _from_16_bits(image, path, notes) if is_deep else image
            picture = _in_srgb(picture, image.info.get("icc_profile"), path, notes) if mode != "L" else picture
            if alpha is not None:
                picture.putalpha(alpha)
            turn = orientation(image)
            return _to_array(picture.transpose(UPRIGHT[turn]) if turn in UPRIGHT else picture, mode)
        except SceneError:
            raise
        except Exception as error:  # decoders raise many kinds of errors for damaged data
            check_text(path, error)
            raise SceneError(f"{path}: damaged or truncated picture ({error}); write it again") from None


def open_picture(path):
    """A picture with its header read, not decoded: PIL.Image.Image, to be closed. Errors as in `read_image`."""
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # opening a pipe would wait forever
            raise SceneError(f"{path}: not a regular file; put a picture there")
        image = Image.open(path, formats=FORMATS)
        image.filename = ""  # Pillow maps files of some formats into memory, and rotated TIFFs wrongly
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
        with open(path, "rb") as file:
            start = file.read(4)
        fault = ("a TIFF of a kind that is not read; save it as a PNG" if start in (b"II*\0", b"MM\0*") else
                 f"{'not a picture (PNG, JPEG, WebP, BMP or TIFF)' if start else 'empty file'}; write it again")
        raise SceneError(f"{path}: {fault}") from None
    except SceneError:
        raise
    except Exception as error:
        check_text(path, error)
        raise SceneError(f"{path}: damaged or truncated picture ({error}); write it again") from None


def orientation(image):
    """The EXIF orientation of a picture, 1 to 8; 1 without a valid one."""
    try:
        turn = image.getexif().get(ORIENTATION)
    except Exception:  # EXIF data may be anything; the pixels decide
        return 1
    return turn if turn in UPRIGHT else 1


def check_text(path, error):
    """Raise SceneError if `error` says that a PNG has too much text."""
    if "MAX_TEXT" in str(error):
        raise SceneError(f"{path}: has more than {PngImagePlugin.MAX_TEXT_CHUNK >> 20} MiB of text beside its pixels; "
                         "save the picture without it") from None


def _bmp_alpha(image, path):
    """The alpha of a BMP with 32 bits a pixel, which Pillow ignores; None if it is 0 or 255 everywhere."""
    if image.format != "BMP" or image.tile[0].args[0] != "BGRX":
        return None
    with open(path, "rb") as file:
        file.seek(image.tile[0].offset)
        data = file.read()
    alpha = Image.frombytes("RGBA", image.size, data, "raw", "BGRA", *image.tile[0].args[1:]).getchannel("A")
    return None if alpha.getextrema() in ((0, 0), (255, 255)) else alpha


def _check_tiff(path, tags):
    """Raise SceneError for tags that give the numbers another meaning than the one they are read with."""
    extra, bits, signs = (np.atleast_1d(tags.get(*tag)) for tag in ((338, 2), (258, 1), (339, 1)))
    range_of_values = [float(value) for value in tags.get(532, ())]
    faults = {
        "an additional channel without a meaning (ExtraSamples 0)": 0 in extra,
        "separate planes (PlanarConfiguration 2) of 16 bits or premultiplied alpha":
            tags.get(284) == 2 and (max(bits) > 8 or 1 in extra),
        "signed numbers (SampleFormat 2)": 2 in signs,
        f"PhotometricInterpretation {tags.get(262)}": tags.get(262) not in (0, 1, 2, 3, 5, 6, 8),
        "a transfer function or response curve": any(number in tags for number in (291, 301, 433)),
        "inks that are not CMYK (InkSet 2)": tags.get(332, 1) != 1,
        "ReferenceBlackWhite": range_of_values not in ([], [0, 255] * 3, [0, 255, 128, 255, 128, 255]),
    }
    for fault, found in faults.items():
        if found:
            raise SceneError(f"{path}: this TIFF has {fault}, which is not read; save it as a PNG")


@lru_cache(maxsize=64)
def _profile(data):
    """What an ICC profile, bytes, says: mode of its colours, transform to sRGB (None if they are), and its name."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.ljust(4)]
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "CMYK":
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(1, -1, len(mode))
        test = Image.fromarray(colours[..., 0] if mode == "L" else colours)
        shift = np.abs(np.int16(ImageCms.applyTransform(test, transform)) - np.int16(test.convert("RGB")))
        transform = transform if shift.max() > 2 else None
    return mode, transform, ImageCms.getProfileDescription(profile).strip()


def _in_srgb(image, data, path, notes):
    """The image with its colours converted from the profile `data`, bytes, to sRGB; as it is without one."""
    if not data:
        return image
    try:
        mode, transform, name = _profile(data)
        own = image.convert("RGBA" if "transparency" in image.info else "RGB") if image.mode == "P" else image
        alpha = own.getchannel("A") if own.mode in ("RGBA", "LA") else None
        own = own.convert(own.mode[:-1]) if alpha else own
        if transform is None or own.mode != mode:
            return image
        result = ImageCms.applyTransform(own, transform)
    except Exception:  # profiles may be anything; the pixels decide
        return image
    if alpha:
        result.putalpha(alpha)
    if notes is not None and not any(f"profile {name}" in note for note in notes):
        notes.append(f"{path.name} …: colours converted from the profile {name} to sRGB")
    return result


def _from_16_bits(image, path, notes):
    """A loaded 16-bit picture → 8 bits, scaled by the bits that are used: 8, 12 or 16.

    Pillow clips 16-bit grey at 255 and drops the low bytes of colours, which hold most of 12-bit values.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        if values.max() > 65535:
            raise SceneError(f"{path}: has numbers of 32 bits, which have no defined range; save 8 or 16 bits")
        if tags.get(262) == 0:
            values = 65535 - values
    else:
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
        if values is None or values.dtype != np.uint16:
            return image
        values = values.astype(np.float32)
        if values.ndim == 3:
            values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    alpha = None
    if values.ndim == 2 and "transparency" in image.info:
        alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    if np.any(np.atleast_1d(tags.get(338, 2)) == 1):  # colours are multiplied by alpha
        values[..., :3] *= 65535 / np.maximum(values[..., 3:], 1)
    most = values.max()  # an opaque alpha shows the bits of dark colours
    bits = 8 if most <= 255 else 12 if most < 4096 else 16
    if bits != 16 and most > 1 and notes is not None:
        notes.append(f"{path.name}: {bits}-bit values in a 16-bit file, scaled accordingly")
    scaled = np.clip(values * (255 / (2**bits - 1)), 0, 255)
    picture = Image.fromarray(scaled.round().astype(np.uint8))
    if alpha is not None:
        picture.putalpha(alpha)
    return picture


def _to_array(image, mode):
    image = image.convert("LA") if image.mode == "La" else image  # not of other modes
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


def write_image(path, array, comment=None, owned=False):
    """Write uint8 (H,W), (H,W,3), (H,W,4) or uint16 (H,W) as PNG, with `comment` in its header; see `atomic_file`."""
    header = PngInfo()
    if comment:
        header.add_text("Comment", comment)
    with atomic_file(path, owned) as temporary:
        # Level 1 is several times faster than the default 6 for a few per cent more bytes.
        Image.fromarray(np.ascontiguousarray(array)).save(temporary, format="PNG", compress_level=1, pnginfo=header)


def comment_of(path):
    """The comment that `write_image` put into the header of a picture; "" if there is none."""
    with open_picture(path) as image:
        return image.info.get("Comment", "")
