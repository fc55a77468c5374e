"""From the files of a scene to the network's input; runs in helper processes."""

import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from amodal_fusion.data.scenes import is_large, read_large, read_scene
from amodal_fusion.data.tensors import distinct
from amodal_fusion.output.records import input_digest

# The network needs about 250 bytes per candidate pixel. It sees scenes with more of them smaller.
MOST_CANDIDATE_PIXELS = 2_400_000


@dataclass
class SceneReader:
    """Reads scenes in helper processes: (scene at the network's size, scene at its own size, digest of its files)."""

    data_dir: Path
    max_completions: int | None
    img_size: int

    def __call__(self, item):
        _, scene_id = item
        folder = self.data_dir / scene_id
        digest = input_digest(folder)  # before reading: if a file changes later, the next run fuses the scene again
        large = is_large(folder, self.max_completions)
        scene = (read_large if large else read_scene)(folder, self.max_completions)
        small = scene.resized(network_size(scene.mask.shape, self.img_size, count_candidates(scene, self.img_size)))
        return small, None if large else scene, digest  # the writer reads a large one again


def network_size(size, img_size, completions=1):
    """(height, width) that the network sees: the scene's aspect, the area of img_size², multiples of 16.

    A smaller area if many completions would need too much memory; `completions` is their number.
    """
    area = min(img_size**2, MOST_CANDIDATE_PIXELS / (completions + 1))
    scale = math.sqrt(area / (size[0] * size[1]))
    return tuple(max(16, 16 * round(side * scale / 16)) for side in size)


def count_candidates(scene, img_size):
    """Number of completions that need the network's memory; copies and transparent ones do not.

    Only counted where the number would make the scene smaller, since that reads all of them.
    """
    count = len(scene.completions)
    few = (count + 1) * img_size**2 <= MOST_CANDIDATE_PIXELS
    return count if few else len(distinct(scene.completions))


def batches(readings):
    """(chunk, scene id, small, scene, digest), … → lists of the last four, one list per forward pass.

    A batch lies within one chunk of the list, so the results do not depend on the number of processes.
    """
    for _, run in groupby(readings, key=lambda reading: (reading[0], reading[2].mask.shape)):
        group, cost = [], 0
        for _, scene_id, small, *rest in run:
            slots = max([len(small.completions), *(len(other.completions) for _, other, *_ in group)]) + 1
            cost = small.mask.size * slots * (len(group) + 1)
            if group and cost > MOST_CANDIDATE_PIXELS:
                yield group
                group = []
            group.append((scene_id, small, *rest))
        yield group
