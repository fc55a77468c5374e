"""Scenes of a prepared data set: one folder each, named and encoded one way.

    DATA/train_list.txt, val_list.txt, [test_list.txt]   one scene id per line
    DATA/dataset.yaml                                    what made it
    DATA/<id>/original.png                               RGB, the training target (may be absent at inference)
    DATA/<id>/partial.png                                RGB, the photo with the hole blanked
    DATA/<id>/mask.png                                   L, 0 or 255; 255 = hole
    DATA/<id>/comp1.png …                                RGBA, full frame, straight alpha
"""

import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fusion.data.images import read_image, resize, write_image
from fusion.errors import SceneError

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass
class Scene:
    """One scene in memory, all pictures of one size (H, W), uint8."""

    id: str
    partial: np.ndarray  # (H, W, 3), black in the hole
    mask: np.ndarray  # (H, W) bool, True = hole
    completions: list  # N × (H, W, 4), straight alpha
    original: np.ndarray | None = None  # (H, W, 3)

    def resized(self, size):
        """The scene at `size` = (height, width); nearest for the mask, premultiplied area for the rest."""
        if size == self.mask.shape:
            return self
        mask = resize(self.mask.astype(np.uint8), size, nearest=True).astype(bool)
        # the hole is transparent, not black: its blank must not darken the pixels beside it
        visible = resize(np.dstack([self.partial, np.where(self.mask, 0, 255).astype(np.uint8)]), size)
        return Scene(
            self.id,
            np.where(mask[..., None], 0, visible[..., :3]).astype(np.uint8),
            mask,
            [resize(completion, size) for completion in self.completions],
            None if self.original is None else resize(self.original, size),
        )


def completion_paths(folder):
    """comp1.png, comp2.png … comp10.png of one scene folder, in the order of their numbers."""
    numbered = [(re.fullmatch(r"comp(\d+)\.png", path.name), path) for path in Path(folder).iterdir()]
    return [path for match, path in sorted(((m, p) for m, p in numbered if m), key=lambda x: int(x[0][1]))]


def find_scenes(data_dir):
    """Ids of all folders below `data_dir` that hold a mask.png or a partial.png, sorted.

    Raises:
        SceneError: there is no such folder or it holds no scene.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise SceneError(f"{data_dir}: no such folder")
    scene_ids = sorted(
        path.name for path in data_dir.iterdir()
        if not path.name.startswith(".") and any((path / name).exists() for name in ("mask.png", "partial.png"))
    )
    if not scene_ids:
        raise SceneError(
            f"{data_dir}: no scene here (a scene is a folder with partial.png, mask.png, comp1.png …); if these are "
            f"results of a completion model, run create first: python prepare_dataset.py create --input_dir {data_dir} "
            "--output_dir DATA --img_size 256 --resize"
        )
    return scene_ids


def read_list(path, data_dir):
    """Scene ids of a list file: one per line, UTF-8 (with or without BOM), blank lines and CRLF allowed.

    Raises:
        SceneError: the list is missing or empty, names a scene twice, a path outside `data_dir`, or a scene that
            is not there; all faulty lines are named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise SceneError(
            f"{path}: no such list; write it with: python prepare_dataset.py split --data_dir {data_dir}"
        ) from None
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
            found = _existing_name(Path(data_dir), scene_id)
            if found is None:
                faults.append(f"line {number}: there is no folder {Path(data_dir) / scene_id}")
            else:
                scene_ids.append(found)
        seen.add(scene_id)
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise SceneError(f"{path}:\n  {shown}")
    if not scene_ids:
        raise SceneError(f"{path}: names no scene")
    return scene_ids


def _existing_name(data_dir, scene_id):
    # A Hangul or accented name typed on one system and stored by another differs in its Unicode normal form.
    for name in (scene_id, *(unicodedata.normalize(form, scene_id) for form in ("NFC", "NFD"))):
        if (data_dir / name).is_dir():
            return name
    return None


