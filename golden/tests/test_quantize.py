"""Quantization against a scalar reference that follows the specification block by block.

The reference knows nothing of chunks, tables or broadcasting. It decides rounding on exact
fractions and computes errors, where float64 rounding may decide, with Python floats in the
documented order.
"""

import math
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

import golden.blocks
from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.convert import decode_array
from golden.errors import InputError
from golden.formats import BF16, HIF7, HIF8, HIF8T, FloatFormat, HifFormat, NumberFormat
from golden.notation import QuantFormat, parse_format
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor, decode

Float32 = NDArray[np.float32]
Real = Fraction | float

SMALLEST_NORMAL = Fraction(2) ** -126
OVERFLOW = Fraction(2) ** 128


# ------------------------------------------------------------------------------ scalar reference


@dataclass(frozen=True)
class Grid:
    """Ascending exact values, what is stored for each, and which midpoints round up."""

    values: list[float]
    stored: list[int]
    middles: list[float]
    up: list[bool]

    def nearest(self, x: Real) -> int:
        """Position of the value nearest to x."""
        position = bisect_left(self.middles, x)
        tie = position < len(self.middles) and self.middles[position] == x
        return position + 1 if tie and self.up[position] else position


@cache
def number_grid(fmt: NumberFormat) -> Grid:
    """Values of a number format: a midpoint goes to the even code."""
    lowest: dict[Fraction, int] = {}
    for code in reversed(range(1 << fmt.width)):
        decoded = fmt.decode(code)
        if decoded.kind.value not in ("nan", "reserved"):
            lowest[decoded.value] = code
    values = sorted(lowest)
    codes = [lowest[value] for value in values]
    pairs = list(pairwise(values))
    return Grid(
        [float(value) for value in values],
        codes,
        [float((low + high) / 2) for low, high in pairs],
        [code % 2 == 1 for code in codes[:-1]],
    )


@cache
def lut_grid(lut: Lut) -> Grid:
    """Entries of a LUT: a midpoint goes to the lower index."""
    values = [float(lut.hif.decode(code).value) for code in lut.codes]
    pairs = list(pairwise(values))
    middles = [(low + high) / 2 for low, high in pairs]
    return Grid(values, list(range(len(values))), middles, [False] * len(middles))


def ordered_sum(values: list[float]) -> float:
    """Element i plus element i + n/2, and so on; n padded with zeros to a power of two."""
    count = 1
    while count < len(values):
        count *= 2
    values = values + [0.0] * (count - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[i + half] for i in range(half)]
    return values[0]


def small_end(grid: Grid) -> float:
    return min(-grid.values[0], grid.values[-1])


def large_end(grid: Grid) -> float:
    low, high = grid.values[0], grid.values[-1]
    return high if high > -low else low


def layer_exponent(absmax: Fraction, end: float, scale: FloatFormat) -> int:
    """Smallest f for which the largest scale covers the largest weight."""
    if scale.exponent_bits == 8 or absmax == 0:
        return 0
    exponent = -400
    while absmax > Fraction(end) * scale.max_value * Fraction(2) ** exponent:
        exponent += 1
    return exponent


