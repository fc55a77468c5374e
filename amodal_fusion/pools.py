"""Helper processes. If one dies, only its own job is lost."""

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

KILLED = ("its process was killed, most likely because memory ran out; use fewer workers or smaller pictures "
          "(--workers)")
ATTEMPTS = 5  # to start the processes
_mine = {}  # in a helper process: its work


def usable_cpus():
    """CPUs that this process may use: a scheduler or container may give it fewer than the machine has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = map(int, file.read().split())  # "max" is no number: no quota
        count = min(count, max(1, quota // period))
    return count


class Failure(str):
    """The message for the user about a job that failed."""


def unforeseen(error):
    """The message about an unforeseen error: type, text and place."""
    cause = error.__cause__ if type(error.__cause__).__name__ == "_RemoteTraceback" else None
    lines = str(cause).splitlines() if cause else traceback.format_tb(error.__traceback__)
    places = re.findall(r'File "(.*?)", line (\d+)', "\n".join(lines))
    place = f"{os.path.basename(places[-1][0])}, line {places[-1][1]}" if places else "an unknown place"
    return f"unforeseen error, please report it: {type(error).__name__}: {error} ({place})"


class Job:
    """One call of the work, running or done."""

    def __init__(self, arguments):
        self.arguments, self.future, self.alone = arguments, None, False

    def begin(self, pool):
        """Give it to the pool; returns False if the pool is broken."""
        try:
            self.future = pool.submit(_do, self.arguments)
        except BrokenProcessPool:
            return False
        return True


class Helpers:
    """A context manager with processes for one function; they end with this process.

    Args:
        work: function or callable object, sent to the processes once; arguments and results are pickled.
        count: number of processes; 0 works in this one.
    """

    def __init__(self, work, count):
        self.work, self.count = work, count
        self.pool, self.begun = None, []  # jobs of this pool without collected outcome

    def __enter__(self):
        try:
            self.restart()
        except BaseException:  # such as Ctrl-C
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """End the processes, also jobs that still run, as after Ctrl-C."""
        if self.pool:
            end(self.pool)

    def restart(self):
        """Start the processes, before a network starts its threads.

        Raises:
            SceneError: they are killed at their start.
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
        """The result of a job, or a Failure: an error for the user (UserError, OSError), no memory, a process that
        died twice, or an unforeseen error with its place."""
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
        except Exception as error:  # one job must not end the others
            return Failure(unforeseen(error))

    def recover(self):
        """Repeat each lost job in a process of its own.

        A process that dies ends all jobs of its pool, and the pool does not say which job it ran."""
        end(self.pool)  # a killed process leaves its programs running
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
        """(item, outcome of work(item)) in order, with up to `ahead` items in work."""
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
    # there is no public way to end a running job
    processes, manager = list((pool._processes or {}).values()), pool._executor_manager_thread
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        kill_group(process.pid)
        process.kill()
    for process in processes:
        process.join(5)
    if manager:
        manager.join(5)  # at exit Python would write to the pipe that this thread closes


def _start(work):
    _mine["work"] = work
    start_helper()
    if "torch" in sys.modules:  # avoids the import where work does not need it
        sys.modules["torch"].set_num_threads(1)


def _do(arguments):
    return _mine["work"](*arguments)


def end_with_parent(*_):
    """Called in a helper process: end it at most a second after its parent has ended.

    Python's own helpers wait forever for a parent that was killed, since each of them holds the other end of its pipe.
    Usable as a loader's `worker_init_fn` and as a pool's `initializer`.
    """
    parent = multiprocessing.parent_process()
    # In a forked process the parent's number changes; elsewhere the parent's sentinel is set.
    number = parent.pid if multiprocessing.get_start_method() == "fork" else os.getppid()

    def watch():
        while os.getppid() == number and parent.is_alive():
            parent.join(1)
        kill_group(os.getpid())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_helper():
    """Called first in a pool's process: its parent handles Ctrl-C. It leads a process group, so that the programs that
    it starts end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    end_with_parent()


def kill_group(number):
    """Kill a process that leads a group, and what it started. It may have ended already."""
    with contextlib.suppress(AttributeError, ProcessLookupError):  # no such call on Windows, no such group
        os.killpg(number, signal.SIGKILL)


@contextlib.contextmanager
def no_interrupt():
    """Delay Ctrl-C within the block: during a fork it can leave locks held forever."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
