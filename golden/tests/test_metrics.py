"""Metrics on values worked out by hand."""

import math

import numpy as np
import pytest

from golden.metrics import Fidelity, cosine_gap_ppm, measure, model_fidelity, relative_mse


def row(*values: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.array([values], dtype=np.float32)


def test_relative_mse_by_hand() -> None:
    # Errors 1 and 2, weights 3 and 4: (1 + 4) / (9 + 16).
    assert relative_mse(row(3, 4), row(2, 6)) == 0.2
    assert relative_mse(row(2, 6), row(3, 4)) == 0.125
    assert relative_mse(row(3, 4), row(0, 0)) == 1.0


def test_relative_mse_of_zeros() -> None:
    assert relative_mse(row(0, 0), row(0, 0)) == 0.0
    assert relative_mse(row(0, 0), row(0, 1)) == math.inf
    assert relative_mse(row(3, 4), row(3, 4)) == 0.0


def test_relative_mse_does_not_leave_float64() -> None:
    """Squares of 1e30 overflow float32, and squares of 1e-30 vanish in it."""
    for size in (1e30, 1e-30):
        ratio = relative_mse(row(3 * size, 4 * size), row(2 * size, 6 * size))
        assert ratio == pytest.approx(0.2, rel=1e-6)
    # 1 + 2**-23 and 1 - 2**-24: the difference keeps all its digits.
    close = relative_mse(row(1 + 2**-23), row(1 - 2**-24))
    assert close == (2**-23 + 2**-24) ** 2 / (1 + 2**-23) ** 2


def test_cosine_gap_by_hand() -> None:
    # <(3, 4), (4, 3)> = 24 of 25.
    assert cosine_gap_ppm(row(3, 4), row(4, 3)) == pytest.approx(40_000, rel=1e-12)
    assert cosine_gap_ppm(row(1, 0), row(0, 1)) == 1e6
    assert cosine_gap_ppm(row(1, 0), row(-1, 0)) == 2e6
    assert cosine_gap_ppm(row(3, 4), row(6, 8)) == pytest.approx(0, abs=1e-9)


def test_cosine_gap_weights_are_squared_channel_norms() -> None:
    # c = (2, 1): <(3, 4), (4, 3)> = 4 * 12 + 12 = 60; norms 4 * 9 + 16 = 52 and 4 * 16 + 9 = 73.
    norms = np.array([2.0, 1.0])
    wanted = (1 - 60 / math.sqrt(52 * 73)) * 1e6
    assert cosine_gap_ppm(row(3, 4), row(4, 3), norms) == pytest.approx(wanted, rel=1e-12)
    ones = cosine_gap_ppm(row(3, 4), row(4, 3), np.ones(2))
    assert ones == cosine_gap_ppm(row(3, 4), row(4, 3))
    # Each norm belongs to a column, not to a row.
    matrix = np.array([[3, 4], [4, 3]], dtype=np.float32)
    # <., .> = 2 * 12 * (4 + 1); both norms 4 * 25 + 25.
    wanted = (1 - 120 / 125) * 1e6
    assert cosine_gap_ppm(matrix, matrix[::-1], norms) == pytest.approx(wanted, rel=1e-12)


def test_cosine_gap_of_zeros() -> None:
    assert cosine_gap_ppm(row(0, 0), row(0, 0)) == 0.0
    assert cosine_gap_ppm(row(0, 0), row(1, 0)) == 1e6
    assert cosine_gap_ppm(row(1, 0), row(0, 0)) == 1e6


def test_cosine_gap_does_not_leave_float64() -> None:
    for size in (1e30, 1e-30):
        gap = cosine_gap_ppm(row(3 * size, 4 * size), row(4 * size, 3 * size))
        assert gap == pytest.approx(40_000, rel=1e-5)


@pytest.mark.parametrize("seed", [97])
def test_cosine_gap_is_never_negative(seed: int) -> None:
    """The docstring promises 0 to 2e6; rounding must not turn an exact copy into -2e-10."""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        weights = rng.standard_normal((4, 16)).astype(np.float32)
        gap = cosine_gap_ppm(weights, weights)
        assert 0.0 <= gap < 1e-9, f"seed {seed}"
        gap = cosine_gap_ppm(weights, -weights)
        assert 2e6 - 1e-9 < gap <= 2e6, f"seed {seed}"


@pytest.mark.parametrize("seed", [98])
def test_inputs_are_not_modified(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (rng.standard_normal((3, 4)).astype(np.float32) for _ in range(2))
    norms = rng.uniform(1, 2, 4)
    kept = first.copy(), second.copy(), norms.copy()
    relative_mse(first, second)
    cosine_gap_ppm(first, second, norms)
    assert np.array_equal(first, kept[0])
    assert np.array_equal(second, kept[1])
    assert np.array_equal(norms, kept[2])


def test_shapes_must_agree() -> None:
    for second in (np.zeros((1, 3), np.float32), np.zeros((2, 1), np.float32)):
        with pytest.raises(ValueError, match=r"shapes differ: \(1, 2\) and"):
            relative_mse(row(1, 2), second)
        with pytest.raises(ValueError, match=r"shapes differ: \(1, 2\) and"):
            cosine_gap_ppm(row(1, 2), second)


def test_measure_gives_all_figures_of_one_layer() -> None:
    rng = np.random.default_rng(31)
    weights = rng.standard_normal((6, 8)).astype(np.float32)
    other = (weights + rng.standard_normal((6, 8)) / 64).astype(np.float32)
    norms = np.array([1.0, 0.0, 2.0, np.nan, 0.5, 3.0, 1.0, 1.0])
    usable = np.where((norms == 0) | np.isnan(norms), 1.0, norms)
    found = measure(weights, other, norms)
    assert found.gap_ppm == cosine_gap_ppm(weights, other, usable)
    assert found.plain_gap_ppm == cosine_gap_ppm(weights, other)
    assert found.relative_mse == pytest.approx(relative_mse(weights, other), rel=1e-12)
    assert (found.weights, found.replaced_norms) == (48, 2)
    assert measure(weights, other).replaced_norms == 0


def test_a_model_is_the_sum_of_its_layers_weighted_by_parameters() -> None:
    layers = [Fidelity(30, 100.0, 200.0, 3.0, 10.0, 1), Fidelity(10, 500.0, 40.0, 1.0, 30.0, 2)]
    assert model_fidelity(layers) == Fidelity(40, 200.0, 160.0, 4.0, 40.0, 3)
    assert model_fidelity(layers).relative_mse == 0.1


def test_relative_error_of_layers_of_zeros() -> None:
    zeros = np.zeros((2, 4), dtype=np.float32)
    assert measure(zeros, zeros).relative_mse == 0.0
    assert measure(zeros, zeros + 1).relative_mse == float("inf")
