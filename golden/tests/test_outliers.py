"""Which weights get a correction, against a scalar reference on exact fractions."""

import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden.errors import InputError
from golden.formats import BF16
from golden.outliers import corrections_at, outlier_mask, residual_mask

Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]


def matrix(rows: list[list[float]]) -> Float32:
    return np.array(rows, dtype=np.float32)


def positions(mask: Mask) -> list[tuple[int, int]]:
    return [(int(row), int(column)) for row, column in np.argwhere(mask)]


def ratio(weights: Float32, row: int, column: int, block_size: int) -> Fraction | float:
    """Squared magnitude over the mean square of the other weights of the block."""
    start = column // block_size * block_size
    squares = [Fraction(float(w)) ** 2 for w in weights[row, start : start + block_size]]
    own = squares.pop(column - start)
    if own == 0:
        return 0.0
    return own * len(squares) / sum(squares) if any(squares) else float("inf")


def reference(scores: list[list[Fraction | float]], count: int) -> Mask:
    """The largest scores above zero, the first in reading order among equals."""
    flat = [score for row in scores for score in row]
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    mask = np.zeros(len(flat), dtype=bool)
    mask[[i for i in order[:count] if flat[i] > 0]] = True
    return mask.reshape(len(scores), -1)


# ------------------------------------------------------------------------------------- outliers


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([8, 16, 32]),
    density=st.sampled_from([0.0, 0.03125, 0.125, 0.5, 0.75]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_outliers_stand_out_most_from_their_block(
    rows: int, columns: int, block_size: int, density: float, seed: int
) -> None:
    """Small integers, so that there are zeros and ties, and short last blocks."""
    rng = np.random.default_rng(seed)
    weights = (rng.integers(-3, 4, (rows, columns)) ** 3).astype(np.float32)
    kept = weights.copy()
    scores = [[ratio(weights, i, j, block_size) for j in range(columns)] for i in range(rows)]
    mask = outlier_mask(weights, block_size, density)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, reference(scores, int(density * rows * columns)))
    np.testing.assert_array_equal(weights, kept)


def test_a_weight_is_judged_by_the_others_of_its_block() -> None:
    """The larger weight among large ones does not stand out, the smaller among small ones does."""
    weights = np.full((1, 32), 0.01, dtype=np.float32)
    weights[0, :16] = 5.0
    weights[0, 3], weights[0, 20] = 10.0, -1.0
    assert positions(outlier_mask(weights, 16, 1 / 32)) == [(0, 20)]
    assert positions(outlier_mask(weights, 16, 2 / 32)) == [(0, 3), (0, 20)]


def test_a_short_block_is_judged_by_its_mean() -> None:
    """Three times the others in a block of 16 as in one of 4: ratios are equal, the first wins.

    Against the sum instead of the mean, the short block would always stand out.
    """
    weights = np.ones((1, 20), dtype=np.float32)
    weights[0, 5], weights[0, 17] = 3.0, 3.0
    assert positions(outlier_mask(weights, 16, 0.05)) == [(0, 5)]
    weights[0, 17] = np.nextafter(np.float32(3.0), np.float32(4.0))
    assert positions(outlier_mask(weights, 16, 0.05)) == [(0, 17)]


@pytest.mark.parametrize("column", [16, 19, 3])
def test_a_weight_alone_in_its_block_stands_out_infinitely(column: int) -> None:
    weights = np.zeros((2, 20), dtype=np.float32)
    weights[0, :16] = [1e6, *[1.0] * 15]
    weights[1, column] = 1e-30
    assert positions(outlier_mask(weights, 16, 0.025)) == [(1, column)]
    assert positions(outlier_mask(weights, 16, 0.05)) == [(0, 0), (1, column)]


def test_a_block_of_one_weight_is_alone() -> None:
    weights = np.ones((3, 17), dtype=np.float32)
    weights[1, 16] = 0.0
    assert positions(outlier_mask(weights, 16, 2 / 51)) == [(0, 16), (2, 16)]


def test_zeros_are_never_marked() -> None:
    weights = matrix([[0.0, -0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert positions(outlier_mask(weights, 4, 0.99)) == [(0, 2)]
    assert not outlier_mask(np.zeros((3, 20), dtype=np.float32), 16, 0.5).any()


def test_of_equals_the_first_are_marked() -> None:
    weights = np.ones((3, 16), dtype=np.float32)
    weights[1, 7] = 2.0
    mask = outlier_mask(weights, 16, 5 / 48)
    assert positions(mask) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 7)]


@pytest.mark.parametrize(
    ("density", "count"), [(0.0, 0), (0.0249, 0), (0.025, 1), (0.0499, 1), (0.05, 2), (0.999, 39)]
)
def test_density_is_rounded_down(density: float, count: int) -> None:
    weights = np.random.default_rng(1).standard_normal((2, 20)).astype(np.float32)
    assert int(outlier_mask(weights, 16, density).sum()) == count
    assert int(residual_mask(weights, np.zeros_like(weights), density).sum()) == count


@pytest.mark.parametrize("density", [-0.001, 1.0, 1.5, np.inf, -np.inf, np.nan])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    weights = np.ones((2, 16), dtype=np.float32)
    message = rf"at least 0 and below 1, not {density}"
    with pytest.raises(InputError, match=message):
        outlier_mask(weights, 16, density)
    with pytest.raises(InputError, match=message):
        residual_mask(weights, weights, density)


# ------------------------------------------------------------------------------------ residuals


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.0625, 0.25, 0.5]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_residuals_are_the_largest_weighted_errors(
    rows: int, columns: int, density: float, weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-4, 5, (rows, columns)).astype(np.float32)
    reconstruction = rng.integers(-4, 5, (rows, columns)).astype(np.float32)
    norms = rng.integers(0, 4, columns).astype(np.float64) if weighted else None
    used = [1.0] * columns if norms is None else [n or 1.0 for n in norms.tolist()]
    errors = (weights - reconstruction).tolist()
    scores: list[list[Fraction | float]] = [
        [Fraction(error * norm) ** 2 for error, norm in zip(row, used, strict=True)]
        for row in errors
    ]
    kept = weights.copy(), reconstruction.copy()
    mask = residual_mask(weights, reconstruction, density, norms)
    np.testing.assert_array_equal(mask, reference(scores, int(density * weights.size)))
    np.testing.assert_array_equal(weights, kept[0])
    np.testing.assert_array_equal(reconstruction, kept[1])


