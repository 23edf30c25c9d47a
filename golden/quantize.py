"""From a weight matrix to a quantized tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from golden.blocks import Blocks, check_weights, cut_blocks, usable_channel_norms
from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.convert import RoundingTable, code_dtype, decode_array, format_table, level_table
from golden.engine import inner_loop
from golden.errors import InputError
from golden.formats import BF16, FloatFormat
from golden.notation import QuantFormat
from golden.scaling import (
    LAYER_EXPONENT_RANGE,
    BlockEncoding,
    ScaleMode,
    choose_layer_exponent,
    choose_row_scales,
    encode_one_pass,
    scale_rounder,
)
from golden.search import NormalizedChunk, ScaleSearch, cells_for
from golden.tensor import QuantizedTensor, check_float32_range, check_luts

__all__ = [
    "ScaledLayer",
    "choose_metabits",
    "fitted_layer",
    "levels_of",
    "quantize",
    "resolve_luts",
    "scaled_layer",
]

Float64 = NDArray[np.float64]

# With fewer exponent bits than this the scale format is narrower than the scales of many layers, so
# that clipping the largest blocks can be worth it.
_WIDE_EXPONENT_BITS = 4


def resolve_luts(fmt: QuantFormat, luts: Sequence[Lut | None] = ()) -> tuple[Lut, ...]:
    """LUTs of a format: those given, and the fixed codebook of its name for each one that is not.

    Raises
    ------
    InputError
        If a codebook that is not fixed has no LUT given, or a LUT does not fit the format.
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


@dataclass(frozen=True, eq=False)
class ScaledLayer:
    """A weight matrix with everything that a format fixes but the LUTs and the block scales.

    Attributes
    ----------
    shape : tuple of int
        (rows, columns).
    blocks : Blocks
    scale : FloatFormat
    layer_exponent : int
        f.
    row_scales : uint16 array, shape (rows,), or None
        bfloat16 bit patterns.
    """

    shape: tuple[int, int]
    blocks: Blocks
    scale: FloatFormat
    layer_exponent: int
    row_scales: NDArray[np.uint16] | None

    def multipliers(self, members: NDArray[np.intp]) -> Float64:
        """What the decoded scale of each of some blocks is multiplied with, shape (members,)."""
        unit = np.full(len(members), np.ldexp(1.0, self.layer_exponent))
        if self.row_scales is None:
            return unit
        return unit * decode_array(self.row_scales[self.blocks.rows(members)], BF16)

    def chunk(self, members: NDArray[np.intp], cells: int) -> NormalizedChunk:
        """Some blocks, prepared for the search with that many cells."""
        values, weights = self.blocks.take(members)
        return NormalizedChunk(values, weights, self.multipliers(members), cells=cells)

    def chunks(self, cells: int) -> Iterator[NormalizedChunk]:
        """Yield all blocks, in order."""
        for members in self.blocks.parts():
            yield self.chunk(members, cells)

    def encode(self, tables: Sequence[RoundingTable], mode: ScaleMode) -> list[BlockEncoding]:
        """Scale codes and exact errors of all blocks under each set of levels.

        Raises
        ------
        InputError
            If ``mode`` is ``argmax`` and the scale has no sign.
        """
        cells = cells_for(max(len(table.values) for table in tables))
        searches = [ScaleSearch(table, self.scale, cells) for table in tables]
        rounder = scale_rounder(self.scale)
        found: list[list[BlockEncoding]] = [[] for _ in tables]
        for chunk in self.chunks(cells):
            for table, search, encodings in zip(tables, searches, found, strict=True):
                if mode is ScaleMode.SEARCH:
                    encodings.append(search.encode(chunk))
                else:
                    encodings.append(encode_one_pass(chunk, table, rounder, mode))
        return [BlockEncoding.join(encodings) for encodings in found]

    def assemble(
        self,
        fmt: QuantFormat,
        luts: Sequence[Lut],
        metabits: NDArray[np.uint16],
        scale_codes: NDArray[np.uint16],
    ) -> QuantizedTensor:
        """Assign every weight its nearest level under the scales and LUTs chosen.

        Parameters
        ----------
        fmt : QuantFormat
        luts : sequence of Lut
            As the format has them.
        metabits, scale_codes : uint16 arrays, shape (blocks,)

        Raises
        ------
        InputError
            If a decoded weight would be subnormal in float32, or overflow.
        """
        tables = levels_of(fmt, luts)
        if fmt.atom is None:
            element_codes = np.arange(fmt.lut_entries)
        else:
            element_codes = np.array(list(fmt.atom.canonical.values()))
        indices = np.empty(self.blocks.values.shape, dtype=code_dtype(fmt.index_bits))
        smallest, largest = np.inf, 0.0
        for members in self.blocks.parts():
            values, _ = self.blocks.take(members)
            scales = decode_array(scale_codes[members], self.scale) * self.multipliers(members)
            index, ends = nearest_levels(values, scales, tables, metabits[members] == 1)
            indices[members] = element_codes[index].T
            smallest, largest = min(smallest, ends[0]), max(largest, ends[1])
        check_float32_range(smallest, largest)
        words = fmt.word.join(scale_codes, metabits)
        rows = self.shape[0] if fmt.block_size else 1
        return QuantizedTensor(
            fmt,
            self.shape,
            indices.reshape(rows, -1, self.blocks.values.shape[1]),
            words.reshape(rows, -1),
            tuple(luts),
            self.layer_exponent,
            self.row_scales,
        )


