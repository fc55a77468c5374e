"""Several processes under PyTorch's own launcher."""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from fusion.errors import UserError


@dataclass
class Process:
    """This process's place among its group."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def distributed(self):
        return self.world_size > 1


def under_launcher():
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarted():
    """True when the launcher has started this group again after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_gpus(wanted):
    """Raise UserError unless `wanted` GPUs are there."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted > found:
        fits = f"--gpus {found}" + (" (or --gpus 0 for the CPU)" if found else ", which trains on the CPU")
        raise UserError(f"{wanted} GPU{'s' * (wanted > 1)} asked for, but this machine has {found}; use {fits}")


def launch(gpus):
    """Replace this process by torchrun with one process per GPU and the same command line; does not return."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    os.execv(sys.executable, command + sys.argv)


def join(gpus):
    """Join the launcher's group, or stay alone when there is none.

    Args:
        gpus: 0 computes on the CPU over gloo, anything else gives each local process its own GPU over NCCL.

    Returns:
        Process.
    """
    if not under_launcher():
        check_gpus(min(gpus, 1))
        return Process(0, 1, torch.device("cuda", 0) if gpus else torch.device("cpu"))
    local_rank = int(os.environ["LOCAL_RANK"])
    if gpus:
        check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # A key space per restart: after a crash the old keys would confuse the new group (pytorch#135712).
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        "nccl" if gpus else "gloo", store=store, rank=rank, world_size=world, device_id=device if gpus else None
    )
    return Process(rank, world, device)


def sum_over_ranks(values, device):
    """Element-wise sum of a list of numbers over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather(items):
    """The lists of all ranks as one."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def any_rank(flag, device):
    """True on every rank when `flag` is true on one."""
    return sum_over_ranks([float(flag)], device)[0] > 0


class EpochSampler(DistributedSampler):
    """DistributedSampler whose items are (epoch, index), and which can start in the middle of an epoch.

    The epoch travels with the index because persistent workers keep an old copy of the data set.
    """

    start = 0  # scenes of this epoch, over all ranks, that were done before a resume

    def __iter__(self):
        indices = list(super().__iter__())
        return iter([(self.epoch, index) for index in indices[self.start // self.num_replicas :]])
