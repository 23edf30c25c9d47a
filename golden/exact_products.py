"""Matrix products that come out the same on every machine.

A BLAS adds in an order of its own, and with or without fused operations, so its products differ in
the last bits between machines. Sums of integers below 2**53 do not: every partial sum is exact,
whatever the order. So both factors are rounded to integers first, short enough for that.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["exact_product", "to_integers"]

Float64 = NDArray[np.float64]

_EXACT_BITS = 53


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
    largest = float(np.abs(values).max()) if values.size else 0.0
    if largest == 0.0:
        return np.zeros_like(values), 0
    exponent = int(np.frexp(largest)[1]) - bits
    limit = 2.0**bits - 1
    return np.clip(np.rint(np.ldexp(values, -exponent)), -limit, limit), exponent


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
    bits = (_EXACT_BITS - max(1, first.shape[1]).bit_length()) // 2
    left, left_exponent = to_integers(first, bits)
    right, right_exponent = to_integers(second, bits)
    product = np.ldexp(left @ right, left_exponent + right_exponent)
    if precise:
        left_rest, left_below = to_integers(first - np.ldexp(left, left_exponent), bits)
        right_rest, right_below = to_integers(second - np.ldexp(right, right_exponent), bits)
        product += np.ldexp(left @ right_rest, left_exponent + right_below)
        product += np.ldexp(left_rest @ right, left_below + right_exponent)
    return product
