"""Loops of :mod:`golden.training`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast.compiling import compiled

__all__ = ["best_predecessors", "cell_sums"]

Float64 = NDArray[np.float64]


def cell_sums(blocks: Float64, scales: Float64, weights: Float64 | None, limit: int) -> Float64:
    """:func:`golden.training.cell_sums`."""
    sums = np.zeros((3, 2 * limit + 1))
    # A product with 1 is exact.
    _add_cells(blocks, scales, np.ones(blocks.shape) if weights is None else weights, limit, sums)
    return sums


@compiled
def _add_cells(blocks: Any, scales: Any, weights: Any, limit: int, sums: Any) -> None:
    size, count = blocks.shape
    for k in range(size):
        for i in range(count):
            quotient = blocks[k, i] / scales[i]
            cell = int(min(max(np.ceil(2.0 * quotient), -limit), limit)) + limit
            power = scales[i] * scales[i] * weights[k, i]
            sums[0, cell] += power
            sums[1, cell] += power * quotient
            sums[2, cell] += power * (quotient * quotient)


@compiled
def best_predecessors(best: Any, between: Any) -> tuple[Float64, NDArray[np.intp]]:
    """:func:`golden.training.best_predecessors`."""
    count = len(best)
    least = best[0] + between[0]
    choice = np.zeros(count, dtype=np.intp)
    for i in range(1, count):
        for j in range(count):
            total = best[i] + between[i, j]
            if total < least[j]:
                least[j] = total
                choice[j] = i
    return least, choice
