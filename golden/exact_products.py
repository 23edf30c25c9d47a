"""Matrix products that come out the same on every machine.

A BLAS adds in an order of its own, and with or without fused operations, so its products differ in
the last bits between machines. Sums of integers below 2**53 do not: every partial sum is exact,
whatever the order. So both factors are rounded to integers first, short enough for that.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.engine import inner_loop

__all__ = [
    "Products",
    "SplitMatrix",
    "SplitRows",
    "add_joined",
    "add_product",
    "exact_product",
    "integer_exponent",
    "integer_products",
    "joined",
    "kept_bits",
    "round_to_integers",
    "scaled",
    "split",
    "to_integers",
]

Float64 = NDArray[np.float64]

_EXACT_BITS = 53
_NORMAL_EXPONENTS = range(-1022, 1024)


def kept_bits(inner: int) -> int:
    """Bits of each factor with which sums of that many products stay below 2**53."""
    return (_EXACT_BITS - max(1, inner).bit_length()) // 2


def scaled(values: Float64, exponent: int) -> Float64:
    """``values * 2**exponent``, rounded once, as :func:`numpy.ldexp` gives it but faster."""
    if exponent in _NORMAL_EXPONENTS:
        return values * 2.0**exponent
    return np.ldexp(values, exponent)


def to_integers(values: Float64, bits: int) -> tuple[Float64, int]:
    """Round to integers below ``2**bits`` in magnitude: ``values`` is about ``integers * 2**e``.

    Parameters
    ----------
    values : float64 array, any shape
        Finite. Not modified.
    bits : int

    Returns
    -------
    integers : float64 array, same shape
        Whole numbers, rounded to nearest, ties to even.
    exponent : int
        e; 0 where all values are zero.
    """
    exponent = integer_exponent(float(np.abs(values).max()) if values.size else 0.0, bits)
    return round_to_integers(values, exponent, bits), exponent


def integer_exponent(largest: float, bits: int) -> int:
    """E of :func:`to_integers` for a matrix of that largest magnitude."""
    return int(np.frexp(largest)[1]) - bits if largest else 0


def round_to_integers(values: Float64, exponent: int, bits: int) -> Float64:
    """The integers of :func:`to_integers`, e being known."""
    limit = 2.0**bits - 1
    integers = scaled(values, -exponent)
    np.rint(integers, out=integers)
    return np.clip(integers, -limit, limit, out=integers)


@dataclass(frozen=True, eq=False)
class SplitMatrix:
    """A matrix in two parts, about ``high * 2**high_exponent + low * 2**low_exponent``.

    Attributes
    ----------
    high, low : float64 arrays, shape (rows, columns)
        Whole numbers.
    high_exponent, low_exponent : int
    """

    high: Float64
    low: Float64
    high_exponent: int
    low_exponent: int

    def __getitem__(self, key: Any) -> "SplitMatrix":
        """Some of its rows and columns."""
        return SplitMatrix(self.high[key], self.low[key], self.high_exponent, self.low_exponent)

    @property
    def transposed(self) -> "SplitMatrix":
        """Rows and columns exchanged."""
        return SplitMatrix(self.high.T, self.low.T, self.high_exponent, self.low_exponent)


@inner_loop
def split(values: Float64, bits: int) -> SplitMatrix:
    """Round a matrix to integers, and what is left once more.

    Parameters
    ----------
    values : float64 array, shape (rows, columns)
        Finite. Not modified.
    bits : int
        Of each part (:func:`kept_bits`).
    """
    high, high_exponent = to_integers(values, bits)
    low, low_exponent = to_integers(values - scaled(high, high_exponent), bits)
    return SplitMatrix(high, low, high_exponent, low_exponent)


class SplitRows:
    """A split matrix whose rows change, some at a time.

    Parameters
    ----------
    values : float64 array, shape (rows, columns)
        Finite. Not modified.
    bits : int
        As in :func:`split`.

    Attributes
    ----------
    parts : SplitMatrix
        What :func:`split` gives for the matrix as it is.
    """

    def __init__(self, values: Float64, bits: int) -> None:
        self._values = values.copy()
        self._bits = bits
        self._split()

    def _split(self) -> None:
        self.parts = split(self._values, self._bits)
        self._largest = _largest_of_rows(self._values)
        self._left = _largest_of_rows(self._values - scaled(self.parts.high, self._exponents[0]))

    @property
    def _exponents(self) -> tuple[int, int]:
        return self.parts.high_exponent, self.parts.low_exponent

    def replace(self, rows: slice, values: Float64) -> bool:
        """Put other values into some rows; whether that changed the integers of other rows."""
        self._values[rows] = values
        self._largest[rows] = _largest_of_rows(values)
        high_exponent = integer_exponent(float(self._largest.max()), self._bits)
        high = round_to_integers(values, high_exponent, self._bits)
        left = values - scaled(high, high_exponent)
        self._left[rows] = _largest_of_rows(left)
        low_exponent = integer_exponent(float(self._left.max()), self._bits)
        if (high_exponent, low_exponent) != self._exponents:
            self._split()
            return True
        self.parts.high[rows] = high
        self.parts.low[rows] = round_to_integers(left, low_exponent, self._bits)
        return False


def _largest_of_rows(values: Float64) -> Float64:
    """Largest magnitude in each row."""
    return np.maximum(values.max(axis=1), -values.min(axis=1))


Products = tuple[Float64, Float64, Float64]
"""Of the integers of two split matrices: high x high, high x low and low x high."""


def integer_products(left: SplitMatrix, right: SplitMatrix) -> Products:
    """Products of the parts; sums of such products over other inner elements add up exactly.

    Both matrices must have been split with the bits that :func:`kept_bits` allows for all inner
    elements together.
    """
    return left.high @ right.high, left.high @ right.low, left.low @ right.high


@inner_loop
def add_joined(
    total: Float64, products: Products, left: SplitMatrix, right: SplitMatrix, sign: int
) -> None:
    """Add the product of two split matrices, given those of their parts, to a matrix.

    Parameters
    ----------
    total : float64 array, shape (rows, columns)
        Modified.
    products : tuple of float64 arrays, shape (rows, columns)
        As :func:`integer_products` gives them.
    left, right : SplitMatrix
        Their exponents count.
    sign : int
        1 to add, -1 to subtract.
    """
    product = scaled(products[0], left.high_exponent + right.high_exponent)
    product += scaled(products[1], left.high_exponent + right.low_exponent)
    product += scaled(products[2], left.low_exponent + right.high_exponent)
    if sign > 0:
        total += product
    else:
        total -= product


def joined(products: Products, left: SplitMatrix, right: SplitMatrix) -> Float64:
    """The product of two split matrices from those of their parts."""
    total = np.zeros_like(products[0])
    add_joined(total, products, left, right, 1)
    return total


@inner_loop
def add_product(total: Float64, left: Float64, right: Float64, exponent: int) -> None:
    """Add ``(left @ right) * 2**exponent`` to a matrix, both being whole numbers.

    Parameters
    ----------
    total : float64 array, shape (rows, columns)
        Modified.
    left, right : float64 arrays, shape (rows, inner) and (inner, columns)
    exponent : int
    """
    total += scaled(left @ right, exponent)


def exact_product(first: Float64, second: Float64, *, precise: bool = False) -> Float64:
    """Matrix product of two matrices rounded to integers, the same bits on every machine.

    The two share the 53 bits of a float64 less those that the sum needs: with 16 inner elements
    each keeps 24 bits, with 2,048 each keeps 20, relative to the largest element of its matrix.

    Parameters
    ----------
    first : float64 array, shape (rows, inner)
    second : float64 array, shape (inner, columns)
        Both finite. Not modified.
    precise : bool
        Also multiply what the rounding leaves, which doubles the bits at three times the work.

    Returns
    -------
    product : float64 array, shape (rows, columns)
    """
    bits = kept_bits(first.shape[1])
    if precise:
        first_parts, second_parts = split(first, bits), split(second, bits)
        return joined(integer_products(first_parts, second_parts), first_parts, second_parts)
    left, left_exponent = to_integers(first, bits)
    right, right_exponent = to_integers(second, bits)
    return scaled(left @ right, left_exponent + right_exponent)
