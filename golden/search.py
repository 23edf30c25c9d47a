"""Search of block scales over every code in a window, ranked by tabulated errors.

For one LUT and one scale, the squared error of a weight is a function of that weight alone. So with
the weights of a block normalised by the power of two below their extreme, and cut into a few
thousand cells, the error of a whole block under one scale is a sum of table entries. The tables of
all mantissas of the scale format fit into the second-level cache, which makes it cheap to rank
*every* scale code around the extreme, with both signs, instead of a dozen starting points. The
codes ranked first are then judged exactly (:mod:`golden.scaling`), so the cells decide which codes
are looked at, never what an error is.

Everything is elementwise IEEE arithmetic of stated order, table look-ups and comparisons.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from golden.convert import RoundingTable
from golden.engine import inner_loop
from golden.formats import FloatFormat
from golden.scaling import (
    BlockEncoding,
    Chunk,
    ScaleMode,
    better_encoding,
    encode_one_pass,
    encode_with_codes,
    scale_rounder,
)

__all__ = ["NormalizedChunk", "ScaleSearch", "cells_for"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

WINDOW = (0.5, 1.25)
"""Magnitudes that a block's extreme may take, relative to the end of the LUT on its side: below 1
it lands inside, above 1 it is clipped."""

# Scale codes per table look-up: eight float32 are half a cache line, and one look-up then serves
# eight codes.
_SLAB = 8

# Quarters of an octave, so that the window of a group is little wider than that of one block.
_GROUP_BOUNDS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429, 2.0)


def cells_for(levels: int) -> int:
    """Cells between -2 and 2 that rank scales well for that many levels.

    The mean error of normal and Laplace blocks of 16 is 0.002 to 0.004 % (16 and 32 levels) or
    0.006 to 0.014 % (64 levels) above that of judging every code of the window exactly. With error
    weights spread over two decades it is up to 0.006 % or 0.025 % above.
    """
    return 4096 if levels <= 16 else 8192


@dataclass(frozen=True, eq=False)
class _Group:
    """Blocks of a chunk whose extremes lie in the same quarter of an octave.

    ``members`` are positions in the chunk, ``cells`` those of the normalised weights.
    """

    number: int
    members: NDArray[np.intp]
    cells: NDArray[np.intp]  # (block_size, members)
    weights: Float32 | None  # (block_size, members, _SLAB): one copy per code of a slab


class NormalizedChunk(Chunk):
    """A chunk of blocks, prepared once for the search under any number of LUTs.

    Parameters
    ----------
    blocks, weights, multipliers
        As in :class:`golden.scaling.Chunk`.
    cells : int
        Cells between -2 and 2 (:func:`cells_for`).

    Attributes
    ----------
    exponents : int64 array, shape (blocks,)
        ``2**exponent <= abs(extreme / multiplier) < 2**(exponent + 1)``.
    units : float64 array, shape (blocks,)
        ``multiplier * 2**exponent``, in which the weights of a block are tabulated.
    importance_units : float64 array, shape (blocks,)
        Power of two above the largest error weight of each block: in these units float32 holds the
        error weights, whatever the channel norms are. 1 without error weights.
    """

    def __init__(
        self,
        blocks: Float64,
        weights: Float64 | None = None,
        multipliers: Float64 | float = 1.0,
        *,
        cells: int,
    ) -> None:
        super().__init__(blocks, weights, multipliers)
        self.cells = cells
        significands, exponents = np.frexp(np.abs(self.extremes) / self.multipliers)
        self._significands = 2.0 * significands
        self.exponents = exponents.astype(np.int64) - 1
        self.units = np.ldexp(self.multipliers, self.exponents)
        largest = np.zeros(len(self)) if weights is None else weights.max(axis=0)
        self.importance_units = np.ldexp(1.0, np.frexp(largest)[1])

    def __len__(self) -> int:
        """Blocks in the chunk."""
        return len(self.extremes)

    @property
    def error_units(self) -> Float64:
        """What a tabulated error of each block is to be multiplied with, shape (blocks,)."""
        return self.units * self.units * self.importance_units

    @cached_property
    def cell_numbers(self) -> NDArray[np.intp]:
        """Cell of every weight, shape (block_size, blocks), in range(cells)."""
        return np.floor((self.blocks / self.units + 2.0) * (self.cells / 4)).astype(np.intp)

    @cached_property
    def distinct_exponents(self) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
        """Exponents that occur, ascending, and the position of each block's among them."""
        distinct, position = np.unique(self.exponents, return_inverse=True)
        return distinct, position

    @cached_property
    def group_numbers(self) -> NDArray[np.intp]:
        """Quarter of an octave in which the extreme of each block lies, in range(4)."""
        return np.searchsorted(_GROUP_BOUNDS[1:-1], self._significands, side="right")

    @cached_property
    def relative_weights(self) -> Float32 | None:
        """Error weights over the unit of each block, shape (block_size, blocks)."""
        if self.weights is None:
            return None
        return (self.weights / self.importance_units).astype(np.float32)

    @cached_property
    def groups(self) -> tuple[_Group, ...]:
        """The blocks in groups of like extremes, every block in one of them."""
        groups = []
        for number in range(len(_GROUP_BOUNDS) - 1):
            members = np.flatnonzero(self.group_numbers == number)
            if len(members):
                weights = None
                if self.relative_weights is not None:
                    weights = np.repeat(self.relative_weights[:, members, None], _SLAB, axis=2)
                inside = np.ascontiguousarray(self.cell_numbers[:, members])
                groups.append(_Group(number, members, inside, weights))
        return tuple(groups)


