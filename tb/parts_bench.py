"""Cocotb bench of the bench's own parts: driver, sink and monitor on a module with two streams.

The module under test has streams ``i`` and ``o`` of the same payload and hands words through.
"""

import json
import os
import random
from dataclasses import dataclass
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge, with_timeout

from sim.clock import CLOCK_NS, reset, start_clock
from sim.stalls import stall_pair
from sim.stream import StreamDriver, StreamMonitor, StreamPins, StreamSink
from tb.scoreboard import InOrderScoreboard

__all__ = ["VARIABLE", "hand_through", "sink_alone"]

VARIABLE = "SOP_PARTS"
"""Environment variable with the stall mode and the seed as JSON."""

WORDS = 300
TIMEOUT_CLOCKS = 64 * WORDS


@dataclass
class _Pauses:
    """Counts clocks in which a stream could have moved a word but one side was not there."""

    pins: StreamPins
    no_valid: int = 0
    no_ready: int = 0
    transfers: int = 0

    async def run(self, transfers: int) -> None:
        """Count from the first transfer up to the last one."""
        while self.transfers < transfers:
            await self.pins.edge
            valid, ready = bool(self.pins.valid.value), bool(self.pins.ready.value)
            self.transfers += valid and ready
            if self.transfers:
                self.no_valid += not valid
                self.no_ready += not ready


@cocotb.test()
async def hand_through(dut: Any) -> None:
    """Every word comes out once, in order; the sides pause as the stall mode says."""
    config = json.loads(os.environ[VARIABLE])
    mode, rng = config["stalls"], random.Random(config["seed"])
    source_stalls, sink_stalls = stall_pair(mode, config["seed"])
    into, out = StreamPins(dut, "i", dut.clk), StreamPins(dut, "o", dut.clk)
    driver, sink = StreamDriver(into, source_stalls), StreamSink(out, sink_stalls)
    scoreboard = InOrderScoreboard("stage")
    monitors = [
        StreamMonitor(into, lambda word: scoreboard.expect(word, "a word that went in")),
        StreamMonitor(out, scoreboard.actual),
    ]
    start_clock(dut)
    await reset(dut)
    for monitor in monitors:
        monitor.start()
    pauses = [_Pauses(pins) for pins in (into, out)]
    counters = [cocotb.start_soon(counter.run(WORDS)) for counter in pauses]
    # Neighbours differ, so a word that is lost or doubled cannot look like the one next to it.
    width = len(dut.i__payload)
    words = [rng.getrandbits(width - 9) << 9 | number for number in range(WORDS)]

    async def send() -> None:
        # Two calls: the second one follows without a pause of its own.
        await driver.send(words[: WORDS // 3])
        await driver.send(words[WORDS // 3 :])

    sending = cocotb.start_soon(send())
    await with_timeout(sink.run(WORDS - 10), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
    await with_timeout(sink.run(10), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
    await sending
    for counter in counters:
        await counter

    assert sink.words == words, "the sink has other words than the driver sent"
    scoreboard.finish(WORDS)
    assert [len(monitor.transfers) for monitor in monitors] == [WORDS, WORDS]
    source_paused, sink_paused = pauses[0].no_valid > 0, pauses[1].no_ready > 0
    assert source_paused == (mode in ("in", "both")), f"source pauses: {pauses[0]}"
    assert sink_paused == (mode in ("out", "both")), f"sink pauses: {pauses[1]}"
    if mode == "none":
        first = monitors[1].transfers[0]
        assert monitors[1].transfers == list(range(first, first + WORDS)), "a bubble"
    # Afterwards both sides are at rest: no word is offered or taken on its own.
    for _ in range(5):
        await RisingEdge(dut.clk)
        assert not into.valid.value, "the driver still offers a word"
        assert not out.ready.value, "the sink is still ready"


@cocotb.test()
async def sink_alone(dut: Any) -> None:
    """Driver and sink without monitors, so that nothing but the sink can object to a payload."""
    into, out = StreamPins(dut, "i", dut.clk), StreamPins(dut, "o", dut.clk)
    driver, sink = StreamDriver(into), StreamSink(out)
    start_clock(dut)
    await reset(dut)
    cocotb.start_soon(driver.send(range(20)))
    await with_timeout(sink.run(20), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
