"""Tile order: where every code goes, and back."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from golden.activations import parse_activation_format, quantize_activations
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import HIF7, HIF8T, HifFormat
from golden.kernel import matmul
from golden.notation import parse_format
from golden.packing import plane_bytes, unpack_bits
from golden.tensor import QuantizedTensor
from golden.tile_order import (
    TileCorrections,
    from_tile_order,
    tile_corrections,
    tile_planes,
    to_tile_order,
    untile_corrections,
    untile_planes,
)
from golden.vectors.decoding import vector_tensor

ROWS, COLUMNS = 7, 37

FORMATS = [
    ("BOF4-NF4sS1E5M5", HIF7),
    ("NF4-DD4sRS1E2M4", HIF7),
    ("DD5^8sUE5M7", HIF8T),
    ("E2M3^32sUE8M0", HIF7),
    ("E4M5sUE5M7", HIF7),
    ("E4M3^0sUE8M0", HIF7),
]


@lru_cache
def tensor_of(name: str, hif: HifFormat) -> QuantizedTensor:
    fmt = parse_format(name, hif)
    size = fmt.block_size
    stored = (ROWS, -(-COLUMNS // size), size) if size else (1, 1, ROWS * COLUMNS)
    return vector_tensor(fmt, (ROWS, COLUMNS), stored, "tile order")


def test_a_beat_has_the_rows_of_one_channel() -> None:
    codes = np.arange(1, 16, dtype=np.uint8).reshape(5, 3)
    tiled = to_tile_order(codes, 2)
    assert tiled.tolist() == [
        [[1, 4], [2, 5], [3, 6]],
        [[7, 10], [8, 11], [9, 12]],
        [[13, 0], [14, 0], [15, 0]],
    ]
    assert from_tile_order(tiled, 5).tolist() == codes.tolist()


@pytest.mark.parametrize("tile_rows", [1, 2, 7, 16])
@pytest.mark.parametrize(("name", "hif"), FORMATS)
def test_planes_there_and_back(name: str, hif: HifFormat, tile_rows: int) -> None:
    tensor = tensor_of(name, hif)
    index_plane, scale_plane = tile_planes(tensor, tile_rows)
    empty = replace(
        tensor,
        indices=np.zeros_like(tensor.indices),
        scale_words=np.zeros_like(tensor.scale_words),
    )
    back = untile_planes(empty, tile_rows, index_plane, scale_plane)
    assert (back.indices == tensor.indices).all()
    assert (back.scale_words == tensor.scale_words).all()
    # Where a code lies, from the text of the module alone.
    width, steps = tensor.format.index_bits, tensor.indices.size // ROWS
    count = -(-ROWS // tile_rows) * tile_rows * steps
    assert len(index_plane) == plane_bytes(count, width)
    flat = unpack_bits(index_plane, width, count)
    row, channel = 5, 30
    tile, lane = divmod(row, tile_rows)
    position = (tile * steps + channel) * tile_rows + lane
    assert flat[position] == tensor.indices.reshape(ROWS, -1)[row, channel]
    if tile_rows == 1:
        assert (index_plane == tensor.index_plane).all()
        assert (scale_plane == tensor.scale_plane).all()


def test_rows_that_fill_a_tile_give_zero() -> None:
    """Also where the LUTs have no zero at index 0."""
    tensor = tensor_of("BOF4-NF4sS1E5M5", HIF7)
    full = replace(
        tensor,
        shape=(8, COLUMNS),
        indices=np.append(tensor.indices, np.zeros_like(tensor.indices[:1]), axis=0),
        scale_words=np.append(tensor.scale_words, np.zeros_like(tensor.scale_words[:1]), axis=0),
    )
    assert full.luts[0].values[0] != 0
    planes, filled = tile_planes(tensor, 4), tile_planes(full, 4)
    assert all((a == b).all() for a, b in zip(planes, filled, strict=True))
    fmt = parse_activation_format("INT8sUE8M0")
    assert fmt is not None
    x = np.random.default_rng(0).standard_normal((3, COLUMNS)).astype(np.float32)
    product = matmul(full, quantize_activations(x, fmt))
    assert not product.bits[:, 7].any()


def test_what_cannot_be_is_refused() -> None:
    codes = np.ones((5, 3), dtype=np.uint8)
    with pytest.raises(InputError, match="a tile must have at least one row, not 0"):
        to_tile_order(codes, 0)
    with pytest.raises(InputError, match="5 rows are not 1 tiles of 4 rows"):
        from_tile_order(to_tile_order(codes[:4], 4), 5)
    with pytest.raises(InputError, match="rows that fill the last tile must have code 0"):
        from_tile_order(np.ones((2, 3, 4), dtype=np.uint8), 5)
    tensor = tensor_of("BOF4-NF4sS1E5M5", HIF7)
    index_plane, scale_plane = tile_planes(tensor, 4)
    with pytest.raises(InputError, match="plane of"):
        untile_planes(tensor, 4, index_plane[:-1], scale_plane)


# --- corrections ----------------------------------------------------------------------------------


def corrections_at(*positions: tuple[int, int], shape: tuple[int, int] = (5, 9)) -> Corrections:
    """Each entry has the value of its row and column, 16 x row + column."""
    mask = np.zeros(shape, bool)
    for row, column in positions:
        mask[row, column] = True
    values = 16 * np.arange(shape[0])[:, None] + np.arange(shape[1])
    return Corrections.from_mask(mask, values.astype(np.float32))


def test_rows_take_turns_and_columns_are_named_once() -> None:
    sparse = corrections_at((0, 7), (1, 2), (1, 5), (1, 7), (4, 0))
    first, second, third = tile_corrections(sparse, 2)
    assert first.columns.tolist() == [2, 5, 7]
    assert first.rows.tolist() == [0, 1, 1, 1]
    assert first.slots.tolist() == [2, 0, 1, 2]
    assert first.turns.tolist() == [0, 0, 1, 2]
    numbers = (first.values.astype(np.uint32) << 16).view(np.float32)
    assert numbers.tolist() == [7, 18, 21, 23]
    assert not len(second.columns)
    assert not len(second.values)
    assert (third.rows.tolist(), third.columns.tolist()) == ([0], [0])


@pytest.mark.parametrize("tile_rows", [1, 2, 3, 16])
@pytest.mark.parametrize("density", [0, 0.1, 1])
def test_corrections_there_and_back(tile_rows: int, density: float) -> None:
    mask = np.random.default_rng(2).random((ROWS, COLUMNS)) < density
    residuals = np.random.default_rng(3).standard_normal(mask.shape).astype(np.float32)
    sparse = Corrections.from_mask(mask, residuals)
    tiles = tile_corrections(sparse, tile_rows)
    for tile in tiles:
        # By turn, in it by row.
        assert (np.diff(tile.turns * tile_rows + tile.rows) > 0).all()
        assert (np.diff(tile.columns.astype(int)) > 0).all()
    back = untile_corrections(tiles, sparse.shape, tile_rows)
    for name in ("indptr", "columns", "values"):
        before, after = (getattr(one, name) for one in (sparse, back))
        assert after.dtype == before.dtype
        assert (after == before).all()


def test_what_no_tiles_of_corrections_are() -> None:
    sparse = corrections_at((0, 7), (4, 0))
    tiles = tile_corrections(sparse, 2)
    with pytest.raises(InputError, match="a tile must have at least one row, not 0"):
        tile_corrections(sparse, 0)
    with pytest.raises(InputError, match="5 rows are not 2 tiles of 2 rows"):
        untile_corrections(tiles[:2], sparse.shape, 2)
    one = np.ones(1, np.int64)
    wrong = TileCorrections(tiles[0].columns, one, one, tiles[0].values, 0 * one)
    with pytest.raises(InputError, match="tile 0: corrections of columns that it does not name"):
        untile_corrections([wrong, *tiles[1:]], sparse.shape, 2)
    with pytest.raises(InputError, match="tile 2: corrections of rows that it does not have"):
        untile_corrections([*tiles[:2], replace(tiles[2], rows=one)], sparse.shape, 2)
