"""Loops of error feedback.

They are those of :mod:`golden.exact_products`, :mod:`golden.factors`, :mod:`golden.block_rounding`
and :mod:`golden.feedback`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import golden.feedback
from fast.compiling import compiled
from fast.levels import find, indices_of
from golden import exact_products
from golden.block_rounding import Turn
from golden.convert import RoundingTable
from golden.engine import definition_of
from golden.exact_products import Products, SplitMatrix, integer_exponent

__all__ = [
    "add_joined",
    "add_product",
    "eliminate",
    "missed_by",
    "round_in_turn",
    "solve",
    "split",
    "weighted_sum",
]

Float64 = NDArray[np.float64]

# A product with such a power of two rounds as ldexp does, and so does one with its inverse.
_EXPONENTS = range(-1022, 1023)

_MAGNITUDE = (1 << 63) - 1  # all bits of a float64 but its sign


# ------------------------------------------------------------------------------------- products


def split(values: Float64, bits: int) -> SplitMatrix:
    """:func:`golden.exact_products.split`."""
    limit = 2.0**bits - 1
    high_exponent = integer_exponent(_largest(values.view(np.int64)), bits)
    if high_exponent in _EXPONENTS:
        high, left = np.empty(values.shape), np.empty(values.shape)
        _round(values, 2.0**-high_exponent, 2.0**high_exponent, limit, high, left)
        low_exponent = integer_exponent(_largest(left.view(np.int64)), bits)
        if low_exponent in _EXPONENTS:
            _round(left, 2.0**-low_exponent, 0.0, limit, left, np.empty((0, 0)))
            return SplitMatrix(high, left, high_exponent, low_exponent)
    return definition_of(exact_products.split)(values, bits)


@compiled
def _largest(bits: Any) -> float:
    """Largest magnitude of numbers, given as their bits, which are ordered as they are."""
    largest = np.zeros(1, dtype=np.int64)
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            largest[0] = max(largest[0], bits[i, j] & _MAGNITUDE)
    return largest.view(np.float64)[0]


@compiled
def _round(values: Any, scale: float, unit: float, limit: float, integers: Any, left: Any) -> None:
    """Round ``values * scale`` to integers; what is left of the values, if ``left`` has room."""
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            integer = np.rint(values[i, j] * scale)
            integer = integer if integer > -limit else -limit
            integer = integer if integer < limit else limit
            if left.size:
                left[i, j] = values[i, j] - integer * unit
            integers[i, j] = integer


def add_joined(
    total: Float64, products: Products, left: SplitMatrix, right: SplitMatrix, sign: int
) -> None:
    """:func:`golden.exact_products.add_joined`."""
    exponents = (
        left.high_exponent + right.high_exponent,
        left.high_exponent + right.low_exponent,
        left.low_exponent + right.high_exponent,
    )
    if not all(exponent in _EXPONENTS for exponent in exponents):
        definition_of(exact_products.add_joined)(total, products, left, right, sign)
    else:
        _add_joined(total, *products, *(sign * 2.0**exponent for exponent in exponents))


@compiled
def _add_joined(
    total: Any, high: Any, high_low: Any, low_high: Any, high_unit: float, high_low_unit: float,
    low_high_unit: float,
) -> None:  # fmt: skip
    for i in range(total.shape[0]):
        for j in range(total.shape[1]):
            part = high[i, j] * high_unit + high_low[i, j] * high_low_unit
            total[i, j] += part + low_high[i, j] * low_high_unit


def add_product(total: Float64, left: Float64, right: Float64, exponent: int) -> None:
    """:func:`golden.exact_products.add_product`."""
    if exponent in _EXPONENTS:
        _add(total, left @ right, 2.0**exponent)
    else:
        definition_of(exact_products.add_product)(total, left, right, exponent)


@compiled
def _add(total: Any, product: Any, unit: float) -> None:
    for i in range(total.shape[0]):
        for j in range(total.shape[1]):
            total[i, j] += product[i, j] * unit


def weighted_sum(
    products: Products, lows: Float64, left: SplitMatrix, right: SplitMatrix, moment: Float64
) -> float:
    """:func:`golden.feedback.weighted_sum`."""
    exponents = (
        left.high_exponent + right.high_exponent,
        left.high_exponent + right.low_exponent,
        left.low_exponent + right.high_exponent,
        left.low_exponent + right.low_exponent,
    )
    if not all(exponent in _EXPONENTS for exponent in exponents):
        return definition_of(golden.feedback.weighted_sum)(products, lows, left, right, moment)
    units = np.array([2.0**exponent for exponent in exponents])
    return _weighted_sum(*products, lows, units, moment)


@compiled
def _weighted_sum(
    high: Any, high_low: Any, low_high: Any, low: Any, units: Any, moment: Any
) -> float:  # fmt: skip
    rows, columns = high.shape
    sums = np.zeros(columns)
    for i in range(rows):
        for j in range(columns):
            total = high[i, j] * units[0] + high_low[i, j] * units[1]
            total = total + low_high[i, j] * units[2] + low[i, j] * units[3]
            sums[j] += total * moment[i, j] * (1.0 if j < rows else 2.0)
    total = 0.0
    for j in range(columns):
        total += sums[j]
    return total


# -------------------------------------------------------------------------------------- factors


@compiled
def eliminate(rest: Any, start: int, diagonal: Any, powers: Any) -> int:
    """:func:`golden.factors.eliminate`: the panel's own rows first, then each row by itself."""
    stop = len(powers)
    panel = np.empty((stop - start, stop - start))  # its part of powers, transposed
    for k in range(stop - 1, start - 1, -1):
        diagonal[k] = rest[k, k]
        if not diagonal[k] > 0:
            return k
        for i in range(start, k):
            powers[i, k - start] = rest[i, k]
            panel[k - start, i - start] = rest[i, k]
        for i in range(start, k):
            rest[i, k] /= diagonal[k]
            for j in range(start, k):
                rest[i, j] -= rest[i, k] * panel[k - start, j - start]
    row = np.empty(stop - start)
    for i in range(start):
        for j in range(stop - start):
            row[j] = rest[i, start + j]
        for k in range(stop - start - 1, -1, -1):
            powers[i, k] = row[k]
            row[k] /= diagonal[start + k]
            for j in range(k):
                row[j] -= row[k] * panel[k, j]
        for j in range(stop - start):
            rest[i, start + j] = row[j]
    return -1


