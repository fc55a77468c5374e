"""Scenes of a prepared data set, one folder each.

    DATA/train_list.txt, val_list.txt, [test_list.txt]   one scene id per line
    DATA/dataset.yaml                                    how it was made
    DATA/<id>/original.png                               RGB, the training target (may be absent at inference)
    DATA/<id>/partial.png                                RGB, the photo with the hole blanked
    DATA/<id>/mask.png                                   L, 0 or 255; 255 = hole
    DATA/<id>/comp1.png …                                RGBA, full frame, straight alpha
    DATA/<id>/comp1_visible.png …                        optional, L, 255 = where the completer saw this object, its
                                                         modal mask
    DATA/<id>/scene.json                                 optional, {"sources": {"comp1.png": "comp4.png"}}: the files
                                                         that the completions were made from
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from amodal_fusion.data.images import FEW, border, comment_of, open_picture, read_image, resize, write_image
from amodal_fusion.data.names import printable
from amodal_fusion.errors import ConfigError, SceneError
from amodal_fusion.files import write_text

# Stands in the header of a prepared completion: its alpha is final. A completed background may have a flat border, and
# then its pixels look like a raw result with a background to key out.
ALPHA_HOLDS = "straight alpha"


@dataclass
class Scene:
    """One scene in memory, all pictures of one size (H, W), uint8."""

    id: str
    partial: np.ndarray  # (H, W, 3), black in the hole
    mask: np.ndarray  # (H, W) bool, True = hole
    completions: list  # N × (H, W, 4), straight alpha
    original: np.ndarray | None = None  # (H, W, 3)
    visible: list | None = None  # N × (H, W) bool or None, modal masks; None if absent or not read
    numbers: list | None = None  # N numbers of the files comp1.png …, ascending; None: 1 … N
    sources: list | None = None  # N names of the files that the completions were made from; None: not known

    def numbered(self):
        """Number of each completion, as in its file name."""
        return self.numbers or list(range(1, len(self.completions) + 1))

    def source_names(self):
        """Name of each completion as the user knows it: the file that it was made from, without suffix."""
        sources = self.sources or [None] * len(self.completions)
        return [stem_of(source) if source else f"comp{number}" for number, source in zip(self.numbered(), sources)]

    def resized(self, size):
        """The scene at `size` = (height, width); nearest for the mask, premultiplied area for the rest."""
        if size == self.mask.shape:
            return self
        mask = resize(self.mask.astype(np.uint8), size, nearest=True).astype(bool)
        # as a transparent hole: black must not darken the pixels beside it
        visible = resize(np.dstack([self.partial, np.where(self.mask, 0, 255).astype(np.uint8)]), size)
        return replace(
            self, mask=mask,
            partial=np.where(mask[..., None], 0, visible[..., :3]).astype(np.uint8),
            completions=[resize(completion, size) for completion in self.completions],
            original=None if self.original is None else resize(self.original, size),
            visible=None if self.visible is None else [
                None if modal is None else resize(modal.astype(np.uint8), size, nearest=True) > 0
                for modal in self.visible])


SOURCES = "scene.json"
SCENE_NAMES = r"comp\d+|comp\d+_visible|original|partial|mask"  # names of a scene's files, without .png


def completion_paths(folder):
    """comp1.png, comp2.png … comp10.png of one scene folder, in the order of their numbers."""
    numbered = [(re.fullmatch(r"comp(\d+)\.png", path.name), path) for path in Path(folder).iterdir()]
    return [path for match, path in sorted(((m, p) for m, p in numbered if m), key=lambda x: int(x[0][1]))]


def numbers_of(paths):
    """[comp1.png, comp4.png] → [1, 4].

    1 … N where comp0.png, or comp01.png beside comp1.png, leave no number for each.
    """
    numbers = [int(path.stem.removeprefix("comp")) for path in paths]
    return numbers if len({0, *numbers}) > len(numbers) else list(range(1, len(paths) + 1))


def stem_of(source):
    """parts/comp4.png → parts/comp4."""
    return str(PurePosixPath(source).with_suffix(""))


def sources_of(folder, paths):
    """The files that the completions at `paths` were made from, by `folder`/scene.json; None where it says nothing.

    Raises:
        SceneError: the file cannot be read.
    """
    try:
        content = json.loads((Path(folder) / SOURCES).read_text(encoding="utf-8"))
        sources = content["sources"]
        return [str(sources[path.name]) if path.name in sources else None for path in paths]
    except (FileNotFoundError, KeyError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise SceneError(f"{folder}/{SOURCES}: cannot be read ({error}); remove it, completions then have their own "
                         "names") from None


def modal_path(path):
    """comp1.png → comp1_visible.png."""
    return path.with_name(f"{path.stem}_visible.png")


def find_scenes(data_dir):
    """Ids of all folders below `data_dir` that hold a mask.png or a partial.png, sorted.

    Raises:
        ConfigError: there is no such folder. SceneError: it holds no scene.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ConfigError(f"{data_dir}: no such folder", "data_dir")
    scene_ids = sorted(
        path.name for path in data_dir.iterdir()
        if not path.name.startswith(".") and any(_may_hold(path, name) for name in ("mask.png", "partial.png"))
    )
    if not scene_ids:
        message = (f"{data_dir}: no scene here (a scene is a folder with partial.png, mask.png, comp1.png …); if these "
                   "are results of a completion model, run create first: python prepare_dataset.py create")
        raise SceneError(message, terminal=f"{message} --input_dir {data_dir} --output_dir DATA --img_size 256 "
                                           "--resize")
    return scene_ids


