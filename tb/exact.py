"""Rounding in exact fractions: slow, short, and independent of any floating-point unit."""

import math
from fractions import Fraction

import numpy as np

from golden.formats import FP32

__all__ = ["float32_bits"]


def float32_bits(value: Fraction, *, negative: bool = False) -> int:
    """Bit pattern of the nearest float32, ties to even; an infinity from 2**128 - 2**103 on.

    Parameters
    ----------
    value : Fraction
        Not negative.
    negative : bool
        Sign of the result.
    """
    sign = int(negative) << 31
    if not value:
        return sign
    binade = value.numerator.bit_length() - value.denominator.bit_length()
    binade -= value < Fraction(2) ** binade
    place = max(binade - FP32.mantissa_bits, FP32.min_exponent)
    rounded = round(value / Fraction(2) ** place)  # Python's own: ties to even
    if rounded * Fraction(2) ** place >= 2 << FP32.bias:
        return sign | FP32.exponent_mask
    return sign | int(np.float32(math.ldexp(rounded, place)).view(np.uint32))