class _ScaleGrid:
    """Scales of a format by position (:class:`ScaleSearch`), and their codes."""

    def __init__(self, scale: FloatFormat) -> None:
        rounder = scale_rounder(scale)
        self._mantissa_bits = scale.mantissa_bits
        self._positives = rounder.values[rounder.zero + 1 :]
        self._positive_codes = rounder.codes[rounder.zero + 1 :].astype(np.int32)
        self._codes: dict[tuple[range, int], NDArray[np.int32]] = {}

    def position_below(self, scale: float) -> int:
        """Position of the highest scale that is at most ``scale``."""
        significand, exponent = np.frexp(scale)
        mantissas = 1 << self._mantissa_bits
        return (
            int(np.floor((2.0 * significand - 1.0) * mantissas)) + (int(exponent) - 1) * mantissas
        )

    def scales_at(self, positions: range) -> Float64:
        """Scales at some positions."""
        mantissas, numbers = 1 << self._mantissa_bits, np.arange(positions.start, positions.stop)
        exponents = numbers // mantissas - self._mantissa_bits
        return np.ldexp((mantissas + numbers % mantissas).astype(np.float64), exponents)

    def codes_at(self, positions: range, exponent: int) -> NDArray[np.int32]:
        """Positive scale code of every position, -1 where the format has no such scale."""
        key = positions, exponent
        if key not in self._codes:
            wanted = np.ldexp(self.scales_at(positions), exponent)
            index = np.searchsorted(self._positives, wanted)
            index = np.minimum(index, len(self._positives) - 1)
            exists = self._positives[index] == wanted
            self._codes[key] = np.where(exists, self._positive_codes[index], -1)
        return self._codes[key]


# Training makes a search for every table it tries, all of a few scale formats.
_scale_grid = lru_cache(maxsize=16)(_ScaleGrid)


