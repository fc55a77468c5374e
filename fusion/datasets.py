"""Scenes as the training script reads them: data sets, samplers and loaders."""

import multiprocessing
import signal
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fusion import distributed
from fusion.images import SceneError
from fusion.run import TrainingError
from fusion.scenes import check_scenes, read_list, read_scene
from fusion.synthesis import Synthesizer
from fusion.tensors import to_tensors


class SceneDataset(Dataset):
    """Scenes by index, or by (epoch, index), as dicts of tensors with the scene's `index` added."""

    def __init__(self, scene_ids):
        self.scene_ids = scene_ids
        # what each loader process reads, for the message when one dies
        self.reading = torch.full((256,), -1).share_memory_()

    def __len__(self):
        return len(self.scene_ids)

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        process = get_worker_info()
        if process is not None:
            self.reading[process.id % len(self.reading)] = index
        return {**self.read(epoch, index), "index": index}


class AmodalFusionDataset(SceneDataset):
    """Scenes of a prepared data set, at one square size, completions padded to a fixed number of slots.

    Args:
        data_dir: folder of scene folders (see fusion/scenes.py).
        scene_ids: which of them.
        img_size: side of the square that the network sees, in pixels; scenes of other sizes are scaled.
        n_max_completions: slots N; of scenes with more, the first N count.
        augment: mirror and recolour the scene, shuffle its completions and drop some, each at random.
        seed: with the epoch and the index it determines the augmentation, whatever the number of workers.

    Items are asked for by index or by (epoch, index) and are dicts of float32 tensors: partial (3,H,W),
    mask (1,H,W), completions (N,4,H,W), original (3,H,W) in [0,1], valid (N,) bool, and the scene's `index`.

    Raises:
        SceneError: from an item, when a file of the scene is missing or damaged.
    """

    def __init__(self, data_dir, scene_ids, img_size=256, n_max_completions=5, augment=False, seed=0):
        super().__init__(scene_ids)
        self.data_dir = Path(data_dir)
        self.img_size = img_size
        self.n_max_completions = n_max_completions
        self.augment = augment
        self.seed = seed

    def read(self, epoch, index):
        scene = read_scene(self.data_dir / self.scene_ids[index], self.n_max_completions, need_original=True)
        scene = scene.resized((self.img_size, self.img_size))
        rng = np.random.default_rng((self.seed, epoch, index))
        if self.augment:
            kept = rng.permutation(len(scene.completions))
            if rng.random() < 0.1:  # seldom: without the front object the one behind is wrong
                kept = kept[: rng.integers(1, len(kept) + 1)]
            scene.completions = [scene.completions[i] for i in kept]
        tensors = to_tensors(scene, self.n_max_completions)
        if self.augment and rng.random() < 0.5:
            tensors = {name: t.flip(-1) if t.dim() > 1 else t for name, t in tensors.items()}
        if self.augment and rng.random() < 0.7:
            recolour(tensors, rng)
        return tensors


def recolour(tensors, rng):
    """Swap the colour channels and bend each by a gamma, alike in all pictures of a scene, in place.

    What copies the photo goes on copying it exactly, and what is wrong stays wrong; only the material looks new.
    """
    order = torch.from_numpy(rng.permutation(3))
    gamma = torch.from_numpy(rng.uniform(-0.4, 0.4, 3)).float().exp()[:, None, None]
    for picture in (tensors["partial"], tensors["original"], tensors["completions"][:, :3]):  # (…,3,H,W)
        picture.copy_(picture.index_select(-3, order).pow(gamma))


class SynthesizedDataset(SceneDataset):
    """An epoch of `count` scenes made on the fly, new ones in every epoch; items as of AmodalFusionDataset."""

    def __init__(self, synthesizer, count):
        super().__init__(range(count))
        self.synthesizer = synthesizer

    def read(self, epoch, index):
        return to_tensors(self.synthesizer(epoch * len(self) + index), self.synthesizer.n_max)


def load_data(config, worker):
    """Datasets and loaders of both lists. Raises SceneError or TrainingError, before the first step."""
    data_dir = Path(config.data_dir)
    train_ids = []
    if not config.synthesize:
        train_ids = read_list(config.train_list or data_dir / "train_list.txt", data_dir)
    val_ids = read_list(config.val_list or data_dir / "val_list.txt", data_dir)
    both = sorted(set(train_ids) & set(val_ids))
    if both:
        raise TrainingError(f"{len(both)} scenes are in both lists, {both[0]} for one; run prepare_dataset.py split")
    share = (train_ids + val_ids)[worker.rank :: worker.world]
    faults = distributed.gather(check_scenes(data_dir, share, quiet=None if worker.is_main else True))
    if faults:
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise TrainingError("the data set has faults; see them all with: python prepare_dataset.py check --data_dir "
                            f"{data_dir}\n  " + "\n  ".join(faults[:20]) + more)
    size = {"img_size": config.img_size, "n_max_completions": config.n_max_completions, "seed": config.seed}
    if config.synthesize:
        synthesizer = Synthesizer(config.objects, config.backgrounds, config.coco, **size)
        train_set = SynthesizedDataset(synthesizer, config.scenes_per_epoch)
    else:
        train_set = AmodalFusionDataset(data_dir, train_ids, augment=config.augment, **size)
    batch = worker.world * config.batch_size * config.accumulate
    if len(train_set) < batch:
        raise TrainingError(
            f"{len(train_set)} training scenes are fewer than one step takes ({worker.world} processes × batch_size "
            f"{config.batch_size} × accumulate {config.accumulate} = {batch}); lower --batch_size or --accumulate"
        )
    # Exact validation over uneven shards: each rank takes every world-th scene, sums and counts are reduced.
    val_set = AmodalFusionDataset(data_dir, val_ids[worker.rank :: worker.world], **size)
    sampler = distributed.EpochSampler(train_set, worker.world, worker.rank, seed=config.seed, drop_last=True)
    common = {"batch_size": config.batch_size, "num_workers": config.workers, "worker_init_fn": ignore_signals,
              "pin_memory": worker.device.type == "cuda", "persistent_workers": config.workers > 0}
    Finalize(None, kill_loaders, exitpriority=1)  # before Python waits for child processes
    train_loader = DataLoader(train_set, sampler=sampler, drop_last=True, **common)
    return train_loader, sampler, DataLoader(val_set, **common)


def ignore_signals(_):
    """In a loader process: Ctrl-C and job schedulers signal the whole group, but who stops is the training process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def kill_loaders():
    """End the loader processes of a run that failed.

    Python itself would ask them by SIGTERM, which they ignore, and wait for ever.
    """
    for process in multiprocessing.active_children():
        process.kill()


def read_batches(loader):
    """Batches of a loader; what goes wrong in its processes comes out as a message for the user.

    Raises:
        SceneError: a scene cannot be read.
        TrainingError: a loader process died, by lack of memory for one; names the scenes that were being read.
    """
    try:
        batches = iter(loader)
        # PyTorch's handler would raise wherever training happens to be; waiting for a batch notices, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except SceneError as error:  # PyTorch puts the loader process's traceback before the message
        raise SceneError(str(error).rsplit("SceneError: ", 1)[-1].strip()) from None
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two in the middle of a transfer
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        data = loader.dataset
        scenes = ", ".join(str(data.scene_ids[i]) for i in data.reading[: loader.num_workers].tolist() if i >= 0)
        raise TrainingError(f"a data loading process died ({error}); being read were: {scenes}. Look at these scenes "
                            "and at the free memory; --workers 0 loads in the training process") from None
