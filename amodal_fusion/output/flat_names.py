"""Results once more, flat and under the names of the user's earlier scripts.

    <id>_fused.png          the fused image
    <id>_visualization.png  the figure
    <id>_weight1.png        RGB, the weight in viridis
    <id>_comp1_masked.png   RGB, the completion in the hole, black elsewhere
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from tqdm import tqdm

from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.scenes import completion_paths, numbers_of
from amodal_fusion.files import ours_in, publish, remove_ours

NAME = re.compile(r"(?P<scene>.+)_(fused|visualization|weight\d+|comp\d+_masked)\.png", re.DOTALL)


def write_flat(data_dir, output_dir, scene_ids, workers=1):
    """Write the files of fused scenes into `output_dir`, beside the scenes' folders; returns how many.

    Args:
        workers: threads.

    Raises:
        UserError: a file of that name is there that is not ours, or a picture cannot be read. Nothing has changed then.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    scene_ids = [i for i in scene_ids if (output_dir / i / "fused.png").exists()]
    with publish(output_dir, keep=True) as stage, ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = pool.map(lambda i: _write_scene(data_dir / i, output_dir / i, stage / i), scene_ids)
        counts = list(tqdm(jobs, "flat names", len(scene_ids), disable=None))
        new = {path.name for path in stage.iterdir()}
    remove_flat(output_dir, new)
    return sum(counts)


def _write_scene(data, output, stem):
    def place(suffix):
        return stem.with_name(f"{stem.name}_{suffix}.png")

    shutil.copyfile(output / "fused.png", place("fused"))
    shutil.copyfile(output / "figure.png", place("visualization"))
    hole = read_image(data / "mask.png", "L") >= 128
    paths = completion_paths(data)
    numbered = [(number, path) for number, path in zip(numbers_of(paths), paths)
                if (output / f"weight_{number}.png").exists()]
    for number, path in numbered:
        weight = colormaps["viridis"](read_image(output / f"weight_{number}.png", "L"))[..., :3]
        write_image(place(f"weight{number}"), np.rint(weight * 255).astype(np.uint8))
        write_image(place(f"comp{number}_masked"), read_image(path, "RGB") * hole[..., None])
    return 2 + 2 * len(numbered)


def remove_flat(output_dir, keep=(), scene_ids=None):
    """Remove what earlier runs wrote here under flat names, except the names in `keep`; returns how many.

    Args:
        scene_ids: only the files of these scenes; None: of all.
    """
    found = ((name, NAME.fullmatch(name)) for name in ours_in(Path(output_dir)))
    chosen = None if scene_ids is None else set(scene_ids)
    stale = [name for name, match in found
             if match and name not in keep and (chosen is None or match["scene"] in chosen)]
    for name in stale:
        remove_ours(Path(output_dir) / name)
    return len(stale)
