"""Loaders of training and validation scenes, and messages about their processes."""

import hashlib
import shutil
import signal
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from amodal_fusion.data.checks import MEMORY, check_scenes, read_checked, write_checked
from amodal_fusion.data.datasets import AmodalFusionDataset, SceneDataset, SynthesizedDataset, WithLayers
from amodal_fusion.data.packed import PackedScenes, ShardWriter, is_packed, pack_scenes
from amodal_fusion.data.scenes import find_scenes, read_list
from amodal_fusion.distributed import EpochSampler
from amodal_fusion.errors import SceneError, UserError
from amodal_fusion.files import fingerprint
from amodal_fusion.pools import end_with_parent
from amodal_fusion.synthesis.assets import Material
from amodal_fusion.synthesis.layers import LayeredScenes
from amodal_fusion.synthesis.synthesizer import Synthesizer
from amodal_fusion.training.shutdown import ignore_signals


def load_data(config, process):
    """Data sets and loaders for training and validation.

    Returns:
        training loader, its sampler, validation loader, and a digest of the validation scenes' names.

    Raises:
        SceneError, UserError: a list or a scene is wrong.
    """
    train_dir, train_ids = None, []
    if not config.synthesize and not uses_layers_alone(config):
        train_dir, train_ids = list_scenes(config, "train")
    val_dir, val_ids = list_scenes(config, "val")
    both = sorted(set(train_ids) & set(val_ids)) if train_dir and train_dir.resolve() == val_dir.resolve() else []
    if both:
        remedy = "run prepare_dataset.py split" if config.data_dir else "name two different folders"
        raise UserError(f"{len(both)} scenes are in the training and in the validation set, such as {both[0]}; "
                        f"{remedy}", *(() if config.data_dir else ("train_dir", "val_dir")))
    if config.cache:
        if train_dir == val_dir:
            train_dir = val_dir = cache_folder(config, process, val_dir, train_ids + val_ids)
        else:
            train_dir = cache_folder(config, process, train_dir, train_ids)
            val_dir = cache_folder(config, process, val_dir, val_ids)
    if config.check:
        check_data(config, process, ((train_dir, train_ids), (val_dir, val_ids)))
    size = {"img_size": config.img_size, "n_max_completions": config.n_max_completions, "seed": config.seed}
    train_set = training_scenes(config, process, train_dir, train_ids, size)
    # Each rank validates every world_size-th scene. Sums and counts are reduced, so uneven shards are exact.
    val_set = AmodalFusionDataset(val_dir, val_ids[process.rank :: process.world_size], **size)
    sampler = EpochSampler(len(train_set), process, config.seed, shuffle=not config.synthesize)
    common = {"batch_size": config.batch_size, "num_workers": config.workers, "worker_init_fn": start_loader,
              "pin_memory": process.device.type == "cuda", "persistent_workers": config.workers > 0}
    train_loader = DataLoader(train_set, sampler=sampler, drop_last=True, **common)
    val_digest = hashlib.sha256("\n".join(val_ids).encode(errors="surrogateescape")).hexdigest()[:16]
    return train_loader, sampler, DataLoader(val_set, **common), val_digest


def training_scenes(config, process, train_dir, train_ids, size):
    """The training set: prepared or composed scenes, a share of them replaced by layered ones."""
    batch = process.world_size * config.batch_size * config.accumulate
    faults = []
    if uses_layers_alone(config):
        train_set = SceneDataset(range(config.scenes_per_epoch))
    elif config.synthesize:
        synthesizer = Synthesizer(Material(config.objects, config.backgrounds, config.coco), **size)
        faults += synthesizer.material.faults[:10]
        train_set = SynthesizedDataset(synthesizer, config.scenes_per_epoch, config.repeat, batch)
    else:
        train_set = AmodalFusionDataset(train_dir, train_ids, augment=config.augment, **size)
    if config.layers:
        layers = LayeredScenes(config.layers, **size)
        faults += layers.faults[:10]
        if config.check:
            found = process.gather(layers.find_faults(process.rank, process.world_size))
            unread = [fault for share in found for fault in share]
            if unread:
                raise UserError(f"{len(unread)} photos with layers have faults; mend or remove them\n  "
                                + "\n  ".join(unread[:20]))
        train_set = WithLayers(train_set, layers, config.layers_share, batch if config.synthesize else None)
    for fault in faults if process.rank == 0 else ():
        print(f"left out: {fault}", flush=True)
    return train_set


def uses_layers_alone(config):
    return bool(config.layers) and config.layers_share == 1


