"""Processes that read and write scenes while the network goes on; one that dies costs no more than its own case."""

from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from fusion.errors import SceneError, UserError
from fusion.processes import start_helper

_mine = {}  # a helper's work, from `_start`


def _start(work):
    _mine["work"] = work
    start_helper()
    torch.set_num_threads(1)


def _do(arguments):
    return _mine["work"](*arguments)


class Helpers:
    """A pool of processes for one kind of work.

    Args:
        work: callable that the helpers get once, a function or an object.
        count: processes; 0 works in this one.
    """

    def __init__(self, work, count):
        self.work, self.count = work, count
        self.pool = None
        self.restart()

    def restart(self):
        if self.count:
            self.pool = ProcessPoolExecutor(self.count, initializer=_start, initargs=(self.work,))
            self.pool.submit(int).result()  # fork them now, before the network starts its threads

    def submit(self, *arguments):
        """Start work(*arguments). Returns a job for `result`."""
        if not self.count:
            return arguments, None
        try:
            return arguments, self.pool.submit(_do, arguments)
        except BrokenProcessPool:
            self.restart()
            return arguments, self.pool.submit(_do, arguments)

    def result(self, job):
        """What the job returned.

        Raises:
            SceneError: it took more memory than there is, or its process was killed, also when tried again by itself.
            UserError, OSError: what the work raises.
        """
        arguments, future = job
        try:
            return self.work(*arguments) if future is None else future.result()
        except MemoryError:
            raise SceneError("out of memory; free some, or lower --workers") from None
        except BrokenProcessPool:  # a killed helper takes all jobs of its pool with it
            try:
                with ProcessPoolExecutor(1, initializer=_start, initargs=(self.work,)) as alone:
                    return alone.submit(_do, arguments).result()
            except MemoryError:
                raise SceneError("out of memory; free some, or lower --workers") from None
            except BrokenProcessPool:
                raise SceneError("the process that worked on it was killed, twice: the memory may be too small for "
                                 "it; try --workers 0") from None

    def outcome(self, job):
        """`result`, or the error as a text: one bad case shall not end the work."""
        try:
            return self.result(job)
        except UserError as error:
            return Failure(str(error))
        except OSError as error:
            return Failure(f"{error.filename}: {error.strerror}" if error.filename else str(error))

    def map(self, items, ahead):
        """(item, outcome of work(item)) in order, with so many items under way."""
        jobs, items = deque(), iter(items)
        while True:
            for item in items:
                jobs.append((item, self.submit(item)))
                if len(jobs) > ahead:
                    break
            if not jobs:
                return
            item, job = jobs.popleft()
            yield item, self.outcome(job)

    def close(self):
        if self.count:
            self.pool.shutdown(cancel_futures=True)


class Failure(str):
    """Why a case failed, in words for the user."""
