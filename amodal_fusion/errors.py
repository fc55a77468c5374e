"""Errors whose cause is a file, an option or the machine: the user gets a message, no traceback."""

import contextlib
import sys


class UserError(Exception):
    """The message names the file or value, what is wrong with it, and what to do. It makes sense to Python callers.

    Args:
        options: names of the options to change, without dashes; on a terminal their flags follow the message.
        terminal: the whole message for a terminal, where it shows more, such as a command.
    """

    def __init__(self, message="", *options, terminal=None):
        super().__init__(message)
        self.options, self.terminal = options, terminal

    def for_terminal(self):
        """The message with the flags of its options: "… (--overwrite)"."""
        flags = ", ".join(f"--{name}" for name in self.options)
        return self.terminal or str(self) + (f" ({flags})" if flags else "")


def message_of(error):
    """Text of an error for a terminal: a UserError's with its flags, an OSError's with its file."""
    return error.for_terminal() if isinstance(error, UserError) else str(error)


class SceneError(UserError):
    """One scene has a fault; the other scenes continue."""


class ConfigError(UserError):
    """Wrong usage: an option is unknown, missing or has a wrong type; exit status 2."""


class LpipsUnavailable(UserError):
    """No ImageNet backbone is available; metrics continue without LPIPS."""


def is_out_of_memory(error):
    """Whether memory ran out; CUDA, its libraries and the allocator of CPUs raise different errors."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def exit_with_message():
    """Around a small program's `main`: an error for the user ends it with the message."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {message_of(error)}")
