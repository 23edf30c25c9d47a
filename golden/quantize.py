"""From a weight matrix to a quantized tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.convert import RoundingTable, code_dtype, format_table, level_table
from golden.errors import InputError
from golden.notation import QuantFormat
from golden.scaling import BlockEncoding, ScaleMode, choose_layer_exponent, encode_chunk
from golden.tensor import QuantizedTensor, check_float32_range, check_luts

__all__ = ["CHANNEL_NORM_RANGE", "check_weights", "quantize", "resolve_luts"]

Float64 = NDArray[np.float64]

CHANNEL_NORM_RANGE = (1e-60, 1e60)
"""Norms outside would take weighted squared errors of float32 weights out of float64's range."""

# Weights per chunk: one float64 array of this size is 256 KiB, so that the handful that a chunk
# needs stays in the second-level cache.
_CHUNK_WEIGHTS = 1 << 15


def check_weights(weights: NDArray[np.float32]) -> None:
    """Refuse what cannot be quantized.

    Raises
    ------
    InputError
        If ``weights`` is not a non-empty float32 matrix, or holds NaN or infinity; the message
        names the position and how many there are.
    """
    if weights.ndim != 2 or weights.size == 0:
        raise InputError(f"weights must be a non-empty matrix (rows, columns), not {weights.shape}")
    if weights.dtype != np.float32:
        raise InputError(f"weights must be float32, not {weights.dtype}")
    finite = np.isfinite(weights)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"weight at row {row}, column {column} is {weights[row, column]} "
            f"({int((~finite).sum())} weights are not finite)"
        )


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Weights cut into blocks along their columns, with the error weight of each.

    ``values`` is float32, shape (all blocks, block_size), zero-padded; ``error_weights`` is
    float64, shape (blocks of a row, block_size), or None for all one. Padding has error weight
    zero.
    """

    values: NDArray[np.float32]
    error_weights: Float64 | None

    def chunks(self) -> Iterator[tuple[slice, Float64, Float64 | None]]:
        """Yield (which blocks, their weights, their error weights), both (block_size, blocks)."""
        count, size = self.values.shape
        step = max(1, _CHUNK_WEIGHTS // size)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            blocks = np.ascontiguousarray(self.values[part].T, dtype=np.float64)
            weights = None
            if self.error_weights is not None:
                rows = np.arange(part.start, part.stop) % len(self.error_weights)
                weights = np.ascontiguousarray(self.error_weights[rows].T)
            yield part, blocks, weights


def _cut(weights: NDArray[np.float32], block_size: int, channel_norms: Float64 | None) -> _Blocks:
    rows, columns = weights.shape
    if block_size == 0:
        importance = None if channel_norms is None else np.tile(channel_norms**2, (1, rows))
        return _Blocks(weights.reshape(1, -1), importance)
    padding = -columns % block_size
    padded = np.pad(weights, ((0, 0), (0, padding))) if padding else weights
    if channel_norms is None and not padding:
        return _Blocks(padded.reshape(-1, block_size), None)
    norms = np.ones(columns) if channel_norms is None else channel_norms
    importance = np.pad(norms**2, (0, padding)).reshape(-1, block_size)
    return _Blocks(padded.reshape(-1, block_size), importance)


def resolve_luts(fmt: QuantFormat, luts: Sequence[Lut | None] = ()) -> tuple[Lut, ...]:
    """LUTs of a format: those given, and the fixed codebook of its name for each one that is not.

    Raises
    ------
    InputError
        If a trained codebook has no LUT given, or a LUT does not fit the format.
    """
    given = tuple(luts) if luts else (None,) * len(fmt.codebooks)
    if len(given) != len(fmt.codebooks):
        raise InputError(f"{fmt.name} has {len(fmt.codebooks)} LUTs, {len(given)} were given")
    resolved = []
    for name, lut in zip(fmt.codebooks, given, strict=True):
        if lut is None and name not in FIXED_CODEBOOKS:
            raise InputError(f"{fmt.name}: codebook {name} is trained per layer; give its LUT")
        resolved.append(lut or fixed_lut(name, fmt.block_size, fmt.hif))
    check_luts(fmt, resolved)
    return tuple(resolved)


def _check_channel_norms(channel_norms: Float64 | None, columns: int) -> None:
    if channel_norms is None:
        return
    if channel_norms.shape != (columns,):
        raise InputError(f"channel_norms has shape {channel_norms.shape}, expected ({columns},)")
    low, high = CHANNEL_NORM_RANGE
    if not ((channel_norms >= low) & (channel_norms <= high)).all():
        raise InputError(f"channel_norms must be positive and finite, from {low:g} to {high:g}")


def _choose(encodings: list[BlockEncoding]) -> tuple[NDArray[np.uint16], BlockEncoding]:
    """Metabit and encoding of each block: the LUT with the lower error, the first among equals."""
    first = encodings[0]
    if len(encodings) == 1:
        return np.zeros_like(first.scale_codes), first
    use_second = encodings[1].errors < first.errors
    return use_second.astype(np.uint16), first.replace(use_second, encodings[1])


def _elements(
    blocks: Float64, tables: Sequence[RoundingTable], metabits: NDArray[np.uint16], scales: Float64
) -> tuple[NDArray[np.intp], Float64]:
    """Index of each element's level and its dense value, both shape (block_size, blocks)."""
    # Scale 0 occurs only in a block of zeros; any divisor gives the level nearest zero there.
    quotients = blocks / np.where(scales == 0.0, 1.0, scales)
    index = tables[0].nearest_index(quotients)
    values = tables[0].values[index]
    if len(tables) == 2:
        other = tables[1].nearest_index(quotients)
        index = np.where(metabits == 1, other, index)
        values = np.where(metabits == 1, tables[1].values[other], values)
    return index, values * scales


