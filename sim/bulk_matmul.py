"""Whole layers through a tile with its LUTs, at the speed of the simulator.

The weights go in as planes in tile order, tile of rows after tile of rows; for each of them the
tokens, tile after tile. Every bit that comes out is compared with :func:`golden.kernel.accumulate`.
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
from golden.errors import InputError
from golden.formats import FP32
from golden.kernel import accumulate, kernel_block_size
from golden.notation import QuantFormat
from golden.packing import unpack_bits
from golden.tensor import QuantizedTensor
from golden.tile_order import tile_planes, to_tile_order
from rtl.layouts import (
    lut_write_layout,
    tile_activations_layout,
    tile_indices_layout,
    tile_outputs_layout,
)
from rtl.lut_tile import LATENCY, LutTile
from rtl.modes import Modes
from rtl.units import LUT_TILE
from sim.beats import beats_from_fields, lut_writes
from sim.file_streams import FileRun, FileStreams, file_streams, word_bytes
from sim.tile_operands import Operands, TilePart, operands_of

__all__ = ["BulkTile", "MatmulResult", "TileOutputs", "run_matmul", "run_parts"]

Bits = NDArray[np.uint32]


@dataclass(frozen=True)
class BulkTile:
    """One tile with its LUTs, and where it is simulated.

    Parameters
    ----------
    formats : tuple of QuantFormat
        Of the weights; each layer has one of them.
    activations : ActivationFormat
    rows, columns : int
    simulator : str
    build_root : Path
    """

    formats: tuple[QuantFormat, ...]
    activations: ActivationFormat
    rows: int
    columns: int
    simulator: str
    build_root: Path

    @cached_property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)

    @cached_property
    def unit(self) -> LutTile:
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
            return LutTile(
                rows=self.rows, columns=self.columns, modes=self.modes,
                activation=self.activations.element, activation_scale=self.activations.scale,
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
        shape = self.unit.tile.shape
        inputs = {
            "i": tile_indices_layout(rows=self.rows, modes=self.modes),
            "i_lut": lut_write_layout(modes=self.modes),
            "i_activation": tile_activations_layout(
                columns=self.columns, element=self.activations.element,
                scale=self.activations.scale,
            ),
        }  # fmt: skip
        return FileStreams(LUT_TILE.name, self.unit, inputs, tile_outputs_layout(units=shape.units))

    @property
    def outputs(self) -> int:
        """Products in every clock."""
        return self.rows * self.columns


class _Words:
    """Payloads of both streams for any part of a product."""

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


@dataclass(frozen=True)
class TileOutputs:
    """What came out of a tile for some parts.

    Attributes
    ----------
    bits : uint32 array, shape (parts, columns, rows)
        Of float32.
    wrong_flags : int
        Beats whose flags, or whose lanes without an output, are not as they have to be after these
        bits: ``overflow`` with an infinity, ``last`` in a part's last beat, no ``reserved``.
    clocks, expected_clocks : int
        From the first operands to the last outputs, both counted; as many as there must be.
    seconds : float
        That the simulator was running.
    waveform : Path or None
    """

    bits: Bits
    wrong_flags: int
    clocks: int
    expected_clocks: int
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
    beats = sum(len(part.blocks) for part in parts) * size
    used = tile.unit.tile.shape.used
    expected_clocks = beats + LATENCY + used - 1
    with file_streams(tile.streams, tile.build_root) as job:
        with job.opened() as files:
            for stream, content in _all_words(words, parts):
                files[stream].write(content)
            length = word_bytes(tile.streams.inputs["i_lut"])
            for word in lut_writes(operands.tensor, tile.modes):
                files["i_lut"].write(word.to_bytes(length, "big"))
        run = job.run(
            tile.simulator, beats=len(parts) * used, expected_clocks=expected_clocks, waves=waves
        )
        bits, wrong_flags = _read_outputs(tile, run)
        if not waves:
            shutil.rmtree(run.folder)
    return TileOutputs(bits, wrong_flags, run.clocks, expected_clocks, run.seconds, run.waveform)


def _all_words(words: _Words, parts: Sequence[TilePart]) -> Iterator[tuple[str, bytes]]:
    """Streams and their words; what is the same as for the part before is not made again."""
    made: TilePart | None = None
    weights = b""
    activations: dict[TilePart, bytes] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        rows, tokens = replace(part, token_tile=0), replace(part, row_tile=0)
        if rows != made or last:
            made, weights = rows, words.weights(part, last=last)
        if tokens not in activations:
            activations[tokens] = words.activations(part)
        yield "i", weights
        yield "i_activation", activations[tokens]


def _read_outputs(tile: BulkTile, run: FileRun) -> tuple[Bits, int]:
    """Bits of all outputs, shape (parts, columns, rows), and how many beats have wrong flags."""
    out, shape = tile.streams.out, tile.unit.tile.shape
    assert out["values"].offset == 0
    words = run.words.view("<u4").reshape(-1, shape.used, run.words.shape[1] // 4)
    lanes = words[..., : shape.units]
    infinite = ((lanes & 0x7FFFFFFF) == FP32.exponent_mask).any(axis=2)
    expected = infinite.astype(np.uint32) << (out["overflow"].offset - 32 * shape.units)
    expected[:, -1] |= 1 << out["last"].offset - 32 * shape.units
    wrong = words[..., shape.units] != expected
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
    accumulators : float32 array, shape (tokens, rows)
        What the hardware computed.
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

    accumulators: NDArray[np.float32]
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
        out = self.outputs
        return not (self.mismatches or out.wrong_flags) and out.clocks == out.expected_clocks


def run_matmul(
    tile: BulkTile,
    tensor: QuantizedTensor,
    activations: QuantizedActivations,
    *,
    fault: tuple[str, int, int] | None = None,
) -> MatmulResult:
    """Multiply a whole layer in the RTL and compare every bit with the golden model.

    Parameters
    ----------
    tile : BulkTile
    tensor : QuantizedTensor
        Weights, shape (rows, channels), of one of the tile's formats. Row scales are not applied.
    activations : QuantizedActivations
        Shape (tokens, channels), of the tile's format.
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
    operands = operands_of(tensor, activations, rows=tile.rows, columns=tile.columns)
    given = operands if fault is None else operands.flipped(*fault)
    outputs = run_parts(tile, given, operands.parts())
    simulated = time.perf_counter()
    row_tiles, token_tiles = operands.tiles
    bits = outputs.bits.reshape(row_tiles, token_tiles, tile.columns, tile.rows)
    bits = bits.transpose(1, 2, 0, 3).reshape(token_tiles * tile.columns, -1)
    expected = accumulate(operands.tensor, operands.activations).view(np.uint32)
    wrong = np.argwhere((bits != expected).T)
    (tokens, channels), rows = activations.shape, tensor.shape[0]
    return MatmulResult(
        accumulators=np.ascontiguousarray(bits[:tokens, :rows]).view(np.float32),
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
