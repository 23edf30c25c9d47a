"""Cocotb bench of tiles from power-up on Icarus, where what nothing has written is undefined.

No reference: monitors refuse a ``valid`` or ``ready`` that is undefined and a valid payload with an
undefined bit. Sources leave payloads undefined whenever they offer no word.
"""

import importlib
import os
import random
from typing import Any

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout

from sim.clock import CLOCK_NS, start_clock
from sim.stalls import STALL_MODES, stall_pair
from sim.stream import StreamDriver, StreamMonitor, StreamPins, StreamSink
from tb.benches import BENCHES
from tb.traffic import UNIT_VARIABLE

__all__ = ["from_power_up"]

TIMEOUT_CLOCKS = 20_000


@cocotb.test()
async def from_power_up(dut: Any) -> None:
    """One clock of reset defines everything, at the start and in mid-traffic."""
    record = BENCHES[os.environ[UNIT_VARIABLE]]
    config = record.config.from_environment()
    rng = random.Random(config.seed)
    start_clock(dut)
    edge = RisingEdge(dut.clk)
    await ClockCycles(dut.clk, 2)
    # Of the bench only the traffic is used.
    traffic = getattr(importlib.import_module(record.module), record.player)(dut, config)
    inputs = tuple(traffic.drivers)
    pins = {name: StreamPins(dut, name, dut.clk) for name in (*inputs, "o")}
    for number, mode in enumerate(STALL_MODES * 2):
        dut.rst.value = 1
        for name in inputs:
            StreamDriver(pins[name], undefined=True).rest()
        pins["o"].ready.value = 0
        await edge
        dut.rst.value = 0
        await edge
        for name in inputs:
            assert pins[name].ready.value.is_resolvable, f"{name}: ready after reset {number}"
        assert pins["o"].valid.value.is_resolvable, f"valid after reset {number}"
        source, take = stall_pair(mode, number)
        sink = StreamSink(pins["o"], take)
        monitors = [StreamMonitor(pin) for pin in pins.values()]
        for monitor in monitors:
            monitor.start()
        words, count = traffic.some_words()
        tasks = [
            cocotb.start_soon(StreamDriver(pins[name], source, undefined=True).send(words[name]))
            for name in inputs
        ]
        if number % 2:  # the next reset comes in mid-traffic
            tasks.append(cocotb.start_soon(sink.run(count)))
            await ClockCycles(dut.clk, rng.randint(1, 2 * traffic.latency))
        else:
            await with_timeout(sink.run(count), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
        for monitor in monitors:
            monitor.stop()
        for task in tasks:
            task.cancel()
