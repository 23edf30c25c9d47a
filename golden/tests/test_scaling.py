"""Scale of a block in one pass, its exact error, the layer exponent and the row scales."""

from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from golden.codebooks import fixed_lut
from golden.convert import decode_array, format_table, level_table
from golden.errors import InputError
from golden.formats import ATOMS, BF16, HIF7, FloatFormat, scale_format
from golden.scaling import (
    BlockEncoding,
    Chunk,
    ScaleMode,
    ScaleRounder,
    better_encoding,
    choose_layer_exponent,
    choose_row_scales,
    encode_one_pass,
    encode_with_codes,
    one_pass_codes,
    sum_over_block,
)

Float64 = NDArray[np.float64]

LEVELS = {
    "NF4": level_table(fixed_lut("NF4", 16, HIF7).values),
    "BOF4": level_table(fixed_lut("BOF4", 16, HIF7).values),
    "SH4": level_table(fixed_lut("SH4", 16, HIF7).values),
    "E2M3": format_table(ATOMS["E2M3"]),
}
ONE_PASS = (ScaleMode.ABSMAX, ScaleMode.ARGMAX)


def gaussian(seed: int, blocks: int = 200) -> Float64:
    """Float32 weights as float64, shape (16, blocks)."""
    values = np.random.default_rng(seed).standard_normal((16, blocks))
    return values.astype(np.float32).astype(np.float64)


def error_weights(seed: int, blocks: int = 200) -> Float64:
    return np.random.default_rng(seed + 1000).uniform(0.1, 4.0, (16, blocks))


def bfloat16_multipliers(seed: int, blocks: int = 200) -> Float64:
    """Row scales: positive bfloat16 numbers."""
    wanted = 2.0 ** np.random.default_rng(seed + 2000).uniform(-9, -1, blocks)
    return wanted.astype(ml_dtypes.bfloat16).astype(np.float64)


# ---------------------------------------------------------------------------------- one pass


def scalar_code(
    extreme: float, end: float, multiplier: float, scale: FloatFormat, *, cover: bool
) -> int:
    """Code of extreme / (end * multiplier) on exact fractions, never zero."""
    wanted = Fraction(extreme) / (Fraction(end) * Fraction(multiplier))
    if cover:
        return next(
            (code for value, code in scale.canonical.items() if value >= wanted),
            scale.canonical[scale.max_value],
        )
    code = scale.encode(wanted)
    return code or (1 | 1 << (scale.width - 1) if scale.signed and wanted < 0 else 1)


@pytest.mark.parametrize("name", ["UE4M4", "S1E5M5", "S1E4M3", "S1E2M4", "UE8M0", "BF16"])
@pytest.mark.parametrize("book", LEVELS)
@pytest.mark.parametrize("mode", ONE_PASS)
@pytest.mark.parametrize("seed", [51])
def test_one_pass_codes_equal_exact_fractions(
    book: str, name: str, mode: ScaleMode, seed: int
) -> None:
    """Under multipliers that are powers of two, from far below to far above, and row scales."""
    scale, levels, blocks = scale_format(name), LEVELS[book], gaussian(seed, 80)
    if mode is ScaleMode.ARGMAX and not scale.signed:
        return
    rng = np.random.default_rng(seed)
    powers: Float64 = np.ldexp(1.0, rng.integers(-14, 3, 80))
    for multipliers in (powers, bfloat16_multipliers(seed, 80)):
        chunk = Chunk(blocks, None, multipliers)
        codes = one_pass_codes(chunk, levels, ScaleRounder(scale), mode)
        assert codes.dtype == np.uint16
        for position, extreme in enumerate(chunk.extremes.tolist()):
            argmax = mode is ScaleMode.ARGMAX
            wanted = scalar_code(
                extreme if argmax else abs(extreme),
                levels.large_end if argmax else levels.small_end,
                float(multipliers[position]),
                scale,
                cover=not argmax and scale.mantissa_bits == 0,
            )
            assert int(codes[position]) == wanted, f"block {position}, seed {seed}"


