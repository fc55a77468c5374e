"""Roles of pictures by their names: `<id>_partial.jpg`, `mask.png`, `comp3_visible.png`."""

import re
from collections import defaultdict

SEPARATOR = r"[_\-. ]"
ROLE = re.compile(
    r"(?P<original>original|image|photo|gt)|(?P<partial>partial|masked|input)|(?P<mask>mask|hole)|"
    rf"(?P<completion>(?:completion|comp|amodal|object|obj)s?(?P<number>{SEPARATOR}?\d+|{SEPARATOR}.+)?)",
    re.IGNORECASE,
)
ROLES = ("original", "partial", "mask", "completion")
# words for masks of a completion: its alpha, its modal mask, or one of the two
KINDS = {"amodal_mask": "alpha", "visible_mask": "visible", "modal_mask": "visible", "mask": "companion",
         "alpha": "alpha", "silhouette": "alpha", "visible": "visible", "modal": "visible", "depth": "", "normal": "",
         "amodal": "alpha"}  # "": not used
KIND = "|".join(KINDS).replace("_", SEPARATOR)
BESIDE = re.compile(rf"(?P<base>.+?){SEPARATOR}(?P<kind>{KIND})", re.IGNORECASE)  # comp1_mask
WITHIN = re.compile(
    rf"(?P<prefix>.*?){SEPARATOR}?(?:comp{SEPARATOR}?(?P<kind>{KIND})|"  # comp_mask_1; obj_amodal_1 is no mask
    rf"(?:completion|comp|amodal|object|obj){SEPARATOR}(?P<other>{KIND.removesuffix('|amodal')}))s?{SEPARATOR}?"
    r"(?P<number>\d+)", re.IGNORECASE)


