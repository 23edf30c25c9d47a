"""Factors of second moments against numpy.linalg, and second moments that are refused."""

import numpy as np
import pytest

from golden.errors import InputError
from golden.factors import DEFAULT_DAMPING, factor_second_moment
from golden.tests.second_moments import (
    autoregressive,
    block_order,
    low_rank,
    reference_factors,
    uneven,
)


@pytest.mark.parametrize("columns", [1, 7, 40, 64, 65, 150])
@pytest.mark.parametrize("block_size", [8, 64])
@pytest.mark.parametrize("decades", [0.0, 4.0])
def test_factors_are_those_of_the_damped_moment_in_order(
    columns: int, block_size: int, decades: float
) -> None:
    moment = uneven(columns, columns + block_size, decades)
    kept = moment.copy()
    made = factor_second_moment(moment, block_size, damping=0.01)
    assert made.order.tolist() == block_order(moment, block_size)
    power = float(np.trace(moment)) / columns
    damped = (moment + 0.01 * power * np.eye(columns))[np.ix_(made.order, made.order)]
    np.testing.assert_allclose(made.moment, damped, rtol=1e-14)
    upper, diagonal = reference_factors(damped)
    units = np.sqrt(diagonal)  # what U is relative to
    np.testing.assert_allclose(made.diagonal, diagonal, rtol=1e-11)
    relative = (made.upper - upper) * units / units[:, None]
    assert np.abs(relative).max() < 1e-11
    assert not np.tril(made.upper).any()
    whole = (made.upper + np.eye(columns)) * np.sqrt(made.diagonal)
    roots = np.sqrt(np.diag(damped))
    difference = (whole @ whole.T - damped) / np.multiply.outer(roots, roots)
    assert np.abs(difference).max() < 1e-12
    np.testing.assert_array_equal(moment, kept)


def test_blocks_of_equal_power_keep_their_order() -> None:
    powers = np.repeat([1.0, 3.0, 1.0, 3.0, 2.0], 8)[:36]  # the last block has half the channels
    made = factor_second_moment(np.diag(powers), 8)
    assert made.order[::8].tolist() == [8, 24, 0, 16, 32]
    assert made.order.tolist() == block_order(np.diag(powers), 8)
    assert not made.upper.any()
    np.testing.assert_allclose(made.diagonal, powers[made.order] + 0.02 * powers.mean())


def test_damping_makes_up_for_a_rank_that_is_too_low() -> None:
    sample = np.random.default_rng(3).integers(-9, 10, (40, 5)).astype(np.float64)
    moment = sample @ sample.T
    with pytest.raises(InputError, match="not positive definite at channel"):
        factor_second_moment(moment, 16, damping=0.0)
    made = factor_second_moment(moment, 16)
    mean = float(np.trace(moment)) / 40
    np.testing.assert_allclose(made.diagonal.min(), DEFAULT_DAMPING * mean, rtol=0.2)


@pytest.mark.parametrize("power", [1e-200, 1e-30, 1e30, 1e200])
def test_units_of_the_inputs_do_not_matter(power: float) -> None:
    exponent = int(np.frexp(power)[1]) // 2 * 2
    moment = low_rank(50, 6, seed=1)
    wanted = factor_second_moment(moment, 16)
    made = factor_second_moment(np.ldexp(moment, exponent), 16)
    np.testing.assert_array_equal(made.upper, wanted.upper)
    np.testing.assert_array_equal(made.diagonal, np.ldexp(wanted.diagonal, exponent))


def test_channels_never_excited_stand_apart() -> None:
    """They count as power 1, also where rounding left something beside a zero diagonal."""
    moment = 2.0 * autoregressive(40)
    silent = [0, 17, 18, 39]
    moment[silent, :] = moment[:, silent] = 0.0
    made = factor_second_moment(moment, 16, damping=0.5)
    place = np.flatnonzero(np.isin(made.order, silent))
    added = 0.5 * (2.0 * 36 + 4) / 40
    assert not made.upper[place].any()
    assert not made.upper[:, place].any()
    np.testing.assert_allclose(made.diagonal[place], 1.0 + added)
    moment[0, 5] = moment[5, 0] = 0.125
    again = factor_second_moment(moment, 16, damping=0.5)
    np.testing.assert_array_equal(again.moment, made.moment)
    np.testing.assert_array_equal(again.upper, made.upper)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 2, 2), ()])
def test_a_moment_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"second moment: shape .* is not square"):
        factor_second_moment(np.ones(shape), 16)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({(2, 5): np.nan, (5, 2): np.nan}, r"entry \(2, 5\) is nan"),
        ({(4, 4): np.inf}, r"entry \(4, 4\) is inf"),
        ({(5, 2): 0.25}, r"not symmetric at \(2, 5\)"),
        ({(3, 3): -1e-9}, "channel 3 has negative power"),
        ({(1, 6): 1.5, (6, 1): 1.5}, "not positive definite at channel 1, damped as it is"),
    ],
)
def test_a_moment_that_is_none_is_refused(
    entries: dict[tuple[int, int], float], message: str
) -> None:
    moment = np.eye(20)
    for position, value in entries.items():
        moment[position] = value
    with pytest.raises(InputError, match=message):
        factor_second_moment(moment, 16)
