"""Which engine runs the quantizer's inner loops: golden's own, or the compiled one.

Both give the same bytes, so the choice is no part of the settings that a file keeps.
"""

from golden.engine import GOLDEN, Engine
from golden.errors import InputError

__all__ = ["ENGINES", "engine_named"]

ENGINES = ("auto", "golden", "fast")

_INSTALL = "pip install -c constraints.txt 'scaled-outer-product[fast]'"


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
        if name == "fast":
            missing = error.name if isinstance(error, ModuleNotFoundError) else str(error)
            raise InputError(f"--engine fast needs {missing!r}; run `{_INSTALL}`") from error
        return GOLDEN
    return FAST
