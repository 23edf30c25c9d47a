"""Whole models through a unit, at the speed of the simulator (:mod:`sim.file_streams`).

Every bit that comes out is compared with the golden model, in NumPy.
"""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.corrections import Corrections
from golden.errors import InputError
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor
from rtl.layouts import (
    correction_layout,
    hif_beat_layout,
    index_beat_layout,
    lut_write_layout,
    merged_beat_layout,
)
from rtl.modes import Modes
from rtl.units import (
    FLOAT_LAYOUTS,
    LUT_DECODER,
    SPARSE_DECODER,
    UNITS,
    build_unit,
    configuration_name,
    latency_of,
)
from sim.beats import beats_from_planes, lut_writes
from sim.file_streams import FileStreams, file_streams, word_bytes
from sim.reference import code_beats, correction_beats, stream_positions, value_beats, weights

__all__ = ["BULK_UNITS", "BulkDecoder", "BulkDifference", "BulkResult", "run_bulk"]

BULK_UNITS = (LUT_DECODER.name, SPARSE_DECODER.name)
"""Units that can be run in bulk: the lookup alone, and everything up to the weights."""


@dataclass(frozen=True)
class BulkDecoder:
    """One unit in its wrapper.

    Parameters
    ----------
    unit : str
        One of :data:`BULK_UNITS`.
    formats : tuple of QuantFormat
        What it decodes; each tensor has one of them.
    lanes : int
    output : str
        ``"float32"`` or ``"bfloat16"``, of the weights.
    simulator : str
    build_root : Path
    """

    unit: str
    formats: tuple[QuantFormat, ...]
    lanes: int
    output: str
    simulator: str
    build_root: Path

    @property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)

    @property
    def inputs(self) -> dict[str, data.StructLayout]:
        """Payload of every input stream."""
        streams = {
            "i": index_beat_layout(lanes=self.lanes, modes=self.modes),
            "i_lut": lut_write_layout(modes=self.modes),
        }
        if "i_entry" in UNITS[self.unit].streams:
            streams["i_entry"] = correction_layout()
        return streams

    @property
    def out(self) -> data.StructLayout:
        """Payload of the output."""
        if UNITS[self.unit].streams["o"] == "hif_beat":
            return hif_beat_layout(lanes=self.lanes, modes=self.modes)
        return merged_beat_layout(lanes=self.lanes, float_layout=FLOAT_LAYOUTS[self.output])

    @property
    def latency(self) -> int:
        """Clocks from a beat in to the same beat out."""
        return latency_of(self.unit, self.output)

    def streams(self) -> FileStreams:
        """The unit between files."""
        name = configuration_name(self.unit, self.formats, lanes=self.lanes, output=self.output)
        unit = build_unit(self.unit, self.formats, lanes=self.lanes, output=self.output)
        return FileStreams(name, unit, self.inputs, self.out)


@dataclass(frozen=True)
class BulkDifference:
    """The first value that differs: tensor by number, row and column in the padded tensor."""

    tensor: int
    row: int
    column: int
    beat: int
    expected: int
    actual: int


