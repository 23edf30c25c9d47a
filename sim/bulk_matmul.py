"""Whole layers through a tile with its LUTs and its epilogue, at the speed of the simulator.

The weights go in as planes in tile order, tile of rows after tile of rows; for each of them the
tokens, tile after tile. Every bit that comes out is compared with :func:`golden.kernel.matmul`.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.activations import ActivationFormat, QuantizedActivations
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import BF16, FP32
from golden.kernel import KernelOutput, kernel_block_size, matmul
from golden.notation import QuantFormat
from golden.packing import unpack_bits
from golden.tensor import QuantizedTensor
from golden.tile_order import TileCorrections, tile_corrections, tile_planes, to_tile_order
from rtl.layouts import (
    column_layout,
    epilogue_activations_layout,
    epilogue_outputs_layout,
    lut_write_layout,
    tile_correction_layout,
    tile_indices_layout,
    tile_row_scales_layout,
)
from rtl.lut_tile import LATENCY
from rtl.matmul_tile import MatmulTile
from rtl.modes import Modes
from rtl.tile_epilogue import clocks_of_tile
from rtl.units import FLOAT_LAYOUTS, MATMUL_TILE
from sim.beats import beats_from_fields, lut_writes
from sim.file_streams import FileRun, FileStreams, file_streams, word_bytes
from sim.tile_operands import Operands, TilePart, operands_of

__all__ = ["BulkTile", "MatmulResult", "TileOutputs", "run_matmul", "run_parts", "slots_for"]

Bits = NDArray[np.unsignedinteger]

_FEWEST_SLOTS = 64


def slots_for(corrections: Corrections | None, rows: int) -> int:
    """Slots that corrections need on a tile of so many rows, a power of two."""
    parts = [] if corrections is None else tile_corrections(corrections, rows)
    most = max((len(part.columns) for part in parts), default=0)
    return max(_FEWEST_SLOTS, 1 << max(0, most - 1).bit_length())


@dataclass(frozen=True)
class BulkTile:
    """One tile with its LUTs and its epilogue, and where it is simulated.

    Parameters
    ----------
    formats : tuple of QuantFormat
        Of the weights; each layer has one of them.
    activations : ActivationFormat
    rows, columns : int
    simulator : str
    build_root : Path
    output : str
        ``"float32"`` or ``"bfloat16"``.
    slots : int
        Most input channels of a tile with corrections (:func:`slots_for`).
    """

    formats: tuple[QuantFormat, ...]
    activations: ActivationFormat
    rows: int
    columns: int
    simulator: str
    build_root: Path
    output: str = "float32"
    slots: int = _FEWEST_SLOTS

    @cached_property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)

    @cached_property
    def unit(self) -> MatmulTile:
        """The hardware.

        Raises
        ------
        InputError
            If it cannot take the formats or the size.
        """
        for fmt in self.formats:
            if fmt.block_size:  # else refused below, with a better message
                kernel_block_size(fmt, self.activations)
        try:
            return MatmulTile(
                rows=self.rows, columns=self.columns, modes=self.modes,
                activation=self.activations.element, activation_scale=self.activations.scale,
                slots=self.slots, float_layout=FLOAT_LAYOUTS[self.output],
            )  # fmt: skip
        except ValueError as error:
            names = ", ".join(fmt.name for fmt in self.formats)
            raise InputError(f"tile for {names} and {self.activations.name}: {error}") from None

    def check(self) -> None:
        """Refuse formats and sizes that the hardware cannot take, as :attr:`unit` does."""
        assert self.unit is not None

    @cached_property
    def streams(self) -> FileStreams:
        """The tile between files."""
        inputs = {
            "i": tile_indices_layout(rows=self.rows, modes=self.modes),
            "i_lut": lut_write_layout(modes=self.modes),
            "i_activation": epilogue_activations_layout(
                columns=self.columns, element=self.activations.element,
                scale=self.activations.scale,
            ),
            "i_column": column_layout(),
            "i_correction": tile_correction_layout(rows=self.rows, slots=self.slots),
        }  # fmt: skip
        if self.modes.row_scale:
            inputs["i_row_scale"] = tile_row_scales_layout(rows=self.rows)
        out = epilogue_outputs_layout(
            units=self.unit.shape.units, float_layout=FLOAT_LAYOUTS[self.output]
        )
        return FileStreams(MATMUL_TILE.name, self.unit, inputs, out)

    @property
    def outputs(self) -> int:
        """Products in every clock."""
        return self.rows * self.columns


class _Words:
    """Payloads of all streams for any part of a product."""

    def __init__(self, tile: BulkTile, operands: Operands) -> None:
        self._tile, tensor = tile, operands.tensor
        self._size = tensor.format.block_size
        index_plane, scale_plane = tile_planes(tensor, tile.rows)
        indices, words = tensor.indices.size, tensor.scale_words.size
        tiled = (operands.tiles[0], -1, tile.rows)
        self._indices = unpack_bits(index_plane, tensor.format.index_bits, indices).reshape(tiled)
        self._scale_words = unpack_bits(scale_plane, tensor.format.word.width, words).reshape(tiled)
        activations = operands.activations
        elements = activations.elements.reshape(len(activations.elements), -1)
        self._elements = to_tile_order(elements, tile.columns)
        self._scales = to_tile_order(activations.scale_codes, tile.columns)
        self._exponents = None
        if activations.token_exponents is not None:
            unsigned = activations.token_exponents.astype(np.uint8)
            self._exponents = unsigned.reshape(-1, tile.columns)
        self._operands = operands
        corrections = operands.corrections
        self._corrections = (
            None if corrections is None else tile_corrections(corrections, tile.rows)
        )

    def _beats(
        self, stream: str, blocks: range, element: str, elements: NDArray[Any], scale: str,
        scales: NDArray[Any], **more: Any,
    ) -> bytes:  # fmt: skip
        """Words of a stream for some blocks of one tile, shapes (channels or blocks, lanes)."""
        channels = elements[blocks.start * self._size : blocks.stop * self._size]
        # Scales count in the first beat of a block.
        spread = np.zeros(channels.shape, dtype=scales.dtype)
        spread[:: self._size] = scales[blocks.start : blocks.stop]
        fields = {element: channels.reshape(-1), scale: spread.reshape(-1), **more}
        return self._packed(stream, fields)

    def _packed(self, stream: str, fields: dict[str, Any]) -> bytes:
        beats = beats_from_fields(fields, self._tile.streams.inputs[stream])
        # $fread fills from the most significant byte on.
        return beats[:, ::-1].tobytes()

    def weights(self, part: TilePart, *, last: bool) -> bytes:
        """Words of ``i``; ``last`` marks the end of the tensor."""
        number = part.row_tile
        return self._beats(
            "i", part.blocks, "indices", self._indices[number],
            "scale_words", self._scale_words[number], last_tile=int(last),
        )  # fmt: skip

    def activations(self, part: TilePart) -> bytes:
        """Words of ``i_activation``."""
        number, more = part.token_tile, {}
        if self._exponents is not None:
            beats = len(part.blocks) * self._size
            more["token_exponents"] = np.tile(self._exponents[number], beats)
        return self._beats(
            "i_activation", part.blocks, "codes", self._elements[number],
            "scales", self._scales[number], **more,
        )  # fmt: skip

    def row_scales(self, part: TilePart) -> bytes:
        """Word of ``i_row_scale``."""
        return self._packed("i_row_scale", {"scales": self._operands.row_scales(part)})

    def corrections(self, part: TilePart) -> tuple[bytes, bytes]:
        """Words of ``i_column`` and ``i_correction``."""
        entries = self._entries(part)
        if entries is None or not len(entries.values):
            one = np.zeros(1, dtype=np.uint32)
            return (
                self._packed("i_column", {"column": one, "empty": 1}),
                self._packed("i_correction", {"row": one, "empty": 1}),
            )
        fields = {name: getattr(entries, f"{name}s") for name in ("row", "slot", "value")}
        return (
            self._packed("i_column", {"column": entries.columns}),
            self._packed("i_correction", fields),
        )

    def rows_in_order(self, part: TilePart) -> list[int]:
        """Row of each correction, as they go in."""
        entries = self._entries(part)
        return [] if entries is None else entries.rows.tolist()

    def _entries(self, part: TilePart) -> TileCorrections | None:
        """Corrections of a part; columns also of those that are left out."""
        if self._corrections is None or part.corrections == 0:
            return None
        whole = self._corrections[part.row_tile]
        if part.corrections is None:
            return whole
        first = whole.turns < part.corrections
        return TileCorrections(
            whole.columns, *(getattr(whole, name)[first] for name in
                             ("rows", "slots", "values", "turns"))
        )  # fmt: skip


@dataclass(frozen=True)
class TileOutputs:
    """What came out of a tile for some parts.

    Attributes
    ----------
    bits : uint32 or uint16 array, shape (parts, columns, rows)
        Of float32 or bfloat16.
    wrong_flags : int
        Beats whose flags, or whose lanes without an output, are not as they have to be after these
        bits: ``overflow`` with an infinity, ``last`` in a part's last beat, no others.
    clocks, expected_clocks : int
        From the first operands to the last outputs, both counted; as many as there must be, if
        ``hidden``.
    hidden : bool
        Every part but the last has its row scales and corrections applied while the products of the
        next one are computed. Else the tile waits for them.
    seconds : float
        That the simulator was running.
    waveform : Path or None
    """

    bits: Bits
    wrong_flags: int
    clocks: int
    expected_clocks: int
    hidden: bool
    seconds: float
    waveform: Path | None


def run_parts(
    tile: BulkTile, operands: Operands, parts: Sequence[TilePart], *, waves: bool = False
) -> TileOutputs:
    """Compute parts of a product one after the other.

    Raises
    ------
    InputError
        If the hardware cannot take the formats, or the simulator is missing.
    SimulationError
        If the simulation could not be built, or hung.
    """
    words, size = _Words(tile, operands), operands.tensor.format.block_size
    used = tile.unit.shape.used
    beats = [len(part.blocks) * size for part in parts]
    after = [_clocks_after(tile, words, part) for part in parts]
    # The next sums come so many clocks later, and the next but one activations need the place of
    # those that were kept.
    hidden = all(
        max(clocks, used + LATENCY) <= coming
        for clocks, coming in zip(after, beats[1:], strict=False)
    )
    expected_clocks = sum(beats) + LATENCY + after[-1]
    with file_streams(tile.streams, tile.build_root) as job:
        with job.opened() as files:
            for stream, content in _all_words(words, parts, row_scales="i_row_scale" in files):
                files[stream].write(content)
            length = word_bytes(tile.streams.inputs["i_lut"])
            for word in lut_writes(operands.tensor, tile.modes):
                files["i_lut"].write(word.to_bytes(length, "big"))
        run = job.run(
            tile.simulator, beats=len(parts) * used,
            expected_clocks=expected_clocks if hidden else expected_clocks + sum(after),
            waves=waves,
        )  # fmt: skip
        bits, wrong_flags = _read_outputs(tile, run)
        if not waves:
            shutil.rmtree(run.folder)
    return TileOutputs(
        bits, wrong_flags, run.clocks, expected_clocks, hidden, run.seconds, run.waveform
    )


def _clocks_after(tile: BulkTile, words: _Words, part: TilePart) -> int:
    """Clocks that the epilogue needs for a part."""
    return clocks_of_tile(
        tile.unit.shape, words.rows_in_order(part), row_scales=tile.modes.row_scale
    )


def _all_words(
    words: _Words, parts: Sequence[TilePart], *, row_scales: bool
) -> Iterator[tuple[str, bytes]]:
    """Streams and their words; what is the same as for the part before is not made again."""
    made: TilePart | None = None
    of_rows: dict[str, bytes] = {}
    activations: dict[TilePart, bytes] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        rows, tokens = replace(part, token_tile=0), replace(part.sums, row_tile=0)
        if rows != made or last:
            made = rows
            of_rows = {"i": words.weights(part, last=last)}
            of_rows["i_column"], of_rows["i_correction"] = words.corrections(part)
            if row_scales:
                of_rows["i_row_scale"] = words.row_scales(part)
        if tokens not in activations:
            activations[tokens] = words.activations(part)
        yield from of_rows.items()
        yield "i_activation", activations[tokens]


def _read_outputs(tile: BulkTile, run: FileRun) -> tuple[Bits, int]:
    """Bits of all outputs, shape (parts, columns, rows), and how many beats have wrong flags."""
    out, shape = tile.streams.out, tile.unit.shape
    assert out["values"].offset == 0
    size = FLOAT_LAYOUTS[tile.output].size // 8
    words = run.words.reshape(-1, shape.used, run.words.shape[1])
    lanes = np.ascontiguousarray(words[..., : size * shape.units]).view(f"<u{size}")
    infinity = (FP32 if size == 4 else BF16).exponent_mask
    infinite = ((lanes & (1 << 8 * size - 1) - 1) == infinity).any(axis=2)
    flags = 8 * size * shape.units  # the first bit after the values
    expected = infinite.astype(np.uint8) << (out["overflow"].offset - flags)
    expected[:, -1] |= 1 << out["last"].offset - flags
    wrong = words[..., size * shape.units] != expected
    # Unit u has the outputs from u * used on; beyond the last there is +0.
    by_unit = lanes.transpose(0, 2, 1)
    number = np.arange(shape.units * shape.used).reshape(by_unit.shape[1:])
    wrong |= (by_unit.astype(bool) & (number >= tile.outputs)).any(axis=1)
    bits = by_unit.reshape(len(words), -1)[:, : tile.outputs]
    return bits.reshape(-1, tile.columns, tile.rows).copy(), int(wrong.sum())


@dataclass(frozen=True)
class MatmulResult:
    """Outcome of :func:`run_matmul`.

    Attributes
    ----------
    output : KernelOutput
        What the hardware computed, of shape (tokens, rows).
    products : int
        Without those of rows and tokens that fill up tiles.
    mismatches : int
        Outputs of which a bit is wrong, those that fill up tiles included.
    first_mismatch : tuple of int, or None
        Row and token of the first of them, row by row.
    outputs : TileOutputs
    operands, given : Operands
        As they are, and as the hardware got them.
    seconds : dict of str to float
    """

    output: KernelOutput
    products: int
    mismatches: int
    first_mismatch: tuple[int, int] | None
    outputs: TileOutputs
    operands: Operands
    given: Operands
    seconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every bit and every clock was right."""
        return not (self.mismatches or self.outputs.wrong_flags) and self.in_time

    @property
    def in_time(self) -> bool:
        """Whether it took as many clocks as it must, or more where the tile waits."""
        out = self.outputs
        return out.clocks == out.expected_clocks or (
            not out.hidden and out.clocks > out.expected_clocks
        )


