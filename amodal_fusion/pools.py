"""Processes that do one kind of work; one that dies costs no more than its own case."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from amodal_fusion.errors import SceneError, UserError

KILLED = ("the process that worked on it was killed, most likely because memory ran out; use fewer workers, or make "
          "its pictures smaller (--workers)")
ATTEMPTS = 5  # to start the processes
_mine = {}  # in a helper process: its work


class Failure(str):
    """Why a case failed, in words for the user."""


def unforeseen(error):
    """What to say about an error that this program does not foresee: its type, message and place."""
    cause = error.__cause__ if type(error.__cause__).__name__ == "_RemoteTraceback" else None
    lines = str(cause).splitlines() if cause else traceback.format_tb(error.__traceback__)
    places = re.findall(r'File "(.*?)", line (\d+)', "\n".join(lines))
    place = f"{os.path.basename(places[-1][0])}, line {places[-1][1]}" if places else "an unknown place"
    return f"unforeseen error, please report it: {type(error).__name__}: {error} ({place})"


class Job:
    """One call of the work, under way or done."""

    def __init__(self, arguments):
        self.arguments, self.future, self.alone = arguments, None, False

    def begin(self, pool):
        """Whether a process of the pool could take it; else the pool is broken."""
        try:
            self.future = pool.submit(_do, self.arguments)
        except BrokenProcessPool:
            return False
        return True


class Helpers:
    """Processes for one kind of work, which end with this one; they are there within a `with`.

    Args:
        work: callable that the helpers get once, a function or an object; arguments and results are pickled.
        count: processes; 0 works in this one.
    """

    def __init__(self, work, count):
        self.work, self.count = work, count
        self.pool, self.begun = None, []  # jobs of this pool whose outcome was not collected yet

    def __enter__(self):
        try:
            self.restart()
        except BaseException:  # Ctrl-C for one
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """Also ends jobs whose outcome is no longer needed, as after Ctrl-C."""
        if self.pool:
            end(self.pool)

    def restart(self):
        """Fork the processes now, before a network starts its threads.

        Raises:
            SceneError: they are killed as soon as they start.
        """
        if not self.count:
            return
        for _ in range(ATTEMPTS):
            with no_interrupt():
                self.pool = ProcessPoolExecutor(self.count, initializer=_start, initargs=(self.work,))
                try:
                    started = self.pool.submit(int)
                except BrokenProcessPool:
                    continue
            if not isinstance(started.exception(), BrokenProcessPool):
                return
        raise SceneError(f"helper processes were killed as they started, {ATTEMPTS} times; use fewer workers",
                         "workers")

    def submit(self, *arguments):
        """Start work(*arguments). Returns a job for `outcome`."""
        job = Job(arguments)
        if self.count:
            while not job.begin(self.pool):
                self.recover()
            self.begun.append(job)
        return job

    def outcome(self, job):
        """What the work returned, or a Failure: an error for the user (UserError, OSError), no memory, or a process
        that died, also when nothing else ran beside it. Any other error is a Failure that says where it arose."""
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
            return Failure("memory ran out; use fewer workers or smaller pictures (--workers)")
        except UserError as error:
            return Failure(error.for_terminal())
        except OSError as error:
            return Failure(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
        except Exception as error:  # one case must not end the work on all others
            return Failure(unforeseen(error))

    def recover(self):
        """Repeat each lost job in a process of its own.

        A process that dies ends all jobs of its pool, and the pool does not say which job it ran."""
        end(self.pool)  # a process that was killed has not ended the programs that it ran
        for job in self.begun:
            if isinstance(job.future.exception(), BrokenProcessPool) and not job.alone:
                with no_interrupt():
                    single = ProcessPoolExecutor(1, initializer=_start, initargs=(self.work,))
                    job.alone = job.begin(single)
                try:
                    wait([job.future])
                finally:
                    end(single)
        self.restart()

    def map(self, items, ahead):
        """(item, outcome of work(item)) in order, with up to `ahead` items under way."""
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


def end(pool):
    """End a pool's processes whatever they do, and what they have started."""
    # there is no public way to end a job that runs
    processes, manager = list((pool._processes or {}).values()), pool._executor_manager_thread
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        kill_group(process.pid)
        process.kill()
    for process in processes:
        process.join(5)
    if manager:
        manager.join(5)  # Python's own end would write to the pipe that this thread is about to close


def _start(work):
    _mine["work"] = work
    start_helper()
    if "torch" in sys.modules:  # work that needs none shall not wait for its import
        sys.modules["torch"].set_num_threads(1)


def _do(arguments):
    return _mine["work"](*arguments)


# ----------------------------------------------------------------------------
# Processes that help another one, and end with it.



def end_with_parent(*_):
    """Called in a helper process: end it, at the latest a second after its parent has gone, however that happened.

    Python's own helpers wait for ever for a parent that was killed: each of them holds the pipe by which it would
    notice. Fits as a loader's `worker_init_fn` and as a pool's `initializer`.
    """
    parent = multiprocessing.parent_process()
    # A forked process sees its parent's number change; elsewhere the parent's sentinel tells.
    number = parent.pid if multiprocessing.get_start_method() == "fork" else os.getppid()

    def watch():
        while os.getppid() == number and parent.is_alive():
            parent.join(1)
        kill_group(os.getpid())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_helper():
    """Called first in a pool's process: Ctrl-C is for its parent to answer, with which it ends. It leads a group of
    processes, so that the programs that it starts end with it, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    end_with_parent()


def kill_group(number):
    """Kill the process of this number, which may have ended already, and what it has started, if it leads a group."""
    with contextlib.suppress(AttributeError, ProcessLookupError):  # no such call on Windows, no such group
        os.killpg(number, signal.SIGKILL)


@contextlib.contextmanager
def no_interrupt():
    """Ctrl-C waits until this is over: one that comes while a process forks can leave locks held for ever."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
