"""Sums of float64 numbers without any rounding, rounded once to float32 at the end.

A sum is a fixed-point number, held as bins of 32 bits each in a float64 array of its own. Adding
splits a number into one part per bin by the addition and subtraction of a constant whose last place
is the bin's (Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", 2013, use the same
step). Every part and every sum of parts is an integer below 2**53 in units of its bin, so nothing
is ever rounded and the result depends on no order.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["ExactSum", "round_to_odd"]

Float64 = NDArray[np.float64]

_BIN_BITS = 32
_BIN_MASK = (1 << _BIN_BITS) - 1
_MAX_ADDENDS = 1 << 20  # 2**52 in units of a bin


def round_to_odd(total: Float64, error: Float64) -> Float64:
    """Nearest float64 of a sum, moved to the odd neighbour where it is not exact.

    Rounding the result again to at most 51 bits rounds the exact sum once, because a sum that was
    not exact is never mistaken for a tie or for an exact number.

    Parameters
    ----------
    total : float64 array, any shape
        The sum, rounded to nearest, ties to even; normal numbers or zero. Not modified.
    error : float64 array, same shape
        The exact sum minus ``total``. Not modified.
    """
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    away = np.where(np.signbit(error) == np.signbit(total), 1, -1)
    return (bits + np.where(even & (error != 0), away, 0)).view(np.float64)


class ExactSum:
    """An array of sums.

    Parameters
    ----------
    shape : tuple of int
        Of the array.
    low, high : int
        What is added must be a multiple of ``2**low`` and less than ``2**high`` in magnitude.
    """

    def __init__(self, shape: tuple[int, ...], low: int, high: int) -> None:
        # The top bin takes what is below half of its range, the sign's share.
        count = max(1, -(-(high + 1 - low) // _BIN_BITS))
        self._exponents = [low + _BIN_BITS * position for position in range(count)]
        self._bins = [np.zeros(shape) for _ in range(count)]
        self._added = 0

    def add(self, values: Float64) -> None:
        """Add one number to each sum.

        Parameters
        ----------
        values : float64 array, of the shape of the sums
            In the range that the constructor was given. Not modified.
        """
        self._added += 1
        assert self._added <= _MAX_ADDENDS
        rest = values
        for position in reversed(range(1, len(self._bins))):
            magnet = 1.5 * 2.0 ** (52 + self._exponents[position])
            part = rest + magnet
            part -= magnet
            self._bins[position] += part
            rest = rest - part
        self._bins[0] += rest

    def merge(self, other: "ExactSum") -> None:
        """Add sums of the same shape and range, such as those over another part of K."""
        assert self._exponents == other._exponents
        self._added += other._added
        assert self._added <= _MAX_ADDENDS
        for mine, theirs in zip(self._bins, other._bins, strict=True):
            mine += theirs

    def round(self) -> NDArray[np.float32]:
        """The sums, each rounded once: nearest, ties to even, subnormals kept, overflow to inf."""
        digits = [
            np.ldexp(part, -exponent).astype(np.int64)
            for part, exponent in zip(self._bins, self._exponents, strict=True)
        ]
        negative = _carried(digits)[-1] < 0
        digits = _carried([np.where(negative, -digit, digit) for digit in digits])
        exponents = [*self._exponents, self._exponents[-1] + _BIN_BITS]
        magnitude = _leading_bits(digits, exponents)
        with np.errstate(over="ignore", under="ignore"):
            return np.where(negative, -magnitude, magnitude).astype(np.float32)


def _carried(digits: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """The same numbers with every digit in ``range(2**32)`` but one more, signed, at the top."""
    carry = np.zeros_like(digits[0])
    done = []
    for digit in digits:
        whole = digit + carry
        done.append(whole & _BIN_MASK)
        carry = whole >> _BIN_BITS
    return [*done, carry]


def _leading_bits(digits: list[NDArray[np.int64]], exponents: list[int]) -> Float64:
    """Numbers rounded to odd, with at least 32 bits, from digits that are not negative."""
    shape = digits[0].shape
    lead = np.zeros(shape, dtype=np.uint64)
    exponent = np.zeros(shape, dtype=np.int64)
    taken = np.zeros(shape, dtype=np.int64)  # digits from the first that is not zero
    sticky = np.zeros(shape, dtype=bool)
    for digit, unit in zip(reversed(digits), reversed(exponents), strict=True):
        taken += (taken > 0) | (digit != 0)
        into = (taken == 1) | (taken == 2)
        longer = lead << np.uint64(_BIN_BITS) | digit.astype(np.uint64)
        lead = np.where(into, longer, lead)
        exponent = np.where(into, unit, exponent)
        sticky |= (taken > 2) & (digit != 0)
    # Up to 64 bits: a float64 has 53.
    long = lead >> np.uint64(53) != 0
    sticky |= long & (lead & np.uint64(0x7FF) != 0)
    lead = np.where(long, lead >> np.uint64(11), lead)
    return np.ldexp(np.bitwise_or(lead, sticky).astype(np.float64), exponent + 11 * long)