@pytest.mark.parametrize("seed", [58])
def test_ties_under_row_scales_are_decided_exactly(seed: int) -> None:
    """Extremes at, just below and just above a midpoint times the end times a bfloat16."""
    scale, levels = scale_format("S1E2M4"), LEVELS["NF4"]
    values = list(scale.canonical)[len(scale.canonical) // 2 + 1 :]
    multipliers = bfloat16_multipliers(seed, len(values) - 1)
    middles = np.array([float((a + b) / 2) for a, b in pairwise(values)])
    products = middles * levels.small_end * multipliers
    exact = products == products.astype(np.float32)  # 6 + 7 + 8 bits
    assert exact.all()
    for bump in (-np.inf, None, np.inf):
        top = products.astype(np.float32)
        if bump is not None:
            top = np.nextafter(top, np.float32(bump))
        chunk = Chunk(top.astype(np.float64)[None, :], None, multipliers)
        codes = one_pass_codes(chunk, levels, ScaleRounder(scale), ScaleMode.ABSMAX)
        wanted = [
            scalar_code(float(x), levels.small_end, float(m), scale, cover=False)
            for x, m in zip(top, multipliers, strict=True)
        ]
        assert codes.tolist() == wanted


@pytest.mark.parametrize("mode", ONE_PASS)
@pytest.mark.parametrize("book", LEVELS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("seed", [52])
def test_each_code_achieves_the_error_that_is_reported(
    mode: ScaleMode, book: str, weighted: bool, seed: int
) -> None:
    scale, levels, blocks = scale_format("S1E5M5"), LEVELS[book], gaussian(seed)
    weights = error_weights(seed) if weighted else None
    multipliers = bfloat16_multipliers(seed)
    chunk = Chunk(blocks, weights, multipliers)
    found = encode_one_pass(chunk, levels, ScaleRounder(scale), mode)
    assert found.scale_codes.dtype == np.uint16
    scales = decode_array(found.scale_codes, scale) * multipliers
    residual = (blocks - levels.nearest_value(blocks / scales) * scales) ** 2
    wanted = (residual if weights is None else residual * weights).sum(axis=0)
    np.testing.assert_allclose(found.errors, wanted, rtol=1e-13)
    given = encode_with_codes(chunk, levels, scale, found.scale_codes)
    assert np.array_equal(given.scale_codes, found.scale_codes)
    assert np.array_equal(given.errors, found.errors)


@pytest.mark.parametrize("mode", ONE_PASS)
def test_a_block_of_zeros_has_code_and_error_zero(mode: ScaleMode) -> None:
    blocks = np.zeros((16, 3))
    blocks[5, 1], blocks[:, 2] = -2.0, -0.0
    levels = level_table([-3.0, -1.0, 1.0, 3.0])  # every level is away from zero
    found = encode_one_pass(Chunk(blocks), levels, ScaleRounder(scale_format("S1E5M5")), mode)
    assert found.scale_codes[[0, 2]].tolist() == [0, 0]
    assert found.errors[[0, 2]].tolist() == [0.0, 0.0]
    assert found.scale_codes[1] != 0
    assert found.errors[1] > 0


def test_a_chunk_knows_its_extremes() -> None:
    """The first of equal magnitudes, with its sign; 1 for a block of zeros."""
    blocks = np.array([[0.5, -0.5, 1.0, -0.0], [-0.5, 0.5, -3.0, 0.0], [0.0, 0.25, 2.0, 0.0]])
    chunk = Chunk(blocks, None, 0.25)
    assert chunk.extremes.tolist() == [0.5, -0.5, -3.0, 1.0]
    assert chunk.is_zero.tolist() == [False, False, False, True]
    assert chunk.multipliers.tolist() == [0.25] * 4


@pytest.mark.parametrize("seed", [55])
def test_blocks_are_encoded_one_by_one(seed: int) -> None:
    """A block comes out alike alone and in company; inputs are not modified."""
    blocks, weights = gaussian(seed, 20), error_weights(seed, 20)
    multipliers = bfloat16_multipliers(seed, 20)
    kept = blocks.copy(), weights.copy(), multipliers.copy()
    rounder, levels = ScaleRounder(scale_format("S1E5M5")), LEVELS["NF4"]
    for mode in ONE_PASS:
        whole = encode_one_pass(Chunk(blocks, weights, multipliers), levels, rounder, mode)
        for column in range(20):
            part = slice(column, column + 1)
            alone = Chunk(blocks[:, part], weights[:, part], multipliers[part])
            single = encode_one_pass(alone, levels, rounder, mode)
            assert single.scale_codes[0] == whole.scale_codes[column]
            assert single.errors[0] == whole.errors[column]
    assert np.array_equal(blocks, kept[0])
    assert np.array_equal(weights, kept[1])
    assert np.array_equal(multipliers, kept[2])


def test_argmax_needs_a_signed_scale() -> None:
    rounder = ScaleRounder(scale_format("UE4M4"))
    with pytest.raises(InputError, match="argmax needs a signed scale, UE4M4 has no sign"):
        encode_one_pass(Chunk(np.ones((16, 1))), LEVELS["NF4"], rounder, ScaleMode.ARGMAX)


@pytest.mark.parametrize("mode", ONE_PASS)
@pytest.mark.parametrize(
    ("code", "bump", "wanted"),
    [(0x3A, 0, 0x3A), (0x3B, 0, 0x3C), (0x3A, 1, 0x3B), (0x3B, -1, 0x3B), (0x3B, 1, 0x3C)],
    ids=["tie_even", "tie_odd", "above", "below", "above_odd"],
)
def test_scales_round_to_nearest_ties_to_the_even_code(
    mode: ScaleMode, code: int, bump: int, wanted: int
) -> None:
    """The extreme lies at E2M3's end times the middle of two neighbouring scales of S1E4M3."""
    scale = scale_format("S1E4M3")
    middle = float((scale.decode(code).value + scale.decode(code + 1).value) / 2)
    # E2M3 ends at -7.5 and 7.5; of equal ends argmax takes the negative one.
    extreme = np.float32(-7.5 * middle)
    extreme = np.nextafter(extreme, np.float32(-np.inf) * bump) if bump else extreme
    blocks = np.zeros((16, 1))
    blocks[3] = extreme
    found = encode_one_pass(Chunk(blocks), LEVELS["E2M3"], ScaleRounder(scale), mode)
    assert int(found.scale_codes[0]) == wanted


@pytest.mark.parametrize(
    ("name", "extreme", "scale"),
    [
        ("UE8M0", 60.0, 8.0),
        ("UE8M0", 7.5 * 4.1, 8.0),
        ("UE7M1", 60.0, 8.0),
        ("UE7M1", 7.5 * 4.1, 4.0),
        ("UE2M0", 7.5 * 9.0, 4.0),
    ],
    ids=["exact", "rounded_up", "mantissa_exact", "mantissa_nearest", "saturated"],
)
def test_only_power_of_two_scales_round_up(name: str, extreme: float, scale: float) -> None:
    """An extreme of 7.5 * 8 needs exactly 2**3; one of 7.5 * 4.1 as well, because 2**2 clips."""
    blocks = np.zeros((16, 1))
    blocks[0] = extreme
    fmt = scale_format(name)
    chunk = Chunk(blocks)
    found = encode_one_pass(chunk, LEVELS["E2M3"], ScaleRounder(fmt), ScaleMode.ABSMAX)
    assert decode_array(found.scale_codes, fmt)[0] == scale


def test_replace_and_join() -> None:
    first = BlockEncoding(np.array([1, 2], np.uint16), np.array([0.1, 0.2]))
    second = BlockEncoding(np.array([3, 4], np.uint16), np.array([0.3, 0.4]))
    mixed = first.replace(np.array([False, True]), second)
    assert mixed.scale_codes.tolist() == [1, 4]
    assert mixed.errors.tolist() == [0.1, 0.4]
    joined = BlockEncoding.join([second, first])
    assert joined.scale_codes.tolist() == [3, 4, 1, 2]
    assert joined.errors.tolist() == [0.3, 0.4, 0.1, 0.2]
    assert joined.scale_codes.dtype == np.uint16


def test_the_better_encoding_has_the_lower_error_then_the_lower_code() -> None:
    best = BlockEncoding(np.array([5, 5, 5, 5], np.uint16), np.array([1.0, 1.0, 1.0, 1.0]))
    candidate = BlockEncoding(np.array([9, 3, 9, 3], np.uint16), np.array([0.5, 1.0, 1.0, 2.0]))
    found = better_encoding(best, candidate)
    assert found.scale_codes.tolist() == [9, 3, 5, 5]
    assert found.errors.tolist() == [0.5, 1.0, 1.0, 1.0]


# ------------------------------------------------------------------- layer exponent, row scales


@pytest.mark.parametrize("name", ["UE4M4", "S1E4M3", "UE2M0", "S1E7M7", "UE5M7"])
@pytest.mark.parametrize("end", [88.0, 120.0, 7.5, 448.0])
@pytest.mark.parametrize("seed", [56])
def test_layer_exponent_is_the_smallest_that_covers(name: str, end: float, seed: int) -> None:
    scale = scale_format(name)
    limit = Fraction(end) * scale.max_value
    rng = np.random.default_rng(seed)
    for magnitude in [*(10.0 ** rng.uniform(-10, 15, 40)), 1.0, 3.4e38]:
        absmax = float(np.float32(magnitude))
        exponent = choose_layer_exponent(absmax, end, scale)
        assert absmax <= limit * Fraction(2) ** exponent, f"seed {seed}"
        assert absmax > limit * Fraction(2) ** (exponent - 1), f"seed {seed}"
        edge = float(limit * Fraction(2) ** exponent)
        assert choose_layer_exponent(edge, end, scale) == exponent
        assert choose_layer_exponent(float(np.nextafter(edge, np.inf)), end, scale) == exponent + 1


def test_layer_exponent_is_zero_where_it_has_no_use() -> None:
    assert choose_layer_exponent(0.0, 88.0, scale_format("UE4M4")) == 0
    for absmax in (1e-30, 1.0, 1e30):
        assert choose_layer_exponent(absmax, 88.0, scale_format("UE8M0")) == 0
        assert choose_layer_exponent(absmax, 88.0, scale_format("BF16")) == 0


@pytest.mark.parametrize(
    ("absmax", "exponent"), [(2.0**-129, -129), (2.0**129, 129), (2.0**128, 128)]
)
def test_layer_exponent_must_fit_eight_bits(absmax: float, exponent: int) -> None:
    """UE2M0 ends at 2**2, so levels that end at 0.25 make the limit 2**f."""
    scale = scale_format("UE2M0")
    with pytest.raises(InputError, match=f"need a layer exponent of {exponent}"):
        choose_layer_exponent(absmax, 0.25, scale)
    assert choose_layer_exponent(2.0**-128, 0.25, scale) == -128
    assert choose_layer_exponent(2.0**127, 0.25, scale) == 127


def top_binade(scale: FloatFormat) -> Fraction:
    """The largest power of two that the scale format holds."""
    power = Fraction(1)
    while 2 * power <= scale.max_value:
        power *= 2
    return power


@pytest.mark.parametrize("name", ["S1E2M4", "UE4M3", "S1E4M3", "UE2M0", "UE3M7"])
@pytest.mark.parametrize("end", [88.0, 120.0, 7.0])
@pytest.mark.parametrize("seed", [59])
def test_row_scales_put_the_largest_block_at_the_start_of_the_top_binade(
    name: str, end: float, seed: int
) -> None:
    scale = scale_format(name)
    rng = np.random.default_rng(seed)
    absmax = (10.0 ** rng.uniform(-30, 38, 60)).astype(np.float32)
    kept = absmax.copy()
    found = choose_row_scales(absmax, end, scale)
    assert found.dtype == np.uint16
    top = float(top_binade(scale))
    wanted = (absmax.astype(np.float64) / (end * top)).astype(np.float32)
    rounded = wanted.astype(ml_dtypes.bfloat16)
    assert found.tolist() == rounded.view(np.uint16).tolist()
    # Within bfloat16's rounding, half of the last of 8 bits, the largest block needs that scale.
    needed = absmax / (end * decode_array(found, BF16))
    assert (np.abs(needed / top - 1.0) <= 2.0**-8).all()
    assert np.array_equal(absmax, kept)


def test_row_scales_round_ties_to_even() -> None:
    """257/256 and 259/256 lie between two bfloat16 numbers."""
    scale = scale_format("UE2M0")  # tops at 4
    absmax = np.array([257 / 64, 259 / 64, 258 / 64], dtype=np.float32)
    found = decode_array(choose_row_scales(absmax, 1.0, scale), BF16)
    assert found.tolist() == [1.0, 260 / 256, 258 / 256]


def test_rows_of_zeros_have_row_scale_one() -> None:
    absmax = np.array([0.0, 88.0 * 4, -0.0], dtype=np.float32)
    found = choose_row_scales(absmax, 88.0, scale_format("S1E2M4"))
    assert decode_array(found, BF16).tolist() == [1.0, 1.0, 1.0]


def test_tiny_rows_have_the_smallest_normal_row_scale() -> None:
    absmax = np.array([1e-45, 2.0**-120, 88 * 4 * 2.0**-125], dtype=np.float32)
    found = choose_row_scales(absmax, 88.0, scale_format("S1E2M4"))
    assert decode_array(found, BF16).tolist() == [2.0**-126, 2.0**-126, 2.0**-125]


# ----------------------------------------------------------------------------------------- sums


def tree(values: list[float]) -> float:
    """Element i plus element i + n/2, and so on, n a power of two."""
    half = len(values) // 2
    return values[0] if not half else tree([values[i] + values[i + half] for i in range(half)])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 24, 40, 64, 120])
@pytest.mark.parametrize("seed", [57])
def test_sums_have_the_documented_order(count: int, seed: int) -> None:
    """As the docstring says: padded with zeros to a power of two, then halved."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, 50)) * 10.0 ** rng.uniform(-8, 8, (count, 50))
    kept = values.copy()
    padded = 1 << (count - 1).bit_length()
    wanted = [
        tree([*values[:, column].tolist(), *[0.0] * (padded - count)]) for column in range(50)
    ]
    assert sum_over_block(values).tolist() == wanted, f"seed {seed}"
    assert np.array_equal(values, kept)
