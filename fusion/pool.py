"""Jobs for several processes, none of which can take the others down with it."""

from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from fusion.errors import UserError
from fusion.processes import start_helper

KILLED = ("the process that worked on it was killed, most likely because memory ran out; use fewer --workers, or make "
          "its pictures smaller")
_task = {}  # in a helper process: its function


def run_jobs(function, items, workers):
    """Apply a function to every item, in processes that end with this one.

    Args:
        function: of one item; items and results are pickled.

    Yields:
        item, result and fault, as jobs end. The fault is None, or a line about what went wrong in this job: an error
        for the user (UserError, OSError), no memory, or a process that died. Any other error is raised.

    Stopping half-way (Ctrl-C, or leaving the loop) abandons the jobs that have begun.
    """
    todo, suspects = deque(items), deque()
    while todo or suspects:
        # After a death nobody knows whose job it was: those that had begun are done again, one at a time.
        alone = bool(suspects)
        yield from _run(function, suspects if alone else todo, suspects, 1 if alone else workers, alone)


def _run(function, todo, suspects, workers, alone):
    """Jobs until `todo` is empty or a process has died; with `alone`, the one job that it did is at fault."""
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(function,))
    running = {}
    try:
        while todo or running:
            while todo and len(running) < (1 if alone else 2 * workers):
                try:
                    running[pool.submit(_call, todo[0])] = todo[0]
                except BrokenProcessPool:  # died since the last job ended
                    return
                todo.popleft()
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                item = running[job]
                try:
                    result, fault = job.result(), None
                except BrokenProcessPool:
                    if alone:
                        del running[job]
                        yield item, None, KILLED
                    return
                except (UserError, OSError, MemoryError) as error:
                    result, fault = None, _line(error)
                del running[job]
                yield item, result, fault
    finally:
        suspects.extend(running.values())
        if running:
            _stop(pool)
        else:
            pool.shutdown()


def _line(error):
    if isinstance(error, MemoryError):
        return "memory ran out; use fewer --workers, or make its pictures smaller"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _start(function):
    _task["function"] = function
    start_helper()


def _call(item):
    return _task["function"](item)


def _stop(pool):
    processes = list((pool._processes or {}).values())  # there is no public way to end a job that runs
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