def _may_hold(folder, name):
    """Whether the file exists. Also true without permission, which reading the scene then reports."""
    try:
        return (folder / name).exists()
    except OSError:
        return True


def read_list(path, data_dir, packed=None):
    """Scene ids of a list file: one per line, UTF-8 (with or without BOM), blank lines and CRLF allowed.

    Args:
        packed: the scene ids of `data_dir` when it is a packed set; None: it has a folder for each.

    Raises:
        SceneError: the list is missing or empty, names a scene twice, a path outside `data_dir`, or a scene that
            is not there; all faulty lines are named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        find_scenes(data_dir)  # raw results have no list to be written yet
        message = (f"{path}: no such list, seen from the current folder. The lists of a data set are written by: "
                   "python prepare_dataset.py split")
        raise SceneError(message, terminal=f"{message} --data_dir {data_dir}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SceneError(f"{path}: not a readable UTF-8 list ({error})") from None
    faults, scene_ids, seen = [], [], set()
    for number, line in enumerate(lines, 1):
        scene_id = line.strip()
        if not scene_id:
            continue
        if scene_id in seen:
            faults.append(f"line {number}: {scene_id!r} is listed twice")
        elif "/" in scene_id or "\\" in scene_id or scene_id in (".", ".."):
            faults.append(f"line {number}: {scene_id!r} is a path; a scene id is the name of a folder in {data_dir}")
        else:
            found = _existing_name(Path(data_dir), scene_id, packed)
            if found is None:
                faults.append(f"line {number}: there is no folder {Path(data_dir) / scene_id}" if packed is None else
                              f"line {number}: no scene {scene_id!r} in the packed set {data_dir}")
            else:
                scene_ids.append(found)
        seen.add(scene_id)
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise SceneError(f"{path}:\n  {shown}")
    if not scene_ids:
        message = f"{path}: names no scene; add ids, one per line, or write it again: python prepare_dataset.py split"
        raise SceneError(message, terminal=f"{message} --data_dir {data_dir}")
    return scene_ids


def _existing_name(data_dir, scene_id, packed):
    # A Hangul or accented name typed on one system and stored by another differs in its Unicode normal form.
    for name in (scene_id, *(unicodedata.normalize(form, scene_id) for form in ("NFC", "NFD"))):
        if (data_dir / name).is_dir() if packed is None else name in packed:
            return name
    return None


def read_scene(folder, max_completions=None, need_original=False, with_visible=False):
    """Read one scene at its own size.

    Args:
        folder: DATA/<id>.
        max_completions: number to read (`create` puts the most useful first); None reads all, 0 none.
        need_original: a missing original.png is an error.
        with_visible: read the modal masks as well.

    Raises:
        SceneError: files are missing or damaged (all are named), sizes differ, the mask has no hole or is inverted, a
            completion has no alpha, or all completions are transparent.
    """
    scene = read_files(folder, max_completions, need_original, with_visible)
    scene.partial = np.where(scene.mask[..., None], 0, scene.partial).astype(np.uint8)
    return scene


def read_files(folder, max_completions=None, need_original=False, with_visible=False):
    """As `read_scene`, but the partial image is not blanked in the hole."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SceneError(f"{folder}: no such folder")
    try:
        paths = completion_paths(folder)
    except OSError as error:
        raise SceneError(f"{folder}: {error.strerror}; make it readable") from None
    faults = [] if paths else [f"{folder}: no completion (comp1.png …)"]
    paths = paths[:max_completions]
    files = [("partial.png", "RGB"), ("mask.png", "L")]
    if need_original or (folder / "original.png").exists():
        files.append(("original.png", "RGB"))
    files += [(path.name, "RGBA") for path in paths]
    modal = [modal_path(path).name for path in paths if with_visible and modal_path(path).exists()]
    files += [(name, "L") for name in modal]
    pictures = _read_all(folder, files, faults)
    partial, mask = pictures["partial.png"], pictures["mask.png"] >= 128
    completions = [pictures[path.name] for path in paths]
    _check_mask(folder / "mask.png", mask, partial)
    for path, completion in zip(paths, completions):
        try:
            check_completion(path, completion, partial, mask)
        except SceneError as error:
            faults.append(str(error))
    if faults:
        raise SceneError("\n".join(faults))
    if max_completions != 0:
        check_opaque(folder, completions)
    visible = [pictures[name] >= 128 if (name := modal_path(path).name) in modal else None for path in paths]
    return Scene(folder.name, partial, mask, completions, pictures.get("original.png"), visible if modal else None,
                 numbers_of(paths), sources_of(folder, paths))


