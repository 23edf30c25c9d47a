"""Fixed codebooks against their sources, and their rounding to the HIF grid."""

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from golden.bof4 import bof4_levels
from golden.codebooks import (
    BLOCK_SIZES,
    FIXED_CODEBOOKS,
    PAPER_CODEBOOKS,
    TWIN_CODEBOOKS,
    Lut,
    fixed_levels,
    fixed_lut,
    lut_from_levels,
)
from golden.errors import InputError
from golden.formats import HIF7, HIF8, HIF8T, HIF_FORMATS, HifFormat

Float64 = NDArray[np.float64]

# bitsandbytes, get_4bit_type("nf4") in bitsandbytes/functional.py, order and sign of that file.
BITSANDBYTES_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip

# An independent Monte-Carlo run for blocks of 16, unmirrored. Its number of samples is not known; a
# run of 400 000 blocks by the same method comes within 0.0014 of the table, this one within 0.013.
MONTE_CARLO_BOF4_16 = [
    -0.885, -0.708, -0.560, -0.432, -0.316, -0.207, -0.103, 0,
    0.094, 0.190, 0.289, 0.395, 0.511, 0.644, 0.802, 1,
]  # fmt: skip

each_hif = pytest.mark.parametrize("hif", HIF_FORMATS.values(), ids=HIF_FORMATS.keys())
each_size = pytest.mark.parametrize("size", BLOCK_SIZES)


def mirrored(levels: list[float]) -> list[float]:
    return [-level for level in reversed(levels)]


def test_block_sizes_are_those_of_the_specification() -> None:
    assert BLOCK_SIZES == (8, 16, 32, 64)


@each_size
def test_nf4_is_the_published_table_mirrored(size: int) -> None:
    assert list(fixed_levels("NF4", size)) == mirrored(BITSANDBYTES_NF4)


@each_size
def test_split87_is_e2m1_on_both_sides_and_the_freed_level(size: int) -> None:
    """Sixteenths of the specification; E2M1's magnitudes times 2 are 1 2 3 4 6 8 12."""
    wanted = [-16, -12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]
    assert [level * 16 for level in fixed_levels("Split87", size)] == wanted


@each_size
def test_sh4_is_sinh_spaced(size: int) -> None:
    wanted = mirrored([math.sinh(k / 8) / math.sinh(1) for k in range(-7, 9)])
    # Two units in the last place of levels below 1: libm may differ by one.
    np.testing.assert_allclose(fixed_levels("SH4", size), wanted, rtol=0, atol=2.3e-16)


@cache
def recomputed(size: int) -> tuple[float, ...]:
    return tuple(bof4_levels(size).tolist())


@each_size
def test_bof4_is_recomputed(size: int) -> None:
    wanted = mirrored(list(recomputed(size)))
    np.testing.assert_allclose(fixed_levels("BOF4", size), wanted, rtol=0, atol=1e-9)


def test_bof4_is_near_an_independent_monte_carlo_run() -> None:
    np.testing.assert_allclose(recomputed(16), MONTE_CARLO_BOF4_16, rtol=0, atol=0.016)


@pytest.mark.parametrize("size", [64])
def test_bof4_quadrature_has_converged(size: int) -> None:
    finer = bof4_levels(size, steps=1200)
    np.testing.assert_allclose(finer, recomputed(size), rtol=0, atol=1e-11)


