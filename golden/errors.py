"""The one exception type for bad input.

The command line turns exactly this type (and :class:`OSError`) into a one-line message and exit
code 2; any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "located"]


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where and why.

    A :class:`ValueError`, so callers of the golden model need not know this class.
    """


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put ``where`` in front of every input error of the block, such as a file, tensor or field."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
