"""Matrix products against Python integers and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden.exact_products import (
    SplitMatrix,
    SplitRows,
    exact_product,
    scaled,
    split,
    to_integers,
)

Float64 = NDArray[np.float64]


def exact_fractions(first: Float64, second: Float64) -> list[list[Fraction]]:
    """Product without any rounding."""
    left = [[Fraction(float(x)) for x in row] for row in first]
    right = [[Fraction(float(x)) for x in column] for column in second.T]
    return [
        [sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in right]
        for row in left
    ]


def kept_bits(inner: int) -> int:
    """Bits of each factor: twice that many and those of a sum of ``inner`` terms make 53."""
    return (53 - inner.bit_length()) // 2


def wide_matrix(seed: int, rows: int, columns: int) -> Float64:
    """Values over twelve orders of magnitude, both signs."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-6, 6, (rows, columns))


# ------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("values", "bits", "integers", "exponent"),
    [
        ([1.0, -0.5, 0.25], 4, [8, -4, 2], -3),
        ([15.0, 2.5, 3.5, -2.5], 4, [15, 2, 4, -2], 0),  # ties to even
        ([15.75, 8.0], 4, [15, 8], 0),  # would round to 16, which has five bits
        ([-15.75, 8.0], 4, [-15, 8], 0),
        ([2.0**-1070, 2.0**-1074], 8, [128, 8], -1077),
        ([2.0**1023, 2.0**1000], 30, [2**29, 2**6], 994),
        ([0.0, -0.0], 24, [0, 0], 0),
        ([], 24, [], 0),
    ],
)
def test_integers_fill_the_bits(
    values: list[float], bits: int, integers: list[int], exponent: int
) -> None:
    made, power = to_integers(np.array(values), bits)
    assert made.tolist() == integers
    assert power == exponent


@given(values=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8), bits=st.integers(2, 26))
@settings(deadline=None)
def test_rounding_errs_by_half_a_unit_at_most(values: list[float], bits: int) -> None:
    """By a whole one where the largest magnitude would round to one bit more."""
    kept = np.array(values)
    integers, exponent = to_integers(kept, bits)
    assert kept.tolist() == values
    assert (np.abs(integers) < 2**bits).all()
    unit = Fraction(2) ** exponent
    for value, integer in zip(values, integers.tolist(), strict=True):
        full = abs(integer) == 2**bits - 1
        error = abs(Fraction(value) / unit - Fraction(integer))
        assert integer == int(integer)
        assert error < 1 if full else error <= Fraction(1, 2)
    if any(values):
        assert np.abs(integers).max() >= 2 ** (bits - 1)


# ------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("inner", [1, 2, 15, 16, 17, 63, 64, 2047, 2048])
@pytest.mark.parametrize("precise", [False, True], ids=["plain", "precise"])
def test_integers_that_fit_are_multiplied_exactly(inner: int, precise: bool) -> None:
    """Factors at their limit with sums just below 2**53, against Python integers."""
    limit = 2 ** kept_bits(inner) - 1
    first = np.random.default_rng(inner).integers(-limit, limit + 1, (3, inner))
    second = np.random.default_rng(inner + 1).integers(-limit, limit + 1, (inner, 4))
    first[0], second[:, 0], second[:, 1] = limit, limit, -limit
    wanted = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in second.T.tolist()]
        for row in first.tolist()
    ]
    assert 2**50 < wanted[0][0] < 2**53
    made = exact_product(first.astype(np.float64), second.astype(np.float64), precise=precise)
    assert made.dtype == np.float64
    assert [[int(x) for x in row] for row in made.tolist()] == wanted


@pytest.mark.parametrize("inner", [1, 16, 64, 200])
def test_plain_products_are_those_of_the_rounded_factors(inner: int) -> None:
    """Not one bit is lost after the rounding: the fractions say so."""
    first, second = wide_matrix(inner, 4, inner), wide_matrix(inner + 1, inner, 3)
    left, left_exponent = to_integers(first, kept_bits(inner))
    right, right_exponent = to_integers(second, kept_bits(inner))
    unit = Fraction(2) ** (left_exponent + right_exponent)
    made = exact_product(first, second)
    wanted = [[x * unit for x in row] for row in exact_fractions(left, right)]
    assert [[Fraction(x) for x in row] for row in made.tolist()] == wanted


