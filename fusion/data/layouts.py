"""Scenes as amodal completion pipelines leave them, found by the names of their files and folders."""

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from fusion.data.images import IMAGE_SUFFIXES

ROLE = re.compile(
    r"(?:(?P<prefix>.+)[_\-. ])??(?:"
    r"(?P<original>original|image|gt)|(?P<partial>partial|masked|input)|(?P<mask>mask|hole)|"
    r"(?P<completion>(?:completion|comp|amodal|object|obj)s?(?P<number>[_\-. ]?\d+|[_\-. ].+)?))",
    re.IGNORECASE,
)


@dataclass
class RawCompletion:
    """Files of one completion, not read yet."""

    path: Path
    alpha: Path | None = None  # its silhouette as a picture of its own
    visible: Path | None = None  # where the completer saw the object (its modal mask)
    companion: Path | None = None  # a mask of it, by its name; which of the two, the pixels tell
    offset: tuple = (0, 0)  # row and column in the photo of the picture's upper left pixel
    object: str = ""  # what it is a sample of; "" when the layout does not say
    as_drawn: bool = False  # its own alpha holds, even where it is 255 everywhere: there is nothing to key out


@dataclass
class RawScene:
    """Files of one scene, not read yet."""

    id: str
    folder: Path
    original: Path | None = None
    partial: Path | None = None
    mask: Path | None = None
    mask_hole: str = "auto"  # the mask's value in the hole, "white" or "black", where the layout knows it
    completions: list = field(default_factory=list)  # of RawCompletion
    notes: list = field(default_factory=list)
    layout: str = ""  # the name of its entry in the table of layouts


def find_raw_scenes(input_dir):
    """All scenes below `input_dir`, by the names of their files.

    Understood are one folder per scene (original, partial, mask, comp1 …), and `<id>.jpg, <id>_partial.jpg,
    <id>_mask.png, <id>_comp1.png` in a folder each or side by side. The scene id is the path below `input_dir`
    joined by "__", because image ids repeat between classes.

    Returns:
        list of RawScene sorted by id, and a list of faults (unreadable folders, two scenes with one id).
    """
    input_dir = Path(input_dir)
    scenes, faults, visited = {}, [], set()
    for folder, subfolders, names in os.walk(input_dir, followlinks=True, onerror=lambda e: faults.append(
            f"{e.filename}: {e.strerror}")):
        real = os.path.realpath(folder)
        if real in visited:  # a symbolic link that leads back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        for scene in _scenes_of_folder(Path(folder), sorted(names), input_dir):
            if scene.id in scenes:
                faults.append(f"{scene.folder}: its id {scene.id} is also that of {scenes[scene.id].folder}; rename it")
            else:
                scenes[scene.id] = scene
    return [scenes[scene_id] for scene_id in sorted(scenes)], faults


def _scenes_of_folder(folder, names, input_dir):
    groups, plain = {}, {}
    for name in names:
        path = folder / name
        if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
            continue
        match = ROLE.fullmatch(path.stem)
        if not match:
            plain.setdefault(path.stem, []).append(path)
            continue
        prefix = match["prefix"] or ""
        of = ROLE.fullmatch(prefix)
        if (of and of["completion"]) or re.search(r"(mask|alpha)$", match["number"] or "", re.IGNORECASE):
            continue  # comp1_mask.png belongs to a completion, not to the scene
        if of and of["original"]:
            prefix = ""  # image.png, image_mask.png
        role = next(r for r in ("original", "partial", "mask", "completion") if match[r])
        group = groups.setdefault(prefix, {"original": [], "partial": [], "mask": [], "completion": []})
        group[role].append((_natural(match["number"] or ""), path))
    scenes = []
    for prefix, group in groups.items():
        stem = prefix or folder.name
        group["original"] += [("", path) for path in plain.get(stem, [])]
        if not (group["partial"] or group["mask"] or group["completion"]):
            continue  # a lone photo
        parts = list(folder.relative_to(input_dir).parts)
        if prefix and prefix != folder.name:
            parts.append(prefix)
        scene_id = unicodedata.normalize("NFC", "__".join(parts or [folder.name]))
        scene = RawScene(scene_id, folder)
        for role in ("original", "partial", "mask"):
            # PNG before lossy copies, else the first name
            files = sorted((path for _, path in group[role]), key=lambda p: (p.suffix.lower() != ".png", p.name))
            if files:
                setattr(scene, role, files[0])
            if len(files) > 1:
                scene.notes.append(f"{len(files)} files could be the {role}, took {files[0].name}")
        scene.completions = [RawCompletion(path) for _, path in sorted(group["completion"])]
        scenes.append(scene)
    return scenes


def _natural(text):
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", text)]