def list_scenes(config, which):
    """(folder, scene ids) for training, `which` = "train", or validation, "val"."""
    own_dir, own_list = getattr(config, f"{which}_dir"), getattr(config, f"{which}_list")
    folder = Path(own_dir or config.data_dir)
    packed = PackedScenes(folder).places if is_packed(folder) else None
    if own_dir and not own_list:
        return folder, sorted(packed or find_scenes(folder))
    return folder, read_list(own_list or folder / f"{which}_list.txt", folder, packed)


def cache_folder(config, process, folder, scene_ids):
    """The packed copy of scenes of a folder within `config.cache`, made or brought up to date by all processes."""
    if folder is None or is_packed(folder):
        return folder
    of = fingerprint([str(folder.resolve()), config.img_size, config.n_max_completions])
    pack = Path(config.cache) / f"{folder.resolve().name}_{of}"
    pack_scenes(ShardWriter(folder, pack, config.img_size, config.n_max_completions), sorted(scene_ids),
                config.workers, process)
    return pack


def check_data(config, process, lists):
    """Read every scene once, except those that an earlier run read; the processes share the work.

    Args:
        lists: pairs of a folder and the ids of scenes in it.

    Raises:
        UserError: with the first twenty faults.
    """
    faults = []
    for folder, scene_ids in lists:
        if not scene_ids:
            continue
        share = scene_ids[process.rank :: process.world_size]
        if is_packed(folder):  # checked when it was packed; does it still fit its folder?
            changes = sorted({change for found in process.gather(PackedScenes(folder).changes(share))
                              for change in found})
            if changes:
                more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
                raise UserError(f"{changes[0]}{more}; pack it again: python prepare_dataset.py pack")
            continue
        known = read_checked(folder)
        checked = process.gather(check_scenes(folder, share, config.n_max_completions, known,
                                              quiet=None if process.is_main else True))
        faults += [fault for found, _ in checked for fault in found]
        states = {scene_id: state for _, new in checked for scene_id, state in new.items()}
        if process.is_main and not states.items() <= known.items() and not write_checked(folder, {**known, **states}):
            print(f"{folder / MEMORY} cannot be written, so every start reads all scenes; --no-check skips that",
                  file=sys.stderr)
    if faults:
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        check, listed = "python prepare_dataset.py check", "\n  " + "\n  ".join(faults[:20]) + more
        raise UserError(f"the data set has faults; list all of them with: {check}{listed}",
                        terminal=f"the data set has faults; list all of them with: {check} --data_dir "
                                 f"{config.data_dir or config.train_dir}{listed}")


def start_loader(_):
    """In a loading process: ignore signals, which the training process handles, and end with that process."""
    ignore_signals()
    end_with_parent()


def read_batches(loader):
    """Batches of a loader; errors of its processes become messages for the user.

    Raises:
        SceneError: a scene cannot be read.
        UserError: a loading process died; the message names the scenes it was reading.
    """
    batches = None
    try:
        batches = iter(loader)
        # PyTorch's handler could raise anywhere in training. Waiting for a batch also notices a dead process.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except SceneError as error:  # PyTorch puts the loading process's traceback before the message
        raise SceneError(str(error).rsplit("SceneError: ", 1)[-1].strip()) from None
    except (RuntimeError, OSError, EOFError) as error:  # the last two come in the middle of a transfer
        if "ancdata" in str(error) or "open files" in str(error):
            raise UserError("too many open files; raise the limit (ulimit -n 65536), or load in the training process "
                            "(workers 0)", "workers") from None
        # full shared memory is a bus error, visible only in the exit status
        statuses = [process.exitcode for process in getattr(batches, "_workers", [])]
        if "shared memory" in str(error) or -signal.SIGBUS in statuses:
            free = f" ({shutil.disk_usage('/dev/shm').total >> 20} MB)" if Path("/dev/shm").is_dir() else ""
            message = f"the loading processes send batches through shared memory, and /dev/shm{free} is too small"
            raise UserError(f"{message}; give the container more, or load in the training process (workers 0)",
                            terminal=f"{message}; give the container more (docker run --shm-size 8g), or load in the "
                                     "training process with --workers 0") from None
        died = ("DataLoader worker (pid", "Pin memory thread")  # this thread may notice it first
        if not isinstance(error, (ConnectionError, EOFError)) and not str(error).startswith(died):
            raise
        data = loader.dataset
        scenes = ", ".join(str(data.scene_ids[i]) for i in data.reading[: loader.num_workers].tolist() if i >= 0)
        raise UserError(f"a data loading process died ({error}) while it read: {scenes}. Check these scenes and the "
                        "free memory, or load in the training process (workers 0)", "workers") from None
