"""SIGTERM, Ctrl-C and a closed terminal: save, then leave."""

import signal
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal came while there was nothing to save yet; like KeyboardInterrupt no `except Exception` catches it."""


class StopSignal:
    """Whether a signal asked this run to stop. Until `hold` it ends what is going on at once, by raising Stopped.

    From then on it is only written down, in `number`, and asked for where the run can be saved.
    """

    def __init__(self):
        self.number, self.held = None, False
        self.interval = self.countdown = 1  # steps
        self.asked_at = time.monotonic()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
                signal.signal(number, self._receive)

    def _receive(self, number, _):
        self.number = self.number or number
        if not self.held:
            raise Stopped

    @property
    def status(self):
        """Exit status after stopping; another process of the group may be the one that was asked."""
        return 128 + (self.number or signal.SIGTERM)

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
        now = time.monotonic()
        asked, step_seconds = process.max([self.number is not None, (now - self.asked_at) / self.interval])
        self.asked_at = now
        self.interval = self.countdown = min(20, max(1, int(2 / max(step_seconds, 0.01))))
        return asked > 0


def ignore_signals():
    """In a loader process: Ctrl-C and job schedulers signal the whole group, but who stops is the training process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
