"""Nearest levels, as :class:`golden.convert.RoundingTable` finds them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast.compiling import compiled
from golden.convert import RoundingTable

__all__ = ["Lookup", "find", "find_one", "indices_of", "nearest_levels", "values_of"]

Float64 = NDArray[np.float64]

Lookup = tuple[Float64, Float64, float, float, Float64]
"""Thresholds of a table; what is found at each level; and, where the table has a direct look-up,
its first and last step and what is found at each step: no steps where it has none.

What is found is a value or an index, an index as a float64 too, so that one compiled function
serves both."""


def values_of(table: RoundingTable) -> Lookup:
    """Look-up of the nearest value."""
    if table.direct is None:
        return table.thresholds, table.values, 0.0, 0.0, np.empty(0)
    return (
        table.thresholds,
        table.values,
        table.direct.first,
        table.direct.last,
        table.direct.values,
    )


def indices_of(table: RoundingTable) -> Lookup:
    """Look-up of the index of the nearest value."""
    thresholds, values, first, last, _ = values_of(table)
    steps = np.empty(0) if table.direct is None else table.direct.indices.astype(np.float64)
    return thresholds, np.arange(len(values), dtype=np.float64), first, last, steps


@compiled
def find(
    x: Any, found: Any, thresholds: Any, at_level: Any, first: float, last: float, at_step: Any
) -> None:
    """Look up every element of ``x``, shape (anything,); ``found`` has the same shape."""
    if len(at_step):
        # Arithmetic and look-ups apart: the first loop then runs on vectors.
        for i in range(len(x)):
            step = np.ceil(x[i] * 2.0)
            step = step if step > first else first
            step = step if step < last else last
            found[i] = step - first
        for i in range(len(x)):
            # Unsigned, so that no code for negative positions is made.
            found[i] = at_step[np.uint32(found[i])]
    else:
        for i in range(len(x)):
            found[i] = find_one(x[i], thresholds, at_level)


@compiled
def find_one(x: float, thresholds: Any, at_level: Any) -> float:
    """Look up one element, by halving."""
    low, high = 0, len(thresholds)
    while low < high:
        middle = (low + high) // 2
        if thresholds[middle] < x:
            low = middle + 1
        else:
            high = middle
    return at_level[low]


def nearest_levels(
    values: Float64,
    scales: Float64,
    tables: Sequence[RoundingTable],
    second: NDArray[np.bool_],
) -> tuple[NDArray[np.intp], tuple[float, float]]:
    """:func:`golden.quantize.nearest_levels`."""
    index = np.empty(values.shape, dtype=np.intp)
    ends = np.inf, 0.0
    for number, table in enumerate(tables):
        smallest, largest = _nearest(
            values, scales, second == bool(number), index, table.values, *indices_of(table)
        )
        ends = min(ends[0], smallest), max(ends[1], largest)
    return index, ends


@compiled
def _nearest(
    values: Any, scales: Any, wanted: Any, index: Any, levels: Any,
    thresholds: Any, at_level: Any, first: float, last: float, at_step: Any,
) -> tuple[float, float]:  # fmt: skip
    """Write the indices of the blocks that are wanted; the ends of their magnitudes above 0."""
    size, count = values.shape
    quotients, found = np.empty(count), np.empty(count)
    smallest, largest = np.inf, 0.0
    for k in range(size):
        for i in range(count):
            quotients[i] = values[k, i] / (1.0 if scales[i] == 0.0 else scales[i])
        find(quotients, found, thresholds, at_level, first, last, at_step)
        for i in range(count):
            if wanted[i]:
                at = np.uint32(found[i])
                index[k, i] = at
                magnitude = abs(levels[at] * scales[i])
                if magnitude > 0.0:
                    smallest = min(smallest, magnitude)
                    largest = max(largest, magnitude)
    return smallest, largest
