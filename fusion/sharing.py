"""Several processes that share one list of scenes, under PyTorch's own launcher; alone when there is none."""

import os
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from fusion.distributed import local_rank, under_launcher

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
