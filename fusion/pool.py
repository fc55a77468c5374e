"""Processes that do one kind of work; one that dies costs no more than its own case."""

import sys
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from fusion.errors import UserError
from fusion.processes import start_helper

KILLED = ("the process that worked on it was killed, most likely because memory ran out; use fewer --workers, or make "
          "its pictures smaller")
_mine = {}  # in a helper process: its work


class Failure(str):
    """Why a case failed, in words for the user."""


class Job:
    """One call of the work, under way or done."""

    def __init__(self, arguments):
        self.arguments, self.future, self.alone = arguments, Future(), False


class Helpers:
    """Processes for one kind of work, which end with this one; use it as a context.

    Args:
        work: callable that the helpers get once, a function or an object; arguments and results are pickled.
        count: processes; 0 works in this one.
    """

    def __init__(self, work, count):
        self.work, self.count = work, count
        self.pool, self.begun = None, []  # jobs of this pool whose outcome nobody has asked for
        self.restart()

    def restart(self):
        if self.count:
            self.pool = ProcessPoolExecutor(self.count, initializer=_start, initargs=(self.work,))
            self.pool.submit(int).result()  # fork them now, before a network starts its threads

    def submit(self, *arguments):
        """Start work(*arguments). Returns a job for `outcome`."""
        job = Job(arguments)
        if self.count:
            try:
                job.future = self.pool.submit(_do, arguments)
            except BrokenProcessPool:
                self.recover()
                job.future = self.pool.submit(_do, arguments)
            self.begun.append(job)
        return job

    def outcome(self, job):
        """What the work returned, or a Failure: an error for the user (UserError, OSError), no memory, or a process
        that died, also when nothing else ran beside it. Any other error is raised."""
        try:
            if not self.count:
                return self.work(*job.arguments)
            if isinstance(job.future.exception(), BrokenProcessPool) and not job.alone:
                self.recover()
            self.begun.remove(job)
            return job.future.result()
        except BrokenProcessPool:
            return Failure(KILLED)
        except MemoryError:
            return Failure("memory ran out; use fewer --workers, or make its pictures smaller")
        except UserError as error:
            return Failure(str(error))
        except OSError as error:
            return Failure(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))

    def recover(self):
        """A process that dies takes all jobs of its pool with it, and nobody knows whose it was: each of them again,
        by itself."""
        for job in self.begun:
            if isinstance(job.future.exception(), BrokenProcessPool) and not job.alone:
                with ProcessPoolExecutor(1, initializer=_start, initargs=(self.work,)) as single:
                    job.future, job.alone = single.submit(_do, job.arguments), True
                    wait([job.future])
        self.restart()

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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Abandons jobs that have begun and that nobody waits for any more, as after Ctrl-C."""
        if not self.count:
            return
        processes = list((self.pool._processes or {}).values())  # there is no public way to end a job that runs
        self.pool.shutdown(wait=not self.begun, cancel_futures=True)
        if self.begun:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(5)


def _start(work):
    _mine["work"] = work
    start_helper()
    if "torch" in sys.modules:  # work that needs none shall not wait for its import
        sys.modules["torch"].set_num_threads(1)


def _do(arguments):
    return _mine["work"](*arguments)