def read_scene(folder, max_completions=None, need_original=False):
    """Read one scene at its own size.

    Args:
        folder: DATA/<id>.
        max_completions: keep the first so many (`create` puts the most useful first); None keeps all.
        need_original: a missing original.png is an error.

    Raises:
        SceneError: files are missing or damaged (all are named), sizes differ, the mask has no hole or is inverted, a
            completion has no alpha, or all completions are transparent.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SceneError(f"{folder}: no such folder")
    try:
        paths = completion_paths(folder)
    except OSError as error:
        raise SceneError(f"{folder}: {error.strerror}; make it readable") from None
    files = [("partial.png", "RGB"), ("mask.png", "L")]
    if need_original or (folder / "original.png").exists():
        files.append(("original.png", "RGB"))
    files += [(path.name, "RGBA") for path in paths[:max_completions]]
    pictures, faults = {}, [] if paths else [f"{folder}: no completion (comp1.png …)"]
    for name, mode in files:
        try:
            pictures[name] = read_image(folder / name, mode)
        except SceneError as error:
            faults.append(str(error))
    if faults:
        raise SceneError("\n".join(faults))
    partial, mask, original = (pictures.pop(name, None) for name in ("partial.png", "mask.png", "original.png"))
    mask = mask >= 128
    paths, completions = paths[:max_completions], list(pictures.values())

    size = partial.shape[:2]
    named = [("mask.png", mask), ("original.png", original), *((p.name, c) for p, c in zip(paths, completions))]
    for name, array in named:
        if array is not None and array.shape[:2] != size:
            raise SceneError(
                f"{folder / name}: {array.shape[1]}×{array.shape[0]}, but partial.png is {size[1]}×{size[0]}; "
                "all pictures of a scene show the same frame"
            )
    if not mask.any():
        raise SceneError(f"{folder / 'mask.png'}: no hole in it (255 = hole); drop the scene or cut a hole")
    if not mask.all() and not partial[~mask].any() and partial[mask].any():
        raise SceneError(
            f"{folder / 'mask.png'}: inverted (partial.png is black where the mask says visible); "
            "255 is the hole: run prepare_dataset.py create on raw results"
        )
    for path, completion in zip(paths, completions):
        if (completion[..., 3] == 255).all() and _is_raw(completion):
            raise SceneError(f"{path}: no alpha on a white or black background; run prepare_dataset.py create on it")
    if not any(completion[..., 3].any() for completion in completions):
        raise SceneError(f"{folder}: every completion is fully transparent; drop the scene")
    partial = np.where(mask[..., None], 0, partial).astype(np.uint8)
    return Scene(folder.name, partial, mask, completions, original)


def _is_raw(completion):
    """A full-frame opaque picture whose whole border is blank: an object on a background nobody keyed out."""
    border = np.concatenate([completion[0], completion[-1], completion[:, 0], completion[:, -1]])[:, :3]
    return bool((border >= 240).all() or (border <= 8).all())


def check_scene(folder, need_original=False):
    """What `read_scene` finds wrong with a scene, or a PNG of it whose end is missing; None when all is well."""
    try:
        read_scene(folder, need_original=need_original)
    except SceneError as error:
        return str(error)
    files = [path for path in (folder / f"{name}.png" for name in ("partial", "mask", "original")) if path.exists()]
    faults = [f"{path}: truncated; write it again" for path in files + completion_paths(folder) if _is_cut_off(path)]
    return "\n".join(faults) or None


def _is_cut_off(path):
    """Whether a PNG lacks its end: decoders need not notice when no more than the last few bytes are gone."""
    with open(path, "rb") as file:
        if file.read(len(PNG_START)) != PNG_START:
            return False  # another format by the name of PNG
        file.seek(-len(PNG_END), 2)
        # some programs append data of their own after the end
        return file.read() != PNG_END and PNG_END not in path.read_bytes()


def check_scenes(data_dir, scene_ids, quiet=True):
    """Read every file of many training scenes, in threads: decoding and waiting let others run.

    A damaged file shall stop a long run before its first step, not in the middle.

    Returns:
        list of messages.
    """
    with ThreadPoolExecutor(16) as pool:
        jobs = pool.map(lambda scene_id: check_scene(Path(data_dir) / scene_id, need_original=True), scene_ids)
        return [fault for fault in tqdm(jobs, "check", len(scene_ids), disable=quiet, leave=False) if fault]


def write_scene(folder, scene):
    """Write the pictures of `scene` into the existing `folder`."""
    folder = Path(folder)
    write_image(folder / "partial.png", scene.partial)
    write_image(folder / "mask.png", scene.mask.astype(np.uint8) * 255)
    if scene.original is not None:
        write_image(folder / "original.png", scene.original)
    for number, completion in enumerate(scene.completions, 1):
        write_image(folder / f"comp{number}.png", completion)
