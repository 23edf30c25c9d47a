"""Checks of weights and channel norms, and the cutting of a matrix into blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import golden.blocks
from golden.blocks import (
    CHANNEL_NORM_RANGE,
    Blocks,
    check_weights,
    cut_blocks,
    usable_channel_norms,
)
from golden.errors import InputError

# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    weights = np.zeros((3, 20), dtype=np.float32)
    check_weights(weights)
    weights[1, 17] = weights[2, 0] = bad
    message = rf"weight at row 1, column 17 is {bad} \(2 weights are not finite\)"
    with pytest.raises(InputError, match=message):
        check_weights(weights)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0), ()])
def test_weights_must_be_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"non-empty matrix \(rows, columns\), not \("):
        check_weights(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_weights_must_be_float32(dtype: type) -> None:
    with pytest.raises(InputError, match=f"must be float32, not {np.dtype(dtype)}"):
        check_weights(np.zeros((2, 16), dtype=dtype))


# -------------------------------------------------------------------------------- channel norms


def test_without_calibration_every_norm_is_one_and_none_is_counted() -> None:
    norms, replaced = usable_channel_norms(None, 3)
    assert norms.dtype == np.float64
    assert norms.tolist() == [1.0, 1.0, 1.0]
    assert replaced == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_missing_channel_norms_become_one_and_are_counted(dtype: type) -> None:
    given_norms: NDArray[np.floating] = np.array([0.5, 0.0, np.nan, -0.0, 2.0], dtype=dtype)
    kept = given_norms.copy()
    norms, replaced = usable_channel_norms(given_norms, 5)
    assert norms.dtype == np.float64
    assert norms.tolist() == [0.5, 1.0, 1.0, 1.0, 2.0]
    assert replaced == 3
    np.testing.assert_array_equal(given_norms, kept)


def test_channel_norms_may_reach_both_ends_of_the_range() -> None:
    norms, replaced = usable_channel_norms(np.array(CHANNEL_NORM_RANGE), 2)
    assert norms.tolist() == list(CHANNEL_NORM_RANGE)
    assert replaced == 0


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (-1.0, "-1"),
        (np.inf, "inf"),
        (-np.inf, "-inf"),
        (1.01e60, r"1.01e\+60"),
        (0.99e-60, "9.9e-61"),
        (5e-324, "4.94066e-324"),
    ],
)
def test_channel_norms_that_cannot_be_used_are_named(bad: float, shown: str) -> None:
    """The first one is named, and zeros before it are not mistaken for it."""
    norms = np.array([0.0, 1.0, np.nan, bad, bad])
    with pytest.raises(InputError, match=rf"channel_norms: channel 3 is {shown}, must be 0"):
        usable_channel_norms(norms, 5)


@pytest.mark.parametrize("shape", [(15,), (17,), (1, 16), (16, 1), ()])
def test_channel_norms_must_match_the_columns(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"channel_norms has shape .*, expected \(16,\)"):
        usable_channel_norms(np.ones(shape), 16)


# -------------------------------------------------------------------------------------- cutting


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    block_size=st.sampled_from([8, 16, 32, 64]),
    weighted=st.booleans(),
)
def test_every_weight_lands_in_its_block(
    rows: int, columns: int, block_size: int, weighted: bool
) -> None:
    weights = np.arange(1, rows * columns + 1, dtype=np.float32).reshape(rows, columns)
    norms = np.arange(1.0, columns + 1) if weighted else None
    blocks = cut_blocks(weights, block_size, norms)
    per_row = -(-columns // block_size)
    assert blocks.blocks_per_row == per_row
    assert len(blocks) == rows * per_row
    assert blocks.values.dtype == np.float32
    assert blocks.rows(np.arange(len(blocks))).tolist() == [
        row for row in range(rows) for _ in range(per_row)
    ]
    if blocks.error_weights is None:
        assert not weighted
        assert columns % block_size == 0
    members = np.arange(len(blocks))[::-1]
    values, error_weights = blocks.take(members)
    assert values.shape == (block_size, len(blocks))
    assert values.dtype == np.float64
    for position, block in enumerate(members.tolist()):
        row, first = block // per_row, block % per_row * block_size
        inside = min(block_size, columns - first)
        wanted = [*weights[row, first : first + inside].tolist(), *[0.0] * (block_size - inside)]
        assert values[:, position].tolist() == wanted
        if error_weights is not None:
            squares = [float(first + i + 1) ** 2 if weighted else 1.0 for i in range(inside)]
            padded = [*squares, *[0.0] * (block_size - inside)]
            assert error_weights[:, position].tolist() == padded


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_block_size_zero_makes_the_matrix_one_block(weighted: bool) -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    blocks = cut_blocks(weights, 0, np.array([1.0, 2.0, 3.0]) if weighted else None)
    assert len(blocks) == blocks.blocks_per_row == 1
    values, error_weights = blocks.take(np.array([0]))
    assert values.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]
    if weighted:
        assert error_weights is not None
        assert error_weights.ravel().tolist() == [1.0, 4.0, 9.0, 1.0, 4.0, 9.0]
    else:
        assert error_weights is None


def test_cutting_does_not_modify_its_inputs() -> None:
    weights, norms = np.ones((2, 20), dtype=np.float32), np.full(20, 3.0)
    blocks = cut_blocks(weights, 16, norms)
    values, error_weights = blocks.take(np.array([0, 3]))
    assert error_weights is not None
    values[:], error_weights[:] = 7.0, 7.0
    assert (weights == 1.0).all()
    assert (norms == 3.0).all()
    assert blocks.values.max() == 1.0
    assert blocks.error_weights is not None
    assert blocks.error_weights.max() == 9.0


@pytest.mark.parametrize(
    ("block_size", "count", "lengths"),
    [(8, 12, [5, 5, 2]), (8, 10, [5, 5]), (8, 3, [3]), (40, 3, [1, 1, 1]), (100, 2, [1, 1])],
)
def test_parts_are_consecutive_and_bounded(
    monkeypatch: pytest.MonkeyPatch, block_size: int, count: int, lengths: list[int]
) -> None:
    """At most 40 weights a part here, but always one block."""
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", 40)
    blocks = Blocks(np.zeros((count, block_size), dtype=np.float32), None, count)
    parts = list(blocks.parts())
    assert [len(part) for part in parts] == lengths
    assert np.concatenate(parts).tolist() == list(range(count))
