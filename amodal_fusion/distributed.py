"""Several processes under PyTorch's launcher: the class `Process`, for training and inference."""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from amodal_fusion.errors import ConfigError, UserError

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]  # not on Windows
MEETING = datetime.timedelta(minutes=10)  # limit for all processes to join
SILENCE = 10  # seconds of waiting before a message
PATIENCE = datetime.timedelta(days=1)  # limit for others to wait while one downloads a backbone or reads 100,000 scenes


class NoMeeting(UserError):
    """The processes of a launch did not find each other. Each of them reports it."""


@dataclass
class Process:
    """This process's place in its group."""

    rank: int
    world_size: int
    device: torch.device
    store: "dist.Store | None" = None
    # For messages other than gradients: gloo, which takes no GPU time and may wait long.
    messages: "dist.ProcessGroup | None" = None
    numbers: count = field(default_factory=count)  # items of a single process
    finished: int = 0

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def distributed(self):
        return self.world_size > 1

    def gather(self, item):
        """The items of all processes, by rank. Waits for the slowest."""
        if not self.distributed:
            return [item]
        items = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.messages)
        return items

    def from_main(self, value):
        """The main process's value, on all of them."""
        values = [value]
        if self.distributed:
            dist.broadcast_object_list(values, group=self.messages)
        return values[0]

    def sum(self, values):
        """Element-wise sum of a list of numbers over all processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values):
        """Element-wise maximum of a list of numbers over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag):
        """True on every process if `flag` is true on one."""
        return self.max([float(flag)])[0] > 0

    def _reduce(self, values, operation):
        total = torch.tensor(values, dtype=torch.float64)
        if self.distributed:
            dist.all_reduce(total, operation, group=self.messages)
        return total.tolist()

    def take(self, total):
        """0 … total − 1, each in one process: the next number goes to the process that asks first."""
        while (number := self.store.add("taken", 1) - 1 if self.distributed else next(self.numbers)) < total:
            yield number

    def finish(self, number):
        """Count `number` more items as finished; returns the count over all processes."""
        self.finished += number
        return self.store.add("finished", number) if self.distributed else self.finished

    def leave(self):
        """Leave the group. Otherwise its threads may abort the interpreter at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()


def under_launcher():
    """True for a process that torchrun started, or a scheduler that sets the same variables."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def number_in(name, default=0, least=0, most=1 << 31):
    """An environment variable of the launcher as a number.

    Raises:
        NoMeeting: it is not a whole number from `least` to `most`.
    """
    text = os.environ.get(name, str(default))
    if not (text.strip().isascii() and text.strip().isdigit() and least <= int(text) <= most):
        raise NoMeeting(f"the environment variable {name} is {text!r}, expected a whole number from {least} to {most}; "
                        "start with torchrun, which sets it, or unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT")
    return int(text)


def local_rank():
    """This process's number among those of its machine."""
    return number_in("LOCAL_RANK") if "LOCAL_RANK" in os.environ else number_in("SLURM_LOCALID")


def restarted():
    """True if the launcher restarted this group after one of its processes died."""
    return number_in("TORCHELASTIC_RESTART_COUNT") > 0