def _read_all(folder, files, faults):
    """{name: picture} of `files`, [(name, mode)], all of one size. Raises SceneError with `faults` and new ones."""
    pictures = {}
    for name, mode in files:
        try:
            pictures[name] = read_image(folder / name, mode)
        except SceneError as error:
            faults.append(str(error))
    if faults:
        raise SceneError("\n".join(faults))
    size = pictures["partial.png"].shape[:2]
    for name, picture in pictures.items():
        check_frame(folder / name, picture, size)
    return pictures


def _check_mask(path, mask, partial):
    """Raise SceneError if the mask (H,W) bool has no hole, or is inverted by the partial image."""
    if not mask.any():
        raise SceneError(f"{path}: no hole in it (255 = hole); drop the scene or cut a hole")
    if not mask.all() and not partial[~mask].any() and partial[mask].any():
        raise SceneError(f"{path}: inverted (partial.png is black where the mask says visible); 255 is the hole: run "
                         "prepare_dataset.py create on raw results")


def check_frame(path, picture, size):
    """Raise SceneError unless the picture of file `path` has the `size`, (height, width), of partial.png."""
    if picture.shape[:2] != size:
        raise SceneError(f"{path}: {picture.shape[1]}×{picture.shape[0]}, but partial.png is {size[1]}×{size[0]}; "
                         "all pictures of a scene must show the same frame")


