"""Loaders of training and validation scenes: shards, loading processes, and what to say when one of them dies."""

import multiprocessing
import shutil
import signal
import sys
from multiprocessing.util import Finalize
from pathlib import Path

from torch.utils.data import DataLoader

from fusion.data.checking import MEMORY, check_scenes, recall, remember
from fusion.data.datasets import AmodalFusionDataset, SynthesizedDataset
from fusion.data.scenes import read_list
from fusion.data.synthesis import Synthesizer
from fusion.errors import SceneError, UserError
from fusion.processes import end_with_parent
from fusion.training.distributed import EpochSampler
from fusion.training.signals import ignore_signals


def load_data(config, process):
    """Datasets and loaders of both lists.

    Returns:
        training loader, its sampler, validation loader.

    Raises:
        SceneError, UserError: something is wrong with the lists or scenes, before the first step.
    """
    data_dir = Path(config.data_dir)
    train_ids = []
    if not config.synthesize:
        train_ids = read_list(config.train_list or data_dir / "train_list.txt", data_dir)
    val_ids = read_list(config.val_list or data_dir / "val_list.txt", data_dir)
    both = sorted(set(train_ids) & set(val_ids))
    if both:
        raise UserError(f"{len(both)} scenes are in both lists, {both[0]} for one; run prepare_dataset.py split")
    if config.check:
        check_data(config, process, train_ids + val_ids)
    size = {"img_size": config.img_size, "n_max_completions": config.n_max_completions, "seed": config.seed}
    if config.synthesize:
        synthesizer = Synthesizer(config.objects, config.backgrounds, config.coco, **size)
        train_set = SynthesizedDataset(synthesizer, config.scenes_per_epoch)
    else:
        train_set = AmodalFusionDataset(data_dir, train_ids, augment=config.augment, **size)
    # Exact validation over uneven shards: each rank takes every world-th scene, sums and counts are reduced.
    val_set = AmodalFusionDataset(data_dir, val_ids[process.rank :: process.world_size], **size)
    sampler = EpochSampler(len(train_set), process, config.seed)
    common = {"batch_size": config.batch_size, "num_workers": config.workers, "worker_init_fn": start_loader,
              "pin_memory": process.device.type == "cuda", "persistent_workers": config.workers > 0}
    Finalize(None, kill_loaders, exitpriority=1)  # before Python waits for child processes
    train_loader = DataLoader(train_set, sampler=sampler, drop_last=True, **common)
    return train_loader, sampler, DataLoader(val_set, **common)


def check_data(config, process, scene_ids):
    """Read all scenes once, shared among the processes, save those that an earlier run has read. Raises UserError."""
    data_dir = Path(config.data_dir)
    known = recall(data_dir)
    share = scene_ids[process.rank :: process.world_size]
    faults, states = check_scenes(data_dir, share, config.n_max_completions, known,
                                  quiet=None if process.is_main else True)
    gathered = process.gather((faults, states))
    faults = [fault for some, _ in gathered for fault in some]
    states = {scene_id: state for _, some in gathered for scene_id, state in some.items()}
    if process.is_main and not states.items() <= known.items() and not remember(data_dir, {**known, **states}):
        print(f"{data_dir / MEMORY} cannot be written: every start will read all scenes; --no-check leaves that out",
              file=sys.stderr)
    if faults:
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError("the data set has faults; see them all with: python prepare_dataset.py check --data_dir "
                        f"{data_dir}\n  " + "\n  ".join(faults[:20]) + more)


def start_loader(_):
    """In a loading process: what is asked of the training process is not asked of this one, which ends with it."""
    ignore_signals()
    end_with_parent()


def kill_loaders():
    """End the loading processes of a run that failed.

    Python itself would ask them by SIGTERM, which they ignore, and wait for ever.
    """
    for process in multiprocessing.active_children():
        process.kill()


def read_batches(loader):
    """Batches of a loader; what goes wrong in its processes comes out as a message for the user.

    Raises:
        SceneError: a scene cannot be read.
        UserError: a loading process died, by lack of memory for one; names the scenes that were being read.
    """
    batches = None
    try:
        batches = iter(loader)
        # PyTorch's handler would raise wherever training happens to be; waiting for a batch notices, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except SceneError as error:  # PyTorch puts the loading process's traceback before the message
        raise SceneError(str(error).rsplit("SceneError: ", 1)[-1].strip()) from None
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two in the middle of a transfer
        # a page of shared memory that cannot be had is a bus error, known by the exit status alone
        statuses = [process.exitcode for process in getattr(batches, "_workers", [])]
        if "shared memory" in str(error) or -signal.SIGBUS in statuses:
            free = f" ({shutil.disk_usage('/dev/shm').total >> 20} MB)" if Path("/dev/shm").is_dir() else ""
            raise UserError(f"the loading processes hand over batches through shared memory, and /dev/shm{free} is too "
                            "small for them; give the container more (docker run --shm-size 8g), or load in the "
                            "training process by --workers 0") from None
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        data = loader.dataset
        scenes = ", ".join(str(data.scene_ids[i]) for i in data.reading[: loader.num_workers].tolist() if i >= 0)
        raise UserError(f"a data loading process died ({error}); being read were: {scenes}. Look at these scenes "
                        "and at the free memory; --workers 0 loads in the training process") from None
