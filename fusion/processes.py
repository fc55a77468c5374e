"""Processes that help another one, and end with it."""

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
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_helper():
    """Called first in a pool's process: Ctrl-C, which reaches all, is for its parent to answer, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
