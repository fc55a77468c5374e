"""The scene folders of a data set: written whole or not at all, and removed only where they are its own."""

import os
import re
import shutil

from fusion.data.names import is_rubbish
from fusion.data.records import TO_BE_MADE, add_record
from fusion.data.scenes import SCENE_NAMES, write_scene
from fusion.errors import ConfigError


def present(output):
    """Ids of the scenes in a data set."""
    return {path.name for path in output.iterdir()
            if not path.name.startswith(".") and os.path.isfile(path / "mask.png")}


def check_own(output, scene_ids, overwrite):
    """Raise ConfigError when a folder that may be removed is nothing that this program has made: one of `scene_ids`,
    with `overwrite` any scene's."""
    made_here = (output / "dataset.yaml").exists()
    for scene_id in sorted({*scene_ids, *(present(output) if overwrite else ())}):
        folder = output / scene_id
        if folder.is_symlink() or not folder.is_dir():
            continue
        if not made_here:
            raise ConfigError(f"{folder} is there, but no dataset.yaml beside it: this is no data set of ours, and "
                              "would be written over; choose another --output_dir")
        strange = sorted(path.name for path in folder.iterdir()
                         if not re.fullmatch(rf"({SCENE_NAMES})\.png", path.name) and not is_rubbish(path.name))
        if strange:
            raise ConfigError(f"{folder / strange[0]}: not of a data set, and would be removed with its folder; put it "
                              "elsewhere, or choose another --output_dir")


def leave_only(scene_ids, output, overwrite, sure=True):
    """With `overwrite`, remove the scenes of earlier runs that are none of these; else say that there are some.

    Args:
        sure: whether all that there is could be read; if not, it may be among what could not.
    """
    others = sorted(present(output) - set(scene_ids))
    if overwrite:
        for scene_id in others if sure else ():
            remove_scene(output / scene_id)
        for scene_id in present(output):
            add_record(output, scene_id, TO_BE_MADE)  # should this run be stopped, the next one goes on from there
    if others:
        print(f"{len(others)} scenes of earlier runs are not among them"
              + (" and were removed" if overwrite and sure else
                 " and stay, as not all could be read" if overwrite else "; --overwrite removes them")
              + f" (as {others[0]})")


def put_scene(output, scene):
    """Write a scene's folder whole or not at all."""
    folder, temporary = output / scene.id, output / f".tmp-{scene.id}"
    remove_scene(temporary)  # when the process that wrote it ended with another that was killed
    temporary.mkdir()
    write_scene(temporary, scene)
    remove_scene(folder)
    temporary.rename(folder)


def remove_scene(folder):
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def clear_leftovers(output):
    """Remove the half-written scene folders of a run that was killed."""
    for leftover in output.glob(".tmp-*"):
        shutil.rmtree(leftover)
