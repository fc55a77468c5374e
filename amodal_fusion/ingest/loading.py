"""Read the files of a raw scene into one frame: photo, partial image, mask, completions and their masks."""

from dataclasses import dataclass, field

import cv2
import numpy as np

from amodal_fusion.data.consistency import alike, largest
from amodal_fusion.data.images import FEW, border, read_image, resize
from amodal_fusion.errors import SceneError
from amodal_fusion.ingest.matting import cut_out, is_silhouette, masks_beside, with_silhouette

ALIKE = 12  # levels; copies of one photo agree within them, after JPEG and resizing


@dataclass
class RawPictures:
    """The pictures of a raw scene, all in one frame (H, W); None where there is no file.

    `faults` are SceneErrors that make the scene bad, `notes` are lines for the user.
    """

    original: np.ndarray | None = None  # (H, W, 3)
    partial: np.ndarray | None = None  # (H, W, 3)
    mask: np.ndarray | None = None  # (H, W) uint8; which value is the hole is decided later
    erased: np.ndarray | None = None  # (H, W) bool, where the photo or partial image is transparent
    mask_is_photo: bool = False  # the mask is the photo with the hole erased from its alpha
    files: list = field(default_factory=list)  # N × RawCompletion
    completions: list = field(default_factory=list)  # N × (H, W, 4), straight alpha
    visible: list = field(default_factory=list)  # N × (H, W) bool or None: modal masks
    scaled: bool = False  # completions came in another size
    kinds: list = field(default_factory=list)  # N × source of the alpha, see `cut_out`
    faults: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def read_pictures(raw, background="auto"):
    """Read all files of a RawScene.

    Args:
        raw: RawScene; background: of completions without alpha, see `key_background`.

    Returns:
        RawPictures. Its `faults` hold what is wrong with the files; no error is raised.
    """
    pictures = RawPictures(notes=list(raw.notes))
    original, partial, mask = (_read(pictures, read_image, path, "RGBA")
                               for path in (raw.original, raw.partial, raw.mask))
    _note_missing_files(raw, pictures)
    canvases = [_read_completion(files, background, pictures) for files in raw.completions]
    _decide_companions(canvases, raw.completions, pictures.notes)
    if original is None and partial is None:
        return pictures

    original, mask = _cropped_alike(original, partial, mask, canvases, raw, pictures)
    size = partial.shape[:2] if partial is not None else original.shape[:2]
    original = same_frame(original, size, raw.original, pictures)
    mask = same_frame(mask, size, raw.mask, pictures, nearest=True)
    photo = original if original is not None else partial
    for canvas, files in zip(canvases, raw.completions):
        if canvas is not None:
            if background == "auto":
                _keep_background(canvas, files, photo, pictures)
            _add_completion(canvas, files, size, pictures)
    _compare_sizes(canvases, raw, size, pictures)

    for role, picture in (("original", original), ("partial", partial)):
        if picture is not None:
            setattr(pictures, role, _on_black(picture))
    shown = partial if partial is not None else original
    if shown is not None and np.count_nonzero(shown[..., 3] < 128) > FEW * shown[..., 3].size:
        pictures.erased = shown[..., 3] < 128
    if mask is not None:
        pictures.mask, pictures.mask_is_photo = as_mask(mask)
    return pictures


def _read(pictures, function, path, *arguments):
    """The result of `function` for `path`; None without a path, or if the file has a fault, which is recorded."""
    try:
        return None if path is None else function(path, *arguments, notes=pictures.notes)
    except SceneError as error:
        pictures.faults.append(error)
        return None


def _note_missing_files(raw, pictures):
    if raw.original is None and raw.partial is None:
        pictures.faults.append(SceneError(f"{raw.folder}: neither a photo nor a partial image of {raw.id}; if its "
                                          "photo lies elsewhere, name the folder", "photos"))
    if not raw.completions:
        pictures.faults.append(SceneError(f"{raw.folder}: no completions of {raw.id} (comp1.png …)"))
    if raw.mask is None and raw.partial is not None:
        pictures.notes.append("no mask")


def _keep_background(canvas, files, photo, pictures):
    """Undo the matting if the completion is a completed background."""
    if files.offset is None and _is_background(canvas, photo):
        canvas.picture, canvas.kind = cv2.cvtColor(canvas.rgb, cv2.COLOR_RGB2RGBA), "opaque"
        pictures.notes.append(f"{files.path.name}: kept whole, as a completed background, because its border shows "
                              "the photo; --background white or black keys it out")


def _add_completion(canvas, files, size, pictures):
    """Append a completion and its modal mask to `pictures`, both in the photo's frame of `size`."""
    if files.offset is not None:
        picture = placed(canvas.picture, files.offset, size)
        visible = None if canvas.visible is None else placed(canvas.visible, files.offset, size)
    else:
        picture = same_frame(canvas.picture, size, files.path, pictures)
        visible = None if canvas.visible is None else resize(canvas.visible, size, nearest=True)
    if picture is None:
        return
    visible = None if visible is None else visible > 127
    if visible is not None and (picture[visible][:, 3] > 0).sum() <= 0.5 * np.count_nonzero(visible):
        if visible.any():
            pictures.notes.append(f"the modal mask of {files.path.name} does not cover what it shows, ignored")
        visible = None
    pictures.files.append(files)
    pictures.completions.append(picture)
    pictures.visible.append(visible)
    pictures.kinds.append(canvas.kind)


