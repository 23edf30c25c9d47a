"""Choice of the scale code of each block, and of the elements under it.

Blocks are handled in chunks laid out as (weights of a block, blocks): the scale of a block then
broadcasts along the contiguous axis, and the sum over a block is a fixed tree of elementwise
additions. Only IEEE additions, multiplications, divisions and comparisons of float64 decide
anything, each on one element at a time, so every machine decides alike.

Exactness: weights have 24 significant bits, scale times midpoint at most 17 (25 with a row scale).
A quotient of the two that is not equal to the midpoint therefore differs from it by far more than
one float64 rounding, so comparing rounded quotients with midpoints decides exactly as real numbers
would.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from golden.convert import RoundingTable, decode_array, format_table, round_bfloat16
from golden.engine import inner_loop
from golden.errors import InputError
from golden.formats import FloatFormat

__all__ = [
    "LAYER_EXPONENT_RANGE",
    "BlockEncoding",
    "Chunk",
    "ScaleMode",
    "ScaleRounder",
    "better_encoding",
    "choose_layer_exponent",
    "choose_row_scales",
    "covering_exponents",
    "encode_one_pass",
    "encode_with_codes",
    "one_pass_codes",
    "scale_rounder",
    "sum_over_block",
]

Float64 = NDArray[np.float64]


class ScaleMode(enum.Enum):
    """How the scale of a block is chosen.

    * ``absmax``: the largest magnitude maps to the smaller end of the levels; scale positive. A
      power-of-two scale (no mantissa) is rounded up, any other to nearest.
    * ``argmax``: the element of largest magnitude maps, with its sign, to the end of larger
      magnitude; needs a signed scale.
    * ``search``: the code with the least weighted squared error among all those around the extreme
      (:class:`golden.search.ScaleSearch`), never worse than the two above.

    Codes are rounded to nearest, ties to even. A block of zeros gets code 0 and error 0; no other
    block gets code 0.
    """

    ABSMAX = "absmax"
    ARGMAX = "argmax"
    SEARCH = "search"


LAYER_EXPONENT_RANGE = range(-128, 128)  # the 8-bit field that the hardware takes


class Chunk:
    """Blocks that are handled together, all with their own extreme and multiplier.

    Parameters
    ----------
    blocks : float64 array, shape (block_size, blocks)
        Finite weights. Not modified.
    weights : float64 array, shape (block_size, blocks), optional
        Non-negative error weights (squared channel norms); all one if not given.
    multipliers : float64 array, shape (blocks,), or float
        What the decoded scale of each block is multiplied with, positive: ``2**f``, times the row
        scale where there is one.

    Attributes
    ----------
    extremes : float64 array, shape (blocks,)
        Signed element of largest magnitude of each block, the first where several are equal; 1 for
        a block of zeros, which is computed like any other and overwritten at the end.
    is_zero : bool array, shape (blocks,)
    """

    def __init__(
        self,
        blocks: Float64,
        weights: Float64 | None = None,
        multipliers: Float64 | float = 1.0,
    ) -> None:
        self.blocks = blocks
        self.weights = weights
        self.multipliers: Float64 = np.broadcast_to(multipliers, blocks.shape[1:])
        position = np.abs(blocks).argmax(axis=0)
        extremes = np.take_along_axis(blocks, position[None, :], axis=0)[0]
        self.is_zero = extremes == 0.0
        self.extremes: Float64 = np.where(self.is_zero, 1.0, extremes)


@dataclass(frozen=True, eq=False)
class BlockEncoding:
    """Scale codes and errors of blocks under one set of levels.

    Attributes
    ----------
    scale_codes : uint16 array, shape (blocks,)
    errors : float64 array, shape (blocks,)
        Activation-weighted squared error of each block.
    """

    scale_codes: NDArray[np.uint16]
    errors: Float64

    @classmethod
    def join(cls, parts: Sequence["BlockEncoding"]) -> "BlockEncoding":
        """Encoding of consecutive parts together."""
        return cls(
            np.concatenate([part.scale_codes for part in parts]),
            np.concatenate([part.errors for part in parts]),
        )

    def replace(self, where: NDArray[np.bool_], other: "BlockEncoding") -> "BlockEncoding":
        """Encoding that takes the blocks marked in ``where`` from ``other``."""
        return BlockEncoding(
            np.where(where, other.scale_codes, self.scale_codes),
            np.where(where, other.errors, self.errors),
        )


def covering_exponents(absmax: Float64, limit: float) -> NDArray[np.int64]:
    """Smallest integers e with ``absmax <= limit * 2**e``; 0 where ``absmax`` is 0.

    Parameters
    ----------
    absmax : float64 array, any shape
        Not negative, finite. Not modified.
    limit : float
        Positive.
    """
    # frexp's exponents differ by the answer, or by one less.
    exponents = np.frexp(absmax)[1].astype(np.int64) - int(np.frexp(limit)[1])
    exponents += absmax > np.ldexp(limit, exponents)
    return np.where(absmax == 0, 0, exponents)


def choose_layer_exponent(absmax: float, small_end: float, scale: FloatFormat) -> int:
    """Layer exponent f: the smallest with which no scale of the layer exceeds the scale format.

    8-bit exponents span float32 by themselves, so f is 0 there.

    Parameters
    ----------
    absmax : float
        Largest magnitude in the layer.
    small_end : float
        Magnitude of the smaller end of the levels (the smallest over both LUTs of a pair): at
        ``absmax / small_end`` no weight of the layer is clipped, so larger scales gain nothing.
    scale : FloatFormat
        Scale format.

    Raises
    ------
    InputError
        If the exponent does not fit the 8-bit field of the hardware.
    """
    if scale.exponent_bits == 8 or absmax == 0.0:
        return 0
    limit = small_end * float(scale.max_value)
    exponent = int(covering_exponents(np.array(absmax), limit))
    if exponent not in LAYER_EXPONENT_RANGE:
        raise InputError(f"weights of magnitude {absmax:g} need a layer exponent of {exponent}")
    return exponent


def choose_row_scales(
    absmax: NDArray[np.float32], small_end: float, scale: FloatFormat
) -> NDArray[np.uint16]:
    """Row scales that put the largest block of each row near the top of the scale format.

    ``absmax / (small_end * 2**k)``, rounded to bfloat16, where ``2**k`` is the start of the
    format's highest binade: the search may then try scales up to twice what the largest block
    needs, and smaller blocks keep the exponents below. Rows of zeros get 1.

    Parameters
    ----------
    absmax : float32 array, shape (rows,)
        Largest magnitude of each row.
    small_end : float
        Magnitude of the smaller end of the levels.
    scale : FloatFormat
        Scale format.

    Returns
    -------
    row_scales : uint16 array, shape (rows,)
        bfloat16 bit patterns of positive numbers.
    """
    top = 2.0 ** (scale.max_exponent + scale.mantissa_bits)
    wanted = np.where(absmax == 0, 1.0, absmax.astype(np.float64) / (small_end * top))
    # The smallest normal bfloat16: a subnormal row scale would lose bits.
    return round_bfloat16(np.maximum(wanted, 2.0**-126).astype(np.float32))


def sum_over_block(values: Float64) -> Float64:
    """Sum along the first axis by halving: element i + element i + n/2, and so on.

    The length of the axis is padded to a power of two with zeros, so the order is the same for
    every machine and is the one stated here.
    """
    count = len(values)
    while count > 1:
        half = 1 << ((count - 1).bit_length() - 1)  # the largest power of two below count
        folded = values[:half].copy()
        folded[: count - half] += values[half:count]
        values, count = folded, half
    return values[0]


class ScaleRounder:
    """Real scale to scale code and back, for one format.

    Attributes
    ----------
    values : float64 array
        All values of the format, ascending, zero among them.
    codes : uint16 array
        Their canonical codes.
    zero : int
        Position of zero in both.
    """

    def __init__(self, scale: FloatFormat) -> None:
        self.scale = scale
        table = format_table(scale)
        self.values = table.values
        self.codes = np.array(list(scale.canonical.values()), dtype=np.uint16)
        self.zero = int(np.flatnonzero(table.values == 0)[0])
        self._table = table

    def nearest(self, wanted: Float64) -> NDArray[np.uint16]:
        """Nearest code that is not zero, ties to even, shape (blocks,)."""
        index = self._table.nearest_index(wanted)
        # A block that is not all zeros never gets scale 0: the smallest scale of its sign instead.
        away = np.where((wanted < 0) & (self.zero > 0), -1, 1)
        return self.codes[np.where(index == self.zero, index + away, index)]

    def covering(self, wanted: Float64) -> NDArray[np.uint16]:
        """Code of the smallest scale that is at least ``wanted`` > 0."""
        index = np.searchsorted(self.values, wanted, side="left")
        return self.codes[np.minimum(index, len(self.values) - 1)]


scale_rounder = lru_cache(maxsize=64)(ScaleRounder)
"""The :class:`ScaleRounder` of a format, made once."""


def one_pass_codes(
    chunk: Chunk, levels: RoundingTable, rounder: ScaleRounder, mode: ScaleMode
) -> NDArray[np.uint16]:
    """Scale code of every block under ``absmax`` or ``argmax`` (:class:`ScaleMode`).

    Raises
    ------
    InputError
        If ``mode`` is ``argmax`` and the scale has no sign.
    """
    wanted = chunk.extremes / chunk.multipliers
    if mode is ScaleMode.ARGMAX:
        if not rounder.scale.signed:
            raise InputError(
                f"scale mode argmax needs a signed scale, {rounder.scale.name} has no sign"
            )
        return rounder.nearest(wanted / levels.large_end)
    wanted = np.abs(wanted) / levels.small_end
    # Rounding a power of two down would clip the extreme by up to 29 %: MXFP6 comes out 8 times
    # worse.
    return rounder.nearest(wanted) if rounder.scale.mantissa_bits else rounder.covering(wanted)


@inner_loop
def encode_with_codes(
    chunk: Chunk, levels: RoundingTable, scale: FloatFormat, codes: NDArray[np.uint16]
) -> BlockEncoding:
    """Encoding with given scale codes, with exact errors; blocks of zeros get code 0, error 0."""
    scales = decode_array(codes, scale) * chunk.multipliers
    residual = levels.nearest_value(chunk.blocks / scales) * scales
    np.subtract(chunk.blocks, residual, out=residual)
    np.multiply(residual, residual, out=residual)
    if chunk.weights is not None:
        residual *= chunk.weights
    errors = sum_over_block(residual)
    zero = chunk.is_zero
    return BlockEncoding(np.where(zero, np.uint16(0), codes), np.where(zero, 0.0, errors))


def better_encoding(best: BlockEncoding, candidate: BlockEncoding) -> BlockEncoding:
    """Of each block the encoding with the lower error, the lower scale code among equals."""
    lower = candidate.errors < best.errors
    tie = (candidate.errors == best.errors) & (candidate.scale_codes < best.scale_codes)
    return best.replace(lower | tie, candidate)


def encode_one_pass(
    chunk: Chunk, levels: RoundingTable, rounder: ScaleRounder, mode: ScaleMode
) -> BlockEncoding:
    """Encoding under ``absmax`` or ``argmax``; errors as :func:`one_pass_codes`."""
    codes = one_pass_codes(chunk, levels, rounder, mode)
    return encode_with_codes(chunk, levels, rounder.scale, codes)