class Reference:
    """One block after another, one candidate after another."""

    def __init__(
        self, weights: Float32, fmt: QuantFormat, mode: ScaleMode, luts: tuple[Lut, ...]
    ) -> None:
        self.fmt, self.mode = fmt, mode
        self.scale = fmt.word.scale
        self.scale_grid = number_grid(self.scale)
        self.grids = [number_grid(fmt.atom)] if fmt.atom else [lut_grid(lut) for lut in luts]
        absmax = max(abs(Fraction(float(w))) for w in weights.ravel())
        self.exponent = layer_exponent(
            absmax, min(small_end(grid) for grid in self.grids), self.scale
        )
        if fmt.row_scale:
            self.exponent = 0
        self.unit = 2.0**self.exponent
        self.zero = self.scale_grid.values.index(0.0)

    def scale_at(self, position: int) -> tuple[int, float]:
        return self.scale_grid.stored[position], self.scale_grid.values[position] * self.unit

    def round_scale(self, wanted: Real) -> tuple[int, float]:
        """Nearest scale; the smallest of its sign where that would be zero."""
        position = self.scale_grid.nearest(wanted / Fraction(self.unit))
        if position == self.zero:
            position += -1 if wanted < 0 and self.scale.signed else 1
        return self.scale_at(position)

    def cover_scale(self, wanted: Fraction) -> tuple[int, float]:
        """Smallest scale that is at least what is wanted, or the largest there is."""
        for position, value in enumerate(self.scale_grid.values):
            if value * Fraction(self.unit) >= wanted:
                return self.scale_at(position)
        return self.scale_at(len(self.scale_grid.values) - 1)

    def error(self, block: list[float], scale: float, grid: Grid, weight: list[float]) -> float:
        squares = []
        for element, importance in zip(block, weight, strict=True):
            residual = element - grid.values[grid.nearest(element / scale)] * scale
            squares.append(residual * residual * importance)
        return ordered_sum(squares)

    def one_pass(self, block: list[float], grid: Grid) -> tuple[int, float]:
        """Scale code and real scale."""
        magnitudes = [abs(element) for element in block]
        extreme = block[magnitudes.index(max(magnitudes))]
        if self.mode is ScaleMode.ARGMAX:
            return self.round_scale(Fraction(extreme) / Fraction(large_end(grid)))
        wanted = Fraction(abs(extreme)) / Fraction(small_end(grid))
        power_of_two = self.scale.mantissa_bits == 0
        return self.cover_scale(wanted) if power_of_two else self.round_scale(wanted)

    def block(self, block: list[float], weight: list[float]) -> tuple[int, float, int]:
        """Scale code, real scale and metabit."""
        if not any(block):
            return 0, 0.0, 0
        chosen = []
        for metabit, grid in enumerate(self.grids):
            code, scale = self.one_pass(block, grid)
            chosen.append((self.error(block, scale, grid, weight), metabit, code, scale))
        _, metabit, code, scale = min(chosen)  # the lower metabit among equal errors
        return code, scale, metabit

    def run(
        self,
        weights: Float32,
        norms: NDArray[np.float64] | None,
        row_scales: list[float] | None = None,
    ) -> tuple[list[list[int]], list[int], list[Fraction]]:
        """Stored elements and scale word of each block, and every dense value with padding."""
        importance = [1.0] * weights.shape[1]
        if norms is not None:
            importance = [norm * norm for norm in norms.tolist()]
        rows = weights.astype(np.float64).tolist()
        blocks: list[tuple[list[float], list[float]]] = []
        if self.fmt.block_size == 0:
            blocks.append(([x for row in rows for x in row], importance * len(rows)))
        else:
            size = self.fmt.block_size
            for row in rows:
                for start in range(0, len(row), size):
                    block, weight = row[start : start + size], importance[start : start + size]
                    missing = [0.0] * (size - len(block))
                    blocks.append((block + missing, weight + missing))
        elements, words, dense = [], [], []
        for number, (block, weight) in enumerate(blocks):
            if row_scales is not None:
                self.unit = row_scales[number * len(row_scales) // len(blocks)]
            code, scale, metabit = self.block(block, weight)
            grid = self.grids[metabit]
            positions = [grid.nearest(x / scale if scale else 0.0) for x in block]
            elements.append([grid.stored[position] for position in positions])
            words.append(metabit << self.scale.width | code)
            dense += [Fraction(grid.values[position]) * Fraction(scale) for position in positions]
        return elements, words, dense


# ------------------------------------------------------------------------------------ test inputs


def random_lut(entries: int, hif: HifFormat, seed: int) -> Lut:
    """A trained-looking LUT with both ends on both sides of zero, and no zero of its own."""
    values = [value for value in hif.canonical if value != 0]
    rng = np.random.default_rng(seed)
    inner = rng.choice(np.arange(6, len(values) - 6), entries - 2, replace=False).tolist()
    picked = sorted([int(rng.integers(0, 6)), *inner, len(values) - 1 - int(rng.integers(0, 6))])
    return Lut(hif, tuple(hif.canonical[values[i]] for i in picked))


def luts_of(fmt: QuantFormat, seed: int) -> tuple[Lut, ...]:
    return tuple(
        fixed_lut(name, fmt.block_size, fmt.hif)
        if name in FIXED_CODEBOOKS
        else random_lut(fmt.lut_entries, fmt.hif, seed + position)
        for position, name in enumerate(fmt.codebooks)
    )


def matrix(name: str, seed: int) -> Float32:
    """Small matrices that reach each rule."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((3, 40))
    if name == "normal":
        values = normal
    elif name == "one_column":
        values = rng.standard_normal((6, 1))
    elif name == "narrow":
        values = rng.standard_normal((4, 5))  # fewer columns than any block has weights
    elif name == "zeros":
        values = np.zeros((2, 24))
    elif name == "zero_blocks":
        values = normal
        values[:, 8:] = 0.0
        values[1] = -0.0
    elif name == "one_nonzero":
        values = np.zeros((2, 40))
        values[0, 17], values[1, 3] = -0.37, 0.37
    elif name == "equal_magnitudes":
        values = np.where(rng.random((3, 40)) < 0.5, -0.75, 0.75)
    elif name == "midpoints":
        # With an extreme of 120 or 128 many scales are 1, and halves of integers are midpoints.
        values = rng.integers(-240, 241, (4, 40)) / 2.0
        values[:2, ::8], values[2:, ::8] = 120.0, -128.0
    elif name == "small_integers":
        values = rng.integers(-3, 4, (4, 40)) / 2.0
    elif name == "tiny":
        values = normal * 1e-30
    elif name == "huge":
        values = normal * 1e30
    elif name == "subnormal":
        values = np.where(rng.random((2, 32)) < 0.5, normal[:2, :32], 1e-40)
    elif name == "wide_range":
        # Rows from the top of the scale format down into its subnormals and below.
        values = rng.standard_normal((6, 32)) * 2.0 ** np.array(
            [[0], [-9], [-15], [-18], [-21], [-28]]
        )
    else:
        raise KeyError(name)
    return values.astype(np.float32)


MATRICES = (
    "normal", "one_column", "narrow", "zeros", "zero_blocks", "one_nonzero", "equal_magnitudes",
    "midpoints", "small_integers", "tiny", "huge", "subnormal", "wide_range",
)  # fmt: skip

FORMATS = {
    name: parse_format(name)
    for name in (
        "E2M1sUE4M4", "E2M3sUE4M4", "E2M3^32sUE8M0", "E3M2^8sS1E2M4", "E4M3^0sUE8M0",
        "E2M3^0sS1E5M5", "E3M4^8sUE5M3",
        "E4M5sUE5M7", "E5M6^8sUE4M4", "INT4sS1E4M3", "INT8^64sBF16", "HIF7sUE4M4", "HIF8^8sS1E5M5",
        "HIF8T^64sUE5M5", "NF4sUE4M4", "NF4sS1E5M5", "NF4^32sUE8M0", "BOF4^32sS1E4M3",
        "Split87^8sUE4M3", "SH4^64sS1E5M5", "DD4sS1E5M5", "DD6sS1E4M3", "BOF4-NF4sS1E5M5",
        "SH4-Split87sUE4M3", "NF4-DD4sS1E2M4", "DD4-DD4^8sS1E4M3", "DD5-DD5sUE4M4",
    )
} | {"NF4-DD4sS1E5M5/HIF8": parse_format("NF4-DD4sS1E5M5", HIF8),
     "DD6-DD6sS1E4M3/HIF8T": parse_format("DD6-DD6sS1E4M3", HIF8T)}  # fmt: skip


def seed_of(*parts: str) -> int:
    return zlib.crc32("/".join(parts).encode()) % 10_000


def one_pass_modes(fmt: QuantFormat) -> list[ScaleMode]:
    return [ScaleMode.ABSMAX] + [ScaleMode.ARGMAX] * fmt.word.scale.signed


def compare(
    fmt: QuantFormat, mode: ScaleMode, weights: Float32, seed: int, *, weighted: bool
) -> None:
    luts = luts_of(fmt, seed)
    columns = weights.shape[1]
    norms = (
        np.random.default_rng(seed + 1).uniform(0.25, 4.0, size=(columns,)) if weighted else None
    )
    reference = Reference(weights, fmt, mode, luts)
    elements, words, dense = reference.run(weights, norms)
    magnitudes = [abs(value) for value in dense if value]
    fits = all(SMALLEST_NORMAL <= magnitude < OVERFLOW for magnitude in magnitudes)
    if not (fits and -128 <= reference.exponent < 128):
        with pytest.raises(InputError, match=r"in float32|overflow float32|layer exponent"):
            quantize(weights, fmt, mode=mode, luts=luts, channel_norms=norms)
        return
    tensor = quantize(weights, fmt, mode=mode, luts=luts, channel_norms=norms)
    where = f"{fmt.name} {mode.value}, seed {seed}"
    assert tensor.layer_exponent == reference.exponent, where
    assert tensor.scale_words.ravel().tolist() == words, where
    assert tensor.indices.reshape(len(words), -1).tolist() == elements, where
    assert decode(tensor, padded=True).ravel().tolist() == [float(value) for value in dense], where


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_equals_the_scalar_reference(name: str, kind: str) -> None:
    fmt, seed = FORMATS[name], seed_of(name, kind)
    for mode in one_pass_modes(fmt):
        compare(fmt, mode, matrix(kind, seed), seed, weighted=False)


@pytest.mark.parametrize("kind", ["normal", "narrow", "small_integers", "zero_blocks"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_with_channel_norms_equals_the_scalar_reference(name: str, kind: str) -> None:
    fmt, seed = FORMATS[name], seed_of("weighted", name, kind)
    for mode in one_pass_modes(fmt):
        compare(fmt, mode, matrix(kind, seed), seed, weighted=True)


@pytest.mark.parametrize("name", ["BOF4-NF4sRS1E2M4", "NF4^8sRUE4M4", "DD5-DD5sRS1E5M5"])
@pytest.mark.parametrize("kind", ["normal", "narrow", "zero_blocks", "wide_range"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_blocks_under_row_scales_equal_the_scalar_reference(
    name: str, kind: str, weighted: bool
) -> None:
    """How row scales themselves are chosen is shown in test_scaling.py."""
    fmt, seed = parse_format(name), seed_of(name, kind)
    weights, luts = matrix(kind, seed), luts_of(fmt, seed)
    rng, columns = np.random.default_rng(seed), weights.shape[1]
    norms = rng.uniform(0.25, 4.0, size=(columns,)) if weighted else None
    for mode in one_pass_modes(fmt):
        tensor = quantize(weights, fmt, mode=mode, luts=luts, channel_norms=norms)
        assert tensor.row_scales is not None
        assert tensor.layer_exponent == 0
        row_scales = decode_array(tensor.row_scales, BF16).tolist()
        reference = Reference(weights, fmt, mode, luts)
        elements, words, _ = reference.run(weights, norms, row_scales)
        assert tensor.scale_words.ravel().tolist() == words
        assert tensor.indices.reshape(len(words), -1).tolist() == elements


SEARCHED = (
    "BOF4-NF4sS1E5M5", "NF4sS1E4M3", "E2M3sUE4M4", "SH4-DD4sUE4M4", "DD5-DD5sRS1E2M4",
    "E3M2^0sUE4M4", "INT4^0sS1E5M5",
)  # fmt: skip


def errors_of(
    weights: Float32, tensor: QuantizedTensor, norms: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Weighted squared error of each block."""
    residual = (weights.astype(np.float64) - decode(tensor)) ** 2
    if norms is not None:
        residual = residual * norms**2
    size = tensor.format.block_size
    if size == 0:
        return residual.sum(keepdims=True)
    residual = np.pad(residual, ((0, 0), (0, -weights.shape[1] % size)))
    total: NDArray[np.float64] = residual.reshape(len(weights), -1, size).sum(axis=2)
    return total


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("seed", [71])
def test_the_search_is_never_worse_than_one_pass_on_any_block(
    name: str, weighted: bool, seed: int
) -> None:
    fmt = parse_format(name)
    weights = np.random.default_rng(seed).standard_normal((12, 70)).astype(np.float32)
    norms = np.random.default_rng(seed + 1).uniform(0.1, 3.0, 70) if weighted else None
    luts = luts_of(fmt, seed)
    searched = quantize(weights, fmt, luts=luts, channel_norms=norms)
    found = errors_of(weights, searched, norms)
    for mode in one_pass_modes(fmt):
        one_pass = quantize(weights, fmt, mode=mode, luts=luts, channel_norms=norms)
        assert one_pass.layer_exponent == searched.layer_exponent
        errors = errors_of(weights, one_pass, norms)
        # Up to the rounding of this test's own sums.
        assert (found <= errors * (1 + 1e-12)).all()
        assert found.sum() < 0.97 * errors.sum()


# ----------------------------------------------------------------------- layer exponent, outliers


def test_narrow_scale_formats_try_the_neighbouring_layer_exponents() -> None:
    """One block far above all others: clipping it lets the others have finer scales."""
    fmt = parse_format("NF4sUE2M3")
    weights = np.random.default_rng(72).standard_normal((40, 64)).astype(np.float32)
    weights[:, 16:] *= 0.02
    weights[0, 3] = 40.0
    norms = np.ones(64)
    norms[3] = 1e-3
    first = quantize(weights, fmt, mode=ScaleMode.ABSMAX, channel_norms=norms)
    found = quantize(weights, fmt, channel_norms=norms)
    assert found.layer_exponent < first.layer_exponent
    weights[0, 3] = 1.0
    covered = quantize(weights / np.float32(4096), fmt)
    assert covered.layer_exponent == quantize(weights, fmt).layer_exponent - 12


def test_excluded_weights_count_neither_in_an_extreme_nor_in_an_error() -> None:
    weights = np.random.default_rng(73).standard_normal((6, 40)).astype(np.float32)
    excluded = np.zeros(weights.shape, dtype=bool)
    excluded[[0, 2, 5], [3, 20, 39]] = True
    tame = np.where(excluded, 0.0, weights).astype(np.float32)
    wild = np.where(excluded, 1e4, weights).astype(np.float32)
    kept = excluded.copy()
    for name in ("BOF4-NF4sS1E5M5", "NF4sRS1E2M4", "E2M3^0sUE4M4"):
        tensors = [
            quantize(values, parse_format(name), excluded=excluded) for values in (tame, wild)
        ]
        assert tensors[0].layer_exponent == tensors[1].layer_exponent
        np.testing.assert_array_equal(tensors[0].scale_words, tensors[1].scale_words)
        decoded = [decode(tensor) for tensor in tensors]
        np.testing.assert_array_equal(decoded[0][~excluded], decoded[1][~excluded])
    assert np.array_equal(excluded, kept)
    # Zeros that count pull the scale another way than weights that do not.
    many = np.random.default_rng(76).random(weights.shape) < 0.3
    tame = np.where(many, 0.0, weights).astype(np.float32)
    counted = quantize(tame, parse_format("SH4TsS1E5M5"))
    left_out = quantize(tame, parse_format("SH4TsS1E5M5"), excluded=many)
    assert not np.array_equal(counted.scale_words, left_out.scale_words)


def test_excluded_must_have_the_shape_of_the_weights() -> None:
    with pytest.raises(InputError, match=r"excluded has shape \(16, 2\), weights \(2, 16\)"):
        quantize(
            np.ones((2, 16), dtype=np.float32),
            parse_format("NF4sUE4M4"),
            excluded=np.zeros((16, 2), dtype=bool),
        )


def test_channels_without_a_norm_count_with_norm_one() -> None:
    weights = np.random.default_rng(74).standard_normal((6, 32)).astype(np.float32)
    norms = np.random.default_rng(75).uniform(0.2, 4.0, 32)
    norms[[3, 17]] = 0.0, np.nan
    usable = norms.copy()
    usable[[3, 17]] = 1.0
    fmt = parse_format("BOF4-NF4sS1E5M5")
    assert_same_bytes(
        quantize(weights, fmt, channel_norms=norms), quantize(weights, fmt, channel_norms=usable)
    )


# ---------------------------------------------------------------------------------------- rules


def one_lut(values: list[int]) -> Lut:
    return Lut(HIF7, tuple(HIF7.canonical[Fraction(value)] for value in values))


STEPS = [-128, -96, -64, -48, -32, -16, -8, 0, 8, 16, 32, 48, 64, 80, 96, 120]
SHIFTED = [-128, -104, -72, -52, -40, -24, -12, -4, 4, 12, 24, 40, 52, 72, 104, 120]


@pytest.mark.parametrize("seed", [31])
def test_equal_errors_take_the_first_lut(seed: int) -> None:
    lut = one_lut(STEPS)
    weights = np.random.default_rng(seed).standard_normal((5, 64)).astype(np.float32)
    fmt = parse_format("DD4-DD4sS1E5M5")
    for mode in ScaleMode:
        assert not quantize(weights, fmt, mode=mode, luts=(lut, lut)).metabits.any()


def test_each_block_takes_the_lut_that_fits_it() -> None:
    fmt = parse_format("DD4-DD4sS1E5M5")
    weights = np.array([[*STEPS], [*SHIFTED], [*STEPS]], dtype=np.float32)
    tensor = quantize(weights, fmt, luts=(one_lut(STEPS), one_lut(SHIFTED)))
    assert tensor.metabits.tolist() == [[0], [1], [0]]
    swapped = quantize(weights, fmt, luts=(one_lut(SHIFTED), one_lut(STEPS)))
    assert swapped.metabits.tolist() == [[1], [0], [1]]
    assert np.array_equal(decode(tensor), weights)
    assert np.array_equal(decode(swapped), weights)


@pytest.mark.parametrize("mode", ScaleMode)
def test_a_block_of_zeros_has_code_0_metabit_0_and_the_level_nearest_zero(mode: ScaleMode) -> None:
    fmt = parse_format("DD4-DD4sS1E5M5")
    weights = np.zeros((2, 40), dtype=np.float32)
    weights[0, 20] = 1.0
    tensor = quantize(weights, fmt, mode=mode, luts=(one_lut(SHIFTED), one_lut(STEPS)))
    zero = np.array([[True, False, True], [True, True, True]])
    assert not tensor.scale_words[zero].any()
    assert (tensor.scale_codes[~zero] != 0).all()
    # -4 and 4 are equally near zero: the lower index, 7.
    assert (tensor.indices[zero] == 7).all()
    assert not decode(tensor, padded=True)[:, :16].any()


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_block_far_below_the_scale_range_gets_the_smallest_scale_not_zero(
    mode: ScaleMode, sign: int
) -> None:
    weights = np.zeros((2, 16), dtype=np.float32)
    weights[0, 0], weights[1, 0] = 1.0, sign * 1e-20
    tensor = quantize(weights, parse_format("NF4sS1E4M3"), mode=mode)
    code = int(tensor.scale_codes[1, 0])
    assert code in (0x01, 0x81)
    if mode is ScaleMode.ARGMAX:
        # The LUT's large end is -128, so a positive extreme takes a negative scale.
        assert code == (0x81 if sign > 0 else 0x01)


def test_argmax_takes_the_first_of_equal_extremes() -> None:
    fmt = parse_format("NF4sS1E5M5")
    for block, negative in (([0.5, -0.5], True), ([-0.5, 0.5], False)):
        weights = np.array([block + [0.0] * 14], dtype=np.float32)
        tensor = quantize(weights, fmt, mode=ScaleMode.ARGMAX)
        assert bool(tensor.scale_codes[0, 0] >> 10) == negative
        assert abs(decode(tensor)[0, 0]) == 0.5


@pytest.mark.parametrize("seed", [32])
def test_absmax_scale_of_a_power_of_two_format_never_clips(seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((20, 64)).astype(np.float32)
    tensor = quantize(weights, parse_format("E2M3^32sUE8M0"), mode=ScaleMode.ABSMAX)
    scales = 2.0 ** (tensor.scale_codes.astype(float) - 127)
    peaks = np.abs(weights).reshape(20, 2, 32).max(axis=2)
    assert (peaks <= 7.5 * scales).all()
    assert (peaks > 7.5 * scales / 2).all()


@pytest.mark.parametrize("seed", [33])
def test_layer_exponent_is_the_smallest_that_covers(seed: int) -> None:
    """NF4 on HIF7 ends at -128 and 88; UE4M4 at 496. 88 * 496 covers exactly itself."""
    fmt = parse_format("NF4sUE4M4")
    smaller = min(128, int(fixed_lut("NF4", 16, HIF7).values[-1]))
    limit = smaller * 496.0
    for exponent in (-30, -1, 0, 3):
        top = np.float32(limit * 2.0**exponent)
        weights = np.full((1, 16), top)
        assert quantize(weights, fmt).layer_exponent == exponent
        weights[0, 0] = np.nextafter(top, np.float32(np.inf))
        assert quantize(weights, fmt).layer_exponent == exponent + 1


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("seed", [34])
def test_a_pair_is_never_worse_than_either_codebook(
    mode: ScaleMode, weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((40, 64)).astype(np.float32)
    norms = rng.uniform(0.1, 3.0, 64) if weighted else None
    # An extreme with which f, on which errors depend, is the same for the pair and its halves.
    weights[0, 0] = 4.5
    pair = quantize(weights, parse_format("BOF4-NF4sS1E5M5"), mode=mode, channel_norms=norms)
    both = [
        quantize(weights, parse_format(f"{name}sS1E5M5"), mode=mode, channel_norms=norms)
        for name in ("BOF4", "NF4")
    ]
    assert {pair.layer_exponent, *(single.layer_exponent for single in both)} == {
        pair.layer_exponent
    }
    errors = [errors_of(weights, single, norms) for single in both]
    best = np.minimum(*errors)
    np.testing.assert_allclose(errors_of(weights, pair, norms), best, rtol=1e-12)
    assert pair.metabits.any()
    assert not pair.metabits.all()
    clear = np.abs(errors[0] - errors[1]) > 1e-9 * best
    assert np.array_equal(pair.metabits[clear] == 1, (errors[1] < errors[0])[clear])


@pytest.mark.parametrize("name", ["NF4sS1E5M5", "BOF4-NF4sS1E5M5", "E2M3sUE4M4", "NF4sUE4M4"])
@pytest.mark.parametrize("seed", [35])
def test_channel_norms_lower_the_weighted_error(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((60, 64)).astype(np.float32)
    norms = 10.0 ** rng.uniform(-1, 1, 64)
    fmt = parse_format(name)
    plain = errors_of(weights, quantize(weights, fmt), norms).sum()
    aware = errors_of(weights, quantize(weights, fmt, channel_norms=norms), norms).sum()
    # Measured at this seed: 0.46 (NF4sS1E5M5), 0.40 (pair), 0.49 (E2M3sUE4M4 and NF4sUE4M4).
    assert aware < 0.6 * plain, f"seed {seed}: {aware / plain}"


@pytest.mark.parametrize("seed", [36])
def test_equal_channel_norms_change_nothing(seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((10, 40)).astype(np.float32)
    fmt = parse_format("BOF4-NF4sS1E5M5")
    assert_same_bytes(
        quantize(weights, fmt), quantize(weights, fmt, channel_norms=np.full(40, 4.0))
    )


@pytest.mark.parametrize(
    ("name", "mode", "published"),
    [
        ("E2M3sUE4M4", ScaleMode.ABSMAX, 0.774),
        ("HIF7sUE4M4", ScaleMode.ABSMAX, 0.774 / 1.0395),
    ],
)
@pytest.mark.parametrize("seed", [37])
def test_fidelity_against_the_papers_baseline(
    name: str, mode: ScaleMode, published: float, seed: int
) -> None:
    """The paper's ratio of MSE to E4M3^0sUE8M0 on three language models is 0.770 to 0.778 for E2M3.

    E2M3 over HIF7 is 1.038 to 1.041 there.

    Gaussian weights are not a language model, so within 10 %; measured here: 0.786 and 0.760.
    """
    weights = np.random.default_rng(seed).standard_normal((256, 256)).astype(np.float32)

    def error(fmt: str) -> float:
        dense = decode(quantize(weights, parse_format(fmt), mode=mode))
        return float(np.mean((weights - dense) ** 2.0))

    ratio = error(name) / error("E4M3^0sUE8M0")
    assert ratio == pytest.approx(published, rel=0.1), f"seed {seed}"


# ---------------------------------------------------------------------------------- determinism


def assert_same_bytes(first: QuantizedTensor, second: QuantizedTensor) -> None:
    assert first.indices.tobytes() == second.indices.tobytes()
    assert first.scale_words.tobytes() == second.scale_words.tobytes()
    assert first.layer_exponent == second.layer_exponent
    assert first.indices.dtype == second.indices.dtype


DETERMINISM = ("BOF4-NF4sS1E5M5", "E2M3^32sUE8M0", "E5M6^8sUE4M4", "E4M3^0sUE8M0")


@pytest.mark.parametrize("name", DETERMINISM)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("chunk", [1, 48, 64, 200])
@pytest.mark.parametrize("seed", [38])
def test_chunking_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, weighted: bool, chunk: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((7, 70)).astype(np.float32)
    norms = rng.uniform(0.5, 2.0, 70) if weighted else None
    fmt = parse_format(name)
    whole = quantize(weights, fmt, channel_norms=norms)
    assert_same_bytes(whole, quantize(weights, fmt, channel_norms=norms))
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", chunk)
    assert_same_bytes(whole, quantize(weights, fmt, channel_norms=norms))


@pytest.mark.parametrize("name", DETERMINISM)
@pytest.mark.parametrize("seed", [39])
def test_memory_layout_changes_nothing_and_inputs_stay_as_they_are(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((6, 64)).astype(np.float32)
    norms = rng.uniform(0.5, 2.0, 64)
    wide = np.zeros((12, 128), dtype=np.float32)
    wide[::2, ::2] = weights
    fmt = parse_format(name)
    whole = quantize(weights, fmt, channel_norms=norms)
    kept = weights.copy(), norms.copy()
    for other in (np.asfortranarray(weights), wide[::2, ::2], weights[::-1][::-1]):
        assert_same_bytes(whole, quantize(other, fmt, channel_norms=norms))
    assert np.array_equal(weights, kept[0])
    assert np.array_equal(norms, kept[1])


@pytest.mark.parametrize("seed", [40])
def test_rows_do_not_affect_each_other(seed: int) -> None:
    """Given the same f, a row comes out alike wherever it stands."""
    weights = np.random.default_rng(seed).standard_normal((6, 40)).astype(np.float32)
    weights[:, 0] = 4.0  # the same absmax, hence f, in every row
    fmt = parse_format("BOF4-NF4sS1E5M5")
    whole = quantize(weights, fmt)
    for row in range(6):
        alone = quantize(weights[row : row + 1], fmt)
        assert np.array_equal(alone.indices[0], whole.indices[row])
        assert np.array_equal(alone.scale_words[0], whole.scale_words[row])


@pytest.mark.parametrize("seed", [41])
def test_padding_is_not_counted(seed: int) -> None:
    """With a LUT that has no zero, counted padding would pull the scale down."""
    weights = np.random.default_rng(seed).standard_normal((30, 9)).astype(np.float32)
    fmt, luts = parse_format("DD4sS1E5M5"), (one_lut(SHIFTED),)
    tensor = quantize(weights, fmt, luts=luts)
    norms = np.ones(9)
    assert_same_bytes(tensor, quantize(weights, fmt, luts=luts, channel_norms=norms))
    counted = np.zeros((30, 16), dtype=np.float32)
    counted[:, :9] = weights
    other = quantize(counted, fmt, luts=luts)
    assert not np.array_equal(tensor.scale_words, other.scale_words)
    own = float(((decode(tensor) - weights) ** 2).sum())
    assert own < float(((decode(other)[:, :9] - weights) ** 2).sum())


# --------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("seed", [42])
def test_shapes_dtypes_and_parts(seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32)
    for name, shape, dtype in (
        ("NF4sUE4M4", (3, 3, 16), np.uint8),
        ("E5M6^8sUE4M4", (3, 5, 8), np.uint16),
        ("E4M3^0sUE8M0", (1, 1, 120), np.uint8),
    ):
        tensor = quantize(weights, parse_format(name))
        assert tensor.indices.shape == shape
        assert tensor.indices.dtype == dtype
        assert tensor.scale_words.shape == shape[:2]
        assert tensor.scale_words.dtype == np.uint16
        assert tensor.shape == (3, 40)
        assert tensor.format == parse_format(name)
        assert tensor.row_scales is None
        assert decode(tensor).shape == (3, 40)


@pytest.mark.parametrize("seed", [43])
def test_the_default_mode_is_search(seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32)
    fmt = parse_format("NF4sS1E5M5")
    assert_same_bytes(quantize(weights, fmt), quantize(weights, fmt, mode=ScaleMode.SEARCH))


@pytest.mark.parametrize("seed", [44])
def test_a_given_lut_replaces_the_fixed_one_and_none_takes_it(seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32)
    fmt, lut = parse_format("NF4-DD4sS1E5M5"), one_lut(SHIFTED)
    tensor = quantize(weights, fmt, luts=(None, lut))
    assert tensor.luts == (fixed_lut("NF4", 16, HIF7), lut)
    replaced = quantize(weights, fmt, luts=(one_lut(STEPS), lut))
    assert replaced.luts == (one_lut(STEPS), lut)


@pytest.mark.parametrize("seed", [45])
def test_bof4_takes_the_table_of_the_block_size(seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((3, 64)).astype(np.float32)
    for size in (8, 16, 32, 64):
        tensor = quantize(weights, parse_format(f"BOF4^{size}sS1E5M5"))
        assert tensor.luts == (fixed_lut("BOF4", size, HIF7),)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    weights = np.zeros((3, 20), dtype=np.float32)
    weights[1, 17] = weights[2, 0] = bad
    message = rf"weight at row 1, column 17 is {bad} \(2 weights are not finite\)"
    with pytest.raises(InputError, match=message):
        quantize(weights, parse_format("NF4sUE4M4"))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0), ()])
def test_weights_must_be_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="non-empty matrix"):
        quantize(np.zeros(shape, dtype=np.float32), parse_format("NF4sUE4M4"))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_weights_must_be_float32(dtype: type) -> None:
    with pytest.raises(InputError, match=f"must be float32, not {np.dtype(dtype)}"):
        quantize(np.zeros((2, 16), dtype=dtype), parse_format("NF4sUE4M4"))


def test_argmax_needs_a_signed_scale() -> None:
    weights = np.ones((2, 16), dtype=np.float32)
    with pytest.raises(InputError, match="argmax needs a signed scale, UE4M4 has no sign"):
        quantize(weights, parse_format("NF4sUE4M4"), mode=ScaleMode.ARGMAX)


def test_a_trained_codebook_needs_its_lut() -> None:
    weights = np.ones((2, 16), dtype=np.float32)
    for luts in ((), (None, None)):
        with pytest.raises(InputError, match="codebook DD4 is trained per layer; give its LUT"):
            quantize(weights, parse_format("NF4-DD4sS1E5M5"), luts=luts)


def test_number_of_luts_must_be_that_of_the_format() -> None:
    weights, lut = np.ones((2, 16), dtype=np.float32), one_lut(STEPS)
    with pytest.raises(InputError, match="NF4-DD4sS1E5M5 has 2 LUTs, 1 were given"):
        quantize(weights, parse_format("NF4-DD4sS1E5M5"), luts=(lut,))
    with pytest.raises(InputError, match="E2M3sUE4M4 has 0 LUTs, 1 were given"):
        quantize(weights, parse_format("E2M3sUE4M4"), luts=(lut,))


@pytest.mark.parametrize(
    "lut",
    [random_lut(32, HIF7, 46), random_lut(8, HIF7, 46), random_lut(16, HIF8, 46)],
    ids=["entries32", "entries8", "hif8"],
)
@pytest.mark.parametrize("seed", [46])
def test_a_lut_of_the_wrong_kind_is_named(lut: Lut, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((3, 16)).astype(np.float32)
    with pytest.raises(InputError, match=r"luts?\b.*16 entries of HIF7"):
        quantize(weights, parse_format("DD4sS1E5M5"), luts=(lut,))


@pytest.mark.parametrize("shape", [(15,), (17,), (1, 16), ()])
def test_channel_norms_must_match_the_columns(shape: tuple[int, ...]) -> None:
    weights = np.ones((2, 16), dtype=np.float32)
    with pytest.raises(InputError, match=r"channel_norms has shape .*, expected \(16,\)"):
        quantize(weights, parse_format("NF4sUE4M4"), channel_norms=np.ones(shape))


@pytest.mark.parametrize("bad", [1e200, 1e-200])
def test_channel_norms_whose_squares_leave_float64_are_refused(bad: float) -> None:
    """Squares of infinity or zero would make every scale equally good."""
    weights, norms = np.ones((2, 16), dtype=np.float32), np.full(16, bad)
    with pytest.raises(InputError, match="channel_norms"):
        quantize(weights, parse_format("NF4sUE4M4"), channel_norms=norms)


def test_results_that_float32_would_flush_are_refused() -> None:
    """1e-38 is below float32's smallest normal number, 1.18e-38."""
    weights = np.zeros((1, 32), dtype=np.float32)
    weights[0, 0], weights[0, 16] = 1e-32, 1e-38
    with pytest.raises(InputError, match=r"would be subnormal in float32"):
        quantize(weights, parse_format("E3M4sUE5M5"))
    weights[0, 16] = 1e-37
    assert decode(quantize(weights, parse_format("E3M4sUE5M5")))[0, 16] == pytest.approx(
        1e-37, rel=0.1
    )


@pytest.mark.parametrize("row", [0, 1, 2])
def test_results_out_of_range_are_found_in_any_chunk(
    monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", 16)
    weights = np.ones((3, 16), dtype=np.float32)
    weights[row] = 1e-39
    with pytest.raises(InputError, match="subnormal in float32"):
        quantize(weights, parse_format("NF4sBF16"))
    weights[row] = -np.finfo(np.float32).max  # the nearest level is -128 * 2**121
    with pytest.raises(InputError, match="overflow float32"):
        quantize(weights, parse_format("NF4sUE8M0"))


def test_subnormal_weights_alone_are_refused() -> None:
    weights = np.full((2, 16), 1e-42, dtype=np.float32)
    with pytest.raises(InputError, match=r"layer exponent|subnormal"):
        quantize(weights, parse_format("NF4sUE4M4"))


def test_magnitudes_without_a_layer_exponent_are_refused() -> None:
    """E2M1 ends at 6 and S1E2M0 at 4: 2**-145 needs f = -149."""
    weights = np.full((1, 16), 2.0**-145, dtype=np.float32)
    with pytest.raises(InputError, match=r"need a layer exponent of -149"):
        quantize(weights, parse_format("E2M1sS1E2M0"))


def test_all_zeros_have_layer_exponent_zero_and_decode_to_zero() -> None:
    tensor = quantize(np.zeros((2, 20), dtype=np.float32), parse_format("E2M3sUE4M4"))
    assert tensor.layer_exponent == 0
    assert not tensor.scale_words.any()
    assert not tensor.indices.any()
    assert math.copysign(1.0, float(decode(tensor)[0, 0])) == 1.0