def run_matmul(
    tile: BulkTile,
    tensor: QuantizedTensor,
    activations: QuantizedActivations,
    corrections: Corrections | None = None,
    *,
    fault: tuple[str, int, int] | None = None,
) -> MatmulResult:
    """Multiply a whole layer in the RTL and compare every bit with the golden model.

    Parameters
    ----------
    tile : BulkTile
    tensor : QuantizedTensor
        Weights, shape (rows, channels), of one of the tile's formats.
    activations : QuantizedActivations
        Shape (tokens, channels), of the tile's format.
    corrections : Corrections, optional
        They need no more slots than the tile has.
    fault : tuple of str, int and int, optional
        Kind, position and bit that the hardware gets wrong (:meth:`Operands.flipped`).

    Raises
    ------
    InputError
        If the hardware cannot take the formats, the simulator is missing, or there is no such bit
        to flip.
    SimulationError
        If the simulation could not be built, or hung.
    """
    start = time.perf_counter()
    operands = operands_of(tensor, activations, corrections, rows=tile.rows, columns=tile.columns)
    given = operands if fault is None else operands.flipped(*fault)
    outputs = run_parts(tile, given, operands.parts())
    simulated = time.perf_counter()
    row_tiles, token_tiles = operands.tiles
    bits = outputs.bits.reshape(row_tiles, token_tiles, tile.columns, tile.rows)
    bits = bits.transpose(1, 2, 0, 3).reshape(token_tiles * tile.columns, -1)
    expected = matmul(
        operands.tensor, operands.activations, operands.corrections, output=tile.output
    ).bits
    wrong = np.argwhere((bits != expected).T)
    (tokens, channels), rows = activations.shape, tensor.shape[0]
    kept = np.ascontiguousarray(bits[:tokens, :rows])
    output = KernelOutput(kept, np.zeros(kept.shape, bool))
    return MatmulResult(
        output=replace(output, overflow=np.isinf(output.values)),
        products=tokens * channels * rows,
        mismatches=len(wrong),
        first_mismatch=(int(wrong[0][0]), int(wrong[0][1])) if len(wrong) else None,
        outputs=outputs,
        operands=operands,
        given=given,
        seconds={
            "simulate": outputs.seconds,
            "prepare and build": simulated - start - outputs.seconds,
            "compare": time.perf_counter() - simulated,
        },
    )