def quantize(
    weights: NDArray[np.float32],
    fmt: QuantFormat,
    *,
    mode: ScaleMode = ScaleMode.SEARCH,
    luts: Sequence[Lut | None] = (),
    channel_norms: Float64 | None = None,
) -> QuantizedTensor:
    """Quantize a weight matrix.

    Columns are cut into blocks of ``fmt.block_size``, the last one of a row zero-padded; padding
    never counts in an error. A block of zeros gets scale code 0, metabit 0 and the level nearest
    zero. With a pair, a block takes the LUT that gives the lower activation-weighted squared error,
    the first LUT if both give the same.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Finite. Not modified.
    fmt : QuantFormat
        Without row scales.
    mode : ScaleMode
        How block scales are chosen (:func:`golden.scaling.encode_chunk`).
    luts : sequence of Lut or None, optional
        One per codebook of the format; None takes the fixed codebook of that name.
    channel_norms : float64 array, shape (columns,), optional
        Root mean square of each input channel, within :data:`CHANNEL_NORM_RANGE`; all one if not
        given.

    Returns
    -------
    tensor : QuantizedTensor

    Raises
    ------
    InputError
        For weights that are not a finite float32 matrix, a trained codebook without its LUT, or
        weights that the format cannot hold exactly in float32.

    Notes
    -----
    Paper, abstract: per-block metabit between two LUTs of the layer. The order of every sum and tie
    is this project's own (docs/numerics.md).
    """
    check_weights(weights)
    _check_channel_norms(channel_norms, weights.shape[1])
    if fmt.row_scale:
        raise InputError(f"{fmt.name}: quantizing with row scales is not supported")
    used_luts = resolve_luts(fmt, luts)
    if fmt.atom is not None:
        tables = [format_table(fmt.atom)]
        element_codes = np.array(list(fmt.atom.canonical.values()))
    else:
        tables = [level_table(lut.values) for lut in used_luts]
        element_codes = np.arange(fmt.lut_entries)
    scale = fmt.word.scale
    absmax = float(np.abs(weights).max())
    exponent = choose_layer_exponent(absmax, min(table.small_end for table in tables), scale)

    blocks = _cut(weights, fmt.block_size, channel_norms)
    indices = np.empty(blocks.values.shape, dtype=code_dtype(fmt.index_bits))
    words = np.empty(len(blocks.values), dtype=np.uint16)
    smallest, largest = np.inf, 0.0
    for part, values, importance in blocks.chunks():
        encodings = [
            encode_chunk(values, table, scale, exponent, mode, importance) for table in tables
        ]
        metabits, chosen = _choose(encodings)
        index, dense = _elements(values, tables, metabits, chosen.scales)
        indices[part] = element_codes[index].T
        words[part] = metabits << np.uint16(scale.width) | chosen.scale_codes
        magnitudes = np.abs(dense)
        if magnitudes.any():
            smallest = min(smallest, float(magnitudes[magnitudes > 0].min()))
            largest = max(largest, float(magnitudes.max()))
    check_float32_range(smallest, largest)
    rows = weights.shape[0] if fmt.block_size else 1
    return QuantizedTensor(
        fmt,
        (weights.shape[0], weights.shape[1]),
        indices.reshape(rows, -1, blocks.values.shape[1]),
        words.reshape(rows, -1),
        used_luts,
        exponent,
    )
