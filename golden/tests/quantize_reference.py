"""Quantization as the specification has it, block by block, and weights to try it on.

The reference knows nothing of chunks, tables or broadcasting. It decides every rounding exactly, on
fractions or on products short enough for float64, and computes errors, where float64 rounding may
decide, with Python floats in the documented order.
"""

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.formats import BF16, HIF7, FloatFormat, HifFormat, NumberFormat
from golden.notation import QuantFormat
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor, decode

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

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

    def nearest(self, x: Fraction) -> int:
        """Position of the value nearest to x."""
        return self._rounded(bisect_left(self.middles, x), x)

    def nearest_quotient(self, x: float, scale: float) -> int:
        """Position of the value nearest to x / scale, or to 0 under scale 0.

        Decided without a division: a midpoint has at most 9 significant bits and a scale 16, so
        their products are exact.
        """
        if scale == 0.0:
            return self.nearest(Fraction(0))
        if scale < 0.0:
            x, scale = -x, -scale
        position = bisect_left(self.middles, x, key=lambda middle: middle * scale)
        return self._rounded(position, Fraction(x) / Fraction(scale))

    def _rounded(self, position: int, x: Fraction) -> int:
        """Settle a tie with the midpoint at a position."""
        tie = position < len(self.middles) and self.middles[position] == x
        return position + 1 if tie and self.up[position] else position

    @property
    def small_end(self) -> float:
        return min(-self.values[0], self.values[-1])

    @property
    def large_end(self) -> float:
        low, high = self.values[0], self.values[-1]
        return high if high > -low else low


def grid(values: list[Fraction], stored: list[int], up: list[bool]) -> Grid:
    middles = [float((low + high) / 2) for low, high in pairwise(values)]
    return Grid([float(value) for value in values], stored, middles, up)


@cache
def number_grid(fmt: NumberFormat) -> Grid:
    """Values of a number format: a midpoint goes to the even code."""
    codes = list(fmt.canonical.values())
    return grid(list(fmt.canonical), codes, [code % 2 == 1 for code in codes[:-1]])


@cache
def lut_grid(lut: Lut) -> Grid:
    """Entries of a LUT: a midpoint goes to the lower index."""
    values = [lut.hif.decode(code).value for code in lut.codes]
    return grid(values, list(range(len(values))), [False] * (len(values) - 1))


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


def layer_exponent(absmax: Fraction, end: float, scale: FloatFormat) -> int:
    """Smallest f for which the largest scale covers the largest weight."""
    if scale.exponent_bits == 8 or absmax == 0:
        return 0
    exponent = -400
    while absmax > Fraction(end) * scale.max_value * Fraction(2) ** exponent:
        exponent += 1
    return exponent


def row_scale(absmax: Fraction, end: float, scale: FloatFormat) -> int:
    """bfloat16 code of absmax / (end * 2**k), 2**k the largest power of two among the scales."""
    if absmax == 0:
        return BF16.encode(Fraction(1))
    top = Fraction(1)
    while 2 * top <= scale.max_value:
        top *= 2
    return BF16.encode(max(absmax / (Fraction(end) * top), SMALLEST_NORMAL))


@dataclass(frozen=True)
class Block:
    """Elements of a block, their error weights, and what its decoded scale is multiplied with."""

    elements: list[float]
    importance: list[float]
    unit: float