def natural(text):
    """Sort key that puts comp2 before comp10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d+|\D+", text)]


def sort_into_roles(pictures, folder_name):
    """Sort the pictures of one folder by scene and role.

    A name is a scene id, a separator and a role; in a folder of one scene it may be the role alone. Ids may contain
    words for roles (`beach_image.jpg`, `object_0001.jpg`): the shared part of names is the id, the rest is the role.
    Two ids never become one scene.

    Args:
        pictures: list of (stem, path).

    Returns:
        dict of id ("" for the folder's own scene) to a dict of original, partial, mask, completion: lists of paths,
        completions in the order of their numbers; and masks: completion's path → {"companion", "alpha" or "visible":
        path}.
    """
    roles = _roles_of({stem for stem, _ in pictures}, folder_name)
    completions = {stem for stem, (_, role, _) in roles.items() if role == "completion"}
    numbered = _numbered(completions, roles)
    groups = defaultdict(lambda: {role: [] for role in ROLES} | {"masks": {}})
    paths, masks = {}, []
    for stem, path in pictures:
        mask = _mask_of(stem, completions, numbered)
        if mask:
            masks.append((*mask, path))
        elif stem in roles:
            scene_id, role, number = roles[stem]
            groups[scene_id][role].append((natural(number), path))
            paths.setdefault(stem, path)
    for base, kind, path in masks:
        if base in paths and kind:
            groups[roles[base][0]]["masks"].setdefault(paths[base], {}).setdefault(kind, path)
    for group in groups.values():
        for role in ROLES:
            group[role] = [path for _, path in sorted(group[role])]
    return groups


def _roles_of(stems, folder_name):
    """{stem: (scene id, role, number)} of the names that have a role."""
    readings = {stem: _readings(stem) for stem in stems}
    sharing = defaultdict(dict)  # possible id → {name: role} of its files
    for stem in stems:
        for scene_id, role, number in readings[stem]:
            if role != "completion" or number:
                sharing[scene_id][stem] = role
    owners = {scene_id: _owner(scene_id, sharing, stems, folder_name) for scene_id in list(sharing)}
    roles = {}
    for stem in stems:
        of_ids = [reading for reading in readings[stem] if owners.get(reading[0]) is not None]
        if owners.get(stem) == stem:
            roles[stem] = stem, "original", ""
        elif of_ids:
            scene_id, role, number = of_ids[-1]
            roles[stem] = owners[scene_id], role, number
        elif stem == folder_name:
            roles[stem] = "", "original", ""
    return roles


def _owner(scene_id, sharing, stems, folder_name):
    """The scene of the names that begin with `scene_id`; None if that is no id.

    `sharing` maps a possible id to {name: role} of the files it would have.
    """
    if scene_id in ("", folder_name):  # X/X_comp1.png is read as X/comp1.png, unless there are two photos
        return "" if scene_id == "" or not {"original", "partial"} & set(sharing[""].values()) else scene_id
    if not _readings(scene_id):
        return scene_id
    outer, role, _ = _readings(scene_id)[-1]
    if role == "completion":  # object_0001: an id if it has files of its own and there is no other photo
        own = set(sharing[scene_id].values()) - {"mask"}
        has_photo = (outer or folder_name) in stems or set(sharing[outer].values()) - {"completion"}
        return scene_id if own and not has_photo else None
    if role == "mask":
        return None
    # image_mask.png is the mask of image.png
    is_shared = not outer or any(stem != scene_id for stem in sharing[outer])
    return _owner(outer, sharing, stems, folder_name) if is_shared else scene_id


def _numbered(completions, roles):
    """{(scene id, number): stem} of the completions with that number; stem "" if there are several.

    object_0_mask belongs to neither of object_0_a and object_0_b; obj_mask_1 belongs to obj_1, not to obj_1_rgb.
    """
    stems_of = defaultdict(list)
    for stem in sorted(completions):
        if not _says_mask(stem):
            scene_id, _, number = roles[stem]
            stems_of[scene_id, _digits(number)].append(stem)
    return {key: next((stem for stem in stems if len(stems) == 1 or not re.search(r"\d\D", roles[stem][2])), "")
            for key, stems in stems_of.items()}


def _readings(stem):
    """Every way to read `stem` as (id, role, number), the shortest id first."""
    cuts = [("", stem)] + [(stem[: cut.start()], stem[cut.end():]) for cut in re.finditer(SEPARATOR, stem)]
    found = []
    for scene_id, rest in cuts:
        match = ROLE.fullmatch(rest)
        if match and (scene_id or rest == stem):
            found.append((scene_id, next(role for role in ROLES if match[role]), match["number"] or ""))
    return found


def _mask_of(stem, completions, numbered):
    """(stem of the completion that `stem` is a mask of, "" if it does not exist; kind of mask), or None.

    `numbered` maps (scene id, number without zeros in front) to a completion.
    """
    match = BESIDE.fullmatch(stem)
    if match and (match["base"] in completions or stem in completions):
        kind, base = _kind(match["kind"]), match["base"]
        if base in completions:
            return base, KINDS[kind]
        if kind != "amodal":
            keys = [(scene_id, _digits(number)) for scene_id, _, number in _readings(base)]
            # obj_1_mask beside obj_1_rgb
            return next((numbered[key] for key in keys if key in numbered), ""), KINDS[kind]
    match = WITHIN.fullmatch(stem)
    if match:
        base = numbered.get((match["prefix"], match["number"].lstrip("0")), "")
        return base, KINDS[_kind(match["kind"] or match["other"])]
    return None


def _says_mask(stem):
    match = BESIDE.fullmatch(stem)
    return WITHIN.fullmatch(stem) is not None or (match is not None and _kind(match["kind"]) != "amodal")


def _kind(words):
    return re.sub(SEPARATOR, "_", words.lower())


def _digits(number):
    """The first number in a completion's, without zeros in front: "1" of `_01` and of `_1_rgb`."""
    found = re.search(r"\d+", number)
    return found[0].lstrip("0") if found else ""