@each_size
@pytest.mark.parametrize("seed", [81])
def test_no_free_bof4_level_can_be_moved_to_lower_the_error(size: int, seed: int) -> None:
    """Gaussian blocks divided by their signed extreme M, errors weighted by M squared.

    A move of 0.01 costs about 1e-4 times the share of weights in the cell; the sampling error of
    the slope at the optimum is an order of magnitude smaller for this many weights.
    """
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((1_600_000 // size, size))
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    x = (blocks / extreme).ravel()
    weight = np.broadcast_to(extreme**2, blocks.shape).ravel()
    order = np.argsort(x)
    x, weight = x[order], weight[order]
    sums = [np.concatenate([[0.0], np.cumsum(weight * x**power)]) for power in range(3)]

    def error(levels: Float64) -> float:
        cuts = np.searchsorted(x, (levels[:-1] + levels[1:]) / 2)
        ends = np.concatenate([[0], cuts, [len(x)]])
        mass, first, second = (np.diff(part[ends]) for part in sums)
        return float((second - 2 * levels * first + levels**2 * mass).sum())

    levels = np.array(mirrored(list(fixed_levels("BOF4", size))))
    assert (levels[7], levels[15]) == (0.0, 1.0)
    lowest = error(levels)
    for free in [*range(7), *range(8, 15)]:
        for step in (-0.01, 0.01):
            moved = levels.copy()
            moved[free] += step
            assert error(moved) > lowest, f"level {free} by {step}, seed {seed}"


@each_hif
@each_size
@pytest.mark.parametrize("name", FIXED_CODEBOOKS)
def test_luts_ascend_in_canonical_codes_nearest_to_the_levels(
    name: str, size: int, hif: HifFormat
) -> None:
    lut = fixed_lut(name, size, hif)
    assert lut.hif == hif
    assert len(lut.codes) == 16
    values = [int(hif.decode(code).value) for code in lut.codes]
    assert lut.values.tolist() == values
    assert lut.values.dtype == np.int64
    assert values == sorted(set(values))
    assert [hif.canonical[Fraction(value)] for value in values] == list(lut.codes)
    # Nothing on the grid is nearer to a level than its entry.
    for level, value in zip(fixed_levels(name, size), values, strict=True):
        target = Fraction(level) * -hif.min_value
        assert abs(value - target) == min(abs(entry - target) for entry in hif.canonical)


@each_hif
@each_size
@pytest.mark.parametrize("name", PAPER_CODEBOOKS)
def test_luts_of_the_paper_have_zero_and_minus_full_scale(
    name: str, size: int, hif: HifFormat
) -> None:
    values = fixed_lut(name, size, hif).values
    assert (values[0], values[8]) == (hif.min_value, 0)


@each_size
@pytest.mark.parametrize("name", TWIN_CODEBOOKS)
def test_twins_are_shifted_by_half_an_inner_step(name: str, size: int) -> None:
    """The mean of the steps on both sides of zero; what would be above 1 stays at 1."""
    own = fixed_levels(name.removesuffix("T"), size)
    half = (own[9] - own[7]) / 4
    assert list(fixed_levels(name, size)) == [min(level + half, 1.0) for level in own]
    assert fixed_levels(name, size)[7] < 0 < fixed_levels(name, size)[8]


def test_split87_twin_by_hand() -> None:
    """Steps of one sixteenth on both sides of zero: a shift of half a sixteenth."""
    wanted = [-31, -23, -15, -11, -7, -5, -3, -1, 1, 3, 5, 7, 9, 13, 17, 25]
    assert [level * 32 for level in fixed_levels("Split87T", 16)] == wanted


def test_every_paper_codebook_has_a_twin() -> None:
    assert TWIN_CODEBOOKS == tuple(f"{name}T" for name in PAPER_CODEBOOKS)
    assert FIXED_CODEBOOKS == PAPER_CODEBOOKS + TWIN_CODEBOOKS


def test_levels_round_ties_to_even() -> None:
    """On HIF7, 17 lies between 8 * 2 and 9 * 2, and 31 between 15 * 2 and 8 * 4."""
    lut = lut_from_levels([-1.0, -19 / 128, 17 / 128, 31 / 128], HIF7)
    assert lut.values.tolist() == [-128, -20, 16, 32]


@pytest.mark.parametrize("hif", [HIF7, HIF8, HIF8T], ids=["HIF7", "HIF8", "HIF8T"])
def test_levels_are_multiplied_by_the_full_scale(hif: HifFormat) -> None:
    lut = lut_from_levels([-1.0, -0.5, 0.0, 1.0], hif)
    full = int(-hif.min_value)
    assert lut.values.tolist() == [-full, -full // 2, 0, int(hif.max_value)]


def test_unknown_codebooks_and_block_sizes() -> None:
    with pytest.raises(InputError, match="unknown codebook 'NF5': fixed ones are NF4, BOF4"):
        fixed_levels("NF5", 16)
    for size in (0, 4, 12, 128):
        with pytest.raises(InputError, match=rf"blocks of \(8, 16, 32, 64\) weights, not {size}"):
            fixed_levels("NF4", size)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([-1.1, 0.0, 0.5, 1.0], r"must lie in \[-1, 1\]"),
        ([-1.0, 0.0, 0.5, 1.01], r"must lie in \[-1, 1\]"),
        ([-1.0, 0.0, 0.001, 1.0], "must ascend strictly"),
        ([0.0, -1.0], "strictly ascending"),
        ([-1.0, 0.0, math.nan], "finite"),
        ([-1.0, 0.0, 1.0], "a LUT has a power of two of entries, not 3"),
    ],
)
def test_impossible_levels(levels: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lut_from_levels(levels, HIF7)


@pytest.mark.parametrize(
    ("hif", "codes", "message"),
    [
        (HIF7, (), "a power of two of entries, not 0"),
        (HIF7, (0,), "a power of two of entries, not 1"),
        (HIF7, (0, 1, 2), "a power of two of entries, not 3"),
        (HIF7, (0, 128), "must be 7-bit codes"),
        (HIF7, (-1, 0), "must be 7-bit codes"),
        (HIF8, (0, 0xA1), "HIF8 code 0xa1 at position .* is reserved"),
        (HIF7, (1, 0x21), "LUT entry 1: HIF7 code 0x21 is not canonical"),  # 2 as 1 * 2
        (HIF7, (0x20, 1), "LUT entry 0: HIF7 code 0x20 is not canonical"),  # 0 as 0 * 2
        (HIF7, (1, 0, 2, 0x1F), "must ascend strictly"),
        (HIF7, (0x1F, 1, 1, 2), "must ascend strictly"),
        (HIF7, (0, 1), "on both sides of zero"),
        (HIF7, (0x1F, 0), "on both sides of zero"),
        (HIF7, (1, 2), "on both sides of zero"),
        (HIF7, (0x1E, 0x1F), "on both sides of zero"),
    ],
)
def test_impossible_luts(hif: HifFormat, codes: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lut(hif, codes)


def test_fixed_luts_are_made_once() -> None:
    assert fixed_lut("NF4", 16, HIF7) is fixed_lut("NF4", 16, HIF7)
