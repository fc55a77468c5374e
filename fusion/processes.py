"""Processes that help another one, and end with it."""

import contextlib
import multiprocessing
import os
import signal
import threading


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
