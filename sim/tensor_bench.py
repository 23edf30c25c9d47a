"""Cocotb bench that streams whole tensors through a unit and records what comes out.

It decides nothing: the caller (:mod:`sim.tensor_run`) prepares the stimulus and compares the result
with the golden model. The folder named by ``SOP_TENSOR_RUN`` holds ``job.json`` and, for tensor n,
``input_n.npy`` (beats, see :mod:`sim.beats`); the bench adds ``output_n.npy`` and ``result.json``.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge, with_timeout

from sim.beats import payloads
from sim.clock import CLOCK_NS, reset, start_clock
from sim.stalls import stall_pair
from sim.stream import StreamDriver, StreamMonitor, StreamPins, StreamSink
from sim.tensor_run import FOLDER_VARIABLE

__all__ = ["stream_job", "stream_tensors"]

# A beat takes at most 21 clocks on either side when stalled; nothing may take longer than that.
TIMEOUT_CLOCKS_PER_BEAT = 64


class _ClockCounter:
    """Counts rising edges."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.count = 0
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        edge = RisingEdge(self.clock)
        while True:
            await edge
            self.count += 1


async def stream_job(dut: Any, monitors: Sequence[StreamMonitor] = ()) -> None:
    """Stream every tensor of the job, one after the other without a pause of our own.

    Parameters
    ----------
    dut : simulation handle
    monitors : sequence of StreamMonitor
        Started after the reset.
    """
    folder = Path(os.environ[FOLDER_VARIABLE])
    job = json.loads((folder / "job.json").read_text())
    source_stalls, sink_stalls = stall_pair(job["stalls"], job["seed"])
    driver = StreamDriver(StreamPins(dut, "i", dut.clk), source_stalls)
    lut_driver = StreamDriver(StreamPins(dut, "i_lut", dut.clk))
    sink = StreamSink(StreamPins(dut, "o", dut.clk), sink_stalls)
    start_clock(dut)
    await reset(dut)
    for monitor in monitors:
        monitor.start()
    clocks = _ClockCounter(dut.clk)

    async def load_luts() -> None:
        for tensor in job["tensors"]:
            await lut_driver.send(tensor["lut_writes"])

    cocotb.start_soon(load_luts())
    inputs = [np.load(folder / f"input_{n}.npy") for n in range(len(job["tensors"]))]
    beats = sum(len(rows) for rows in inputs)
    results = []

    async def send_all() -> None:
        for number, rows in enumerate(inputs):
            before = clocks.count
            await driver.send(payloads(rows))
            results.append({"beats": len(rows), "clocks": clocks.count - before})
            dut._log.info("tensor %d: %d beats sent", number, len(rows))

    cocotb.start_soon(send_all())
    await with_timeout(sink.run(beats), (beats + 100) * TIMEOUT_CLOCKS_PER_BEAT * CLOCK_NS, "ns")

    row_bytes = -(-len(dut.o__payload) // 8)
    start = 0
    for number, rows in enumerate(inputs):
        words = sink.words[start : start + len(rows)]
        start += len(rows)
        raw = b"".join(word.to_bytes(row_bytes, "little") for word in words)
        outputs = np.frombuffer(raw, dtype=np.uint8).reshape(len(rows), row_bytes)
        np.save(folder / f"output_{number}.npy", outputs)
    (folder / "result.json").write_text(json.dumps({"tensors": results}))


@cocotb.test()
async def stream_tensors(dut: Any) -> None:
    """The job alone: the caller compares what comes out."""
    await stream_job(dut)
