"""Which engine runs the quantizer's inner loops: golden's own, or the compiled one.

Both give the same bytes, so the choice is no part of the settings that a file keeps.
"""

from golden.engine import GOLDEN, Engine
from golden.errors import InputError
from golden.extras import missing_package

__all__ = ["ENGINES", "engine_named"]

ENGINES = ("auto", "golden", "fast")


def engine_named(name: str) -> Engine:
    """The engine of that name; ``auto`` is the fast one where it is installed.

    Raises
    ------
    InputError
        If the fast one is asked for and cannot be loaded.
    """
    if name == "golden":
        return GOLDEN
    try:
        # Only here: compiling takes packages that not everyone has, and half a second to load.
        from fast.engine import FAST
    except ImportError as error:
        if name == "auto":
            return GOLDEN
        if isinstance(error, ModuleNotFoundError):
            raise missing_package("--engine fast", error.name, "fast") from error
        # numba says so of a NumPy that it does not know.
        raise InputError(f"--engine fast: {error}") from error
    return FAST
