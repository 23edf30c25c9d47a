"""Cocotb bench of :mod:`sim.file_streams`: starts the clock and waits for the wrapper."""

import json
import os
import time
from pathlib import Path
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge, Timer, with_timeout

from sim.clock import CLOCK_NS
from sim.file_streams import CLOCKS_VARIABLE

# Loading the first LUTs takes some clocks; apart from that the run should take none too many.
TIMEOUT_FACTOR = 2
TIMEOUT_CLOCKS = 10_000


@cocotb.test()
async def stream_files(dut: Any) -> None:
    """Run until every beat came out."""
    expected = int(os.environ[CLOCKS_VARIABLE])
    # In reset from the very first edge on: a word that is read before would be lost.
    dut.rst.value = 1
    await Timer(CLOCK_NS, "ns")
    # A clock without Python: nothing here is written in the same step as an edge after the reset.
    Clock(dut.clk, CLOCK_NS, unit="ns", impl="gpi").start()
    await ClockCycles(dut.clk, 2)
    dut.rst.value = 0
    start = time.perf_counter()
    limit = TIMEOUT_FACTOR * expected + TIMEOUT_CLOCKS
    await with_timeout(RisingEdge(dut.done), limit * CLOCK_NS, "ns")
    seconds = time.perf_counter() - start
    Path("seconds.json").write_text(json.dumps(seconds))
    await RisingEdge(dut.clk)