@pytest.mark.parametrize("inner", [1, 16, 64, 200])
def test_precise_products_have_twice_the_bits(inner: int) -> None:
    """Errors relative to the largest elements; the plain product is there to be worse."""
    first, second = wide_matrix(inner, 4, inner), wide_matrix(inner + 1, inner, 3)
    bits = kept_bits(inner)
    unit = float(np.abs(first).max() * np.abs(second).max()) * inner
    wanted = exact_fractions(first, second)
    errors = {}
    for precise in (False, True):
        made = exact_product(first, second, precise=precise).tolist()
        pairs = [
            (x, y) for row, exact in zip(made, wanted, strict=True)
            for x, y in zip(row, exact, strict=True)
        ]  # fmt: skip
        errors[precise] = max(float(abs(Fraction(x) - y)) for x, y in pairs) / unit
    assert errors[False] < 2.0 ** (1 - bits)
    # The product of both remainders is left out, and float64 itself rounds the sums.
    assert errors[True] < 2.0 ** (1 - 2 * bits) + 2.0**-51
    assert errors[True] < errors[False] / 2 ** (bits // 2)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 80), st.integers(1, 6)),
    precise=st.booleans(),
)
@settings(deadline=None)
def test_order_of_the_inner_elements_changes_no_bit(
    seed: int, shape: tuple[int, int, int], precise: bool
) -> None:
    """Nor do the order of rows and columns, the layout in memory, or what else is multiplied."""
    rows, inner, columns = shape
    rng = np.random.default_rng(seed)
    first, second = wide_matrix(seed, rows, inner), wide_matrix(seed + 1, inner, columns)
    kept = first.copy(), second.copy()
    made = exact_product(first, second, precise=precise)
    order = rng.permutation(inner)
    shuffled = exact_product(first[:, order], second[order], precise=precise)
    np.testing.assert_array_equal(shuffled, made)
    row_order, column_order = rng.permutation(rows), rng.permutation(columns)
    moved = exact_product(first[row_order], second[:, column_order], precise=precise)
    np.testing.assert_array_equal(moved, made[np.ix_(row_order, column_order)])
    other = exact_product(np.asfortranarray(first), np.asfortranarray(second), precise=precise)
    np.testing.assert_array_equal(other, made)
    turned = exact_product(second.T, first.T, precise=precise)
    if not precise:  # there the two remainders are added in turn
        np.testing.assert_array_equal(turned.T, made)
    np.testing.assert_array_equal(first, kept[0])
    np.testing.assert_array_equal(second, kept[1])


@given(
    seed=st.integers(0, 2**32 - 1),
    powers=st.tuples(st.integers(-300, 300), st.integers(-300, 300)),
    precise=st.booleans(),
)
@settings(deadline=None)
def test_powers_of_two_pass_through(seed: int, powers: tuple[int, int], precise: bool) -> None:
    first, second = wide_matrix(seed, 3, 20), wide_matrix(seed + 1, 20, 4)
    scaled = exact_product(np.ldexp(first, powers[0]), np.ldexp(second, powers[1]), precise=precise)
    made = exact_product(first, second, precise=precise)
    np.testing.assert_array_equal(scaled, np.ldexp(made, sum(powers)))


@pytest.mark.parametrize("precise", [False, True], ids=["plain", "precise"])
@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 4, 2), (3, 4, 0)])
def test_empty_and_zero_matrices_give_zeros(shape: tuple[int, int, int], precise: bool) -> None:
    rows, inner, columns = shape
    made = exact_product(np.ones((rows, inner)), np.ones((inner, columns)), precise=precise)
    assert made.shape == (rows, columns)
    assert not made.any()
    assert not exact_product(np.zeros((2, 5)), np.ones((5, 3)), precise=precise).any()


# ---------------------------------------------------------------------------------- split matrices


def parts_of(matrix: SplitMatrix) -> list[object]:
    exponents = matrix.high_exponent, matrix.low_exponent
    return [matrix.high.tolist(), matrix.low.tolist(), exponents]


@given(seed=st.integers(0, 2**32 - 1), decades=st.sampled_from([0.0, 3.0]))
@settings(deadline=None)
def test_rows_that_change_are_split_as_the_whole_matrix_is(seed: int, decades: float) -> None:
    """Exponents are those of the matrix as it is: they rise, fall, and fall to those of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((6, 5))
    made = SplitRows(values, 12)
    for step in range(12):
        rows = slice(step % 3 * 2, step % 3 * 2 + 2)
        values[rows] = rng.standard_normal((2, 5)) * 10.0 ** rng.uniform(-decades, decades)
        if step > 8:
            values[rows] = 0.0
        before = parts_of(made.parts)
        anew = made.replace(rows, values[rows])
        assert parts_of(made.parts) == parts_of(split(values, 12))
        assert anew == (parts_of(made.parts)[2] != before[2])


def test_scaling_is_that_of_ldexp() -> None:
    """Also where the power of two alone is no normal float64."""
    values = np.array([1.0, -3.0, 2.0**52 + 1, 2.0**-1000, 0.0, -0.0])
    for exponent in (-1100, -1074, -1030, -1022, -3, 0, 7, 971):
        np.testing.assert_array_equal(scaled(values, exponent), np.ldexp(values, exponent))
    tiny = np.array([2.0**-1000, 3 * 2.0**-1074])
    np.testing.assert_array_equal(scaled(tiny, 1100), np.ldexp(tiny, 1100))
