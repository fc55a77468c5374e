"""Early shutdown of a training run, after a signal or an error: one line and an exit status."""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch

from amodal_fusion.distributed import SIGNALS, under_launcher
from amodal_fusion.errors import ConfigError, UserError, is_out_of_memory, message_of


class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception, so that `except Exception` does not catch it."""


class StopSignal:
    """SIGTERM, Ctrl-C or a closed terminal. Until `hold` a signal raises Stopped at once.

    After `hold` only its `number` is stored, and the loop asks for it when the run can be saved.
    """

    def __init__(self):
        self.number, self.held, self.launcher = None, False, os.getppid()
        self.interval = self.countdown = 1  # steps
        self.asked_at = time.monotonic()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._receive)

    def _receive(self, number, _):
        self.number = self.number or number
        if not self.held:
            raise Stopped

    def hold(self):
        self.held = True
        if self.number is not None:  # Python may have swallowed Stopped, for example in a destructor
            raise Stopped

    def agreed(self, process):
        """Called by all processes once a step: True on all of them, at the same step, if one got a signal.

        The answer waits for all processes, so they communicate about every two seconds, not at every step.
        """
        if not process.distributed:
            return self.number is not None
        self.countdown -= 1
        if self.countdown > 0:
            return False
        if os.getppid() != self.launcher:  # the launcher was killed
            self.number = self.number or signal.SIGTERM
        now = time.monotonic()
        asked, step_seconds = process.max([self.number is not None, (now - self.asked_at) / self.interval])
        self.asked_at = now
        self.interval = self.countdown = min(20, max(1, int(2 / max(step_seconds, 0.01))))
        return asked > 0


def ignore_signals():
    """In a loading process: signals reach the whole group, but only the training process handles them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_loaders():
    """Kill the loading processes of a run that ends early.

    PyTorch and Python would send SIGTERM, which these processes ignore, and wait for them.
    """
    for process in multiprocessing.active_children():
        process.kill()


@contextmanager
def clean_shutdown(config, stop_signal):
    """Turn errors and signals into one line and an exit status: 1 error, 2 wrong usage, 128 + n after signal n.

    Under torchrun a stopped and saved run exits with 0: any other status would restart the group.
    """
    try:
        try:
            yield
        except BaseException:
            kill_loaders()
            raise
    except ConfigError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        sys.exit(f"error: {message_of(error)}")
    except OSError as error:  # a full or read-only disk
        sys.exit(f"error: {error.filename or config.checkpoint_dir}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0].split(". ")[0]
        sys.exit(f"error: out of memory ({reason}); lower --batch_size and raise --accumulate by the same factor, "
                 "which keeps the effective batch, or lower --img_size or --n_max_completions; then --resume auto")
    except Stopped:
        status = 128 + (stop_signal.number or signal.SIGTERM)  # another process may have got the signal
        if not stop_signal.held:
            print("stopped by a signal before the first step; nothing is lost", file=sys.stderr)
            sys.exit(status)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(f"stopped by a signal after saving {config.checkpoint_dir}/last.pth; resume with --resume auto")
        status = 0 if under_launcher() else status
    else:
        status = 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