def levels_of(fmt: QuantFormat, luts: Sequence[Lut]) -> list[RoundingTable]:
    """What elements of a format can be: the atom's values, or those of each LUT."""
    if fmt.atom is not None:
        return [format_table(fmt.atom)]
    return [level_table(lut.values) for lut in luts]


@inner_loop
def nearest_levels(
    values: Float64,
    scales: Float64,
    tables: Sequence[RoundingTable],
    second: NDArray[np.bool_],
) -> tuple[NDArray[np.intp], tuple[float, float]]:
    """Level of each element of blocks under their scales.

    Parameters
    ----------
    values : float64 array, shape (block_size, blocks)
    scales : float64 array, shape (blocks,)
        0 only for a block of zeros.
    tables : sequence of RoundingTable
        One or two sets of levels.
    second : bool array, shape (blocks,)
        Blocks that take the second set; none where there is one.

    Returns
    -------
    index : intp array, shape (block_size, blocks)
    ends : tuple of float
        Smallest and largest magnitude above 0 of a level times its scale; infinity and 0 where
        all are 0.
    """
    # With scale 0 any divisor gives the level nearest zero.
    quotients = values / np.where(scales == 0, 1.0, scales)
    index = tables[0].nearest_index(quotients)
    levels = tables[0].values[index]
    if len(tables) == 2:
        other = tables[1].nearest_index(quotients)
        index = np.where(second, other, index)
        levels = np.where(second, tables[1].values[other], levels)
    magnitudes = np.abs(levels * scales)
    if not magnitudes.any():
        return index, (np.inf, 0.0)
    return index, (float(magnitudes[magnitudes > 0].min()), float(magnitudes.max()))


def scaled_layer(
    weights: NDArray[np.float32],
    fmt: QuantFormat,
    small_end: float,
    channel_norms: NDArray[np.floating] | None = None,
    excluded: NDArray[np.bool_] | None = None,
) -> ScaledLayer:
    """Cut a matrix into blocks and fix the layer exponent and the row scales of a format.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Finite. Not modified.
    fmt : QuantFormat
    small_end : float
        Magnitude of the smaller end of the levels, the smallest over all LUTs that will be used.
    channel_norms : float array, shape (columns,), optional
        See :func:`golden.blocks.usable_channel_norms`.
    excluded : bool array, shape (rows, columns), optional
        Weights that a sparse correction will set right: they count neither in an extreme nor in an
        error (:mod:`golden.outliers`).

    Raises
    ------
    InputError
        For weights or channel norms that cannot be used, or an exponent out of range.
    """
    check_weights(weights)
    rows, columns = weights.shape
    norms = None
    if channel_norms is not None:
        norms, _ = usable_channel_norms(channel_norms, columns)
    scale, row_scales, exponent = fmt.word.scale, None, 0
    magnitudes = np.abs(weights)
    if excluded is not None:
        if excluded.shape != weights.shape:
            raise InputError(f"excluded has shape {excluded.shape}, weights {weights.shape}")
        magnitudes[excluded] = 0.0
    if fmt.row_scale:
        row_scales = choose_row_scales(magnitudes.max(axis=1), small_end, scale)
    else:
        exponent = choose_layer_exponent(float(magnitudes.max()), small_end, scale)
    blocks = cut_blocks(weights, fmt.block_size, norms, excluded)
    return ScaledLayer((rows, columns), blocks, scale, exponent, row_scales)


