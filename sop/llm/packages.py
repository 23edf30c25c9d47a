"""Packages of the extra ``llm``, imported when they are needed."""

import importlib
from types import ModuleType

from golden.errors import InputError

__all__ = ["one_line", "require"]

_INSTALL = "pip install -c constraints.txt 'scaled-outer-product[llm]'"
_MAX_REASON = 300  # characters of another program's message that an error quotes


def require(package: str) -> ModuleType:
    """Import a package of the extra ``llm``.

    Raises
    ------
    InputError
        If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        problem = f"needs the Python package {error.name!r}; install the llm extra: {_INSTALL}"
        raise InputError(f"running a model {problem}") from error


def one_line(error: Exception) -> str:
    """Message of another program, short enough to be quoted."""
    return " ".join(str(error).split())[:_MAX_REASON]
