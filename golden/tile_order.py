"""Tile order: the planes of a tensor so that a beat brings what R rows need of one input channel.

A tile of R x C outputs takes the R indices of one k each clock, and R scale words at the start of a
block. Stored planes run along one row after the other (:mod:`golden.packing`); in tile order they
run over tiles of R rows, in a tile over the input channels (or blocks), and there over the R rows.
Nothing else changes: an element has the same bits, and planes end with zero bits up to a byte.

The last tile is filled up with rows of index 0 under scale word 0, which is scale zero: whatever
their index stands for, their products are zero. What they give is to be dropped.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from golden.packing import pack_bits, unpack_bits
from golden.tensor import QuantizedTensor

__all__ = ["from_tile_order", "tile_planes", "to_tile_order", "untile_planes"]

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
