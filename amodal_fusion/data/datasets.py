"""PyTorch data sets of prepared, composed and layered scenes."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from amodal_fusion.data.packed import PackedScenes, is_packed
from amodal_fusion.data.scenes import read_scene
from amodal_fusion.data.tensors import to_floats, to_uint8


class SceneDataset(Dataset):
    """Scenes by index, or by (epoch, index), as dicts of tensors with the scene's `index` added.

    Items are what `with_draws` gives; `to_batch` makes the network's inputs of a batch of them.
    """

    def __init__(self, scene_ids):
        self.scene_ids = scene_ids
        # the scene that each loader process reads, for the message if one dies
        self.reading = torch.full((256,), -1).share_memory_()

    def __len__(self):
        return len(self.scene_ids)

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        loader = get_worker_info()
        if loader is not None:
            self.reading[loader.id % len(self.reading)] = index
        return {**self.read(epoch, index), "index": index}


class AmodalFusionDataset(SceneDataset):
    """Scenes of a prepared data set, at one square size, completions padded to a fixed number of slots.

    Args:
        data_dir: folder of scene folders (see amodal_fusion/data/scenes.py), or a packed set of this img_size
            (amodal_fusion/data/packed.py), which gives the same tensors.
        scene_ids: which of them.
        img_size: side of the square that the network sees, in pixels; scenes of other sizes are scaled.
        n_max_completions: slots N; of scenes with more completions, the first N are used.
        augment: mirror and recolour scenes, shuffle completions and drop some, at random.
        seed: with epoch and index it determines the augmentation, for any number of workers.

    Items, by index or by (epoch, index), are dicts of float32 tensors: partial (3,H,W),
    mask (1,H,W), completions (N,4,H,W), original (3,H,W) in [0,1], valid (N,) bool, and the scene's `index`.

    Raises:
        UserError: the packed set has another size, or fewer completions.
        SceneError: from an item, when a file of the scene is missing or damaged.
    """

    def __init__(self, data_dir, scene_ids, img_size=256, n_max_completions=5, augment=False, seed=0):
        super().__init__(scene_ids)
        self.data_dir = Path(data_dir)
        self.img_size = img_size
        self.n_max_completions = n_max_completions
        self.augment = augment
        self.seed = seed
        self.packed = PackedScenes(data_dir) if is_packed(data_dir) else None
        if self.packed:
            self.packed.check_fits(img_size, n_max_completions)

    def read(self, epoch, index):
        scene_id = self.scene_ids[index]
        if self.packed:
            scene = self.packed.read(scene_id, self.n_max_completions)
        else:
            scene = read_scene(self.data_dir / scene_id, self.n_max_completions, need_original=True)
            scene = scene.resized((self.img_size, self.img_size))
        rng = np.random.default_rng((self.seed, epoch, index)) if self.augment else None
        return with_draws(scene, self.n_max_completions, rng)


def with_draws(scene, slots, rng=None):
    """An item: `to_uint8` of a scene, its completions shuffled, seldom some dropped, and how to augment it.

    Args:
        rng: numpy Generator; None: as it is.

    Returns:
        the dict of `to_uint8`, and flip () bool, recoloured () bool, order (3,) of the colour channels, gamma (3,).
    """
    draws = {"flip": False, "recoloured": False, "order": np.arange(3), "gamma": np.ones(3)}
    if rng is not None:
        kept = rng.permutation(len(scene.completions))
        if rng.random() < 0.1:  # seldom: without the front object the one behind is wrong
            kept = kept[: rng.integers(1, len(kept) + 1)]
        scene = dataclasses.replace(scene, completions=[scene.completions[i] for i in kept])
        draws["flip"] = rng.random() < 0.5
        if rng.random() < 0.7:
            draws |= {"recoloured": True, "order": rng.permutation(3), "gamma": np.exp(rng.uniform(-0.4, 0.4, 3))}
    tensors = {name: torch.as_tensor(value) for name, value in draws.items()}
    return {**to_uint8(scene, slots), **tensors, "gamma": tensors["gamma"].float()}


def to_batch(items, device):
    """Items of a loader, collated → a batch on the device, mirrored and recoloured as drawn.

    Returns:
        dict of float32 partial (B,3,H,W), mask (B,1,H,W), completions (B,N,4,H,W), original (B,3,H,W) in [0,1], valid
        (B,N) bool, and the scenes' index (B,).
    """
    draws = {name: items[name] for name in ("flip", "recoloured", "order", "gamma")}
    batch = to_floats({name: t.to(device, non_blocking=True) for name, t in items.items() if name not in draws})
    flipped, recoloured = (draws[name].nonzero()[:, 0] for name in ("flip", "recoloured"))  # on the CPU: no waiting
    if len(flipped):
        rows = flipped.to(device)
        for name in ("partial", "mask", "completions", "original"):
            batch[name][rows] = batch[name][rows].flip(-1)
    if len(recoloured):
        recolour(batch, recoloured.to(device), *(draws[name][recoloured].to(device) for name in ("order", "gamma")))
    return batch


def recolour(batch, rows, order, gamma):
    """Swap the colour channels of some scenes and bend each by a gamma, alike in all pictures of a scene, in place.

    What copies the photo goes on copying it exactly, and what is wrong stays wrong; only the material looks new.

    Args:
        rows: (R,) which scenes of the batch; order, gamma: (R,3) of their channels.
    """
    for picture in (batch["partial"][:, None], batch["original"][:, None], batch["completions"][:, :, :3]):
        colours = picture[rows].take_along_dim(order[:, None, :, None, None], 2)  # (R,N,3,H,W)
        picture[rows] = colours.pow(gamma[:, None, :, None, None])


class WithLayers(SceneDataset):
    """A data set with a share of its scenes replaced by scenes from photos with layers.

    Args:
        base: SceneDataset; layers: LayeredScenes; share: of all scenes, in (0, 1].
        batch: scenes of one step over all processes, if `base` is read in order: every step has the same number of
            layered scenes, at the same positions, so that `base` can repeat its scenes. None: drawn at random.
    """

    SPREAD = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly, also over processes

    def __init__(self, base, layers, share, batch=None):
        super().__init__(base.scene_ids)
        self.base, self.layers, self.share, self.batch = base, layers, share, batch
        places = sorted(range(batch or 0), key=lambda place: place * self.SPREAD % 1)
        self.layered_places = set(places[: round(share * len(places))])

    def is_layered(self, epoch, index):
        if self.batch:
            return index % self.batch in self.layered_places
        return np.random.default_rng((self.layers.seed, epoch, index, 2)).random() < self.share

    def read(self, epoch, index):
        if not self.is_layered(epoch, index):
            return self.base.read(epoch, index)
        scene = self.layers((epoch << 32) + index)
        return with_draws(scene, self.layers.n_max, np.random.default_rng((self.layers.seed, epoch, index, 3)))


class SynthesizedDataset(SceneDataset):
    """Scenes composed on the fly, new in every epoch; items as in AmodalFusionDataset, to be read in order.

    Composing a scene takes longer than training on it. So each is used `repeat` times, augmented from the second time
    on. 1 / `repeat` of a step's scenes are new; the others were first used 16, 32 … steps before, in the same loader
    process if there are 1, 2, 4, 8 or 16. In the first steps all are new.

    Args:
        synthesizer: Synthesizer; count: items of an epoch, 1 / `repeat` of them new scenes.
        repeat: uses of a scene, at least 1; batch: scenes of one step, over all processes.
    """

    LAG = 16  # steps

    def __init__(self, synthesizer, count, repeat=1, batch=1):
        super().__init__(range(count))
        self.synthesizer, self.repeat, self.batch, self.lag = synthesizer, repeat, batch, self.LAG * batch
        self.span = -(-count // self.lag) * self.lag  # from an epoch's first item to the next one's
        self.made = {}

    def read(self, epoch, index):
        item = epoch * self.span + index
        turn, slot = item // self.lag, item % self.batch
        # slot // repeat: a process has every world_size-th slot and needs new scenes among them
        use = min((slot + slot // self.repeat + turn) % self.repeat, turn)
        number = item - use * self.lag  # the item for which the scene was composed
        if number not in self.made:
            oldest = item - (self.repeat - 1) * self.lag
            self.made = {n: scene for n, scene in self.made.items() if n >= oldest}
            self.made[number] = self.synthesizer(number)
        scene = self.made[number] if self.repeat > use + 1 else self.made.pop(number)
        rng = np.random.default_rng((self.synthesizer.seed, item)) if use else None
        return with_draws(scene, self.synthesizer.n_max, rng)