def test_channel_norms_decide_between_residuals() -> None:
    weights = matrix([[3.0, -1.0, 0.5, 2.0]])
    reconstruction = np.zeros_like(weights)
    assert positions(residual_mask(weights, reconstruction, 0.25)) == [(0, 0)]
    norms = np.array([0.3, 4.0, 10.0, 0.1])
    assert positions(residual_mask(weights, reconstruction, 0.25, norms)) == [(0, 2)]
    # Never excited channels count as 1.
    norms = np.array([np.nan, 0.0, 1.0, 1.4])
    assert positions(residual_mask(weights, reconstruction, 0.25, norms)) == [(0, 0)]


def test_exact_weights_need_no_residual() -> None:
    weights = matrix([[1.0, 2.0, 3.0, 4.0]])
    reconstruction = matrix([[1.0, 2.0, 3.5, 4.0]])
    assert positions(residual_mask(weights, reconstruction, 0.75)) == [(0, 2)]


@pytest.mark.parametrize(
    ("norms", "message"),
    [([1.0, -1.0], "channel 1 is -1"), ([1.0, np.inf], "channel 1 is inf"), ([1.0], "shape")],
)
def test_channel_norms_that_cannot_be_used_are_refused(norms: list[float], message: str) -> None:
    weights = np.ones((1, 2), dtype=np.float32)
    with pytest.raises(InputError, match=message):
        residual_mask(weights, weights, 0.5, np.array(norms))


# ---------------------------------------------------------------------------------- corrections


def test_corrections_hold_what_the_dense_part_misses() -> None:
    weights = matrix([[1.0, -2.0, 0.0], [0.5, 300.0, 7.0]])
    dense = matrix([[0.75, -2.0, 0.25], [0.5, 1.0, 7.0]])
    mask = np.array([[True, True, True], [False, True, False]])
    made = corrections_at(weights, dense, mask)
    assert made.shape == (2, 3)
    assert made.indptr.tolist() == [0, 3, 4]
    assert made.columns.tolist() == [0, 1, 2, 1]
    # 299 needs nine bits, bfloat16 has eight: ties to even make it 300.
    expected = [[1.0, -2.0, 0.0], [0.5, 301.0, 7.0]]
    assert made.add_to(dense).tolist() == expected


def test_no_mask_makes_no_corrections() -> None:
    weights = np.ones((2, 4), dtype=np.float32)
    made = corrections_at(weights, np.zeros_like(weights), np.zeros(weights.shape, dtype=bool))
    assert made.entries == 0
    np.testing.assert_array_equal(made.add_to(weights), weights)


# --------------------------------------------------- order of arithmetic as docs/numerics.md has it


def largest(scores: list[float], count: int) -> list[int]:
    """Positions of the largest scores above zero, of equals the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(i for i in order[:count] if scores[i] > 0)


@pytest.mark.parametrize("seed", [41, 42])
def test_outliers_are_scored_in_the_stated_order(seed: int) -> None:
    """Blocks of the same values in other orders: only the rounding of the sums tells them apart."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(16).astype(np.float32)
    weights = np.array([rng.permutation(values) for _ in range(64)])
    scores = []
    for row in weights.tolist():
        total = 0.0
        for x in row:  # from left to right
            total += x * x
        scores += [x * x * 15 / (total - x * x) for x in row]
    mask = outlier_mask(weights, 16, 32 / weights.size)  # half of the rows' largest
    assert np.flatnonzero(mask).tolist() == largest(scores, 32)


@pytest.mark.parametrize("seed", [43, 44])
def test_residuals_are_scored_in_the_stated_order(seed: int) -> None:
    """Errors and norms whose product is nearly the same for all."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((1, 256)).astype(np.float32)
    dense = np.zeros_like(weights)
    norms = 1.0 / np.abs(weights[0].astype(np.float64))
    scores = [(r * r) * (c * c) for r, c in zip(weights[0].tolist(), norms.tolist(), strict=True)]
    mask = residual_mask(weights, dense, 0.25, norms)
    assert np.flatnonzero(mask).tolist() == largest(scores, 64)


@pytest.mark.parametrize("seed", [45])
def test_values_are_rounded_to_float32_and_then_to_bfloat16(seed: int) -> None:
    """Differences that need more than 24 bits, and fall on a tie of bfloat16 in float32."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((1, 512)).astype(np.float32)
    ties = (rng.integers(128, 256, 512) + 0.5) * 2.0 ** rng.integers(-12, 4, 512)
    weights = (dense.astype(np.float64) + ties).astype(np.float32)
    values = corrections_at(weights, dense, np.ones((1, 512), dtype=bool)).values
    expected, once = [], []
    for w, d in zip(weights[0].tolist(), dense[0].tolist(), strict=True):
        rounded: float = struct.unpack("<f", struct.pack("<f", w - d))[0]  # exact in float64
        expected.append(BF16.encode(rounded))
        once.append(BF16.encode(w - d))
    assert values.tolist() == expected
    assert expected != once  # the two roundings are not one
