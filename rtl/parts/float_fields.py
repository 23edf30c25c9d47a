"""Significands and exponents of binary floating point, from its fields (IEEE 754-2019, 3.4)."""

from amaranth.hdl import Cat, Value

from rtl.layouts import FLOAT32

__all__ = ["BIAS", "SIGNIFICAND", "TOP_EXPONENT", "place", "significand"]

BIAS = 127
"""Of float32 and bfloat16 alike."""

TOP_EXPONENT = 255
"""Exponent field of their infinities."""

SIGNIFICAND: int = FLOAT32["mantissa"].width + 1
"""Bits of a float32 significand, hidden bit included."""


def significand(mantissa: Value, exponent: Value) -> Value:
    """The mantissa with its hidden bit, which only subnormal numbers and zeros lack.

    Parameters
    ----------
    mantissa, exponent : Value
        Fields as they are stored.
    """
    return Cat(mantissa, exponent.any())


def place(exponent: Value) -> Value:
    """The exponent field that the significand counts with: subnormals share that of field 1.

    Parameters
    ----------
    exponent : Value
        Field as it is stored.
    """
    return Cat(exponent[0] | ~exponent.any(), exponent[1:])