class Reference:
    """One block after another, one LUT after another."""

    def __init__(
        self,
        weights: Float32,
        fmt: QuantFormat,
        luts: tuple[Lut, ...],
        norms: Float64 | None = None,
        excluded: Mask | None = None,
    ) -> None:
        self.fmt, self.scale = fmt, fmt.word.scale
        self.scale_grid = number_grid(self.scale)
        self.grids = [number_grid(fmt.atom)] if fmt.atom else [lut_grid(lut) for lut in luts]
        end = min(grid.small_end for grid in self.grids)
        squares = [1.0] * weights.shape[1] if norms is None else [c * c for c in norms.tolist()]
        importance = [list(squares) for _ in weights]
        rows = weights.astype(np.float64).tolist()
        if excluded is not None:
            for row, column in np.argwhere(excluded):
                rows[row][column] = importance[row][column] = 0.0
        peaks = [max(abs(Fraction(x)) for x in row) for row in rows]
        self.row_scales: list[int] | None = None
        if fmt.row_scale:
            self.exponent = 0
            self.row_scales = [row_scale(peak, end, self.scale) for peak in peaks]
            units = [float(BF16.decode(code).value) for code in self.row_scales]
        else:
            self.exponent = layer_exponent(max(peaks), end, self.scale)
            units = [2.0**self.exponent] * len(rows)
        self.blocks: list[Block] = []
        if fmt.block_size == 0:
            together = [x for row in rows for x in row], [c for row in importance for c in row]
            self.blocks.append(Block(*together, units[0]))
            return
        for row, weight, unit in zip(rows, importance, units, strict=True):
            for start in range(0, len(row), fmt.block_size):
                part = slice(start, start + fmt.block_size)
                missing = [0.0] * (fmt.block_size - len(row[part]))
                self.blocks.append(Block(row[part] + missing, weight[part] + missing, unit))

    def scale_of(self, code: int, block: Block) -> float:
        return float(self.scale.decode(code).value) * block.unit

    def round_scale(self, wanted: Fraction) -> int:
        """Code of the nearest scale; the smallest of its sign where that would be zero."""
        position, zero = self.scale_grid.nearest(wanted), self.scale_grid.values.index(0.0)
        if position == zero:
            position += -1 if wanted < 0 and self.scale.signed else 1
        return self.scale_grid.stored[position]

    def cover_scale(self, wanted: Fraction) -> int:
        """Code of the smallest scale that is at least what is wanted, or the largest there is."""
        position = bisect_left(self.scale_grid.values, wanted)
        return self.scale_grid.stored[min(position, len(self.scale_grid.values) - 1)]

    def scale_code(self, block: Block, grid: Grid, mode: ScaleMode) -> int:
        """Scale code under one of the one-pass modes."""
        magnitudes = [abs(element) for element in block.elements]
        extreme = block.elements[magnitudes.index(max(magnitudes))]
        if extreme == 0.0:
            return 0
        wanted = Fraction(extreme) / Fraction(block.unit)
        if mode is ScaleMode.ARGMAX:
            return self.round_scale(wanted / Fraction(grid.large_end))
        wanted = abs(wanted) / Fraction(grid.small_end)
        power_of_two = self.scale.mantissa_bits == 0
        return self.cover_scale(wanted) if power_of_two else self.round_scale(wanted)

    def error(self, block: Block, grid: Grid, code: int) -> float:
        scale, squares = self.scale_of(code, block), []
        if code == 0:
            return 0.0  # nothing but zeros
        for element, importance in zip(block.elements, block.importance, strict=True):
            residual = element - grid.values[grid.nearest_quotient(element, scale)] * scale
            squares.append(residual * residual * importance)
        return ordered_sum(squares)

    def words(self, mode: ScaleMode) -> list[int]:
        """Scale word of each block under one of the one-pass modes."""
        words = []
        for block in self.blocks:
            chosen = []
            for metabit, grid in enumerate(self.grids):
                code = self.scale_code(block, grid, mode)
                chosen.append((self.error(block, grid, code), metabit, code))
            _, metabit, code = min(chosen)  # the lower metabit among equal errors
            words.append(metabit << self.scale.width | code)
        return words

    def elements(self, words: list[int]) -> tuple[list[list[int]], list[Fraction]]:
        """Stored elements of each block under given scale words, and every dense value."""
        elements, dense = [], []
        for block, word in zip(self.blocks, words, strict=True):
            metabit, code = divmod(word, 1 << self.scale.width)
            grid, scale = self.grids[metabit], self.scale_of(code, block)
            positions = [grid.nearest_quotient(x, scale) for x in block.elements]
            elements.append([grid.stored[position] for position in positions])
            dense += [Fraction(grid.values[position]) * Fraction(scale) for position in positions]
        return elements, dense


