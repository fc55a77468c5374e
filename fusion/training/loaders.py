"""Loaders of training and validation scenes: shards, process processes, and what to say when one of them dies."""

import multiprocessing
import signal
from multiprocessing.util import Finalize
from pathlib import Path

from torch.utils.data import DataLoader

from fusion.data.checks import check_scenes
from fusion.data.datasets import AmodalFusionDataset, SynthesizedDataset
from fusion.data.scenes import find_scenes, read_list
from fusion.data.synthesis import Synthesizer
from fusion.errors import SceneError, UserError
from fusion.training import distributed


def load_data(config, process):
    """Datasets and loaders of both lists. Raises SceneError or UserError, before the first step."""
    train_dir, train_ids = None, []
    if not config.synthesize:
        train_dir, train_ids = list_scenes(config, "train")
    val_dir, val_ids = list_scenes(config, "val")
    both = sorted(set(train_ids) & set(val_ids)) if train_dir and train_dir.resolve() == val_dir.resolve() else []
    if both:
        raise UserError(f"{len(both)} scenes are in both lists, {both[0]} for one; run prepare_dataset.py split")
    faults = []
    for folder, scene_ids in ((train_dir, train_ids), (val_dir, val_ids)):
        share = scene_ids[process.rank :: process.world_size]
        faults += distributed.gather(check_scenes(folder, share, quiet=None if process.is_main else True))
    if faults:
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError("the data set has faults; see them all with: python prepare_dataset.py check --data_dir "
                            f"{config.data_dir or config.train_dir}\n  " + "\n  ".join(faults[:20]) + more)
    size = {"img_size": config.img_size, "n_max_completions": config.n_max_completions, "seed": config.seed}
    if config.synthesize:
        synthesizer = Synthesizer(config.objects, config.backgrounds, config.coco, **size)
        train_set = SynthesizedDataset(synthesizer, config.scenes_per_epoch)
    else:
        train_set = AmodalFusionDataset(train_dir, train_ids, augment=config.augment, **size)
    batch = process.world_size * config.batch_size * config.accumulate
    if len(train_set) < batch:
        raise UserError(
            f"{len(train_set)} training scenes are fewer than one step takes ({process.world_size} processes × "
            f"batch_size {config.batch_size} × accumulate {config.accumulate} = {batch}); lower --batch_size or "
            "--accumulate"
        )
    # Exact validation over uneven shards: each rank takes every world-th scene, sums and counts are reduced.
    val_set = AmodalFusionDataset(val_dir, val_ids[process.rank :: process.world_size], **size)
    sampler = distributed.EpochSampler(train_set, process.world_size, process.rank, seed=config.seed, drop_last=True)
    common = {"batch_size": config.batch_size, "num_workers": config.workers, "worker_init_fn": ignore_signals,
              "pin_memory": process.device.type == "cuda", "persistent_workers": config.workers > 0}
    Finalize(None, kill_loaders, exitpriority=1)  # before Python waits for child processes
    train_loader = DataLoader(train_set, sampler=sampler, drop_last=True, **common)
    return train_loader, sampler, DataLoader(val_set, **common)


def list_scenes(config, which):
    """(folder, scene ids) for training, `which` = "train", or validation, "val"."""
    own_dir, own_list = getattr(config, f"{which}_dir"), getattr(config, f"{which}_list")
    folder = Path(own_dir or config.data_dir)
    if own_dir and not own_list:
        return folder, find_scenes(folder)
    return folder, read_list(own_list or folder / f"{which}_list.txt", folder)


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
        UserError: a loader process died, by lack of memory for one; names the scenes that were being read.
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
        raise UserError(f"a data loading process died ({error}); being read were: {scenes}. Look at these scenes "
                            "and at the free memory; --workers 0 loads in the training process") from None
