"""Find the raw scenes of amodal completion pipelines by the names of files and folders."""

import json
import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from pathlib import Path

from amodal_fusion.data.images import IMAGE_SUFFIXES, OTHER_SUFFIXES, open_picture
from amodal_fusion.data.names import fault_of_id, is_rubbish, join_id
from amodal_fusion.errors import SceneError, message_of
from amodal_fusion.ingest.layout_table import BY_ROLES, LAYOUTS
from amodal_fusion.ingest.roles import ROLES, natural, sort_into_roles

FIELDS = {"id": r"(?P<id>.+)", "n": r"(?P<n>.+)", "d": r"(?P<d>\d+)", "dddd": r"(?P<d>\d{4})",
          "object": r"(?P<object>.+)"}


@dataclass(slots=True)
class RawCompletion:
    """Files of one completion, not read yet."""

    path: Path
    alpha: Path | None = None  # a file with its alpha
    visible: Path | None = None  # where the completer saw the object (its modal mask)
    companion: Path | None = None  # a mask beside it: alpha or modal mask, the pixels decide
    offset: tuple | None = None  # [row, column] of its upper left pixel in the photo; None: same frame
    object: str = ""  # name of the object that it shows; "" if unknown
    keep_alpha: bool = False  # its alpha is right, even if 255 everywhere: key nothing out


@dataclass(slots=True)
class RawScene:
    """Files of one scene, not read yet."""

    id: str
    folder: Path
    original: Path | None = None
    partial: Path | None = None
    mask: Path | None = None
    completions: list = field(default_factory=list)  # of RawCompletion
    notes: list = field(default_factory=list)
    layout: str = ""  # the name of its entry in the table of layouts
    no_hole: str = ""  # why the layout has no hole; "" = look at the pixels
    photo: Path | None = None  # from the folder of photos; used when the scene has no original
    masked_photo: bool = False  # the hole may be blank in its photo already


def find_raw_scenes(input_dir, photos_dir=None, unread=None, wanted=lambda _: True):
    """All raw scenes below `input_dir`, by the names of files and folders.

    A folder is read by the first entry of the table of layouts that it fits. Without one, file names tell the roles.
    The scene id is the path below `input_dir` joined by "__", because image ids repeat between classes. Hidden and
    system folders are skipped.

    Args:
        photos_dir: folder of the photos that scenes were made from, with the same names; for layouts without photos.
        unread: list, to which (folder, what is not read there) is added for pictures of other formats and for folders
            with pictures that give no scene.
        wanted: function of a scene id; other scenes are not returned, and take no memory but for their folder.

    Returns:
        list of RawScene sorted by id, and a dict of faults (unreadable folders, bad names, two scenes with one id):
        scene id or folder to message.
    """
    input_dir = Path(input_dir)
    scenes, faults, visited, leftovers, with_scenes = {}, {}, set(), set(), set()
    photos, not_read = _photos_by_stem(photos_dir), []
    for place, subfolders, names in os.walk(input_dir, followlinks=True, onerror=lambda e: faults.update(
            {str(e.filename): f"{e.filename}: {e.strerror}"})):
        folder, real = Path(place), os.path.realpath(place)
        if real in visited:  # a symbolic link to a folder above
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_rubbish(name))
        pictures = in_folder = _pictures(folder, names)
        is_extra = folder.name == "debug" and folder.parent in with_scenes
        found = []
        try:
            for layout in LAYOUTS:
                found = _scenes_of_layout(layout, folder, pictures, subfolders, input_dir, photos)
                if found:
                    subfolders[:] = [name for name in subfolders if not _belongs_to(layout, found, name)]
                    around = folder.parent.parent if folder.parent.name == layout.inner else folder.parent
                    leftovers |= {around / name for name in layout.leftovers}
                    # if names contain ids, other scenes may lie in this folder, too
                    files = _matching(folder, layout.completion, pictures, subfolders)
                    ids = tuple({fields["id"] + "_" for fields, _ in files if "id" in fields})
                    pictures = [(stem, path) for stem, path in pictures if ids and not stem.startswith(ids)]
                    break
            if pictures and not is_extra:
                found += _scenes_by_roles(folder, pictures, input_dir, photos, faults)
            if found:
                with_scenes.add(folder)
        except SceneError as error:
            faults[join_id(folder.relative_to(input_dir).parts) or str(folder)] = message_of(error)
            subfolders.clear()
        passed = found or is_extra or _is_below(folder, photos_dir)
        not_read += zip(repeat(folder), _not_read(names, in_folder, [] if passed else in_folder))
        for scene in found:
            fault = fault_of_id(scene.id)
            if fault:
                faults[scene.id] = f"{scene.folder}: {fault}"
            elif scene.id in scenes:
                other = scenes[scene.id].folder
                faults[str(scene.folder)] = f"{scene.folder}: its id {scene.id} belongs to {other}, too; rename it"
            else:
                scenes[scene.id] = scene if wanted(scene.id) else RawScene(scene.id, scene.folder)
    found = [scenes[scene_id] for scene_id in sorted(filter(wanted, scenes))
             if not _is_in(scenes[scene_id].folder, leftovers)]
    if unread is not None:
        unread += [(folder, text) for folder, text in not_read if not _is_in(folder, leftovers)]
    return found, faults