def solve(upper: Float64, diagonal: Float64, right: Float64) -> Float64:
    """:func:`golden.factors.solve`."""
    x = right.copy()
    _solve(upper, diagonal, x)
    return x


@compiled
def _solve(upper: Any, diagonal: Any, x: Any) -> None:
    count, columns = x.shape
    for k in range(count - 1, -1, -1):
        for later in range(k + 1, count):
            for j in range(columns):
                x[k, j] -= upper[k, later] * x[later, j]
    for k in range(count):
        for j in range(columns):
            x[k, j] /= diagonal[k]
        for earlier in range(k):
            for j in range(columns):
                x[k, j] -= upper[earlier, k] * x[earlier, j]


# -------------------------------------------------------------------------------- block rounding


def missed_by(turn: Turn, values: Float64) -> Float64:
    """:func:`golden.block_rounding.missed_by`."""
    missed = np.zeros(values.shape[1])
    _miss(turn.weights, turn.targets, turn.upper, turn.diagonal, values, missed)
    return missed


@compiled
def _miss(weights: Any, targets: Any, upper: Any, diagonal: Any, values: Any, missed: Any) -> None:
    count, rows = values.shape
    target = np.empty(rows)
    for k in range(count):
        _aim(weights, targets, upper, values, k, target)
        for i in range(rows):
            left = target[i] - values[k, i]
            missed[i] += diagonal[k] * (left * left)


@compiled
def _aim(weights: Any, targets: Any, upper: Any, values: Any, k: int, target: Any) -> None:
    """Target of a channel after the values of the channels before it."""
    for i in range(len(target)):
        target[i] = targets[k, i]
    for earlier in range(k):
        for i in range(len(target)):
            target[i] += (weights[earlier, i] - values[earlier, i]) * upper[earlier, k]


def round_in_turn(
    turn: Turn, levels: RoundingTable, scales: Float64
) -> tuple[NDArray[np.intp], Float64, Float64]:
    """:func:`golden.block_rounding.round_in_turn`."""
    indices = np.empty(turn.targets.shape, dtype=np.intp)
    values, missed = np.empty(turn.targets.shape), np.zeros(len(scales))
    _round_in_turn(
        turn.weights, turn.targets, turn.upper, turn.diagonal, scales, levels.values, indices,
        values, missed, *indices_of(levels),
    )  # fmt: skip
    return indices, values, missed


@compiled
def _round_in_turn(
    weights: Any, targets: Any, upper: Any, diagonal: Any, scales: Any, levels: Any, indices: Any,
    values: Any, missed: Any, thresholds: Any, at_level: Any, first: float, last: float,
    at_step: Any,
) -> None:  # fmt: skip
    count, rows = values.shape
    target, quotients, found = np.empty(rows), np.empty(rows), np.empty(rows)
    for k in range(count):
        _aim(weights, targets, upper, values, k, target)
        for i in range(rows):
            quotients[i] = target[i] / (1.0 if scales[i] == 0.0 else scales[i])
        find(quotients, found, thresholds, at_level, first, last, at_step)
        for i in range(rows):
            at = np.uint32(found[i])
            indices[k, i] = at
            values[k, i] = levels[at] * scales[i]
        for i in range(rows):
            left = target[i] - values[k, i]
            missed[i] += diagonal[k] * (left * left)
