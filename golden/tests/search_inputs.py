"""Blocks, levels and scale formats to search scales for."""

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import fixed_lut
from golden.convert import RoundingTable, decode_array, format_table, level_table
from golden.formats import ATOMS, BF16, HIF7, HIF8T, FloatFormat, HifFormat, scale_format
from golden.scaling import BlockEncoding, Chunk, choose_layer_exponent, choose_row_scales
from golden.search import NormalizedChunk, ScaleSearch, cells_for

Float64 = NDArray[np.float64]


def wide_lut(hif: HifFormat, count: int) -> RoundingTable:
    """Levels as training starts from: a little wider towards the ends, on the HIF grid."""
    grid = level_table([float(value) for value in hif.canonical])
    steps = (np.arange(count) - count // 2) / (count // 2)
    return level_table(grid.nearest_value(steps * (1 + steps * steps / 4) / 1.25 * hif.full_scale))


SHIFTED = [-128, -104, -72, -52, -40, -24, -12, -4, 4, 12, 24, 40, 52, 72, 104, 120]
LEVELS = {
    "NF4": level_table(fixed_lut("NF4", 16, HIF7).values),
    "BOF4": level_table(fixed_lut("BOF4", 16, HIF7).values),
    "shifted": level_table(SHIFTED),  # none at zero
    "LUT5": wide_lut(HIF7, 32),
    "LUT6": wide_lut(HIF8T, 64),
    "E2M1": format_table(ATOMS["E2M1"]),
    "E2M3": format_table(ATOMS["E2M3"]),
    "HIF7": format_table(ATOMS["HIF7"]),
}
SCALES = ("UE8M0", "UE4M4", "S1E4M3", "S1E5M5", "BF16", "RS1E2M4")


def gaussian(seed: int, blocks: int = 200, size: int = 16) -> Float64:
    """Float32 weights as float64."""
    values = np.random.default_rng(seed).standard_normal((size, blocks))
    return values.astype(np.float32).astype(np.float64)


def uneven_weights(seed: int, shape: tuple[int, ...], decades: float = 0.8) -> Float64:
    rng = np.random.default_rng(seed + 1000)
    values: Float64 = 10.0 ** rng.uniform(-decades, decades, shape)
    return values


def multipliers_of(
    blocks: Float64, levels: RoundingTable, name: str
) -> tuple[FloatFormat, Float64]:
    """Scale format and multipliers: a common f, or with an R one row scale per twenty blocks."""
    scale, absmax = scale_format(name.removeprefix("R")), np.abs(blocks).max(axis=0)
    if name.startswith("R"):
        rows = absmax.astype(np.float32).reshape(-1, 20).max(axis=1)
        row_scales = choose_row_scales(rows, levels.small_end, scale)
        return scale, np.repeat(decode_array(row_scales, BF16), 20)
    exponent = choose_layer_exponent(float(absmax.max()), levels.small_end, scale)
    return scale, np.full(len(absmax), 2.0**exponent)


def normalized(
    levels: RoundingTable,
    blocks: Float64,
    weights: Float64 | None = None,
    multipliers: Float64 | float = 1.0,
) -> NormalizedChunk:
    return NormalizedChunk(blocks, weights, multipliers, cells=cells_for(len(levels.values)))


def search(levels: RoundingTable, scale: FloatFormat) -> ScaleSearch:
    return ScaleSearch(levels, scale, cells_for(len(levels.values)))


def encode(levels: RoundingTable, scale: FloatFormat, chunk: NormalizedChunk) -> BlockEncoding:
    return search(levels, scale).encode(chunk)


def scan(
    chunk: Chunk, levels: RoundingTable, scale: FloatFormat, reach: tuple[float, float]
) -> Float64:
    """Least error of each block over every scale within reach, both signs where there are two.

    ``reach`` is like ``WINDOW``. Where the format has no such scale, the nearest one is tried.
    """
    positives = np.array([float(value) for value in scale.canonical if value > 0])
    wanted = np.abs(chunk.extremes) / chunk.multipliers
    first = np.searchsorted(positives, wanted / (abs(levels.large_end) * reach[1]))
    last = np.searchsorted(positives, wanted / (levels.small_end * reach[0]), side="right")
    first = np.minimum(first, len(positives) - 1)
    last = np.maximum(last, first + 1)
    least = np.full(len(wanted), np.inf)
    for step in range(int((last - first).max())):
        magnitudes = positives[np.minimum(first + step, last - 1)] * chunk.multipliers
        for scales in (magnitudes, -magnitudes) if scale.signed else (magnitudes,):
            residual = (chunk.blocks - levels.nearest_value(chunk.blocks / scales) * scales) ** 2
            if chunk.weights is not None:
                residual *= chunk.weights
            least = np.minimum(least, residual.sum(axis=0))
    return np.where(chunk.is_zero, 0.0, least)