@dataclass
class BulkResult:
    """Outcome of a run.

    ``clocks`` from the first beat in to the last one out, both counted; ``expected_clocks`` is one
    for each beat, or correction of a beat that has several, and the unit's latency; that many it
    must be if ``loads_hidden``: every tensor is longer than the load of the next one's LUTs. Times
    in seconds.
    """

    weights: int = 0
    beats: int = 0
    corrections: int = 0
    clocks: int = 0
    expected_clocks: int = 0
    loads_hidden: bool = True
    wrong_beats: int = 0
    first_difference: BulkDifference | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every bit was right and no clock was lost without need."""
        in_time = self.clocks == self.expected_clocks or not self.loads_hidden
        return not self.wrong_beats and in_time


def _input_clocks(tensor: QuantizedTensor, sparse: Corrections | None, lanes: int) -> int:
    """Clocks that a tensor occupies the input: one a beat, or one a correction if more."""
    beats = -(-tensor.indices.size // lanes)
    if sparse is None or not sparse.entries:
        return beats
    per_beat = np.bincount(stream_positions(tensor, sparse) // lanes, minlength=beats)
    return int(np.maximum(per_beat, 1).sum())


def _expected(
    decoder: BulkDecoder, tensor: QuantizedTensor, sparse: Corrections | None
) -> NDArray[np.uint8]:
    """Every beat of a tensor as the golden model has it."""
    if "codes" in decoder.out.members:
        return code_beats(tensor, lanes=decoder.lanes, modes=decoder.modes)
    return value_beats(weights(tensor, sparse), decoder.out, decoder.output)


def _locate(
    decoder: BulkDecoder, tensor: QuantizedTensor, number: int, beat: int,
    expected: NDArray[np.uint8], actual: NDArray[np.uint8],
) -> BulkDifference:  # fmt: skip
    """Where the first differing beat differs; fields after the values count as its first lane."""
    out = decoder.out
    name = "codes" if "codes" in out.members else "values"
    width = out[name].width // decoder.lanes
    words = [int.from_bytes(row.tobytes(), "little") for row in (expected, actual)]
    mask = (1 << width) - 1
    lanes = [
        lane
        for lane in range(decoder.lanes)
        if (words[0] ^ words[1]) >> (out[name].offset + lane * width) & mask
    ]
    lane = lanes[0] if lanes else 0
    if lanes:
        words = [word >> (out[name].offset + lane * width) & mask for word in words]
    row_length = tensor.indices.shape[1] * tensor.indices.shape[2]
    row, column = divmod(beat * decoder.lanes + lane, row_length)
    return BulkDifference(number, row, column, beat, expected=words[0], actual=words[1])


def _write_inputs(
    decoder: BulkDecoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    files: dict[str, IO[bytes]],
    result: BulkResult,
) -> None:
    lut_bytes = word_bytes(decoder.inputs["i_lut"])
    beats_before = None
    for tensor, sparse in tensors:
        beats = beats_from_planes(
            tensor.index_plane,
            tensor.scale_plane,
            tensor.format,
            lanes=decoder.lanes,
            modes=decoder.modes,
            row_scales=tensor.row_scales,
        )
        # $fread fills from the most significant byte on, so words are big-endian.
        files["i"].write(beats[:, ::-1].tobytes())
        writes = lut_writes(tensor, decoder.modes)
        result.loads_hidden &= beats_before is None or beats_before > len(writes)
        beats_before = len(beats)
        for word in writes:
            files["i_lut"].write(word.to_bytes(lut_bytes, "big"))
        if "i_entry" in files:
            entries = correction_beats(tensor, sparse)
            files["i_entry"].write(entries[:, ::-1].tobytes())
            result.corrections += sparse.entries if sparse is not None else 0
            result.expected_clocks += _input_clocks(tensor, sparse, decoder.lanes)
        else:
            result.expected_clocks += len(beats)
        result.weights += tensor.shape[0] * tensor.shape[1]
        result.beats += len(beats)


def _flip(path: Path, layout: data.StructLayout, bit: int) -> None:
    size = word_bytes(layout)
    beats = path.stat().st_size // size
    beat, place = divmod(bit, layout.size)
    if not 0 <= beat < beats:
        raise InputError(f"bit {bit} does not exist: {beats} beats of {layout.size} bits")
    with open(path, "r+b") as file:
        file.seek(beat * size + size - 1 - place // 8)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << place % 8]))


def run_bulk(
    decoder: BulkDecoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    *,
    flipped_bit: int | None = None,
) -> BulkResult:
    """Stream tensors through the RTL and compare every bit with the golden model.

    Parameters
    ----------
    decoder : BulkDecoder
    tensors : iterable of (QuantizedTensor, Corrections or None)
        Gone through twice, one at a time, so it may load them when asked.
    flipped_bit : int, optional
        A bit of the words on ``i``, counted through the whole run, that the hardware gets wrong: to
        see that the comparison notices.

    Raises
    ------
    InputError
        If the hardware cannot take the formats or lane count, the simulator is missing, or there is
        no such bit to flip.
    SimulationError
        If the simulation could not be built, or hung.
    """
    result = BulkResult()
    streams = decoder.streams()  # checks the arguments
    with file_streams(streams, decoder.build_root) as job:
        start = time.perf_counter()
        with job.opened() as files:
            _write_inputs(decoder, tensors, files, result)
        if flipped_bit is not None:
            _flip(job.inputs["i"], decoder.inputs["i"], flipped_bit)
        result.expected_clocks += decoder.latency
        prepared = time.perf_counter()
        run = job.run(decoder.simulator, beats=result.beats, expected_clocks=result.expected_clocks)
        simulated = time.perf_counter()
        result.clocks = run.clocks
        _compare(decoder, tensors, run.words, result)
        result.seconds = {
            "prepare": prepared - start,
            "build": simulated - prepared - run.seconds,
            "simulate": run.seconds,
            "compare": time.perf_counter() - simulated,
        }
        shutil.rmtree(run.folder)
    return result


def _compare(
    decoder: BulkDecoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    actual: NDArray[np.uint8],
    result: BulkResult,
) -> None:
    used = word_bytes(decoder.out)
    start = 0
    for number, (tensor, sparse) in enumerate(tensors):
        expected = _expected(decoder, tensor, sparse)
        got = actual[start : start + len(expected), :used]
        start += len(expected)
        wrong = np.flatnonzero((got != expected).any(axis=1))
        if len(wrong) and result.first_difference is None:
            beat = int(wrong[0])
            result.first_difference = _locate(
                decoder, tensor, number, beat, expected[beat], got[beat]
            )
        result.wrong_beats += len(wrong)