def check_opaque(folder, completions):
    """Raise SceneError if all completions of a scene are transparent."""
    if not any(completion[..., 3].any() for completion in completions):
        raise SceneError(f"{folder}: every completion is fully transparent; drop the scene")


def check_completion(path, completion, partial, mask):
    """Raise SceneError if a completion's alpha is obviously wrong.

    Args:
        path: its file; completion (H,W,4), partial (H,W,3), mask (H,W) bool, of one size.
    """
    check_alpha(path, completion)
    if _is_raw(completion, partial, mask) and comment_of(path) != ALPHA_HOLDS:
        raise SceneError(f"{path}: no alpha, on a flat background; run prepare_dataset.py create on it")


def check_alpha(name, completion):
    """Raise SceneError if the alpha of the picture `name`, (H,W,4), has values 0 and 1."""
    if completion[..., 3].max() == 1:
        raise SceneError(f"{name}: alpha is 0 or 1, but 255 is opaque; multiply it by 255")


def _is_raw(completion, partial, mask):
    """Whether the background is not keyed out: an opaque picture with a flat border where the photo has none."""
    if np.count_nonzero(completion[..., 3] < 250) > FEW * mask.size:
        return False
    edge, photo, hole = (border(picture) for picture in (completion, partial, mask))
    edge = edge[:, :3].astype(np.int16)
    colour = np.median(edge, 0)
    if (np.abs(edge - colour).max(1) > 20).mean() > 0.02:
        return False
    if not hole.all() and (np.abs(edge - photo)[~hole].max(1) <= 40).mean() >= 0.8:
        return False
    if hole.all() or np.abs(completion[..., :3] - colour).max() <= 20:  # no object on it: an empty background
        return bool(edge.min() >= 240 or edge.max() <= 8)
    return True


def write_scene(folder, scene):
    """Write the pictures of `scene` into the existing `folder`."""
    folder = Path(folder)
    write_image(folder / "partial.png", scene.partial)
    write_image(folder / "mask.png", scene.mask.astype(np.uint8) * 255)
    if scene.original is not None:
        write_image(folder / "original.png", scene.original)
    paths = [folder / f"comp{number}.png" for number in scene.numbered()]
    for slot, (path, completion) in enumerate(zip(paths, scene.completions)):
        write_image(path, completion, ALPHA_HOLDS)
        if scene.visible is not None and scene.visible[slot] is not None:
            write_image(modal_path(path), scene.visible[slot].astype(np.uint8) * 255)
    if scene.sources is not None:
        sources = {path.name: printable(source, "") for path, source in zip(paths, scene.sources)}
        write_text(folder / SOURCES, json.dumps({"sources": sources}, ensure_ascii=False, indent=1) + "\n")


LARGE = 2**25  # bytes of decoded pictures


class StoredCompletions(Sequence):
    """Completions of a scene on disk, each read on access."""

    def __init__(self, paths, scene):
        self.paths, self.partial, self.mask = paths, scene.partial, scene.mask

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        completion = read_image(self.paths[index], "RGBA")
        check_frame(self.paths[index], completion, self.mask.shape)
        check_completion(self.paths[index], completion, self.partial, self.mask)
        return completion


def is_large(folder, max_completions=None):
    """Whether a scene takes more than LARGE bytes, by the header of its mask; False if that is unreadable."""
    try:
        with open_picture(folder / "mask.png") as mask:
            pixels = mask.width * mask.height
        return pixels * 4 * len(completion_paths(folder)[:max_completions]) > LARGE
    except SceneError:
        return False


def read_large(folder, max_completions=None):
    """As `read_scene`, but completions stay on disk until they are used."""
    scene = read_scene(folder, 0)
    paths = completion_paths(folder)[:max_completions]
    scene.completions = StoredCompletions(paths, scene)
    scene.numbers, scene.sources = numbers_of(paths), sources_of(folder, paths)
    check_opaque(folder, scene.completions)  # reads them up to the first that is not transparent
    return scene