def choose_metabits(encodings: Sequence[BlockEncoding]) -> tuple[NDArray[np.uint16], BlockEncoding]:
    """Metabit and encoding of each block: the LUT with the lower error, the first among equals."""
    first = encodings[0]
    if len(encodings) == 1:
        return np.zeros_like(first.scale_codes), first
    use_second = encodings[1].errors < first.errors
    return use_second.astype(np.uint16), first.replace(use_second, encodings[1])


def fitted_layer(
    weights: NDArray[np.float32],
    fmt: QuantFormat,
    tables: Sequence[RoundingTable],
    mode: ScaleMode,
    channel_norms: NDArray[np.floating] | None = None,
    excluded: NDArray[np.bool_] | None = None,
) -> ScaledLayer:
    """:func:`scaled_layer` with the f or the row scales that fit these levels, and no others.

    What a file holds so follows from the weights and from the LUTs in the file, wherever those came
    from. Where the scale format has fewer than four exponent bits and no row scales, ``search``
    also tries the neighbouring layer exponents.

    Parameters
    ----------
    tables : sequence of RoundingTable
        Levels of the elements (:func:`levels_of`).
    weights, fmt, mode, channel_norms, excluded
        As in :func:`quantize`; errors as there.
    """
    small_end = min(table.small_end for table in tables)
    layer = scaled_layer(weights, fmt, small_end, channel_norms, excluded)
    narrow = layer.scale.exponent_bits < _WIDE_EXPONENT_BITS and not fmt.row_scale
    if mode is ScaleMode.SEARCH and narrow:
        return _search_layer_exponent(layer, tables)
    return layer


def _search_layer_exponent(layer: ScaledLayer, tables: Sequence[RoundingTable]) -> ScaledLayer:
    """The layer with the exponent, among four, that gives the least error."""
    best, least = layer, np.inf
    # The first exponent, with which nothing is clipped, wins a tie.
    for step in (0, -1, -2, 1):
        exponent = layer.layer_exponent + step
        if exponent not in LAYER_EXPONENT_RANGE:
            continue
        candidate = replace(layer, layer_exponent=exponent)
        _, chosen = choose_metabits(candidate.encode(tables, ScaleMode.SEARCH))
        error = float(np.cumsum(chosen.errors)[-1])
        if error < least:
            best, least = candidate, error
    return best


def quantize(
    weights: NDArray[np.float32],
    fmt: QuantFormat,
    *,
    mode: ScaleMode = ScaleMode.SEARCH,
    luts: Sequence[Lut | None] = (),
    channel_norms: NDArray[np.floating] | None = None,
    excluded: NDArray[np.bool_] | None = None,
) -> QuantizedTensor:
    """Quantize a weight matrix with given LUTs.

    Columns are cut into blocks of ``fmt.block_size``, the last one of a row zero-padded; padding
    never counts in an error. A block of zeros gets scale code 0, metabit 0 and the level nearest
    zero. With a pair, a block takes the LUT that gives the lower activation-weighted squared error,
    the first LUT if both give the same. Where the scale format has fewer than four exponent bits
    and no row scales, ``search`` also tries the neighbouring layer exponents.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Finite. Not modified.
    fmt : QuantFormat
    mode : ScaleMode
        How block scales are chosen.
    luts : sequence of Lut or None, optional
        One per codebook of the format; None takes the fixed codebook of that name.
    channel_norms : float array, shape (columns,), optional
        Root mean square of each input channel; all one if not given
        (:func:`golden.blocks.usable_channel_norms`).
    excluded : bool array, shape (rows, columns), optional
        Weights that a sparse correction will set right: they count neither in an extreme nor in an
        error (:mod:`golden.outliers`).

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
    used_luts = resolve_luts(fmt, luts)
    tables = levels_of(fmt, used_luts)
    layer = fitted_layer(weights, fmt, tables, mode, channel_norms, excluded)
    metabits, chosen = choose_metabits(layer.encode(tables, mode))
    return layer.assemble(fmt, used_luts, metabits, chosen.scale_codes)