def launch_name():
    """A name for this launch, unchanged when the launcher restarts the group."""
    launcher = os.getppid()
    try:  # with the start time (field 22), since process numbers are reused; field 2, the name, is in brackets
        began = Path(f"/proc/{launcher}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except OSError:
        began = ""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {socket.gethostname()} {launcher} {began}"


def check_gpus(wanted):
    """Raise ConfigError unless the machine has `wanted` GPUs."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted > found:
        usable = f"at most {found}, or 0 for the CPU" if found else "0 for the CPU"
        raise ConfigError(f"{wanted} GPU{'s' * (wanted > 1)} asked for, but this machine has {found}; use {usable}",
                          "gpus")


def launch(gpus):
    """Become torchrun for one process per GPU with the same command line; does not return.

    The processes report their errors; torchrun's traceback is suppressed.
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
    """Join the launcher's group for training, become the launcher of one, or stay alone.

    Args:
        gpus: 0 computes on the CPU over gloo, anything else gives each local process its own GPU over NCCL.

    Returns:
        Process.

    Raises:
        UserError: there are fewer GPUs than processes, or the processes do not find each other.
    """
    if under_launcher():
        return join_group(gpus)
    check_gpus(gpus)
    if gpus > 1:
        launch(gpus)
    return Process(0, 1, torch.device("cuda", 0) if gpus else torch.device("cpu"))


def join_group(gpus=0):
    """Join the launcher's group; gpus as in `join`. Without a launcher: alone, on the CPU.

    Until all have joined, signals end the process at once: it waits in C++, where Python cannot handle them.

    Raises:
        NoMeeting: a variable of the launcher is wrong, or not all processes join within MEETING.
    """
    if not under_launcher():
        return Process(0, 1, torch.device("cpu"))
    world_size = number_in("WORLD_SIZE", least=1)
    rank, port = number_in("RANK", most=world_size - 1), number_in("MASTER_PORT", most=65535)
    attempt, where = number_in("TORCHELASTIC_RESTART_COUNT"), f"{os.environ['MASTER_ADDR']}:{port}"
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], port)
        with default_signals(), note_when_waiting(f"{world_size} processes", where):
            # A key space per restart: after a crash the old keys would confuse the new group (pytorch#135712).
            store = dist.PrefixStore(f"attempt_{attempt}", next(dist.rendezvous("env://", timeout=MEETING))[0])
            device = own_gpu(store, rank, world_size) if gpus else torch.device("cpu")
            dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=world_size,
                                    device_id=device if gpus else None)
            return Process(rank, world_size, device, store, dist.new_group(backend="gloo", timeout=PATIENCE))
    except socket.gaierror as error:
        raise NoMeeting(f"MASTER_ADDR: the host {os.environ['MASTER_ADDR']!r} is unknown here ({error.strerror}); all "
                        "machines must reach the first one under this name") from None
    except dist.DistError as error:
        raise NoMeeting(f"process {rank} of {world_size} did not find the others at {where} (MASTER_ADDR:MASTER_PORT) "
                        f"within {MEETING.seconds // 60} minutes: {str(error).splitlines()[0][:200]}. Start all of "
                        "them with the same address, and with a port that is free and open") from None


@contextlib.contextmanager
def default_signals():
    """In this context SIGTERM, Ctrl-C and a closed terminal end the process at once; ignored ones stay ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def note_when_waiting(who, where):
    """After SILENCE seconds in this context, print who is waited for and where."""
    text = (f"waiting for {who} at {where} (MASTER_ADDR:MASTER_PORT), {MEETING.seconds // 60} minutes at most; Ctrl-C "
            "ends it")
    timer = threading.Timer(SILENCE, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def own_gpu(store, rank, world_size):
    """The GPU of this process. If a scheduler shows each process only its own GPU, that is number 0."""
    number = local_rank()
    if torch.cuda.device_count() == 1:
        number = 0
    else:
        check_gpus(number_in("LOCAL_WORLD_SIZE", number + 1))
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    store.set(f"gpu_{rank}", f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}")
    gpus = [store.get(f"gpu_{other}") for other in range(world_size)]
    if len(set(gpus)) < world_size:
        raise UserError(f"{world_size} processes, but {len(set(gpus))} GPUs; start one process per GPU")
    return device


def parallel(model, process):
    """DistributedDataParallel of the model; with one process the model itself."""
    if not process.distributed:
        return model
    device_ids = [process.device] if process.device.type == "cuda" else None
    network = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # All buffers are constants from the same file. The constructor's argument is deprecated since torch 2.13.
    network.broadcast_buffers = False
    return network


class EpochSampler(Sampler):
    """One process's share of an epoch: (epoch, index) of every world_size-th scene from `start` to `stop`.

    The order depends on seed and epoch alone, so another number of processes can finish an epoch. The epoch travels
    with the index because persistent workers keep an old copy of the data set.
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
