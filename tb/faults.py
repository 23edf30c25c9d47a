"""Wrong versions of a module, made from its source text."""

import inspect
from types import ModuleType

__all__ = ["FIRST_FAILURE", "changed_module"]

FIRST_FAILURE = {"COCOTB_MAX_FAILURES": "1"}
"""Environment of a simulation that need not go on after a test has failed."""


def changed_module(module: ModuleType, old: str, new: str) -> ModuleType:
    """A module with one piece of its source text replaced.

    Raises
    ------
    AssertionError
        If the text does not occur exactly once: a fault cannot silently stop being one.
    """
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    changed = ModuleType("rtl.faulty")
    exec(compile(source.replace(old, new), module.__file__ or "", "exec"), vars(changed))
    return changed
