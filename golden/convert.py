"""Array versions of encoding and decoding; exactly equal to the scalar ones in golden.formats.

Every rounding decision in the golden model is one comparison against a table of thresholds that is
built here, so each tie rule has one home:

* number formats: nearest, ties to the even code (:func:`format_table`);
* lookup tables and codebooks: nearest, ties to the lower index (:func:`level_table`).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.errors import InputError
from golden.formats import FloatFormat, Kind, NumberFormat

__all__ = [
    "DirectSteps",
    "RoundingTable",
    "code_dtype",
    "decode_array",
    "encode_array",
    "format_table",
    "level_table",
    "round_bfloat16",
]

Float64 = NDArray[np.float64]

_MAX_DIRECT_STEPS = 4096  # the look-up table of doubled values stays inside the first-level cache


@dataclass(frozen=True, eq=False)
class DirectSteps:
    """Look-up of the nearest value by ``clip(ceil(2 * x), first, last) - first``.

    Attributes
    ----------
    first, last : float
        Whole numbers.
    indices : intp array, shape (last - first + 1,)
        Index of the nearest value at each step.
    values : float64 array, same shape
        The value itself.
    """

    first: float
    last: float
    indices: NDArray[np.intp]
    values: Float64


class RoundingTable:
    """Ascending values and the thresholds between them, with fast nearest-value look-up.

    Parameters
    ----------
    values : float64 array, shape (values,)
        Strictly ascending, exact.
    tie_goes_up : bool array, shape (values - 1,)
        For each pair of neighbours, whether their midpoint rounds to the higher one.

    Attributes
    ----------
    values : float64 array, shape (values,)
    thresholds : float64 array, shape (values - 1,)
        ``x`` rounds to ``values[i]`` where ``i`` thresholds are below ``x``. A tie that goes up has
        its threshold one float64 below the midpoint, so that a plain comparison decides it.
    direct : DirectSteps or None
        Where the values allow it.
    """

    def __init__(self, values: Float64, tie_goes_up: NDArray[np.bool_]) -> None:
        self.values = values
        # Exact: neighbouring values share a binade or differ by few bits, far below 53.
        midpoints = (values[:-1] + values[1:]) / 2
        self.thresholds = np.where(tie_goes_up, np.nextafter(midpoints, -np.inf), midpoints)
        doubled = 2 * self.thresholds
        # Small integer values whose ties all go down (every LUT) need no binary search: ceil(2 x)
        # says which doubled midpoints lie below 2 x. One step beyond both ends is enough, because
        # everything outside saturates.
        self.direct: DirectSteps | None = None
        if (doubled == np.rint(doubled)).all() and doubled[-1] - doubled[0] < _MAX_DIRECT_STEPS:
            first, last = doubled[0], doubled[-1] + 1
            below = np.searchsorted(doubled, np.arange(first, last + 1), side="left")
            self.direct = DirectSteps(float(first), float(last), below, values[below])

    @property
    def low_end(self) -> float:
        """The lowest value."""
        return float(self.values[0])

    @property
    def high_end(self) -> float:
        """The highest value."""
        return float(self.values[-1])

    @property
    def large_end(self) -> float:
        """The end of larger magnitude; the low one where both are equal."""
        return self.high_end if self.high_end > -self.low_end else self.low_end

    @property
    def small_end(self) -> float:
        """Magnitude of the end of smaller magnitude."""
        return min(self.high_end, -self.low_end)

    def nearest_index(self, x: Float64) -> NDArray[np.intp]:
        """Index of the value nearest to each ``x`` (no NaN), same shape; saturates."""
        if self.direct is None:
            return np.searchsorted(self.thresholds, x, side="left")
        return self.direct.indices.take(_step(x, self.direct))

    def nearest_value(self, x: Float64) -> Float64:
        """The value nearest to each ``x`` (no NaN), same shape; saturates."""
        if self.direct is None:
            return self.values.take(np.searchsorted(self.thresholds, x, side="left"))
        return self.direct.values.take(_step(x, self.direct))


def _step(x: Float64, steps: DirectSteps) -> NDArray[np.intp]:
    doubled = np.ceil(x * 2.0)
    np.clip(doubled, steps.first, steps.last, out=doubled)
    doubled -= steps.first
    return doubled.astype(np.intp)


@lru_cache(maxsize=64)
def format_table(fmt: NumberFormat) -> RoundingTable:
    """Rounding table of a number format: ties to the even code."""
    codes = list(fmt.canonical.values())
    values = np.array([float(value) for value in fmt.canonical])
    up = [not fmt.is_even(low) for low in codes[:-1]]
    return RoundingTable(values, np.array(up, dtype=bool))


def level_table(levels: ArrayLike) -> RoundingTable:
    """Rounding table of a codebook: ties to the lower index.

    Parameters
    ----------
    levels : array_like of numbers, shape (levels,)
        Strictly ascending.

    Raises
    ------
    InputError
        If the levels are not strictly ascending and finite.
    """
    values = np.asarray(levels, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(
            f"a codebook needs at least two levels in one row, not shape {values.shape}"
        )
    if not (np.isfinite(values).all() and (np.diff(values) > 0).all()):
        raise InputError(f"codebook levels must be finite and strictly ascending, not {levels!r}")
    return RoundingTable(values, np.zeros(len(values) - 1, dtype=bool))


def code_dtype(width: int) -> type[np.uint8 | np.uint16]:
    """Smallest unsigned dtype that holds a code of ``width`` bits, at most 16."""
    return np.uint8 if width <= 8 else np.uint16


@lru_cache(maxsize=64)
def _canonical_codes(fmt: NumberFormat) -> NDArray[np.uint16]:
    return np.array(list(fmt.canonical.values()), dtype=code_dtype(fmt.width))


@lru_cache(maxsize=64)
def _decoded_values(fmt: NumberFormat) -> Float64:
    """Value of every code; NaN where the code has none; -0.0 for a negative zero."""
    values = np.full(1 << fmt.width, np.nan)
    for code in range(1 << fmt.width):
        decoded = fmt.decode(code)
        if decoded.kind is Kind.ZERO:
            values[code] = -0.0 if decoded.sign else 0.0
        elif decoded.kind not in (Kind.NAN, Kind.RESERVED):
            significand = -decoded.significand if decoded.sign else decoded.significand
            values[code] = math.ldexp(significand, decoded.exponent)
    return values


def encode_array(values: ArrayLike, fmt: NumberFormat) -> NDArray[np.unsignedinteger]:
    """Codes of the nearest values of ``fmt``: ties to even, saturating, infinities included.

    The sign of a zero is kept where the format has a negative zero, as ml_dtypes does: a small
    negative value may become -0. Everything else is canonical.

    Parameters
    ----------
    values : array_like of float32 or float64, any shape
        Not modified.
    fmt : NumberFormat
        Target format.

    Returns
    -------
    codes : uint8 or uint16 array, same shape, values in ``range(2**fmt.width)``

    Raises
    ------
    InputError
        If a value is NaN; the message names its position.
    """
    exact = np.asarray(values, dtype=np.float64)
    invalid = np.isnan(exact)
    if invalid.any():
        position = tuple(int(i) for i in np.argwhere(invalid)[0])
        raise InputError(f"NaN at position {position} has no code in {fmt.name}")
    codes = _canonical_codes(fmt)[format_table(fmt).nearest_index(exact)]
    if isinstance(fmt, FloatFormat) and fmt.signed:
        negative_zero = np.signbit(exact) & (codes == 0)
        codes = codes | negative_zero.astype(codes.dtype) << np.uint8(fmt.field_offset("sign"))
    return codes


def decode_array(codes: ArrayLike, fmt: NumberFormat) -> Float64:
    """Exact values of codes.

    Parameters
    ----------
    codes : array_like of unsigned integers, any shape
        Each in ``range(2**fmt.width)``; need not be canonical. Not modified.
    fmt : NumberFormat
        Format of the codes.

    Returns
    -------
    values : float64 array, same shape

    Raises
    ------
    InputError
        If a code is out of range, NaN or reserved; the message names code and position.
    """
    index = np.asarray(codes)
    table = _decoded_values(fmt)
    if index.size and not (0 <= int(index.min()) and int(index.max()) < len(table)):
        worst = index.min() if int(index.min()) < 0 else index.max()
        raise InputError(f"{fmt.name} codes must be in range({len(table)}), not {worst}")
    values = table[index]
    invalid = np.isnan(values)
    if invalid.any():
        position = tuple(int(i) for i in np.argwhere(invalid)[0])
        code = int(index[position])
        kind = fmt.decode(code).kind.value
        raise InputError(f"{fmt.name} code {code:#x} at position {position} is {kind}")
    return np.asarray(values)


def round_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns of float32 values rounded to bfloat16: nearest, ties to even.

    Parameters
    ----------
    values : float32 array, any shape
        Finite. Not modified.

    Returns
    -------
    bits : uint16 array, same shape
    """
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)
