"""Records chosen signals of a simulation clock by clock, for :mod:`sim.timing.wavejson`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cocotb
import numpy as np
from amaranth.lib import data
from cocotb.triggers import ClockCycles, RisingEdge

from sim.bench_config import BenchConfig
from sim.clock import start_clock
from sim.timing.diagrams import DIAGRAMS
from sim.timing.wavejson import Cell, Row, wavejson, wavejson_text

__all__ = ["RecordedScene", "Recorder", "among"]


def among(labels: Mapping[int, Cell], port: str) -> Callable[[int], Cell]:
    """What a word of a port is called, which has to be one of these."""

    def show(word: int) -> Cell:
        assert word in labels, f"{port}: {word:#x} was not expected"
        return labels[word]

    return show


@dataclass
class _Track:
    """One row while it is recorded: how to read its cell."""

    name: str
    group: str
    words: bool
    read: Callable[[], str | Cell | None]
    cells: list[str | Cell | None] = field(default_factory=list)


class Recorder:
    """Samples at every rising edge, which reads what was stable before it.

    A word counts while its ``valid`` is high. Those with labels have to be among them: a diagram
    never shows a word that the golden model did not expect.
    """

    def __init__(self, dut: Any) -> None:
        self.dut = dut
        self.tracks: list[_Track] = []
        self.running = False

    def bit(self, port: str, group: str = "", valid: str = "") -> None:
        """A row of one port of one bit, which may mean nothing without its ``valid``."""
        handle = getattr(self.dut, port)
        gate = getattr(self.dut, valid) if valid else None

        def read() -> str:
            text = str(handle.value)
            return text if text in ("0", "1") and (gate is None or str(gate.value) == "1") else "x"

        self.tracks.append(_Track(port, group, False, read))

    def word(self, port: str, valid: str, show: Callable[[int], Cell], group: str = "") -> None:
        """A row of one port of several bits; ``show`` gives what a word is called."""
        handle, gate = getattr(self.dut, port), getattr(self.dut, valid)

        def read() -> Cell | None:
            return show(handle.value.to_unsigned()) if str(gate.value) == "1" else None

        self.tracks.append(_Track(port, group, True, read))

    def payload(
        self, stream: str, labels: Mapping[int, Cell], layout: data.StructLayout, *fields: str
    ) -> None:
        """Rows of a stream of payload, valid and ready, and of single fields of its payload.

        Fields of one bit are shown as such, others in hex; of an array, lane 0.
        """
        for part in ("valid", "ready"):
            self.bit(f"{stream}__{part}", stream)
        port, valid = f"{stream}__payload", f"{stream}__valid"
        self.word(port, valid, among(labels, port), stream)
        for name in fields:
            self._field(stream, labels, name, layout[name])

    def _field(self, stream: str, labels: Mapping[int, Cell], name: str, field: data.Field) -> None:
        port, valid = f"{stream}__payload", f"{stream}__valid"
        array = isinstance(field.shape, data.ArrayLayout)
        width = field.width // (field.shape.length if array else 1)
        label = f"{port}.{name}{'[0]' if array else ''}"
        digits, mask = -(-width // 4), (1 << width) - 1

        def show(word: int) -> Cell:
            return Cell(f"{word >> field.offset & mask:0{digits}X}", labels[word].tensor)

        self.word(port, valid, show, stream)
        track = self.tracks[-1]
        track.name = label
        if width == 1:
            read = track.read

            def bit() -> str:
                cell = read()
                return cell.label if isinstance(cell, Cell) else "x"

            track.words, track.read = False, bit

    def start(self) -> None:
        """Record from the next rising edge on."""
        self.running = True
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        edge = RisingEdge(self.dut.clk)
        while self.running:
            await edge
            for track in self.tracks:
                track.cells.append(track.read())

    def write(self, name: str) -> None:
        """Stop, and write the WaveJSON of a scenario into the current folder."""
        self.running = False
        (scenario,) = (
            item
            for diagrams in DIAGRAMS.values()
            for item in diagrams.scenarios
            if item.name == name
        )
        rows = [Row(item.name, item.group, item.words, item.cells) for item in self.tracks]
        Path(f"{name}.json").write_text(wavejson_text(wavejson(scenario, rows)))


class RecordedScene:
    """A unit in the configuration of the diagrams, its recorder, and the clock."""

    def __init__(self, dut: Any) -> None:
        self.dut = dut
        self.config = BenchConfig.from_environment()
        self.modes, self.lanes = self.config.modes, self.config.lanes
        self.rng = np.random.default_rng(1)
        self.recorder = Recorder(dut)
        start_clock(dut)

    async def clocks(self, count: int) -> None:
        """Let time pass."""
        await ClockCycles(self.dut.clk, count)

    async def finish(self, name: str, clocks: int) -> None:
        """Record some clocks more, and write."""
        await self.clocks(clocks)
        self.recorder.write(name)
