"""Packages of the extra ``llm``, imported when they are needed."""

from types import ModuleType

from golden.extras import import_extra

__all__ = ["one_line", "require"]

_MAX_REASON = 300  # characters of another program's message that an error quotes


def require(package: str) -> ModuleType:
    """Import a package of the extra ``llm``.

    Raises
    ------
    InputError
        If it is not installed; the message says how to install it.
    """
    return import_extra(package, "running a model", "llm")


def one_line(error: Exception) -> str:
    """Message of another program, short enough to be quoted."""
    return " ".join(str(error).split())[:_MAX_REASON]