def _is_below(folder, photos_dir):
    return photos_dir is not None and _is_in(folder.resolve(), {Path(photos_dir).resolve()})


def _is_in(folder, places):
    return not places.isdisjoint({folder, *folder.parents})


def _not_read(names, pictures, without):
    """Lines about files of a folder: those of other formats, and pictures `without` a scene, [(stem, path)]."""
    stems, kinds = {stem for stem, _ in pictures}, {}
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in OTHER_SUFFIXES and not name.startswith(".") and stem not in stems:
            kinds.setdefault(suffix.lower(), []).append(name)
    for suffix, found in sorted(kinds.items()):
        yield f"{len(found)} {suffix} files, as {found[0]}; save them as PNG"
    if without:
        yield (f"{len(without)} pictures whose names have no role, or no scene around them, as {without[0][1].name}; "
               "docs/formats.md lists the names")


def _scenes_of_layout(layout, folder, pictures, subfolders, input_dir, photos):
    """The scenes of this layout in `folder`: one, or one per id in the names of completions."""
    by_id = {}
    for fields, path in _matching(folder, layout.completion, pictures, subfolders):
        if not (layout.never and re.fullmatch(layout.never, path.stem, re.IGNORECASE)):
            by_id.setdefault(fields.get("id", folder.name), []).append((fields, path))
    if not by_id or (layout.marks and not any(
            (folder / mark).is_dir() if mark.endswith("/") else _first(folder, (mark,), {"id": folder.name})
            for mark in layout.marks)):
        return []
    scenes = [_scene_of_layout(layout, folder, name, files, input_dir, photos) for name, files in by_id.items()]
    return [scene for scene in scenes if scene]


def _scene_of_layout(layout, folder, name, files, input_dir, photos):
    """The scene of the completions `files`, [(fields, path)], or None if the layout does not fit."""
    of_scene = {"id": name}
    files = sorted(files, key=lambda entry: (natural(entry[1].parent.name), natural(entry[1].stem)))
    original = _first(folder, layout.original, of_scene)
    files = [(fields | of_scene, path) for fields, path in files if path != original]
    if not files or (layout.with_alpha and not _are_layers([path for _, path in files])):
        return None
    photo = _photo_of(folder, name, photos, needed=original is None)
    if layout.wants_photo and not (original or photo):
        return None
    parts = list(folder.relative_to(input_dir).parts)
    if name != folder.name:
        parts.append(name)
    elif len(parts) > 1 and parts[-2] == layout.inner:
        del parts[-2]
    scene = RawScene(join_id(parts or [folder.name]), folder, original or photo, layout=layout.name, photo=photo,
                     partial=_first(folder, layout.partial, of_scene), mask=_first(folder, layout.mask, of_scene),
                     masked_photo=layout.masked_photo)
    scene.no_hole = "" if scene.mask or scene.partial else layout.no_hole
    background = _first(folder, (layout.background,), of_scene)
    if background:
        scene.completions.append(RawCompletion(background, object="background", keep_alpha=True))
    for fields, path in files:
        drawn = fields.get("object") or fields.get("n") or fields.get("d") or path.stem
        scene.completions.append(RawCompletion(
            path, _first(folder, (layout.alpha,), fields), _first(folder, (layout.visible,), fields),
            offset=_offset(folder, layout.offsets, drawn, fields) if layout.offsets else None,
            object="the one object" if layout.same_object else drawn, keep_alpha=layout.with_alpha))
    return scene


def _belongs_to(layout, scenes, name):
    """Whether subfolder `name` belongs to the scenes in its folder. Other subfolders may hold other scenes."""
    heads = {pattern.split("/")[0] for pattern in (layout.completion, layout.alpha, layout.visible, *layout.marks)
             if "/" in pattern and pattern[0] not in "{."}
    return (any(_regex(head).fullmatch(name) for head in heads) or
            any(completion.path.parent == scene.folder / name for scene in scenes for completion in scene.completions))


def _matching(folder, pattern, pictures, subfolders):
    """[(fields, path)] of the pictures that fit `pattern`."""
    head, _, tail = pattern.rpartition("/")
    if head:
        places = [(match.groupdict(), folder / name) for name in subfolders
                  if (match := _regex(head).fullmatch(name))]
    else:
        places = [({}, folder)]
    found, regex = [], _regex(tail)
    for fields, place in places:
        taken = {}
        try:
            beside = _pictures(place) if head else pictures
        except SceneError:
            if not head.startswith("{"):
                raise
            continue  # every folder fits such a pattern, related or not
        for stem, path in beside:
            match = regex.fullmatch(stem)
            if match and (stem not in taken or path.suffix.lower() == ".png"):  # PNG before lossy copies
                taken[stem] = (fields | match.groupdict(), path)
        found += taken.values()
    return found


