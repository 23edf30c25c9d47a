"""What the hardware's conversion to float does for every input, also those that decode refuses.

:func:`golden.tensor.decode` raises for reserved codes and for values outside float32's normal
range. Hardware cannot raise; it sets a flag and gives a defined value:

* a reserved HIF shift counts as the largest shift, a reserved exponent of a scale or row scale as a
  finite one, the NaN of E4M3 as 480, the reserved code of an integer as 0; flag ``reserved``;
* a result of 2**128 or more becomes an infinity of its sign; flag ``overflow``;
* a result below 2**-126 other than zero becomes +0; flag ``underflow``.

Range is judged after rounding. Zero is always +0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.formats import (
    BF16,
    FP32,
    OUTPUT_FORMATS,
    FloatFormat,
    HifFormat,
    IntFormat,
    NumberFormat,
    Specials,
)

__all__ = ["FloatOutput", "element_to_float"]

# Of float32 and bfloat16 alike.
_OVERFLOW = 2.0 ** (FP32.bias + 1)
_SMALLEST_NORMAL = 2.0 ** (1 - FP32.bias)


@dataclass(frozen=True, eq=False)
class FloatOutput:
    """Result of :func:`element_to_float`, every array of the same shape.

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


def _integer_values(
    codes: NDArray[np.unsignedinteger], fmt: IntFormat
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    half = 1 << (fmt.bits - 1)
    wide = codes.astype(np.int64)
    reserved = wide == half
    return np.where(reserved, 0, wide - 2 * half * (wide > half)).astype(np.float64), reserved


def _float_values(
    codes: NDArray[np.unsignedinteger], fmt: FloatFormat
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    wide = codes.astype(np.int64)
    mantissa = wide & ((1 << fmt.mantissa_bits) - 1)
    exponent = fmt.exponent_field(wide)
    hidden = np.where(exponent > 0, 1 << fmt.mantissa_bits, 0)
    last_place = np.maximum(exponent, 1) - fmt.bias - fmt.mantissa_bits
    magnitude = np.ldexp((mantissa | hidden).astype(np.float64), last_place)
    negative = wide >> (fmt.mantissa_bits + fmt.exponent_bits) == 1
    special = fmt.specials is not Specials.NONE and exponent == (1 << fmt.exponent_bits) - 1
    if fmt.specials is Specials.NAN_ALL_ONES:
        special = special & (mantissa == (1 << fmt.mantissa_bits) - 1)
    reserved = np.broadcast_to(special, wide.shape)
    return np.where(negative, -magnitude, magnitude), reserved


def _element_values(
    codes: NDArray[np.unsignedinteger], element: NumberFormat
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    if isinstance(element, HifFormat):
        return _hif_values(codes, element)
    if isinstance(element, IntFormat):
        return _integer_values(codes, element)
    assert isinstance(element, FloatFormat)
    return _float_values(codes, element)


def element_to_float(
    codes: NDArray[np.unsignedinteger],
    scale_codes: NDArray[np.unsignedinteger],
    layer_exponent: NDArray[np.int64] | int,
    *,
    element: NumberFormat,
    scale: FloatFormat,
    row_scales: NDArray[np.uint16] | None = None,
    output: str = "float32",
) -> FloatOutput:
    """Bit patterns of ``element * scale * row scale * 2**layer_exponent`` as hardware gives them.

    Parameters
    ----------
    codes, scale_codes : unsigned integer arrays, shapes that broadcast
        Any codes of their formats, reserved ones included. Not modified.
    layer_exponent : int or int64 array that broadcasts
        f, in range(-256, 256).
    element : NumberFormat
        HIF, or the atom.
    scale : FloatFormat
    row_scales : uint16 array that broadcasts, optional
        bfloat16 bit patterns.
    output : str
        ``"float32"`` (exact) or ``"bfloat16"`` (nearest, ties to even).
    """
    values, reserved = _element_values(np.asarray(codes), element)
    scales, bad_scale = _float_values(np.asarray(scale_codes), scale)
    reserved = reserved | bad_scale
    if row_scales is not None:
        factors, bad_factor = _float_values(np.asarray(row_scales), BF16)
        scales, reserved = scales * factors, reserved | bad_factor
    # Exact: at most 24 significant bits, exponents far inside float64's range.
    exact = np.ldexp(values * scales, layer_exponent)
    significand, exponent = np.frexp(exact)
    unit = 2 << OUTPUT_FORMATS[output].mantissa_bits  # the hidden bit counts too
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
    return FloatOutput(bits, np.broadcast_to(reserved, bits.shape), overflow, underflow)
