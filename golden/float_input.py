"""Small floats and bfloat16 to HIF codes: what the hardware's converter does for every input.

The value of a source code times ``2**shift`` is rounded to the nearest HIF value, ties to the even
significand of the canonical code, saturating at both ends; the codes are canonical. ``shift`` is
fixed where the hardware is built. What :func:`default_shift` takes is this project's choice.

Unlike :func:`golden.convert.encode_array` it is defined for every code, because hardware cannot
raise:

* a NaN becomes code 0; flag ``nan`` and no other. E4M3 and bfloat16 have them;
* a value beyond an end becomes that end; flags ``saturated`` and ``inexact``. The range is judged
  after rounding, as if the shifts of the format went on: to HIF7, whose highest value is 120, 121
  is only inexact, and 124, which HIF8 rounds to 128, is saturated too. Infinities of bfloat16 are
  beyond;
* any other value that is not equal to its code raises ``inexact`` alone.

Zeros of either sign become code 0, and subnormals are taken as they are.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.convert import decode_array, encode_array
from golden.errors import InputError
from golden.formats import BF16, E2M1, E2M3, E3M2, E4M3, FloatFormat, HifFormat, Specials

__all__ = ["SOURCES", "HifCodes", "checked_shift", "default_shift", "float_to_hif", "shift_range"]

SOURCES = {fmt.name: fmt for fmt in (E2M1, E2M3, E3M2, E4M3, BF16)}
"""Formats that can be converted. ``BF16`` is bfloat16 as IEEE 754 has it: infinities and NaNs."""


@dataclass(frozen=True, eq=False)
class HifCodes:
    """Result of :func:`float_to_hif`, every array of the same shape.

    ``codes`` is uint8, canonical; the flags are bool.
    """

    codes: NDArray[np.uint8]
    inexact: NDArray[np.bool_]
    saturated: NDArray[np.bool_]
    nan: NDArray[np.bool_]


def shift_range(source: FloatFormat, hif: HifFormat) -> range:
    """Shifts with which not every value becomes an end of ``hif`` or next to zero.

    The lowest takes the highest binade of ``source`` to 1..2, the highest its smallest value to
    half of full scale.
    """
    highest_binade = source.max_exponent + source.mantissa_bits
    half_scale = hif.full_scale.bit_length() - 2
    return range(-highest_binade, half_scale - source.min_exponent + 1)


def default_shift(source: FloatFormat, hif: HifFormat) -> int:
    """Power of two that a source is multiplied by where nothing else is asked for.

    * bfloat16: -1 becomes the lowest value, as a codebook level of -1 does (7 for HIF7, 8 else).
    * Others: the smallest value becomes 1, which makes every value exact (E2M1 1, E2M3 3); or, if
      the largest would not fit then, the most that it allows: E3M2 2 (HIF7) or 3, E4M3 -2 or -1.
    """
    if source == BF16:
        return hif.full_scale.bit_length() - 1
    shift = -source.min_exponent
    while source.max_value * Fraction(2) ** shift > hif.max_value:
        shift -= 1
    return shift


def checked_shift(source: FloatFormat, hif: HifFormat, shift: int | None = None) -> int:
    """The shift of a conversion: ``shift``, or the default if it is None.

    Raises
    ------
    InputError
        If there is no such conversion, or ``shift`` is not in :func:`shift_range`.
    """
    if SOURCES.get(source.name) != source:
        raise InputError(f"no conversion from {source.name}: sources are {', '.join(SOURCES)}")
    if shift is None:
        return default_shift(source, hif)
    allowed = shift_range(source, hif)
    if not isinstance(shift, int) or shift not in allowed:
        raise InputError(
            f"shift from {source.name} to {hif.name} must be {allowed[0]} to {allowed[-1]}, "
            f"not {shift!r}"
        )
    return shift


def _checked_codes(codes: ArrayLike, source: FloatFormat) -> NDArray[np.int64]:
    given = np.asarray(codes)
    if given.dtype.kind not in "iu":
        raise InputError(f"{source.name} codes must be integers, not {given.dtype}")
    wrong = (given < 0) | (given >= 1 << source.width)
    if wrong.any():
        position = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"{source.name} code {given[position]} at position {position} is not in "
            f"range({1 << source.width})"
        )
    return given.astype(np.int64)


def _source_values(codes: NDArray[np.int64], source: FloatFormat) -> NDArray[np.float64]:
    """Value of every code, infinities and NaN included."""
    magnitude = codes & ((1 << source.field_offset("sign")) - 1)
    # The first code above the finite ones, if there is one.
    infinity = ((1 << source.exponent_bits) - 1) << source.mantissa_bits
    nan = np.zeros(codes.shape, dtype=bool)
    infinite = nan
    if source.specials is Specials.NAN_ALL_ONES:
        nan = magnitude == infinity | ((1 << source.mantissa_bits) - 1)
    elif source.specials is Specials.TOP_EXPONENT:
        nan, infinite = magnitude > infinity, magnitude == infinity
    values = decode_array(np.where(nan | infinite, 0, codes), source)
    signed_infinity = np.where(codes == magnitude, np.inf, -np.inf)
    return np.where(nan, np.nan, np.where(infinite, signed_infinity, values))


def float_to_hif(
    codes: ArrayLike, source: FloatFormat, hif: HifFormat, shift: int | None = None
) -> HifCodes:
    """Codes of the HIF values nearest to source values times ``2**shift``, and flags.

    Parameters
    ----------
    codes : array_like of integers, any shape
        Codes of ``source``, bit patterns for bfloat16; any of them, NaN included. Not modified.
    source : FloatFormat
        One of :data:`SOURCES`.
    hif : HifFormat
        Format of the result.
    shift : int, optional
        In :func:`shift_range`; :func:`default_shift` if not given.

    Raises
    ------
    InputError
        If there is no such conversion or shift, or a code is out of range; the message names the
        code's position.
    """
    shift = checked_shift(source, hif, shift)
    values = np.ldexp(_source_values(_checked_codes(codes, source), source), shift)
    nan = np.isnan(values)
    exact = np.where(nan, 0.0, values)
    result = encode_array(exact, hif)
    wider = replace(hif, name=f"{hif.name} with one more shift", shifts=hif.shifts + 1)
    rounded = decode_array(encode_array(exact, wider), wider)
    saturated = (rounded < float(hif.min_value)) | (rounded > float(hif.max_value))
    return HifCodes(result.astype(np.uint8), decode_array(result, hif) != exact, saturated, nan)
