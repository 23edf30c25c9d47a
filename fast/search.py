"""Loops of :mod:`golden.search` and :mod:`golden.scaling`."""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from fast.compiling import compiled
from fast.levels import find, values_of
from fast.vectors import LANES, add_rows, keep_lower
from golden.convert import RoundingTable, decode_array
from golden.formats import FloatFormat
from golden.scaling import BlockEncoding, Chunk
from golden.search import NormalizedChunk, ScaleSearch

__all__ = ["encode_with_codes", "lowest_sums"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_TILE_WEIGHTS = 16384  # looked up in one table before the next one comes into the cache

_tables: WeakKeyDictionary[ScaleSearch, Float32] = WeakKeyDictionary()


def lowest_sums(search: ScaleSearch, chunk: NormalizedChunk) -> tuple[NDArray[np.uint16], Float64]:
    """:func:`golden.search.lowest_sums`."""
    if search not in _tables:
        _tables[search] = _tabulate(search)
    codes, row = search.codes_at(chunk)
    weights = chunk.relative_weights
    return _lowest_sums(
        chunk.cell_numbers,
        # A product with 1 is exact: it changes no sum.
        np.ones((1, 1), dtype=np.float32) if weights is None else np.ascontiguousarray(weights),
        chunk.group_numbers,
        row,
        codes,
        (codes < 0).any(axis=1),
        np.array(search.windows) - search.positions.start,
        _tables[search],
        len(search.signs),
        1 << (search.scale.width - 1),
    )


def _tabulate(search: ScaleSearch) -> Float32:
    """Squared errors of all cells, shape (signs * slabs, cells, 8)."""
    scales = np.concatenate([sign * search.scales_at(search.positions) for sign in search.signs])
    tables = np.empty((len(scales) // LANES, search.cells, LANES), dtype=np.float32)
    _square_errors(search.centers, scales, tables, search.levels.thresholds, search.levels.values)
    return tables


@compiled
def _square_errors(centers: Any, scales: Any, tables: Any, thresholds: Any, values: Any) -> None:
    """Squared distance of each centre to the nearest multiple of a level, by scale.

    Quotients ascend or descend with the centres, so each level has a run of them: where it ends is
    guessed, then found by comparing quotients, as for a single weight.
    """
    cells = len(centers)
    for position in range(len(scales)):
        scale = scales[position]
        slab, lane = position // LANES, position % LANES
        start = 0
        for number in range(len(values)):
            level = number if scale > 0.0 else len(values) - 1 - number
            stop = cells
            if number < len(values) - 1:
                bound = thresholds[level if scale > 0.0 else level - 1]
                guess = (bound * scale + 2.0) * (cells / 4) + 0.5
                stop = min(max(int(min(max(guess, 0.0), float(cells))), start), cells)
                if scale > 0.0:
                    while stop > start and not centers[stop - 1] / scale <= bound:
                        stop -= 1
                    while stop < cells and centers[stop] / scale <= bound:
                        stop += 1
                else:
                    while stop > start and not centers[stop - 1] / scale > bound:
                        stop -= 1
                    while stop < cells and centers[stop] / scale > bound:
                        stop += 1
            nearest = values[level] * scale
            for cell in range(start, stop):
                error = centers[cell] - nearest
                tables[slab, cell, lane] = np.float32(error * error)
            start = stop


@compiled
def _lowest_sums(
    cells: Any, weights: Any, groups: Any, rows: Any, codes: Any, incomplete: Any, windows: Any,
    tables: Any, signs: int, sign_bit: int,
) -> tuple[NDArray[np.uint16], Float64]:  # fmt: skip
    size, count = cells.shape
    positions = codes.shape[1]
    slabs = positions // LANES
    best = np.full(count, np.inf)
    found = np.ones(count, dtype=np.uint16)
    step = max(1, min(count, _TILE_WEIGHTS // size))
    # The cells of a block side by side, those of a tile in the cache with one table.
    cell = np.empty((step, size), dtype=np.uint16)
    weight = np.ones((step, size), dtype=np.float32)
    lowest = np.empty((step, LANES), dtype=np.float32)
    where = np.empty((step, LANES), dtype=np.int32)  # slab, counted over both signs
    sums, number = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.int32)
    for start in range(0, count, step):
        width = min(step, count - start)
        for k in range(size):
            for i in range(width):
                cell[i, k] = cells[k, start + i]
        if weights.size == cells.size:
            for k in range(size):
                for i in range(width):
                    weight[i, k] = weights[k, start + i]
        lowest[:] = np.inf
        where[:] = -1
        for slab in range(signs * slabs):
            table, first = tables[slab], slab % slabs * LANES
            number[:] = slab
            for i in range(width):
                group = groups[start + i]
                if windows[group, 0] <= first < windows[group, 1]:
                    add_rows(table, cell[i], weight[i], sums)
                    if incomplete[rows[start + i]]:
                        for lane in range(LANES):
                            if codes[rows[start + i], first + lane] < 0:
                                sums[lane] = np.inf
                    keep_lower(sums, lowest[i], where[i], number)
        for i in range(width):
            block = start + i
            # Each lane has its first lowest sum; of equal ones the first slab, then the first lane.
            lane = 0
            for other in range(1, LANES):
                if lowest[i, other] < lowest[i, lane] or (
                    lowest[i, other] == lowest[i, lane] and where[i, other] < where[i, lane]
                ):
                    lane = other
            if where[i, lane] >= 0:
                best[block] = lowest[i, lane]
                sign, at = where[i, lane] // slabs, where[i, lane] % slabs * LANES + lane
                found[block] = codes[rows[block], at] | (sign_bit if sign else 0)
    return found, best


def encode_with_codes(
    chunk: Chunk, levels: RoundingTable, scale: FloatFormat, codes: NDArray[np.uint16]
) -> BlockEncoding:
    """:func:`golden.scaling.encode_with_codes`."""
    errors = _errors(
        np.ascontiguousarray(chunk.blocks),
        np.ones((1, 1)) if chunk.weights is None else np.ascontiguousarray(chunk.weights),
        decode_array(codes, scale) * chunk.multipliers,
        *values_of(levels),
    )
    zero = chunk.is_zero
    return BlockEncoding(np.where(zero, np.uint16(0), codes), np.where(zero, 0.0, errors))


@compiled
def _errors(
    blocks: Any, weights: Any, scales: Any, thresholds: Any, at_level: Any, first: float,
    last: float, at_step: Any,
) -> Float64:  # fmt: skip
    size, count = blocks.shape
    errors = np.empty(count)
    step = max(1, min(count, 4096 // size))
    terms = np.empty((size, step))
    quotients, levels = np.empty(step), np.empty(step)
    for start in range(0, count, step):
        width = min(step, count - start)
        scale = scales[start : start + width]
        for k in range(size):
            block = blocks[k, start : start + width]
            for i in range(width):
                quotients[i] = block[i] / scale[i]
            find(quotients[:width], levels, thresholds, at_level, first, last, at_step)
            for i in range(width):
                left = block[i] - levels[i] * scale[i]
                terms[k, i] = left * left
            if weights.size == blocks.size:
                for i in range(width):
                    terms[k, i] *= weights[k, start + i]
        rest = size
        while rest > 1:
            half = 1
            while 2 * half < rest:
                half *= 2
            for k in range(rest - half):
                for i in range(width):
                    terms[k, i] += terms[half + k, i]
            rest = half
        for i in range(width):
            errors[start + i] = terms[0, i]
    return errors