@cache
def _regex(pattern):
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile("".join(FIELDS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _pictures(folder, names=None):
    """[(stem, path)] of the pictures among `names`, or of all in `folder`, sorted.

    Stems are without spaces around them and without a second suffix: comp1 .png and comp1.png.png are comp1. They are
    in one Unicode normal form, whatever systems the files come from.
    """
    try:
        names = os.listdir(folder) if names is None else names
    except OSError as error:
        raise SceneError(f"{folder}: {error.strerror}") from None
    found = []
    for name in sorted(names):
        stem, suffix = os.path.splitext(name.rstrip())
        if suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
            inner, second = os.path.splitext(stem)
            stem = (inner if second.lower() in IMAGE_SUFFIXES else stem).strip()
            found.append((unicodedata.normalize("NFC", stem), folder / name))
    return found


def _first(folder, patterns, fields):
    """The first existing file of `patterns`, PNG before other formats; None if there is none."""
    for pattern in filter(None, patterns):
        path = folder / pattern.format(**fields)
        for suffix in sorted(IMAGE_SUFFIXES, key=lambda suffix: (suffix != ".png", suffix)):
            for name in (path.name + suffix, path.name + suffix.upper()):
                if path.with_name(name).is_file():
                    return Path(os.path.normpath(path.with_name(name)))
    return None


def _are_layers(paths):
    """Whether the pictures can be layers of one picture: each has alpha, all have one size."""
    sizes = set()
    for path in paths:
        try:
            with open_picture(path) as image:
                if "A" not in image.mode and "transparency" not in image.info:
                    return False
                sizes.add(image.size)
        except SceneError:
            continue  # damaged: reading it later gives the message
    return len(sizes) == 1


def _offset(folder, pattern, name, fields):
    path = folder / pattern.format(**fields)
    if not path.is_file():
        return None
    try:
        steps = json.loads(path.read_text(encoding="utf-8")).get(name)
        return None if steps is None else (int(steps[0]), int(steps[1]))
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise SceneError(f"{path}: should map {name} to [row, column] ({error}); write it again") from None


def _scenes_by_roles(folder, pictures, input_dir, photos, faults):
    """The scenes in `folder`, by the roles in file names. Faults of a scene go to `faults`."""
    name = unicodedata.normalize("NFC", folder.name)
    scenes, groups = [], sort_into_roles(pictures, name)
    for prefix, group in groups.items():
        if not (group["partial"] or group["mask"] or group["completion"]):
            continue  # only a photo
        parts = list(folder.relative_to(input_dir).parts)
        if prefix and prefix != name:
            parts.append(prefix)
        scene = RawScene(join_id(parts or [folder.name]), folder, layout=BY_ROLES, masked_photo=True)
        for role in ROLES[:3]:
            # PNG before lossy copies, else the first name
            files = sorted(group[role], key=lambda path: (path.suffix.lower() != ".png", path.name))
            if files:
                setattr(scene, role, files[0])
            if len(files) > 1:
                scene.notes.append(f"{len(files)} files could be the {role}; used {files[0].name}")
        try:
            scene.photo = _photo_of(folder, prefix or name, photos, needed=not scene.original)
        except SceneError as error:
            faults[scene.id] = message_of(error)
            continue
        scene.original = scene.original or scene.photo
        for path in group["completion"]:
            masks = dict(group["masks"].get(path, {}))
            if "alpha" in masks and "companion" not in masks:  # the pixels decide whether it is alpha
                masks["companion"] = masks.pop("alpha")
            scene.completions.append(RawCompletion(path, **masks))
        scenes.append(scene)
    known = {path for group in groups.values() for role in ROLES for path in group[role]}
    known |= {path for group in groups.values() for masks in group["masks"].values() for path in masks.values()}
    unread = sorted(path.name for _, path in pictures if path not in known)
    if len(scenes) == 1 and scenes[0].completions and unread:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        scenes[0].notes.append(f"not read, no role in the name: {', '.join(unread[:5])}{more}")
    return scenes


def _photos_by_stem(photos_dir):
    photos = {}
    for folder, subfolders, names in os.walk(photos_dir, followlinks=False) if photos_dir else ():
        subfolders[:] = sorted(name for name in subfolders if not is_rubbish(name))
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                photos.setdefault(unicodedata.normalize("NFC", stem), []).append(Path(folder, name))
    return photos


def _photo_of(folder, stem, photos, needed):
    """The photo named `stem`. Of several, the one whose path has the most folder names in common with the scene's.

    Raises:
        SceneError: several photos fit equally well, and the photo is `needed`.
    """
    candidates = photos.get(unicodedata.normalize("NFC", stem), ())
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    around = folder.parts[:-1] if folder.name == stem else folder.parts

    def shared(path):
        pairs = zip(reversed(path.parts[:-1]), reversed(around))
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(around))

    best, second = sorted(candidates, key=shared, reverse=True)[:2]
    if shared(best) == shared(second):
        if not needed:
            return None
        raise SceneError(f"{folder}: {best} and {second} could both be its photo; sort the photos into the same "
                         "folders", "photos")
    return best
