"""Inner loops that another engine may run: compiled ones, say, with the same results bit for bit.

The functions of this package are the definition of what comes out. Those that take most of the time
are marked as inner loops; an :class:`Engine` brings a function of its own for any of them, which
takes the same arguments and returns the same bits. This package knows no engine but itself: who
wants another one says so with :func:`running_on`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

__all__ = ["GOLDEN", "Engine", "definition_of", "inner_loop", "running_on"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Engine:
    """Functions in place of inner loops.

    Attributes
    ----------
    name : str
    loops : mapping
        From a function marked :func:`inner_loop` to what runs in its place.
    """

    name: str
    loops: Mapping[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)


GOLDEN = Engine("golden")
"""The inner loops as they are defined, in NumPy."""

_engine: ContextVar[Engine] = ContextVar("engine", default=GOLDEN)


@contextmanager
def running_on(engine: Engine) -> Iterator[None]:
    """Run the inner loops on an engine, in this thread and as long as the context lasts."""
    token = _engine.set(engine)
    try:
        yield
    finally:
        _engine.reset(token)


def inner_loop(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Mark a function that an engine may replace; it takes positional arguments only."""

    @wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        loop: Callable[_Arguments, _Result] = _engine.get().loops.get(run, function)
        return loop(*args, **kwargs)

    return run


def definition_of(loop: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The golden function behind an inner loop, whatever engine runs."""
    return cast(Callable[_Arguments, _Result], vars(loop)["__wrapped__"])
