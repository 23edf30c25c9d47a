"""Training of codebooks: the exact step by brute force, the rest by what it promises."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from golden.codebooks import fixed_lut
from golden.convert import decode_array, level_table
from golden.formats import HIF7, HIF8, HIF8T, HIF_FORMATS, HifFormat
from golden.notation import parse_format
from golden.quantize import quantize, scaled_layer
from golden.search import ScaleSearch
from golden.tensor import decode
from golden.training import (
    START_LEVELS,
    Training,
    TrainingSample,
    _Moments,
    _moments,
    _Trainer,
    best_start,
    initial_levels,
    optimal_levels,
    start_levels,
    train_codebooks,
)

Levels = NDArray[np.int64]


def gaussian(seed: int, rows: int = 16, columns: int = 128) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def sample_of(
    weights: NDArray[np.float32],
    name: str = "DD4-DD4sS1E5M5",
    count: int = 4096,
    norms: NDArray[np.float64] | None = None,
) -> TrainingSample:
    fmt = parse_format(name)
    return TrainingSample(scaled_layer(weights, fmt, 100.0, norms), count, fmt.lut_entries)


# ----------------------------------------------------------------------------------- optimal step


def moments_of(cells: NDArray[np.int64], weights: NDArray[np.float64], limit: int) -> _Moments:
    """Moments of points in the middle of half-integer cells, as optimal_levels takes them."""
    points = (cells - 0.5) / 2
    sums = np.zeros((3, 2 * limit + 1))
    for power in range(3):
        np.add.at(sums[power], cells + limit, weights * points**power)
    return _Moments(np.concatenate([np.zeros((3, 1)), np.cumsum(sums, axis=1)], axis=1), limit)


def error_of(levels: Levels, cells: NDArray[np.int64], weights: NDArray[np.float64]) -> float:
    """Every point goes to its nearest level; none is half-way, as midpoints are half-integers."""
    points = (cells - 0.5) / 2
    distances = np.abs(points[:, None] - levels)
    return float((weights * distances.min(axis=1) ** 2).sum())


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_the_optimal_levels_are_those_of_brute_force(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = np.array([-12, -10, -7, -5, -3, -2, 0, 1, 4, 6, 9, 12], dtype=np.int64)
    cells = rng.integers(-30, 31, 60)
    weights = rng.uniform(0.1, 2.0, 60)
    found = optimal_levels(moments_of(cells, weights, 40), grid, count)
    assert len(found) == count
    assert (np.diff(found) > 0).all()
    least = min(
        error_of(np.array(chosen), cells, weights) for chosen in itertools.combinations(grid, count)
    )
    assert error_of(found, cells, weights) == pytest.approx(least, rel=1e-12)


# ----------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("hif", HIF_FORMATS.values(), ids=HIF_FORMATS.keys())
@pytest.mark.parametrize("luts", [1, 2])
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_starts_are_ascending_grid_values(hif: HifFormat, luts: int, bits: int) -> None:
    starts = start_levels(hif, 1 << bits, luts)
    assert starts
    for start in starts:
        assert len(start) == luts
        for levels in start:
            assert len(levels) == 1 << bits
            assert (np.diff(levels) > 0).all()
            assert levels[0] < 0 < levels[-1]
            assert set(levels.tolist()) <= {int(value) for value in hif.canonical}


def test_a_format_without_its_own_start_takes_that_of_hif7_doubled() -> None:
    own = START_LEVELS["HIF7", 16, 1]
    assert ("HIF8T", 16, 1) not in START_LEVELS or START_LEVELS["HIF8T", 16, 1] != own
    assert ("HIF8", 16, 2) not in START_LEVELS
    (start,) = start_levels(HIF8, 16, 2)
    ratio = HIF8.full_scale // HIF7.full_scale
    expected = [[ratio * value for value in lut] for lut in START_LEVELS["HIF7", 16, 2]["normal"]]
    assert [levels.tolist() for levels in start] == expected


def test_without_any_table_the_luts_of_a_pair_interleave() -> None:
    assert ("HIF7", 32, 2) not in START_LEVELS
    ((first, second),) = start_levels(HIF7, 32, 2)
    np.testing.assert_array_equal(first, initial_levels(HIF7, 32, 0.0))
    np.testing.assert_array_equal(second, initial_levels(HIF7, 32, 0.5))
    middle = slice(8, 24)
    assert (first[middle] < second[middle]).all()


def test_the_best_start_has_the_least_error_and_the_first_wins() -> None:
    sample = sample_of(gaussian(1), "DD4sS1E5M5")
    coarse = initial_levels(HIF7, 16, 0.0)
    fitted = fixed_lut("BOF4", 16, HIF7).values
    starts = [[coarse], [fitted], [fitted.copy()]]
    errors = [sample.rank(start[0]).errors.sum() for start in starts]
    assert errors[1] < errors[0]
    assert best_start(sample, starts) is starts[1]


# --------------------------------------------------------------------------------------- training


def total_error(sample: TrainingSample, luts: list[Levels]) -> float:
    errors = [sample.rank(levels).errors for levels in luts]
    return float(np.cumsum(np.minimum.reduce(errors))[-1])


@pytest.mark.parametrize("luts", [1, 2])
@pytest.mark.parametrize("seed", [2])
def test_training_gains_and_says_what_it_reached(luts: int, seed: int) -> None:
    name = "-".join(["DD4"] * luts) + "sS1E5M5"
    sample = sample_of(gaussian(seed), name)
    start = [initial_levels(HIF7, 16, number / luts) for number in range(luts)]
    before = total_error(sample, start)
    reached = []
    for effort in (
        Training(rounds=0, sweeps=0),
        Training(rounds=4, sweeps=0),
        Training(rounds=4, sweeps=2, least_gain=0.0),
    ):
        trained, error = train_codebooks(sample, start, HIF7, effort=effort)
        assert total_error(sample, [lut.values for lut in trained]) == error
        reached.append(error)
    assert reached[0] == before
    assert reached[1] < 0.997 * before  # 0.994 for the pair: the alternation stops early
    assert reached[2] < 0.99 * reached[1]


def test_training_fits_the_weights_it_is_given() -> None:
    """Weights that are multiples of odd levels are reproduced exactly by training alone."""
    levels = np.array([-128, -104, -80, -60, -48, -36, -26, -10, -3, 5, 15, 30, 44, 72, 88, 112])
    rng = np.random.default_rng(3)
    weights = rng.choice(levels, (64, 64)).astype(np.float32)
    weights[:, ::16] = -128
    start = [levels + np.array([0, 8, 0, -4, 4, 0, 2, 1, 0, -1, 1, -2, 4, 0, 8, 8])]
    fmt = parse_format("DD4sS1E5M5")
    sample = TrainingSample(scaled_layer(weights, fmt, 112.0), 256, 16)
    luts, _ = train_codebooks(sample, start, HIF7, effort=Training(rounds=10, sweeps=10))
    np.testing.assert_array_equal(decode(quantize(weights, fmt, luts=luts)), weights)


@pytest.mark.parametrize("offset", [-4, 4])
def test_the_descent_moves_levels_either_way(offset: int) -> None:
    levels = np.array([-128, -104, -80, -60, -48, -36, -24, -12, 4, 16, 28, 40, 56, 72, 88, 112])
    weights = np.random.default_rng(8).choice(levels, (64, 64)).astype(np.float32)
    weights[:, ::16] = -128
    fmt = parse_format("DD4sS1E5M5")
    sample = TrainingSample(scaled_layer(weights, fmt, 112.0), 256, 16)
    start = levels.copy()
    start[8] += offset
    effort = Training(rounds=0, sweeps=3)
    (lut,), error = train_codebooks(sample, [start], HIF7, effort=effort)
    assert lut.values[8] == levels[8]
    assert error < 0.1 * total_error(sample, [start])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_moments_are_sums_over_the_members(weighted: bool) -> None:
    weights = gaussian(9, 4, 64)
    rng = np.random.default_rng(9)
    norms: NDArray[np.float64] | None = None
    if weighted:
        norms = np.ldexp(1.0, rng.integers(-3, 4, 64))
    sample = sample_of(weights, "DD4sS1E4M3", norms=norms)
    codes = sample.rank(fixed_lut("BOF4", 16, HIF7).values).scale_codes
    members = np.arange(16) % 3 != 1
    found = _moments(sample, codes, members, 128).sums[:, -1]
    expected = np.zeros(3)
    (chunk,) = sample.chunks
    scales = decode_array(codes, sample.scale) * chunk.multipliers
    for block in np.flatnonzero(members):
        for element, weight in enumerate(chunk.blocks[:, block]):
            quotient = weight / scales[block]
            importance = scales[block] ** 2
            if norms is not None:
                importance *= norms[16 * (block % 4) + element] ** 2
            expected += importance * quotient ** np.arange(3)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_step_that_makes_it_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = sample_of(gaussian(10), "DD4sS1E5M5")
    start = [fixed_lut("BOF4", 16, HIF7).values]

    def spoil(trainer: _Trainer) -> None:
        trainer.levels[0] = initial_levels(HIF7, 16, 0.0)
        trainer.encodings[0] = sample.rank(trainer.levels[0])

    monkeypatch.setattr(_Trainer, "alternate", spoil)
    luts, error = train_codebooks(sample, start, HIF7, effort=Training(sweeps=0))
    assert luts[0].values.tolist() == start[0].tolist()
    assert error == total_error(sample, start)


def test_only_the_luts_asked_for_are_trained() -> None:
    sample = sample_of(gaussian(4))
    fixed = fixed_lut("NF4", 16, HIF7)
    start = [fixed.values, initial_levels(HIF7, 16, 0.5)]
    effort = Training(rounds=2, sweeps=1)
    luts, error = train_codebooks(sample, start, HIF7, trained=(False, True), effort=effort)
    assert luts[0] == fixed
    assert luts[1].values.tolist() != start[1].tolist()
    assert error < total_error(sample, start)
    swapped, _ = train_codebooks(sample, start[::-1], HIF7, trained=(True, False), effort=effort)
    assert swapped[1] == fixed


def test_training_is_the_same_every_time_and_takes_the_norms_into_account() -> None:
    weights, norms = gaussian(5), 4.0 ** np.random.default_rng(6).standard_normal(128)
    start = start_levels(HIF8T, 16, 2)[0]
    effort = Training(rounds=2, sweeps=1)
    results = [
        train_codebooks(sample_of(weights, norms=one), start, HIF8T, effort=effort)
        for one in (None, None, norms)
    ]
    assert results[0] == results[1]
    assert results[0][0] != results[2][0]


def test_a_lut_keeps_entries_on_both_sides_of_zero() -> None:
    """All weights are positive and many are small, so the only negative entry would go to 0."""
    weights = np.abs(gaussian(7)) ** 3
    start = [np.array([-1, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 120])]
    luts, _ = train_codebooks(sample_of(weights, "DD4sUE4M4"), start, HIF7)
    assert luts[0].values[0] < 0


# ----------------------------------------------------------------------------------------- sample


def test_a_sample_is_spread_evenly_over_the_blocks() -> None:
    weights = gaussian(8, 10, 64)
    layer = scaled_layer(weights, parse_format("DD4sS1E5M5"), 100.0)
    sample = TrainingSample(layer, 4, 16)
    values = np.concatenate([chunk.blocks for chunk in sample.chunks], axis=1)
    np.testing.assert_array_equal(values, layer.blocks.take(np.array([0, 10, 20, 30]))[0])
    whole = TrainingSample(layer, 1000, 16)
    assert sum(len(chunk) for chunk in whole.chunks) == 40


def test_ranks_are_those_of_the_scale_search() -> None:
    weights = gaussian(9, 300, 128)  # more than one chunk
    layer = scaled_layer(weights, parse_format("DD4sS1E5M5"), 100.0)
    sample = TrainingSample(layer, 2400, 16)
    lut = fixed_lut("SH4", 16, HIF7)
    search = ScaleSearch(level_table(lut.values), layer.scale, sample.cells)
    chunk = layer.chunk(np.arange(2400), sample.cells)
    np.testing.assert_array_equal(sample.rank(lut.values).errors, search.rank(chunk).errors)