def _compare_sizes(canvases, raw, size, pictures):
    """Record whether completions have another size than the photo. Several other sizes are a fault."""
    sizes = {canvas.rgb.shape[:2] for canvas, files in zip(canvases, raw.completions)
             if canvas is not None and files.offset is None and _same_aspect(canvas.rgb.shape, size)}
    pictures.scaled = bool(sizes - {size})
    if len(sizes - {size}) > 1:
        pictures.faults.append(SceneError(f"{raw.folder}: completions of {len(sizes)} sizes, are they crops of the "
                                          "objects? Paste each into the photo's frame"))


def _is_background(canvas, photo):
    """Whether the region that was keyed out belongs to the photo, such as the sky of a completed background.

    A flat background lies all around an object, a sky only along a part of the border.
    """
    keyed = canvas.kind in ("white", "black") or canvas.kind.startswith("#")
    if not keyed or photo is None or canvas.rgb.shape[:2] != photo.shape[:2]:
        return False
    out = canvas.picture[..., 3] < 128
    if not out.any() or out.all() or border(out).mean() >= 0.9:
        return False
    shown = alike(canvas.rgb, photo[..., :3])
    return bool(shown[out].mean() > 0.85 and shown[~out].mean() > 0.5)


def as_mask(rgba):
    """A mask file's pixels (H,W,4) → (H,W) uint8, and whether it is a photo with the hole erased from its alpha.

    Values of 0 and 1 count as 0 and 255. Transparency, if any, is the mask: strokes on an empty canvas, or a photo with
    the hole erased.
    """
    alpha = cv2.extractChannel(rgba, 3)
    if np.count_nonzero(alpha < 128) > FEW * alpha.size and (alpha >= 128).any():
        strokes = rgba[alpha >= 128][:, :3]
        return alpha, bool(strokes.astype(np.float32).std(0).max() > 16)
    grey = cv2.cvtColor(rgba, cv2.COLOR_RGBA2GRAY)
    return (grey * np.uint8(255) if grey.max() == 1 else grey), False


@dataclass
class _Canvas:
    """A completion on its own canvas."""

    rgb: np.ndarray  # (h, w, 3) as in the file
    picture: np.ndarray  # (h, w, 4), cut out
    kind: str
    visible: np.ndarray | None  # (h, w) uint8
    companion: np.ndarray | None


def _read_completion(files, background, pictures):
    """The files of a RawCompletion → _Canvas, or None when the picture cannot be read."""
    rgba = _read(pictures, read_image, files.path, "RGBA")
    masks = [_read(pictures, _read_mask, path, files, rgba) for path in (files.alpha, files.visible, files.companion)]
    if rgba is None:
        return None
    alpha, visible, companion = masks
    rgb = rgba[..., :3]
    picture, kind = cut_out(rgba, "opaque" if files.keep_alpha else background)
    if alpha is not None:
        picture, kind = with_silhouette(rgb, picture, kind, alpha), "mask beside it"
    elif companion is None and kind not in ("alpha", "premultiplied alpha") and is_silhouette(picture):
        kind = "silhouette"
    return _Canvas(rgb, picture, kind, visible, companion)


def _read_mask(path, files, rgba, notes):
    picture = read_image(path, "RGBA", notes)
    mask, _ = as_mask(picture)
    colourful = np.ptp(picture[..., :3], axis=2) > 32
    if colourful.mean() > 0.05 and len(np.unique(mask)) > 32:
        notes.append(f"{path.name} beside {files.path.name} is a photo and no mask, ignored")
        return None
    if rgba is None or mask.shape == rgba.shape[:2]:
        return mask
    size = rgba.shape[:2]
    if files.offset is not None:  # the mask has the photo's frame
        return placed(mask, tuple(-step for step in files.offset), size)
    if _same_aspect(mask.shape, size):
        return resize(mask, size)
    raise SceneError(f"{path}: {mask.shape[1]}×{mask.shape[0]}, but {files.path.name} is {size[1]}×{size[0]}; a mask "
                     "must have the size of its completion")


