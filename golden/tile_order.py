"""Tile order: the planes of a tensor so that a beat brings what R rows need of one input channel.

A tile of R x C outputs takes the R indices of one k each clock, and R scale words at the start of a
block. Stored planes run along one row after the other (:mod:`golden.packing`); in tile order they
run over tiles of R rows, in a tile over the input channels (or blocks), and there over the R rows.
Nothing else changes: an element has the same bits, and planes end with zero bits up to a byte.

The last tile is filled up with rows of index 0 under scale word 0, which is scale zero: whatever
their index stands for, their products are zero. What they give is to be dropped.

Corrections in tile order (:func:`tile_corrections`) name each input channel once a tile, in
ascending order, so that its activations can be kept while they go by; and rows take turns, so that
sums of one row have time to be finished before the next correction of that row.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from golden.corrections import Corrections, column_dtype
from golden.errors import InputError
from golden.packing import pack_bits, unpack_bits
from golden.tensor import QuantizedTensor

__all__ = [
    "TileCorrections",
    "from_tile_order",
    "tile_corrections",
    "tile_planes",
    "to_tile_order",
    "untile_corrections",
    "untile_planes",
]

Codes = NDArray[np.unsignedinteger]


def _tiles(rows: int, tile_rows: int) -> int:
    if tile_rows < 1:
        raise InputError(f"a tile must have at least one row, not {tile_rows}")
    return -(-rows // tile_rows)


def to_tile_order(codes: Codes, tile_rows: int) -> Codes:
    """Interleave the rows of each tile.

    Parameters
    ----------
    codes : unsigned integer array, shape (rows, steps)
        Indices (a step is an input channel) or scale words (a step is a block). Not modified.
    tile_rows : int
        R.

    Returns
    -------
    tiled : array of the same dtype, shape (tiles, steps, tile_rows)
        Element [t, k, i] is ``codes[t * tile_rows + i, k]``, or 0 where there is no such row.

    Raises
    ------
    InputError
        If ``tile_rows`` is less than one.
    """
    rows, steps = codes.shape
    tiles = _tiles(rows, tile_rows)
    padded = np.zeros((tiles * tile_rows, steps), dtype=codes.dtype)
    padded[:rows] = codes
    return np.ascontiguousarray(padded.reshape(tiles, tile_rows, steps).transpose(0, 2, 1))


def from_tile_order(tiled: Codes, rows: int) -> Codes:
    """Undo :func:`to_tile_order`.

    Parameters
    ----------
    tiled : unsigned integer array, shape (tiles, steps, tile_rows)
        Not modified.
    rows : int
        How many there are without those that fill the last tile.

    Returns
    -------
    codes : array of the same dtype, shape (rows, steps)

    Raises
    ------
    InputError
        If so many rows are not that many tiles, or a code of a row that fills the last tile is
        not 0.
    """
    tiles, steps, tile_rows = tiled.shape
    if _tiles(rows, tile_rows) != tiles:
        raise InputError(f"{rows} rows are not {tiles} tiles of {tile_rows} rows")
    codes = tiled.transpose(0, 2, 1).reshape(tiles * tile_rows, steps)
    if codes[rows:].any():
        raise InputError("the rows that fill the last tile must have code 0")
    return np.ascontiguousarray(codes[:rows])


def tile_planes(
    tensor: QuantizedTensor, tile_rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Index plane and scale plane of a tensor in tile order.

    Of a format with one scale word for the tensor the scale plane is that word, as stored.

    Raises
    ------
    InputError
        If ``tile_rows`` is less than one.
    """
    rows = tensor.shape[0]
    indices = to_tile_order(tensor.indices.reshape(rows, -1), tile_rows)
    index_plane = pack_bits(indices, tensor.format.index_bits)
    if not tensor.format.block_size:
        return index_plane, tensor.scale_plane
    words = to_tile_order(tensor.scale_words, tile_rows)
    return index_plane, pack_bits(words, tensor.format.word.width)


