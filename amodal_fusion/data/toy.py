"""Drawn scenes for tests and benchmarks."""

import numpy as np

from amodal_fusion.data.scenes import Scene, write_scene
from amodal_fusion.files import write_text


def draw_scene(seed, size=64, n=3, scene_id="scene", decoy=False):
    """Coloured discs over a gradient, the later in front; completions copy them whole, in random order.

    With `decoy` one more completion copies the visible part of a disc and is white in the hidden part. No rule can
    distinguish it from the true one, a network can.
    """
    rng = np.random.default_rng(seed)
    height, width = (size, size) if isinstance(size, int) else size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    photo = np.stack([y * 255 / height, x * 255 / width, np.full_like(x, 90)], 2)
    photo += rng.normal(0, 2, photo.shape)
    completions = []
    for _ in range(n):
        centre = rng.uniform(0.35, 0.65, 2) * (height, width)
        inside = np.hypot(y - centre[0], x - centre[1]) < rng.uniform(0.18, 0.3) * min(height, width)
        texture = rng.uniform(0, 255, 3) + 30 * np.sin(x / rng.uniform(2, 5))[..., None]
        photo = np.where(inside[..., None], texture, photo)
        completions.append(np.dstack([np.clip(texture, 0, 255), inside * 255.0]))
        completions[-1][~inside] = 0
    photo = np.clip(photo, 0, 255).astype(np.uint8)
    completions = [completions[i].astype(np.uint8) for i in rng.permutation(n)]
    mask = np.zeros((height, width), bool)
    mask[height // 4 : 3 * height // 4, width // 3 : 2 * width // 3] = True
    if decoy:
        white = completions[0].copy()
        white[mask & (white[..., 3] > 0)] = 255
        completions.append(white)
    return Scene(scene_id, np.where(mask[..., None], 0, photo).astype(np.uint8), mask, completions, photo)


def write_dataset(folder, train=8, val=3, **options):
    """A prepared data set of drawn scenes with both lists."""
    for name, count, offset in (("train", train, 0), ("val", val, 1000)):
        ids = [f"{name}_{i}" for i in range(count)]
        for i, scene_id in enumerate(ids):
            (folder / scene_id).mkdir(parents=True)
            write_scene(folder / scene_id, draw_scene(offset + i, n=2 + i % 2, scene_id=scene_id, **options))
        write_text(folder / f"{name}_list.txt", "\n".join(ids) + "\n", owned=True)
    return folder
