"""Cocotb bench of the float decoder: whole tensors (:mod:`sim.tensor_bench`), with coverage."""

from typing import Any

import cocotb

from rtl.units import FLOAT_DECODER
from sim.stream import StreamMonitor, StreamPins
from sim.tensor_bench import stream_job
from tb.unit_bench import watch_for_coverage
from tb.unit_coverage import UnitCoverage

__all__ = ["watched_tensors"]


@cocotb.test()
async def watched_tensors(dut: Any) -> None:
    """Stream every tensor of the job, and count what the pins do."""
    monitors = {name: StreamMonitor(StreamPins(dut, name, dut.clk)) for name in ("i", "o")}
    last_in, last_out = len(dut.i__payload) - 1, len(dut.o__payload) - 1
    watch_for_coverage(
        dut, monitors, lambda counts: UnitCoverage(counts, FLOAT_DECODER.name, last_in, last_out)
    )
    await stream_job(dut, tuple(monitors.values()))
