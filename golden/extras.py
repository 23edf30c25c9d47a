"""Packages that only some tasks need: imported then, and how to install them where they lack."""

import importlib
from types import ModuleType

from golden.errors import InputError

__all__ = ["import_extra", "install_command", "missing_package"]


def install_command(*extras: str) -> str:
    """Command that installs this project with some of its extras."""
    return f"pip install -c constraints.txt 'scaled-outer-product[{','.join(extras)}]'"


def missing_package(task: str, package: str | None, extra: str) -> InputError:
    """The error for a task that needs a package of an extra, with how to install it."""
    hint = f"install the {extra} extra: {install_command(extra)}"
    return InputError(f"{task} needs the Python package {package!r}; {hint}")


def import_extra(module: str, task: str, extra: str) -> ModuleType:
    """Import a module of an extra.

    Parameters
    ----------
    module : str
    task : str
        What needs it, for the message, such as ``"simulating"``.
    extra : str

    Raises
    ------
    InputError
        If it, or what it imports, is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package(task, error.name, extra) from error
