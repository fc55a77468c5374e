"""Names of scenes and folders: which are valid, which belong to the system, how to print any of them."""

import unicodedata

RUBBISH = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
           "__pycache__"}
LONGEST_ID = 240  # bytes; file systems end at 255, and a scene that is being written has a longer name for a while


def is_rubbish(name):
    """Whether a folder is hidden or one that systems and programs make for themselves, copies and thumbnails in it."""
    return name.startswith(".") or name.lower() in RUBBISH


def join_id(parts):
    """Scene id of a path below the input folder, in the normal form in which it is listed."""
    return unicodedata.normalize("NFC", "__".join(parts))


def is_utf8(name):
    """Whether a file's name can be written into UTF-8 text; Python lets other bytes pass as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def photo_of(scene_id, pattern):
    """Name of a scene's photo: what `pattern` (compiled, or None) finds at the start of its id, or its first group.

    None when that is nothing.
    """
    match = pattern and pattern.match(scene_id)
    return match[pattern.groups and 1] or None if match else None


def fault_of_id(scene_id):
    """What keeps `scene_id` from being a folder and a line of a list; None when nothing does."""
    if not is_utf8(scene_id):
        return "its name is not UTF-8; rename it"
    length = len(scene_id.encode())
    if length > LONGEST_ID:
        return (f"its id, the path to it joined by __, has {length} bytes, more than {LONGEST_ID}; shorten the names "
                "or start at a folder below")
    if any(map(_breaks_lines, scene_id)):
        return "a line break or another control character in its name; rename it"
    if scene_id.startswith("."):
        return "a dot at the start of its id, as hidden folders have; rename it"
    if scene_id != scene_id.strip():
        return "a space at the start or end of its id, which no list can hold; rename it"
    return None


def printable(text, kept="\n"):
    """`text` as any terminal and file takes it: bytes that are no UTF-8 and control characters escaped, but `kept`."""
    text = str(text).encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(repr(c)[1:-1] if _breaks_lines(c) and c not in kept else c for c in text)


def _breaks_lines(character):
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")
