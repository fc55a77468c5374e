"""How a training run ends early: a signal asks it to, or something goes wrong. One line and an exit status."""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch

from amodal_fusion.distributed import under_launcher
from amodal_fusion.errors import ConfigError, UserError, is_out_of_memory

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]  # not on Windows


class Stopped(BaseException):
    """A signal asked the run to stop; like KeyboardInterrupt no `except Exception` catches it."""


class StopSignal:
    """SIGTERM, Ctrl-C or a closed terminal. Until `hold` it ends what is going on at once, by raising Stopped.

    From then on it is only written down, in `number`, and asked for where the run can be saved.
    """

    def __init__(self):
        self.number, self.held, self.launcher = None, False, os.getppid()
        self.interval = self.countdown = 1  # steps
        self.asked_at = time.monotonic()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
                signal.signal(number, self._receive)

    def _receive(self, number, _):
        self.number = self.number or number
        if not self.held:
            raise Stopped

    def hold(self):
        self.held = True
        if self.number is not None:  # raised where Python swallows exceptions, in a destructor for one
            raise Stopped

    def agreed(self, process):
        """Once a step, by all processes: True for all of them at the same step when one was asked to stop.

        An answer has to wait for every process, so they ask each other every two seconds or so, not at every step.
        """
        if not process.distributed:
            return self.number is not None
        self.countdown -= 1
        if self.countdown > 0:
            return False
        if os.getppid() != self.launcher:  # it was killed
            self.number = self.number or signal.SIGTERM
        now = time.monotonic()
        asked, step_seconds = process.max([self.number is not None, (now - self.asked_at) / self.interval])
        self.asked_at = now
        self.interval = self.countdown = min(20, max(1, int(2 / max(step_seconds, 0.01))))
        return asked > 0


def ignore_signals():
    """In a loading process: Ctrl-C and job schedulers signal the whole group, but who stops is the training process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_loaders():
    """End the loading processes of a run that ends early.

    PyTorch would wait until each has made what it was last asked for, ten seconds at most, and Python for ever: both
    would ask by SIGTERM, which they ignore.
    """
    for process in multiprocessing.active_children():
        process.kill()


@contextmanager
def ending(config, stop_signal):
    """What ends a run early as one line and an exit status: 1 something failed, 2 wrong usage, 128 + n after signal n.

    Under torchrun a run that was stopped and saved ends with 0: for any other status the group would be started again.
    """
    try:
        try:
            yield
        except BaseException:
            kill_loaders()
            raise
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full or read-only disk
        sys.exit(f"error: {error.filename or config.checkpoint_dir}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0].split(". ")[0]
        sys.exit(f"error: out of memory ({reason}); lower --batch_size and raise --accumulate as much, which keeps the "
                 "effective batch, or lower --img_size or --n_max_completions; then go on with --resume auto")
    except Stopped:
        status = 128 + (stop_signal.number or signal.SIGTERM)  # perhaps another process of the group was asked
        if not stop_signal.held:
            print("stopped by a signal before the first step, nothing is lost", file=sys.stderr)
            sys.exit(status)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(f"stopped by a signal after saving {config.checkpoint_dir}/last.pth; go on with --resume auto")
        status = 0 if under_launcher() else status
    else:
        status = 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
