"""Scenes too large to travel between processes or to be held in memory whole."""

from collections.abc import Sequence

from fusion.data.images import open_picture, read_image
from fusion.data.scenes import check_completion, check_frame, check_opaque, completion_paths, read_scene
from fusion.errors import SceneError

LARGE = 2**25  # bytes of decoded pictures


class StoredCompletions(Sequence):
    """Completions of a scene on disk, each read when it is asked for."""

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
    """Whether a scene takes more than LARGE bytes, by the header of its mask; False when there is no telling."""
    try:
        with open_picture(folder / "mask.png") as mask:
            pixels = mask.width * mask.height
        return pixels * 4 * len(completion_paths(folder)[:max_completions]) > LARGE
    except SceneError:
        return False


def read_large(folder, max_completions=None):
    """A scene whose completions stay on disk until they are asked for; see `read_scene`."""
    scene = read_scene(folder, 0)
    scene.completions = StoredCompletions(completion_paths(folder)[:max_completions], scene)
    check_opaque(folder, scene.completions)  # reads them up to the first that is not transparent
    return scene