def untile_planes(
    tensor: QuantizedTensor,
    tile_rows: int,
    index_plane: NDArray[np.uint8],
    scale_plane: NDArray[np.uint8],
) -> QuantizedTensor:
    """Tensor from planes in tile order: the inverse of :func:`tile_planes`.

    Parameters
    ----------
    tensor : QuantizedTensor
        Gives format, shape, LUTs and everything else that is in no plane.
    tile_rows : int
        R.
    index_plane, scale_plane : uint8 arrays
        Not modified.

    Raises
    ------
    InputError
        If a plane has the wrong length, or something in it that cannot be there.
    """
    fmt, rows = tensor.format, tensor.shape[0]
    tiles = _tiles(rows, tile_rows)

    def unpacked(plane: NDArray[np.uint8], width: int, steps: int) -> Codes:
        codes = unpack_bits(plane, width, tiles * steps * tile_rows)
        return from_tile_order(codes.reshape(tiles, steps, tile_rows), rows)

    indices = unpacked(index_plane, fmt.index_bits, tensor.indices.size // rows)
    if fmt.block_size:
        words = unpacked(scale_plane, fmt.word.width, tensor.scale_words.shape[1])
    else:
        words = unpack_bits(scale_plane, fmt.word.width, 1).reshape(1, 1)
    return replace(
        tensor,
        indices=indices.reshape(tensor.indices.shape),
        scale_words=words.astype(np.uint16),
    )


@dataclass(frozen=True, eq=False)
class TileCorrections:
    """Corrections of one tile of rows.

    Parameters
    ----------
    columns : uint16 or uint32 array, shape (slots,)
        Input channels that have corrections in this tile, ascending.
    rows : int64 array, shape (entries,)
        Row in the tile: first the first correction of every row that has one, rows ascending, then
        the second ones, and so on; those of a row have ascending columns.
    slots : int64 array, shape (entries,)
        Position of the entry's column in ``columns``.
    values : uint16 array, shape (entries,)
        bfloat16 bit patterns.
    turns : int64 array, shape (entries,)
        How many corrections its row has before it.
    """

    columns: NDArray[np.unsignedinteger]
    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    values: NDArray[np.uint16]
    turns: NDArray[np.int64]


def tile_corrections(corrections: Corrections, tile_rows: int) -> list[TileCorrections]:
    """Corrections in tile order, one part for each tile of rows.

    Raises
    ------
    InputError
        If ``tile_rows`` is less than one.
    """
    rows = corrections.shape[0]
    counts = np.diff(corrections.indptr)
    row_of = np.repeat(np.arange(rows), counts)
    turn_of = np.arange(corrections.entries) - np.repeat(corrections.indptr[:-1], counts)
    parts = []
    for tile in range(_tiles(rows, tile_rows)):
        start, stop = (corrections.indptr[min(rows, row)] for row in
                       (tile * tile_rows, (tile + 1) * tile_rows))  # fmt: skip
        entries = slice(start, stop)
        order = np.lexsort((row_of[entries], turn_of[entries]))
        columns, slots = np.unique(corrections.columns[entries], return_inverse=True)
        parts.append(
            TileCorrections(
                columns,
                row_of[entries][order] - tile * tile_rows,
                slots.astype(np.int64)[order],
                corrections.values[entries][order],
                turn_of[entries][order],
            )
        )
    return parts


def untile_corrections(
    tiles: list[TileCorrections], shape: tuple[int, int], tile_rows: int
) -> Corrections:
    """Corrections of a tensor of that shape: the inverse of :func:`tile_corrections`.

    Raises
    ------
    InputError
        If the tiles are not as many as the rows need, or an entry cannot be there.
    """
    if len(tiles) != _tiles(shape[0], tile_rows):
        raise InputError(f"{shape[0]} rows are not {len(tiles)} tiles of {tile_rows} rows")
    for number, tile in enumerate(tiles):
        last = min(tile_rows, shape[0] - number * tile_rows)
        if len(tile.rows) and not 0 <= tile.rows.min() <= tile.rows.max() < last:
            raise InputError(f"tile {number}: corrections of rows that it does not have")
        if len(tile.slots) and not 0 <= tile.slots.min() <= tile.slots.max() < len(tile.columns):
            raise InputError(f"tile {number}: corrections of columns that it does not name")
    row_of = np.concatenate([tile.rows + number * tile_rows for number, tile in enumerate(tiles)])
    columns = np.concatenate([tile.columns[tile.slots] for tile in tiles])
    values = np.concatenate([tile.values for tile in tiles])
    order = np.argsort(row_of, kind="stable")
    indptr = np.zeros(shape[0] + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=shape[0]), out=indptr[1:])
    return Corrections(shape, indptr, columns[order].astype(column_dtype(shape[1])), values[order])
