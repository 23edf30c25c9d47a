"""What the benches of single units share: streams around a unit, start, interruption by a reset."""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import cocotb
from cocotb.task import Task
from cocotb.triggers import RisingEdge

from golden.formats import FloatFormat
from sim.clock import reset, start_clock
from sim.stalls import random_stalls, stall_pair
from sim.stream import StreamDriver, StreamMonitor, StreamPins, StreamSink
from tb.coverage import VARIABLE, Counts
from tb.scoreboard import InOrderScoreboard
from tb.unit_coverage import UnitCoverage

__all__ = ["UnitBench", "float_ends", "watch_for_coverage"]


def float_ends(fmt: FloatFormat) -> list[int]:
    """Codes at which the classes of a format begin and end, of both signs if it has signs."""
    binade = 1 << fmt.mantissa_bits
    top = (binade << fmt.exponent_bits) - 1
    # Zero, subnormals, smallest normal, and at the top whatever is special there.
    magnitudes = [0, 1, binade - 1, binade, top - binade, top - binade + 1, top - 1, top]
    return [code | sign * (top + 1) for code in magnitudes for sign in range(1 + fmt.signed)]


def watch_for_coverage(
    dut: Any, monitors: Mapping[str, StreamMonitor], make: Callable[[Counts], UnitCoverage]
) -> UnitCoverage | None:
    """Let monitors feed the coverage of a unit, if coverage is collected; written as the test ends.

    Parameters
    ----------
    dut : simulation handle
    monitors : mapping of str to StreamMonitor
        By stream, in the order in which they are started; ``o`` is the last.
    make : callable
        Makes the coverage.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    counts = Counts()
    coverage = make(counts)

    def attach(stream: str, monitor: StreamMonitor) -> None:
        inner = monitor.on_transfer

        def transfer(word: int) -> None:
            coverage.on_transfer(stream, word)
            if inner is not None:
                inner(word)

        monitor.on_transfer = transfer
        monitor.on_clock = lambda valid, ready: coverage.on_clock(stream, valid, ready)

    for stream, monitor in monitors.items():
        attach(stream, monitor)

    async def watch_resets() -> None:
        rises, edge = RisingEdge(dut.rst), RisingEdge(dut.clk)
        try:
            while True:
                await rises
                await edge  # what the registers see together with the reset
                stalled = str(dut.o__valid.value) == "1" and str(dut.o__ready.value) != "1"
                coverage.on_reset(stalled)
        finally:  # the end of the test
            counts.write(Path(folder))

    cocotb.start_soon(watch_resets())
    return coverage


class UnitBench:
    """Drivers, sink, monitors and scoreboard around one unit with one output stream ``o``.

    Parameters
    ----------
    dut : simulation handle
    stalls, seed : str, int
        As in :class:`sim.clock.BenchConfig`.
    scoreboard : InOrderScoreboard
        Gets what comes out.
    watchers : mapping of str to callable
        For each input stream what its monitor calls with every word.
    coverage : callable
        Makes the unit's coverage.
    """

    def __init__(
        self, dut: Any, stalls: str, seed: int, scoreboard: InOrderScoreboard,
        watchers: Mapping[str, Callable[[int], None]], coverage: Callable[[Counts], UnitCoverage],
    ) -> None:  # fmt: skip
        self.dut = dut
        self.scoreboard = scoreboard
        self.stalls = stalls
        source, sink = stall_pair(stalls, seed)
        self.drivers, monitors = {}, {}
        for name, watcher in watchers.items():
            pins = StreamPins(dut, name, dut.clk)
            other = stalls in ("in", "both") and name != "i"
            pauses = random_stalls(f"{name.removeprefix('i_')}-{seed}") if other else None
            self.drivers[name] = StreamDriver(pins, source if name == "i" else pauses)
            monitors[name] = StreamMonitor(pins, watcher)
        pins = StreamPins(dut, "o", dut.clk)
        self.sink = StreamSink(pins, sink)
        monitors["o"] = StreamMonitor(pins, self.check)
        self.driver = self.drivers["i"]
        self.input_monitor, self.output_monitor = monitors["i"], monitors["o"]
        self.monitors = tuple(monitors.values())
        self.coverage = watch_for_coverage(dut, monitors, coverage)

    def check(self, word: int) -> None:
        """Compare a word that came out."""
        self.scoreboard.actual(word)

    async def start(self) -> None:
        """Clock, reset, monitors."""
        start_clock(self.dut)
        await reset(self.dut)
        self.watch()

    def watch(self, guard: Callable[[Awaitable[None]], Any] | None = None) -> None:
        """Start the monitors; ``guard`` may wrap each of them."""
        for monitor in self.monitors:
            monitor.start(guard)

    def unwatch(self) -> None:
        """Stop the monitors."""
        for monitor in self.monitors:
            monitor.stop()

    def forget(self) -> None:
        """Expect nothing any more, as after a reset."""
        self.scoreboard.clear()

    async def interrupt(self, tasks: list[Task[Any]], latency: int) -> None:
        """End tasks that drive the unit, reset it, and see that no beat comes out.

        Returns ``latency`` clocks after the reset; the monitors start anew with :meth:`watch`.
        """
        # Traffic goes on while the registers see the reset.
        edge = RisingEdge(self.dut.clk)
        await edge
        self.unwatch()
        self.dut.rst.value = 1
        await edge
        for task in tasks:
            task.cancel()
        for driver in self.drivers.values():
            driver.pins.valid.value = 0
        self.sink.pins.ready.value = 0
        self.dut.rst.value = 0
        for _ in range(latency):
            await edge
            assert not self.dut.o__valid.value, "a beat survived the reset"
        self.forget()
