"""A decoder under simulation, what golden says comes out of it, and what came out instead."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.corrections import Corrections
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor
from rtl.layouts import (
    correction_layout,
    float_beat_layout,
    hif_beat_layout,
    index_beat_layout,
    lut_write_layout,
    merged_beat_layout,
)
from rtl.modes import Modes
from rtl.units import FLOAT_LAYOUTS, UNITS, build_unit, configuration_name, latency_of, unit_verilog
from sim.beats import field_bits
from sim.file_streams import FileStreams, word_bytes
from sim.installed import require_simulator
from sim.reference import code_beats, value_beats, weights
from sim.simulator import Design

__all__ = ["FLAGS", "Decoder", "Difference", "Result"]

FLAGS = ("reserved", "overflow", "underflow")
"""Fields of an output that say that a value is not to be trusted; none may be set here."""


@dataclass(frozen=True)
class Decoder:
    """One unit that decodes planes, in one configuration, on one simulator.

    Parameters
    ----------
    unit : str
        Name of a unit with streams ``i``, ``i_lut`` and ``o``.
    formats : tuple of QuantFormat
        What it decodes; each tensor has one of them.
    lanes : int
    output : str
        ``"float32"`` or ``"bfloat16"``, of the weights.
    simulator : str
        One of :data:`sim.installed.SIMULATORS`.
    build_root : Path
    """

    unit: str
    formats: tuple[QuantFormat, ...]
    lanes: int
    output: str
    simulator: str
    build_root: Path

    def check(self) -> None:
        """Refuse what cannot be built or simulated here, before any long work.

        Raises
        ------
        InputError
            If the hardware cannot take the format or lane count, or the simulator
            cannot work here.
        """
        require_simulator(self.simulator, self.build_root)
        assert self.design(waves=False)

    @property
    def _options(self) -> dict[str, Any]:
        return {"lanes": self.lanes, "output": self.output}

    @property
    def name(self) -> str:
        """Name of the top module."""
        return configuration_name(self.unit, self.formats, **self._options)

    @property
    def format(self) -> QuantFormat:
        """The first format, which is the only one of most decoders."""
        return self.formats[0]

    @property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)

    @property
    def latency(self) -> int:
        """Clocks from a beat in to the same beat out."""
        return latency_of(self.unit, self.output)

    @cached_property
    def inputs(self) -> dict[str, data.StructLayout]:
        """Payload of every input stream."""
        streams = {
            "i": index_beat_layout(lanes=self.lanes, modes=self.modes),
            "i_lut": lut_write_layout(modes=self.modes),
        }
        if "i_entry" in UNITS[self.unit].streams:
            streams["i_entry"] = correction_layout()
        return streams

    @cached_property
    def out(self) -> data.StructLayout:
        """Payload of the output."""
        kind = UNITS[self.unit].streams["o"]
        if kind == "hif_beat":
            return hif_beat_layout(lanes=self.lanes, modes=self.modes)
        floats = merged_beat_layout if kind == "merged_beat" else float_beat_layout
        return floats(lanes=self.lanes, float_layout=FLOAT_LAYOUTS[self.output])

    @property
    def values(self) -> str:
        """Field of the output with an element a lane."""
        return "codes" if "codes" in self.out.members else "values"

    def design(self, *, waves: bool) -> Design:
        """Design to simulate, with or without recording."""
        name, text = unit_verilog(self.unit, self.formats, **self._options)
        return Design(name, text, waves=waves)

    def file_streams(self) -> FileStreams:
        """The unit between files."""
        unit = build_unit(self.unit, self.formats, **self._options)
        return FileStreams(self.name, unit, self.inputs, self.out)

    def expected(
        self, tensor: QuantizedTensor, sparse: Corrections | None = None
    ) -> NDArray[np.uint8]:
        """Every beat of a tensor as the golden model has it, shape (beats, bytes)."""
        if self.values == "codes":
            return code_beats(tensor, lanes=self.lanes, modes=self.modes)
        return value_beats(weights(tensor, sparse), self.out, self.output)


@dataclass(frozen=True)
class Difference:
    """The first value that differs: where it is, and both bit patterns.

    ``tensor`` is its number in the run; ``row``, ``column``, ``block`` and ``element`` locate the
    weight in the padded tensor, ``beat`` and ``lane`` in its stream; ``expected`` and ``actual``
    are bit patterns of the value, or, where all values are right, of the whole beat in lane 0.
    """

    tensor: int
    row: int
    column: int
    block: int
    element: int
    beat: int
    lane: int
    expected: int
    actual: int


@dataclass
class Result:
    """Outcome of a run, or of one tensor of it.

    ``clocks`` counts from the first beat in to the last one out; ``expected_clocks`` is one for
    each beat, or correction of a beat that has several, and the unit's latency; that many it must
    be if ``in_step``: nothing stalls on purpose, and every tensor is longer than the load of the
    next one's LUTs. ``wrong_beats`` counts beats with any wrong bit, ``mismatches`` values,
    ``misplaced_last`` beats whose ``last`` is wrong; ``flags`` names those that any beat raised.
    ``seconds`` are times by step.
    """

    weights: int = 0
    beats: int = 0
    corrections: int = 0
    clocks: int = 0
    expected_clocks: int = 0
    in_step: bool = True
    wrong_beats: int = 0
    mismatches: int = 0
    misplaced_last: int = 0
    flags: tuple[str, ...] = ()
    first_difference: Difference | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every bit was right and no clock was lost without need."""
        return not self.wrong_beats and (self.clocks == self.expected_clocks or not self.in_step)

    def compare(
        self,
        decoder: Decoder,
        number: int,
        tensor: QuantizedTensor,
        expected: NDArray[np.uint8],
        actual: NDArray[np.uint8],
    ) -> None:
        """Count what is wrong in the beats of one tensor.

        Parameters
        ----------
        decoder : Decoder
        number : int
            Of the tensor in the run.
        tensor : QuantizedTensor
        expected, actual : uint8 arrays, shape (beats, bytes)
            Actual ones may be longer words, or end early.
        """
        count = len(actual)
        expected, actual = expected[:count], actual[:, : word_bytes(decoder.out)]
        wrong = np.flatnonzero((actual != expected).any(axis=1))
        self.wrong_beats += len(wrong)
        if not len(wrong):
            return
        expected, actual, out = expected[wrong], actual[wrong], decoder.out
        raised = {
            flag for flag in FLAGS if flag in out.members and field_bits(actual, out, flag).any()
        }
        self.flags = tuple(flag for flag in FLAGS if flag in raised or flag in self.flags)
        last = [field_bits(beats, out, "last") for beats in (expected, actual)]
        self.misplaced_last += int((last[0] != last[1]).sum())
        bits = [
            field_bits(beats, out, decoder.values).reshape(len(wrong), decoder.lanes, -1)
            for beats in (expected, actual)
        ]
        self.mismatches += int((bits[0] != bits[1]).any(axis=2).sum())
        if self.first_difference is None:
            first = int(wrong[0])
            lanes = np.flatnonzero((bits[0][0] != bits[1][0]).any(axis=1))
            lane = int(lanes[0]) if len(lanes) else 0
            words = [
                pair[0, lane] if len(lanes) else np.unpackbits(beats[0], bitorder="little")
                for pair, beats in zip(bits, (expected, actual), strict=True)
            ]
            self.first_difference = _located(decoder, number, tensor, first, lane, words)


def _located(
    decoder: Decoder, number: int, tensor: QuantizedTensor, beat: int, lane: int,
    words: list[NDArray[np.uint8]],
) -> Difference:  # fmt: skip
    _, blocks, size = tensor.indices.shape
    row, column = divmod(beat * decoder.lanes + lane, blocks * size)
    expected, actual = (
        int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little") for bits in words
    )
    block, element = divmod(column, size)
    return Difference(number, row, column, block, element, beat, lane, expected, actual)