# ------------------------------------------------------------------------------------ test inputs


def random_lut(entries: int, hif: HifFormat, seed: int) -> Lut:
    """A trained-looking LUT with both ends on both sides of zero, and no zero of its own."""
    values = [value for value in hif.canonical if value != 0]
    rng = np.random.default_rng(seed)
    inner = rng.choice(np.arange(6, len(values) - 6), entries - 2, replace=False).tolist()
    picked = sorted([int(rng.integers(0, 6)), *inner, len(values) - 1 - int(rng.integers(0, 6))])
    return Lut(hif, tuple(hif.canonical[values[i]] for i in picked))


def one_lut(values: list[int]) -> Lut:
    return Lut(HIF7, tuple(HIF7.canonical[Fraction(value)] for value in values))


STEPS = [-128, -96, -64, -48, -32, -16, -8, 0, 8, 16, 32, 48, 64, 80, 96, 120]
SHIFTED = [-128, -104, -72, -52, -40, -24, -12, -4, 4, 12, 24, 40, 52, 72, 104, 120]
FAR = [
    -128,
    -120,
    -112,
    -104,
    -96,
    -88,
    -80,
    -72,
    64,
    72,
    80,
    88,
    96,
    104,
    112,
    120,
]  # both ends, nothing between


def shifted_luts(fmt: QuantFormat) -> tuple[Lut, ...]:
    """LUTs without a zero, so that weights of zero have errors."""
    return (one_lut(SHIFTED),) * len(fmt.codebooks)


def luts_of(fmt: QuantFormat, seed: int) -> tuple[Lut, ...]:
    return tuple(
        fixed_lut(name, fmt.block_size, fmt.hif)
        if name in FIXED_CODEBOOKS
        else random_lut(fmt.lut_entries, fmt.hif, seed + position)
        for position, name in enumerate(fmt.codebooks)
    )


def gaussian(seed: int, rows: int, columns: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def uneven_norms(seed: int, columns: int) -> Float64:
    return np.random.default_rng(seed + 1000).uniform(0.25, 4.0, columns)


def some_excluded(seed: int, shape: tuple[int, ...]) -> Mask:
    """A third of the weights, and the whole first row."""
    excluded = np.random.default_rng(seed + 2000).random(shape) < 1 / 3
    excluded[0] = True
    return excluded


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
    elif name == "only_subnormal":
        values = normal * 1e-41
    elif name == "wide_range":
        # Rows from the top of the scale format down into its subnormals and below.
        values = rng.standard_normal((6, 32)) * 2.0 ** np.array(
            [[0], [-9], [-15], [-18], [-21], [-28]]
        )
    else:
        raise KeyError(name)
    return values.astype(np.float32)


def one_pass_modes(fmt: QuantFormat) -> list[ScaleMode]:
    return [ScaleMode.ABSMAX] + [ScaleMode.ARGMAX] * fmt.word.scale.signed


def exact_errors(
    weights: Float32, tensor: QuantizedTensor, norms: Float64 | None = None
) -> list[Fraction]:
    """Weighted squared error of each block."""
    size, columns = tensor.format.block_size, weights.shape[1]
    squares = [Fraction(1)] * columns if norms is None else [Fraction(c) ** 2 for c in norms]
    terms = [
        [(Fraction(x) - Fraction(y)) ** 2 * c for x, y, c in zip(row, dense, squares, strict=True)]
        for row, dense in zip(weights.tolist(), decode(tensor).tolist(), strict=True)
    ]
    if size == 0:
        return [sum((term for row in terms for term in row), Fraction(0))]
    return [
        sum(row[start : start + size], Fraction(0))
        for row in terms
        for start in range(0, columns, size)
    ]