class ScaleSearch:
    """Search of the scale codes of blocks under one set of levels.

    A *position* p stands for the scale ``(2**M + p mod 2**M) * 2**(p div 2**M - M)`` in units of
    the power of two below the block's extreme, M being the mantissa bits of the format: ascending
    positions are ascending scales, and all scales of the format in that binade.

    Parameters
    ----------
    levels : RoundingTable
        What elements can be.
    scale : FloatFormat
        Scale format.
    cells : int
        As in the chunks that will be searched.

    Attributes
    ----------
    centers : float64 array, shape (cells,)
        Middle of every cell.
    signs : tuple of int
        Signs of scales that are tried: 1, and -1 where it can gain something.
    windows : list of (int, int)
        First and one past the last position to try, of each quarter of an octave that the extremes
        of blocks lie in; multiples of eight.
    """

    def __init__(self, levels: RoundingTable, scale: FloatFormat, cells: int) -> None:
        self.levels = levels
        self.scale = scale
        self.cells = cells
        self._rounder = scale_rounder(scale)
        self._grid = _scale_grid(scale)
        middles: Float64 = np.arange(cells, dtype=np.float64) + 0.5
        self.centers = middles * (4.0 / cells) - 2.0
        self._slabs: dict[tuple[int, int], Float32] = {}
        # A sign gains nothing where the levels are symmetric.
        mirrored = np.array_equal(levels.values, -levels.values[::-1])
        self.signs: tuple[int, ...] = (1, -1) if scale.signed and not mirrored else (1,)
        self.windows = [self._window(low, high) for low, high in itertools.pairwise(_GROUP_BOUNDS)]

    def _window(self, low: float, high: float) -> tuple[int, int]:
        """First and one past the last position to try, whole slabs, extremes in [low, high)."""
        first = self._grid.position_below(low / (abs(self.levels.large_end) * WINDOW[1]))
        last = self._grid.position_below(high / (self.levels.small_end * WINDOW[0]))
        return first // _SLAB * _SLAB, (last // _SLAB + 1) * _SLAB

    @property
    def codes_tried(self) -> tuple[int, int]:
        """Least and most scale codes that a block is tried with, both signs counted."""
        counts = [len(self.signs) * (last - first) for first, last in self.windows]
        return min(counts), max(counts)

    @property
    def positions(self) -> range:
        """Positions of all windows together."""
        return range(self.windows[0][0], self.windows[-1][1])

    def scales_at(self, positions: range) -> Float64:
        """Scales at some positions, in units of the power of two below a block's extreme."""
        return self._grid.scales_at(positions)

    def codes_at(self, chunk: NormalizedChunk) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
        """Positive scale codes at all :attr:`positions` for the blocks of a chunk.

        Returns
        -------
        table : int32 array, shape (distinct exponents, positions)
            -1 where the format has no such scale.
        row : intp array, shape (blocks,)
            Row of each block.
        """
        distinct, row = chunk.distinct_exponents
        return np.stack([self._grid.codes_at(self.positions, int(e)) for e in distinct]), row

    def _slab(self, sign: int, position: int) -> Float32:
        """Squared error of every cell's centre under eight scales, shape (cells, 8)."""
        key = sign, position
        if key not in self._slabs:
            scales = sign * self.scales_at(range(position, position + _SLAB))
            nearest = self.levels.nearest_value(self.centers[:, None] / scales) * scales
            self._slabs[key] = ((self.centers[:, None] - nearest) ** 2).astype(np.float32)
        return self._slabs[key]

    def rank(self, chunk: NormalizedChunk) -> BlockEncoding:
        """Best scale code of every block by tabulated errors, which are returned as its errors.

        Among equals the lowest scale wins, a positive one before a negative. A block in whose
        window the format has no scale gets an infinite error.
        """
        codes, best = lowest_sums(self, chunk)
        return BlockEncoding(
            np.where(chunk.is_zero, np.uint16(0), codes),
            np.where(chunk.is_zero, 0.0, best * chunk.error_units),
        )

    def sums(self, group: _Group, sign: int) -> Float32:
        """Tabulated errors at the positions of a group's window, shape (members, positions)."""
        first, last = self.windows[group.number]
        sums = np.empty((len(group.members), last - first), dtype=np.float32)
        terms = np.empty((*group.cells.shape, _SLAB), dtype=np.float32)
        for position in range(first, last, _SLAB):
            # "clip" only skips the check of cells that are in range anyway.
            np.take(self._slab(sign, position), group.cells, axis=0, out=terms, mode="clip")
            if group.weights is not None:
                terms *= group.weights
            out = sums[:, position - first : position - first + _SLAB]
            np.add.reduce(terms, axis=0, out=out)
        return sums

    def encode(self, chunk: NormalizedChunk) -> BlockEncoding:
        """Scale code of every block, and its exact error.

        Candidates are the code ranked first and those of the one-pass modes; the one with the least
        exact error wins, the lower code among equals.
        """
        best = encode_one_pass(chunk, self.levels, self._rounder, ScaleMode.ABSMAX)
        if self.scale.signed:
            argmax = encode_one_pass(chunk, self.levels, self._rounder, ScaleMode.ARGMAX)
            best = better_encoding(best, argmax)
        ranked = self.rank(chunk)
        found = encode_with_codes(
            chunk, self.levels, self.scale, np.maximum(ranked.scale_codes, np.uint16(1))
        )
        return better_encoding(best, found)


@inner_loop
def lowest_sums(search: ScaleSearch, chunk: NormalizedChunk) -> tuple[NDArray[np.uint16], Float64]:
    """Scale code with the lowest tabulated error of every block, and that error in its units.

    Returns
    -------
    codes : uint16 array, shape (blocks,)
        1 where the format has no scale in the window.
    sums : float64 array, shape (blocks,)
        Infinite there.
    """
    best = np.full(len(chunk), np.inf)
    codes = np.ones(len(chunk), dtype=np.uint16)
    sign_bit = 1 << (search.scale.width - 1)
    table, row = search.codes_at(chunk)
    start = search.positions.start
    for group in chunk.groups:
        first, last = search.windows[group.number]
        inside = table[:, first - start : last - start]
        missing = inside < 0
        rows = row[group.members]
        for sign in search.signs:
            sums = search.sums(group, sign)
            if missing.any():
                sums[missing[rows]] = np.inf
            position = sums.argmin(axis=1)
            errors = np.take_along_axis(sums, position[:, None], axis=1)[:, 0]
            lower = errors < best[group.members]
            winners = group.members[lower]
            best[winners] = errors[lower]
            found = inside[rows[lower], position[lower]]
            codes[winners] = found if sign > 0 else found | sign_bit
    return codes, best
