"""Several processes under PyTorch's own launcher."""

import datetime
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from amodal_fusion.errors import UserError

PATIENCE = datetime.timedelta(days=1)  # while one process downloads a backbone or reads 100,000 scenes, others wait


@dataclass
class Process:
    """This process's place among its group."""

    rank: int
    world_size: int
    device: torch.device
    # What processes tell each other apart from gradients goes over gloo: it costs the GPU nothing, and may take long.
    messages: "dist.ProcessGroup | None" = None

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def distributed(self):
        return self.world_size > 1

    def gather(self, item):
        """The items of all processes, by rank."""
        if not self.distributed:
            return [item]
        items = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.messages)
        return items

    def sum(self, values):
        """Element-wise sum of a list of numbers over all processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values):
        """Element-wise maximum of a list of numbers over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag):
        """True on every process when `flag` is true on one."""
        return self.max([float(flag)])[0] > 0

    def _reduce(self, values, operation):
        total = torch.tensor(values, dtype=torch.float64)
        if self.distributed:
            dist.all_reduce(total, operation, group=self.messages)
        return total.tolist()


def under_launcher():
    """True for a process that torchrun started, or a scheduler that sets the same variables."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def local_rank():
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def restarted():
    """True when the launcher has started this group again after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_name():
    """What tells this launch from others, and stays when the launcher starts the group again."""
    launcher = os.getppid()
    try:  # a number alone comes again; the 22nd field, the second of which is a name in brackets
        began = Path(f"/proc/{launcher}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except OSError:
        began = ""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {socket.gethostname()} {launcher} {began}"


def check_gpus(wanted):
    """Raise UserError unless `wanted` GPUs are there."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted > found:
        usable = f"--gpus {found}" + (" (or --gpus 0 for the CPU)" if found else ", the CPU")
        raise UserError(f"{wanted} GPU{'s' * (wanted > 1)} asked for, but this machine has {found}; use {usable}")


def launch(gpus):
    """Be torchrun for one process per GPU with the same command line; does not return.

    The processes say what went wrong; torchrun's own traceback about them is left out.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    module = sys.modules["__main__"].__spec__  # None for a script
    program = ["--module", module.name, *sys.argv[1:]] if module else sys.argv
    try:
        torchrun(["--standalone", "--nproc_per_node", str(gpus), *program])
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError:
        sys.exit(1)
    sys.exit(0)


def join(gpus):
    """Join the launcher's group, become the launcher of one, or stay alone.

    Args:
        gpus: 0 computes on the CPU over gloo, anything else gives each local process its own GPU over NCCL.

    Returns:
        Process.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if not under_launcher():
        check_gpus(gpus)
        if gpus > 1:
            launch(gpus)
        return Process(0, 1, torch.device("cuda", 0) if gpus else torch.device("cpu"))
    # A key space per restart: after a crash the old keys would confuse the new group (pytorch#135712).
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    device = own_gpu(store, rank, world_size) if gpus else torch.device("cpu")
    dist.init_process_group(
        "nccl" if gpus else "gloo", store=store, rank=rank, world_size=world_size, device_id=device if gpus else None
    )
    return Process(rank, world_size, device, dist.new_group(backend="gloo", timeout=PATIENCE))


def own_gpu(store, rank, world_size):
    """The GPU of this process. A scheduler may show every process its own alone, which then is number 0 to each."""
    number = local_rank()
    if torch.cuda.device_count() == 1:
        number = 0
    else:
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)))
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    store.set(f"gpu_{rank}", f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}")
    gpus = [store.get(f"gpu_{other}") for other in range(world_size)]
    if len(set(gpus)) < world_size:
        raise UserError(f"{world_size} processes, but {len(set(gpus))} GPUs; start one process per GPU")
    return device


def parallel(model, process):
    """The model for several processes, which average their gradients; itself for one."""
    if not process.distributed:
        return model
    device_ids = [process.device] if process.device.type == "cuda" else None
    network = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # All buffers are constants, read from the same file. As an argument it is deprecated from torch 2.13 on.
    network.broadcast_buffers = False
    return network


class EpochSampler(Sampler):
    """One process's share of an epoch: (epoch, index) of every world_size-th scene from `start` to `stop`.

    The order depends on seed and epoch alone, so an epoch can be finished by another number of processes. The epoch
    travels with the index because persistent workers keep an old copy of the data set.
    """

    epoch = start = 0
    stop = None  # start and stop count scenes of all processes

    def __init__(self, count, process, seed, shuffle=True):
        self.count, self.process, self.seed, self.shuffle = count, process, seed, shuffle

    def __len__(self):
        return len(range(self.count)[self.start : self.stop][self.process.rank :: self.process.world_size])

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist() if self.shuffle else range(self.count)
        mine = order[self.start : self.stop][self.process.rank :: self.process.world_size]
        return iter([(self.epoch, index) for index in mine])


# ----------------------------------------------------------------------------
# Several processes that share one list of scenes, under PyTorch's own launcher; alone when there is none.




LONG = timedelta(days=30)  # the slowest process may take hours longer than the others


class Sharing:
    """This process's place among those that share the work. Nothing else is exchanged than numbers and messages."""

    def __init__(self):
        self.rank, self.world_size, self.local_rank = 0, 1, 0
        self.taken, self.finished = count(), 0
        if under_launcher():
            self.local_rank = local_rank()
            store, self.rank, self.world_size = next(dist.rendezvous("env://", timeout=LONG))
            # a key space per restart: after a crash the old keys would confuse the new group (pytorch#135712)
            self.store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.world_size, timeout=LONG)

    @property
    def is_main(self):
        return self.rank == 0

    def take(self, total):
        """0 … total − 1, each for one of the processes: whoever is ready takes the next."""
        while (number := next(self.taken) if self.world_size == 1 else self.store.add("taken", 1) - 1) < total:
            yield number

    def finish(self, number):
        """Count so many more scenes as finished; returns how many are, over all processes."""
        self.finished += number
        return self.finished if self.world_size == 1 else self.store.add("finished", number)

    def from_main(self, value):
        """The main process's value, on all of them."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, items):
        """The dicts of all processes as one; waits for the slowest. The last that they exchange."""
        if not dist.is_initialized():
            return items
        dicts = [None] * self.world_size
        dist.all_gather_object(dicts, items)
        dist.destroy_process_group()  # left to the interpreter's end, its threads may abort the process
        return {key: value for items in dicts for key, value in items.items()}