def _decide_companions(canvases, files, notes):
    """Decide whether the companions of a scene's completions are alpha or modal masks, and use them so."""
    found = [(canvas, raw) for canvas, raw in zip(canvases, files) if canvas is not None
             and canvas.companion is not None]
    if not found:
        return
    drawn = [None if canvas.kind in ("opaque", "checkerboard") else canvas.picture[..., 3] > 127 for canvas, _ in found]
    name = found[0][1].companion.name
    shown = [(drawing, canvas.companion > 127) for drawing, (canvas, _) in zip(drawn, found) if drawing is not None]
    if shown and all((drawing & mask).sum() < 0.1 * drawing.sum() and mask.mean() > 0.5 for drawing, mask in shown):
        notes.append(f"{name} …: inverted, black is the object")
        for canvas, _ in found:
            canvas.companion = 255 - canvas.companion
    use, share = masks_beside(drawn, [canvas.companion > 127 for canvas, _ in found])
    if use == "modal":
        notes.append(f"{name} …: modal masks, {share:.0%} of the completions lies outside of them")
    elif use == "alpha":
        notes.append(f"{name} …: alpha, they contain the completions")
    else:
        if all(mask.mean() > 128 and border(mask).mean() > 200 for mask in (canvas.companion for canvas, _ in found)):
            raise SceneError(f"{name} …: white nearly everywhere, are these masks inverted? White must be the object; "
                             "the completions have no flat background to check it with")
        notes.append(f"{name} …: taken as alpha; the completions have no flat background to check it with")
    for canvas, _ in found:
        if use == "modal":
            canvas.visible = canvas.companion
        elif canvas.kind not in ("alpha", "premultiplied alpha"):
            canvas.picture = with_silhouette(canvas.rgb, canvas.picture, canvas.kind, canvas.companion)
            canvas.kind = "mask beside it"


def placed(picture, offset, size):
    """A picture on an empty frame of `size`, its upper left pixel at `offset` = (row, column); the rest is cropped."""
    frame = np.zeros((*size, *picture.shape[2:]), picture.dtype)
    (top, left), (height, width) = offset, picture.shape[:2]
    rows, columns = (slice(max(0, start), min(end, start + length))
                     for start, length, end in ((top, height, size[0]), (left, width, size[1])))
    if rows.start < rows.stop and columns.start < columns.stop:
        frame[rows, columns] = picture[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return frame


def _same_aspect(shape, size):
    return abs(shape[0] * size[1] - shape[1] * size[0]) <= 0.01 * shape[0] * size[1]


def same_frame(picture, size, path, pictures, nearest=False):
    """Scale a picture of the same aspect to `size`; another aspect is a fault."""
    if picture is None or picture.shape[:2] == size:
        return picture
    height, width = picture.shape[:2]
    if not _same_aspect((height, width), size):
        pictures.faults.append(SceneError(f"{path}: {width}×{height}, but the scene is {size[1]}×{size[0]}; all "
                                          "pictures of a scene must show the same frame"))
        return None
    pictures.notes.append(f"{path.name} scaled from {width}×{height} to {size[1]}×{size[0]}")
    return resize(picture, size, nearest)


def _cropped_alike(original, partial, mask, canvases, raw, pictures):
    """The photo and its mask, cropped or squeezed as the partial image was, or else the completions.

    Models for square images crop the middle of a photo or squeeze it. The pixels decide which of the two it was. The
    photo and its mask stay unchanged if neither fits, or if another picture has the photo's aspect.
    """
    shown = [partial] if partial is not None else [canvas.picture for canvas in canvases if canvas is not None]
    if not shown or original is None or any(_same_aspect(picture.shape, original.shape) for picture in shown) or any(
            files.offset is not None for files in raw.completions):
        return original, mask
    size, (height, width) = shown[0].shape[:2], original.shape[:2]
    side = min(height / size[0], width / size[1])
    crop_size = tuple(max(1, round(side * length)) for length in size)
    top, left = ((whole - part) // 2 for whole, part in zip((height, width), crop_size))
    middle = np.s_[top : top + crop_size[0], left : left + crop_size[1]]
    ways = {"cropped to its middle": original[middle], "squeezed": original}

    small = tuple(max(1, round(length * min(1, 128 / max(size)))) for length in size)
    shown = [resize(picture, small) for picture in shown]

    def distance(picture):  # to the nearest picture at each pixel; the hole is less than 60 % of the photo
        picture, nearest = resize(picture, small)[..., :3], np.full(small, 255, np.uint8)
        for other in shown:
            difference = largest(cv2.absdiff(other[..., :3], picture))
            nearest = np.where(other[..., 3] > 200, np.minimum(nearest, difference), nearest)
        return np.percentile(nearest[nearest < 255], 40) if (nearest < 255).any() else 255

    distances = {way: distance(picture) for way, picture in ways.items()}
    best, other = sorted(distances, key=distances.get)
    if distances[best] > ALIKE or distances[best] > 0.7 * distances[other]:
        return original, mask
    witness = "completions show" if raw.partial is None else f"{raw.partial.name} shows"
    pictures.notes.append(f"{raw.original.name}: {best}, as {witness} it")
    if mask is not None and mask.shape[:2] == (height, width):
        mask = resize(mask[middle] if best != "squeezed" else mask, size, nearest=True)
    return resize(ways[best], size), mask


def _on_black(rgba):
    if rgba[..., 3].min() == 255:
        return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    return np.rint(rgba[..., :3] * (rgba[..., 3:] / 255.0)).astype(np.uint8)
