"""What can go wrong for reasons that lie with files, options or the machine: a message for the user, no traceback."""

import contextlib
import sys


class UserError(Exception):
    """The message names the file or option, what is wrong with it, and what to do."""


class SceneError(UserError):
    """Something is wrong with one scene; the others can go on."""


class ConfigError(UserError):
    """An option is unknown, missing or of the wrong type: wrong usage, exit status 2."""


class LpipsUnavailable(UserError):
    """No ImageNet backbone to be had; metrics can do without."""


def is_out_of_memory(error):
    """Whether an error says that memory is short; CUDA, its libraries and a CPU's allocator have a way of their own."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def told():
    """Around a small program's `main`: such an error ends it with its message."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
