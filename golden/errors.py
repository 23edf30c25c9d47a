"""The one exception type for bad input.

The command line turns exactly this type (and :class:`OSError`) into a one-line message and exit
code 2; any other exception is a bug and keeps its traceback.
"""

__all__ = ["InputError"]


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where and why.

    A :class:`ValueError`, so callers of the golden model need not know this class.
    """
