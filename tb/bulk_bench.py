"""Cocotb bench of :mod:`tb.bulk`: starts the clock and waits; the wrapper does the work."""

import json
import os
import time
from pathlib import Path
from typing import Any

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout

from tb.bench import CLOCK_NS, start_clock

# Clocks that a beat may take: as many as a beat has lanes, each with a correction.
TIMEOUT_CLOCKS_PER_BEAT = 512


@cocotb.test()
async def stream_files(dut: Any) -> None:
    """Run until every beat came out."""
    beats = int(os.environ["SOP_BULK_BEATS"])
    # In reset from the very first edge on: a word that is read before would be lost.
    dut.rst.value = 1
    start_clock(dut)
    await ClockCycles(dut.clk, 2)
    dut.rst.value = 0
    start = time.perf_counter()
    limit = (beats + 10_000) * TIMEOUT_CLOCKS_PER_BEAT * CLOCK_NS
    await with_timeout(RisingEdge(dut.done), limit, "ns")
    seconds = time.perf_counter() - start
    Path("seconds.json").write_text(json.dumps(seconds))
    await RisingEdge(dut.clk)
