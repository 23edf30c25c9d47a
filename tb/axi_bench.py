"""Cocotb bench of :class:`rtl.sop_decoder_axi.SopDecoderAxi`.

Sources, sink and AXI4-Lite master are those of cocotbext-axi, which knows nothing of this project.
A seed is one or more tensors, with pauses on every stream; some seeds have a wrong packet, some a
reset in mid-traffic, after which everything has to work as if nothing had been.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout
from cocotbext.axi import (
    AxiLiteBus,
    AxiLiteMaster,
    AxiResp,
    AxiStreamBus,
    AxiStreamSink,
    AxiStreamSource,
)

from rtl.registers import LUT_WINDOW, REGISTERS, Register, register
from rtl.sop_decoder_axi import plane_widths
from tb.axi_traffic import Job, damaged, random_job, whole_words
from tb.bench import CLOCK_NS, BenchConfig, reset, start_clock

__all__ = ["SEEDS_VARIABLE", "AxiBench"]

SEEDS_VARIABLE = "SOP_AXI_SEEDS"
"""First seed and number of seeds, separated by a space."""

TIMEOUT_CLOCKS = 60_000  # of one seed: none may take longer
RATE_COLUMNS, RATE_ROWS = 512, 8


def pauses(rng: np.random.Generator) -> Iterator[bool]:
    """Never, sometimes or most of the time; endless."""
    chance = rng.choice([0.0, 0.3, 0.8])
    while True:
        yield from (rng.random(256) < chance).tolist()


class AxiBench:
    """Master, sources and sink around the unit."""

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.dut, self.config = dut, config
        self.modes = config.modes
        self.codes = config.output == "codes"
        self.widths = plane_widths(lanes=config.lanes, modes=self.modes, corrections=not self.codes)
        self.master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        self.sources = {
            plane: AxiStreamSource(
                AxiStreamBus.from_prefix(dut, f"s_axis_{plane}"), dut.clk, dut.rst,
                byte_lanes=width // 8,
            )
            for plane, width in self.widths.items()
        }  # fmt: skip
        bus = AxiStreamBus.from_prefix(dut, "m_axis")
        # Without tkeep the model cannot know that lanes are bytes.
        lanes = len(dut.m_axis_tdata) // 8 if self.codes else None
        self.sink = AxiStreamSink(bus, dut.clk, dut.rst, byte_lanes=lanes)
        for part in (self.sink, *self.sources.values()):
            part.log.setLevel(logging.ERROR)
        for channel in (self.master.write_if, self.master.read_if):
            channel.log.setLevel(logging.ERROR)

    # --- registers --------------------------------------------------------------------------------

    async def write(self, name: str, value: int) -> AxiResp:
        """Write a register by name."""
        data = value.to_bytes(4, "little")
        return AxiResp((await self.master.write(register(name).address, data)).resp)

    async def read(self, name: str) -> int:
        """Read a register by name."""
        return int(await self.master.read_dword(register(name).address))

    async def flags(self, name: str) -> set[str]:
        """Names of the fields of a register that are set."""
        value = await self.read(name)
        item = register(name)
        assert value & ~sum(field.mask for field in item.fields) == 0, f"{name} {value:#x}"
        return {field.name for field in item.fields if value & field.mask}

    async def start(self, job: Job) -> None:
        """Wait until it can be described, describe it, start it."""
        while not {"start_ready", "lut_ready"} <= await self.flags("STATUS"):
            pass
        for number, lut in enumerate(job.tensor.luts):
            offset = LUT_WINDOW + (number << self.modes.index_bits)
            answer = await self.master.write(offset, bytes(lut.codes))
            assert answer.resp == AxiResp.OKAY, "LUT write refused"
        rows, columns = job.tensor.shape
        settings = {
            "MODE": self.modes.mode_of(job.tensor.format),
            "LAYER_EXPONENT": job.tensor.layer_exponent & 0xFF,
            "ROWS": rows, "COLUMNS": columns, "CORRECTIONS": job.entries, "CONTROL": 1,
        }  # fmt: skip
        for name, value in settings.items():
            assert await self.write(name, value) == AxiResp.OKAY, f"{name} refused"

    # --- one seed ---------------------------------------------------------------------------------

    def set_pauses(self, rng: np.random.Generator) -> None:
        """New pause generators on every stream and on the channels of AXI4-Lite."""
        channels = (
            self.master.write_if.aw_channel, self.master.write_if.w_channel,
            self.master.write_if.b_channel, self.master.read_if.ar_channel,
            self.master.read_if.r_channel,
        )  # fmt: skip
        for part in (self.sink, *self.sources.values(), *channels):
            part.set_pause_generator(pauses(rng))

    def jobs(self, rng: np.random.Generator, count: int, wrong: bool = False) -> list[Job]:
        """Random tensors; the first is damaged if asked for."""
        made = []
        for number in range(count):
            fmt = self.config.formats[rng.integers(len(self.config.formats))]
            job = random_job(rng, fmt, self.config.output)
            if wrong and number == 0:
                made.append(damaged(rng, job, self.widths, self.config.output))
            else:
                made.append(whole_words(rng, job, self.widths))
        return made

    async def run(self, jobs: list[Job]) -> None:
        """Send everything and check everything that comes out."""
        tensors = await self.read("TENSORS")
        driver = cocotb.start_soon(self._drive(jobs))
        for number, job in enumerate(jobs):
            self._check(number, job, await self.sink.recv(compact=False))
        await driver
        while "busy" in await self.flags("STATUS"):
            pass
        assert await self.read("TENSORS") == tensors + len(jobs), "number of tensors"
        assert "done" in await self.flags("IRQ_STATUS")
        await self._check_errors(jobs)
        assert self.sink.empty(), "a beat too many"
        for plane, source in self.sources.items():
            assert source.idle(), f"{plane}: words were left"

    async def _drive(self, jobs: list[Job]) -> None:
        for job in jobs:
            for plane, packet in job.packets.items():
                self.sources[plane].send_nowait(packet)
            await self.start(job)

    def _check(self, number: int, job: Job, frame: Any) -> None:
        raw = np.frombuffer(bytes(frame.tdata), dtype=np.uint8)
        lanes, lane_bytes = self.config.lanes, {"float32": 4, "bfloat16": 2, "codes": 1}
        size = lane_bytes[self.config.output]
        beats = -(-job.weights // lanes)
        bus_bytes = len(self.dut.m_axis_tdata) // 8
        assert len(raw) == beats * bus_bytes, f"tensor {number}: {len(raw)} bytes"
        if not self.codes:
            keep = np.array(frame.tkeep, dtype=bool)
            used = np.arange(keep.size) < job.weights * size
            assert (keep == used).all(), f"tensor {number}: tkeep"
        values = raw.reshape(beats, bus_bytes)[:, : lanes * size].reshape(-1)
        values = values.view(f"<u{size}")[: job.weights]
        if job.expected is not None:
            wrong = np.flatnonzero(values != job.expected)
            assert not wrong.size, (
                f"tensor {number}, {job.tensor.format.name} {job.tensor.shape}: {wrong.size} "
                f"wrong, weight {wrong[0]} is {values[wrong[0]]:#x}, "
                f"expected {job.expected[wrong[0]]:#x}"
            )
        if self.codes:
            self._check_codes(job, raw.reshape(beats, bus_bytes), frame.tuser)

    def _check_codes(self, job: Job, raw: Any, user: Any) -> None:
        """Scale codes, layer exponent and mode beside the codes."""
        lanes, slots = self.config.lanes, self.modes.slots(self.config.lanes)
        repeat = job.tensor.format.block_size * slots // lanes
        expected = job.tensor.scale_codes.reshape(-1).repeat(repeat)
        if "short_scales" not in job.errors:
            scales = np.ascontiguousarray(raw[:, lanes : lanes + 2 * slots]).view("<u2")
            assert (scales.reshape(-1)[: expected.size] == expected).all(), "scale codes"
        exponent = job.tensor.layer_exponent & 0xFFFF
        mode = self.modes.mode_of(job.tensor.format)
        assert set(np.unique(user).tolist()) == {exponent | mode << 16}, "tuser"

    async def _check_errors(self, jobs: list[Job]) -> None:
        wanted = {error for job in jobs for error in job.errors}
        optional = {error.rstrip("?") for error in wanted if error.endswith("?")}
        # Range flags say something about values; values are compared.
        optional |= {"reserved_code", "overflow", "underflow"}
        wanted = {error for error in wanted if not error.endswith("?")}
        found = await self.flags("ERRORS")
        assert wanted <= found <= wanted | optional, f"errors {found}, expected {wanted}"
        enabled = int(bool(found))
        await self.write("ERROR_ENABLE", 0xFFFFFFFF)
        await self.write("IRQ_ENABLE", 0b10)
        await RisingEdge(self.dut.clk)
        assert int(self.dut.irq.value) == enabled, "interrupt of errors"
        await self.write("IRQ_ENABLE", 0b01)
        await RisingEdge(self.dut.clk)
        assert int(self.dut.irq.value) == 1, "interrupt of done"
        await self.write("ERRORS", 0xFFFFFFFF)
        await self.write("IRQ_STATUS", 0xFFFFFFFF)
        await self.write("IRQ_ENABLE", 0b11)
        await RisingEdge(self.dut.clk)
        assert int(self.dut.irq.value) == 0, "interrupt after it was cleared"
        await self.write("IRQ_ENABLE", 0)

    async def interrupted(self, rng: np.random.Generator, jobs: list[Job]) -> None:
        """Start, then reset in the middle: by the reset input or by the command."""
        driver = cocotb.start_soon(self._drive(jobs))
        await ClockCycles(self.dut.clk, int(rng.integers(1, 600)))
        hard = rng.random() < 0.5
        if not hard:
            await driver  # a transaction on AXI4-Lite is not interrupted
        driver.cancel()
        streams = (self.sink, *self.sources.values())
        for part in streams:
            part.assert_reset(True)
            part.clear()
        if hard:
            await reset(self.dut, cycles=int(rng.integers(1, 4)))
        else:
            assert await self.write("CONTROL", 2) == AxiResp.OKAY
        for part in streams:
            part.assert_reset(False)
        assert await self.flags("STATUS") == {"start_ready", "lut_ready"}
        await self.write("ERRORS", 0xFFFFFFFF)
        await self.write("IRQ_STATUS", 0xFFFFFFFF)

    async def seed(self, number: int) -> None:
        """One seed from start to end."""
        rng = np.random.default_rng(number)
        self.set_pauses(rng)
        kind = rng.choice(["right", "wrong", "reset"], p=[0.5, 0.3, 0.2])
        if kind == "reset":
            # A command has to wait for its turn: only one tensor can be under way then.
            await self.interrupted(rng, self.jobs(rng, 1))
        await self.run(self.jobs(rng, int(rng.integers(1, 4)), kind == "wrong"))


async def ready_bench(dut: Any) -> AxiBench:
    """A bench after its first reset."""
    # The models look at outputs from their first edge on: these have to be defined by then.
    start_clock(dut)
    await reset(dut)
    return AxiBench(dut, BenchConfig.from_environment())


@cocotb.test()
async def random_seeds(dut: Any) -> None:
    """Every seed; what fails names its seed."""
    bench = await ready_bench(dut)
    first, count = map(int, os.environ.get(SEEDS_VARIABLE, "0 10").split())
    for number in range(first, first + count):
        try:
            await with_timeout(bench.seed(number), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
        except BaseException as error:
            error.add_note(f"seed {number}") if hasattr(error, "add_note") else None
            dut._log.error("seed %d failed: %r", number, error)
            raise


@cocotb.test(timeout_time=TIMEOUT_CLOCKS * CLOCK_NS, timeout_unit="ns")
async def full_rate(dut: Any) -> None:
    """Without pauses: a beat every clock inside a tensor; the gap between tensors is bounded."""
    bench = await ready_bench(dut)
    rng = np.random.default_rng(1)
    times: list[int] = []

    async def watch() -> None:
        edge, clock = RisingEdge(dut.clk), 0
        while True:
            await edge
            clock += 1
            if int(dut.m_axis_tvalid.value) and int(dut.m_axis_tready.value):
                times.append(clock)

    watcher = cocotb.start_soon(watch())
    for fmt in bench.config.formats:
        job = random_job(rng, fmt, bench.config.output, shape=(RATE_ROWS, RATE_COLUMNS))
        times.clear()
        await bench.run([whole_words(rng, job, bench.widths)])
        if not job.entries:
            span = times[-1] - times[0] + 1
            assert span == len(times), f"{fmt.name}: {len(times)} beats in {span} clocks"
    watcher.cancel()


@cocotb.test(timeout_time=TIMEOUT_CLOCKS * CLOCK_NS, timeout_unit="ns")
async def registers(dut: Any) -> None:
    """Constants, reset values, byte strobes, and everything that is refused."""
    bench = await ready_bench(dut)
    for item in REGISTERS:
        value = await bench.read(item.name)
        if item.name not in ("CONFIG", "STATUS"):
            wanted = sum(field.reset << field.lowest for field in item.fields)
            assert value == wanted, f"{item.name}: {value:#x} after reset"
        await _check_access(bench, item)
    config = await bench.read("CONFIG")
    assert config & 0x3FF == bench.config.lanes
    assert config >> 12 & 0x1F == len(bench.config.formats)

    for address in (0x0C, 0x3C, 0x50, LUT_WINDOW + (bench.modes.luts << bench.modes.index_bits)):
        assert (await bench.master.write(address, b"\1\2\3\4")).resp == AxiResp.SLVERR
    assert (await bench.master.read(0x0C, 4)).resp == AxiResp.SLVERR
    await bench.write("ERRORS", 0xFFFFFFFF)

    await bench.write("ROWS", 0)  # no tensor has no rows
    assert await bench.write("CONTROL", 1) == AxiResp.SLVERR
    assert await bench.flags("ERRORS") == {"start_refused"}
    await bench.write("ERRORS", 0xFFFFFFFF)
    await bench.write("CORRECTIONS", 0)
    await bench.write("MODE", 0)
    await bench.write("ROWS", 1 << 20)
    await bench.write("COLUMNS", 1 << 12)
    assert await bench.write("CONTROL", 1) == AxiResp.OKAY
    while "busy" in await bench.flags("STATUS"):
        pass
    assert await bench.flags("ERRORS") == {"too_large"}
    await bench.write("ERRORS", 0xFFFFFFFF)

    # The first runs (it has no data), the second waits, the third is refused, and so are LUTs.
    await bench.write("ROWS", 1)
    for answer in (AxiResp.OKAY, AxiResp.OKAY, AxiResp.SLVERR):
        assert await bench.write("CONTROL", 1) == answer
        await ClockCycles(dut.clk, 50)
    if bench.modes.luts:
        assert (await bench.master.write(LUT_WINDOW, b"\1")).resp == AxiResp.SLVERR
        assert await bench.flags("ERRORS") == {"start_refused", "lut_refused"}
    assert await bench.write("CONTROL", 2) == AxiResp.OKAY
    assert await bench.flags("STATUS") == {"start_ready", "lut_ready"}


async def _check_access(bench: AxiBench, item: Register) -> None:
    used = sum(field.mask for field in item.fields)
    if item.access == "ro":
        before = await bench.read(item.name)
        assert await bench.write(item.name, 0xFFFFFFFF) == AxiResp.SLVERR, item.name
        assert await bench.read(item.name) == before, item.name
    if item.access == "rw":
        await bench.write(item.name, 0xA5C3F00F)
        assert await bench.read(item.name) == 0xA5C3F00F & used, item.name
        await bench.master.write(item.address + 2, b"\x5a")
        assert await bench.read(item.name) == 0xA55AF00F & used, item.name
        await bench.write(item.name, 0)
