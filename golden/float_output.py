"""What the HIF-to-float hardware does for every input, also those that decode refuses.

:func:`golden.tensor.decode` raises for reserved codes and for values outside float32's normal
range. Hardware cannot raise; it sets a flag and gives a defined value:

* a reserved HIF shift counts as the largest shift, a reserved scale exponent as a finite one; flag
  ``reserved``;
* a result of 2**128 or more becomes an infinity of its sign; flag ``overflow``;
* a result below 2**-126 other than zero becomes +0; flag ``underflow``.

Range is judged after rounding. Zero is always +0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.formats import FloatFormat, HifFormat, Specials

__all__ = ["FloatOutput", "hif_to_float"]

# Significant bits, hidden bit included.
_PRECISION = {"float32": 24, "bfloat16": 8}
_OVERFLOW = 2.0**128
_SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True, eq=False)
class FloatOutput:
    """Result of :func:`hif_to_float`, every array of the same shape.

    ``bits`` is uint32 (float32) or uint16 (bfloat16); the flags are bool.
    """

    bits: NDArray[np.unsignedinteger]
    reserved: NDArray[np.bool_]
    overflow: NDArray[np.bool_]
    underflow: NDArray[np.bool_]


def _hif_values(
    codes: NDArray[np.unsignedinteger], hif: HifFormat
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    significand = codes.astype(np.int64) & ((1 << hif.significand_bits) - 1)
    negative = significand >> (hif.significand_bits - 1) == 1
    significand = np.where(negative, significand - (1 << hif.significand_bits), significand)
    shift = codes.astype(np.int64) >> hif.significand_bits
    reserved = shift >= hif.shifts
    return np.ldexp(significand.astype(np.float64), np.minimum(shift, hif.shifts - 1)), reserved


def _scale_values(
    codes: NDArray[np.unsignedinteger], scale: FloatFormat
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    wide = codes.astype(np.int64)
    mantissa = wide & ((1 << scale.mantissa_bits) - 1)
    exponent = wide >> scale.mantissa_bits & ((1 << scale.exponent_bits) - 1)
    hidden = np.where(exponent > 0, 1 << scale.mantissa_bits, 0)
    last_place = np.maximum(exponent, 1) - scale.bias - scale.mantissa_bits
    magnitude = np.ldexp((mantissa | hidden).astype(np.float64), last_place)
    negative = wide >> (scale.mantissa_bits + scale.exponent_bits) == 1
    top = (1 << scale.exponent_bits) - 1
    reserved = (exponent == top) & (scale.specials is Specials.TOP_EXPONENT)
    return np.where(negative, -magnitude, magnitude), reserved


def hif_to_float(
    hif_codes: NDArray[np.unsignedinteger],
    scale_codes: NDArray[np.unsignedinteger],
    layer_exponent: NDArray[np.int64] | int,
    *,
    hif: HifFormat,
    scale: FloatFormat,
    output: str = "float32",
) -> FloatOutput:
    """Bit patterns of ``HIF code * scale code * 2**layer_exponent`` as the hardware gives them.

    Parameters
    ----------
    hif_codes, scale_codes : unsigned integer arrays, shapes that broadcast
        Any codes of their formats, reserved ones included. Not modified.
    layer_exponent : int or int64 array that broadcasts
        f, in range(-128, 128).
    hif : HifFormat
    scale : FloatFormat
    output : str
        ``"float32"`` (exact) or ``"bfloat16"`` (nearest, ties to even).
    """
    values, bad_shift = _hif_values(np.asarray(hif_codes), hif)
    scales, bad_exponent = _scale_values(np.asarray(scale_codes), scale)
    # Exact: at most 14 significant bits, exponents far inside float64's range.
    exact = np.ldexp(values * scales, layer_exponent)
    significand, exponent = np.frexp(exact)
    unit = 1 << _PRECISION[output]
    rounded = np.ldexp(np.rint(significand * unit) / unit, exponent)

    magnitude = np.abs(rounded)
    overflow = magnitude >= _OVERFLOW
    underflow = (magnitude > 0) & (magnitude < _SMALLEST_NORMAL)
    finite = np.where(overflow | underflow, 0.0, rounded) + 0.0
    result = np.where(overflow, np.copysign(np.inf, rounded), finite).astype(np.float32)
    bits = result.view(np.uint32)
    if output == "bfloat16":
        # Already rounded: the lower half is zero.
        bits = (bits >> np.uint32(16)).astype(np.uint16)
    reserved = np.broadcast_to(bad_shift | bad_exponent, bits.shape)
    return FloatOutput(bits, reserved, overflow, underflow)
