"""How loops are compiled: strict IEEE arithmetic, kept on disk."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["compiled", "compiled_loops"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

compiled_loops: list[Any] = []
"""Every function that :func:`compiled` was given, as numba's dispatchers."""


def compiled(function: _Function) -> _Function:
    """Compile a function when it is first called, once for each machine and set of types.

    No ``fastmath``: nothing is reassociated and no product and sum are fused, so every operation
    rounds as NumPy's does. With numba's ``error_model="numpy"`` a division by zero gives infinity
    or NaN, which also lets loops be vectorized.
    """
    loop: Any
    try:
        loop = numba.njit(cache=True, error_model="numpy", nogil=True)(function)
    except RuntimeError:  # there is no folder to keep it in
        loop = numba.njit(error_model="numpy", nogil=True)(function)
    compiled_loops.append(loop)
    return cast(_Function, loop)
