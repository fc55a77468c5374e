"""Names of scenes and folders: valid ids, system folders, printable text."""

import re
import unicodedata

RUBBISH = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
           "__pycache__"}
NOT_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[<>:\"|?*\\].*|.*\.", re.IGNORECASE)
LONGEST_ID = 240  # bytes; file systems allow 255, and temporary names are longer


def is_rubbish(name):
    """Whether a folder is hidden or a system folder, with copies or thumbnails."""
    return name.startswith(".") or name.lower() in RUBBISH


def join_id(parts):
    """Scene id of a path below the input folder, in Unicode normal form C."""
    return unicodedata.normalize("NFC", "__".join(parts))


def is_utf8(name):
    """Whether a file name is valid UTF-8; Python represents other bytes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def photo_of(scene_id, pattern):
    """Name of a scene's photo: the match of `pattern` (compiled, or None) at the start of its id, or its first group.

    None without a match.
    """
    match = pattern and pattern.match(scene_id)
    return match[pattern.groups and 1] or None if match else None


def fault_of_id(scene_id):
    """Why `scene_id` cannot be a folder name and a line of a list; None if it can."""
    if not is_utf8(scene_id):
        return "its name is not UTF-8; rename it"
    length = len(scene_id.encode())
    if length > LONGEST_ID:
        return (f"its id (its path, joined by __) has {length} bytes, more than {LONGEST_ID}; shorten the names "
                "or start at a folder below")
    if any(map(_breaks_lines, scene_id)):
        return "a line break or another control character in its name; rename it"
    if scene_id.startswith("."):
        return "a dot at the start of its id, as in hidden folders; rename it"
    if scene_id != scene_id.strip():
        return "a space at the start or end of its id, which a list cannot hold; rename it"
    return None


def case_twins(scene_ids):
    """Ids that differ from an earlier one only in case, {id: the earlier one}; some disks have one folder for both."""
    first, twins = {}, {}
    for scene_id in sorted(scene_ids):
        earlier = first.setdefault(scene_id.casefold(), scene_id)
        if earlier != scene_id:
            twins[scene_id] = earlier
    return twins


def print_unportable(scene_ids):
    """Print a line about ids that are one folder where case is ignored, and one about ids that Windows refuses."""
    twins, refused = case_twins(scene_ids), [name for name in sorted(scene_ids) if NOT_ON_WINDOWS.fullmatch(name)]
    if twins:
        pair = " and ".join(next(iter(twins.items())))
        print(f"note: {len(twins)} scene ids differ from another only in case, as {pair}: on disks that ignore case "
              "(Windows, macOS) both are one folder")
    if refused:
        print(f"note: {len(refused)} scene ids cannot be folders on Windows, as {refused[0]}; rename these to use "
              "the data set there")


def printable(text, kept="\n"):
    """`text` for any terminal and file: invalid UTF-8 and control characters, except `kept`, are escaped."""
    text = str(text).encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(repr(c)[1:-1] if _breaks_lines(c) and c not in kept else c for c in text)


def _breaks_lines(character):
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")
