"""What :mod:`tb.axi_bench` drives the unit with: bus models, limits on every wait, checks.

Sources, sink and AXI4-Lite master are those of cocotbext-axi, which knows nothing of this project.
Whatever the unit does, no wait here is longer than its limit, and a failure says what was missing.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Iterator
from typing import Any, TypeVar

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge, SimTimeoutError, with_timeout
from cocotbext.axi import (
    AxiLiteBus,
    AxiLiteMaster,
    AxiResp,
    AxiStreamBus,
    AxiStreamSink,
    AxiStreamSource,
)

from rtl.registers import LUT_WINDOW, register
from rtl.tensor_core import plane_widths
from sim.bench_config import BenchConfig
from sim.clock import CLOCK_NS, reset, start_clock
from tb.axi_traffic import Job

__all__ = ["LIMITS", "AxiHarness", "StreamWatch", "pauses", "ready_harness", "within"]

# Clocks that each kind of wait may take, with pauses on all streams.
LIMITS = {
    "access": 600,  # of one register
    "lut": 400,  # write of four LUT entries
    "description": 20_000,  # until a tensor may be described: that before it has begun
    "tensor": 20_000,  # from one tensor's final beat to that of the next
    "idle": 3_000,  # from the final beat to the end of STATUS.busy
}
_LONGEST_PAUSE = 400
_OUTPUT_BYTES = {"float32": 4, "bfloat16": 2}

Result = TypeVar("Result")


async def within(clocks: int, what: str, awaitable: Awaitable[Result]) -> Result:
    """Wait for something, but not longer than so many clocks.

    Raises
    ------
    AssertionError
        If it did not come.
    """
    try:
        result: Result = await with_timeout(awaitable, clocks * CLOCK_NS, "ns")
    except SimTimeoutError:
        raise AssertionError(f"waited {clocks} clocks for {what}") from None
    return result


def pauses(rng: np.random.Generator) -> Iterator[bool]:
    """Never, sometimes, most of the time, or for long; endless."""
    chance = rng.choice([0.0, 0.3, 0.8, -1.0])
    if chance < 0:
        while True:
            for paused in (False, True):
                yield from [paused] * int(rng.integers(1, _LONGEST_PAUSE))
    while True:
        yield from (rng.random(256) < chance).tolist()


class StreamWatch:
    """Counts what moves on a stream, and knows whether a packet has begun and not ended."""

    def __init__(self, dut: Any, prefix: str) -> None:
        self.valid, self.ready, self.last = (
            getattr(dut, f"{prefix}_t{name}") for name in ("valid", "ready", "last")
        )
        self.clock = 0
        self.times: list[int] = []  # clock of every word
        self.waits = 0  # clocks in which a word was not taken
        self.inside = False
        self.edge = RisingEdge(dut.clk)
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        while True:
            await self.edge
            self.clock += 1
            if self.valid.value and self.ready.value:
                self.times.append(self.clock)
                self.inside = not self.last.value
            elif self.valid.value:
                self.waits += 1


class AxiHarness:
    """Master, sources and sink around the unit."""

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.dut, self.config = dut, config
        self.modes = config.modes
        self.codes = config.output == "codes"
        code_bytes = 1 if self.modes.code_bits <= 8 else 2
        self.value_bytes = _OUTPUT_BYTES.get(config.output, code_bytes)
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
        self.out = StreamWatch(dut, "m_axis")
        self.started = 0  # tensors
        for part in self.streams:
            part.log.setLevel(logging.ERROR)
        for channel in (self.master.write_if, self.master.read_if):
            channel.log.setLevel(logging.ERROR)

    @property
    def streams(self) -> tuple[Any, ...]:
        """All stream models."""
        return (self.sink, *self.sources.values())

    # --- registers --------------------------------------------------------------------------------

    async def write_at(self, address: int, data: bytes, clocks: int = LIMITS["access"]) -> AxiResp:
        """Write bytes; gives the answer."""
        what = f"the answer to a write to {address:#x}"
        return AxiResp((await within(clocks, what, self.master.write(address, data))).resp)

    async def read_at(self, address: int) -> Any:
        """Read a word; gives data and answer."""
        what = f"the answer to a read from {address:#x}"
        return await within(LIMITS["access"], what, self.master.read(address, 4))

    async def write(self, name: str, value: int) -> AxiResp:
        """Write a register by name."""
        return await self.write_at(register(name).address, value.to_bytes(4, "little"))

    async def read(self, name: str) -> int:
        """Read a register by name."""
        answer = await self.read_at(register(name).address)
        assert answer.resp == AxiResp.OKAY, f"read of {name} refused"
        return int.from_bytes(answer.data, "little")

    async def flags(self, name: str) -> set[str]:
        """Names of the fields of a register that are set."""
        value = await self.read(name)
        item = register(name)
        assert value & ~sum(field.mask for field in item.fields) == 0, f"{name} {value:#x}"
        return {field.name for field in item.fields if value & field.mask}

    async def until_status(self, clocks: int, wanted: set[str], unwanted: set[str]) -> None:
        """Poll STATUS until it has some flags and lacks others."""
        end = self.out.clock + clocks
        while not (wanted <= (found := await self.flags("STATUS")) and not unwanted & found):
            assert self.out.clock < end, (
                f"waited {clocks} clocks for STATUS with {wanted} without {unwanted}: it is {found}"
            )

    async def idle(self) -> None:
        """Wait until no tensor is under way."""
        await self.until_status(LIMITS["idle"], set(), {"busy"})

    async def until_beats(self, count: int) -> None:
        """Wait until so many beats have left in all."""
        for _ in range(LIMITS["tensor"]):
            if len(self.out.times) >= count:
                return
            await RisingEdge(self.dut.clk)
        raise AssertionError(f"waited {LIMITS['tensor']} clocks for beat {count}")

    async def load(self, job: Job) -> None:
        """Write the LUTs of a tensor."""
        for number, lut in enumerate(job.tensor.luts):
            offset = LUT_WINDOW + (number << self.modes.index_bits)
            entries = bytes(lut.codes)
            answer = await self.write_at(offset, entries, LIMITS["lut"] * len(entries) // 4)
            assert answer == AxiResp.OKAY, "LUT write refused"

    async def start(self, job: Job) -> None:
        """Describe a tensor, while another one may still wait; start it as soon as possible."""
        await self.describe(job)
        assert await self.write("CONTROL", 1) == AxiResp.OKAY, "START refused"
        self.started += 1

    async def describe(self, job: Job) -> None:
        """Everything but the start; the unit is ready for that then."""
        rows, columns = job.tensor.shape
        settings = {
            "MODE": self.modes.mode_of(job.tensor.format),
            "LAYER_EXPONENT": job.tensor.layer_exponent & 0xFF,
            "ROWS": rows, "COLUMNS": columns, "CORRECTIONS": job.entries,
        }  # fmt: skip
        for name, value in settings.items():
            assert await self.write(name, value) == AxiResp.OKAY, f"{name} refused"
        await self.until_status(LIMITS["description"], {"start_ready", "lut_ready"}, set())
        await self.load(job)

    # --- tensors ----------------------------------------------------------------------------------

    def set_pauses(self, rng: np.random.Generator) -> None:
        """New pause generators on every stream and on the channels of AXI4-Lite."""
        for part in self.streams:
            part.set_pause_generator(pauses(rng))
        channels = (
            self.master.write_if.aw_channel, self.master.write_if.w_channel,
            self.master.write_if.b_channel, self.master.read_if.ar_channel,
            self.master.read_if.r_channel,
        )  # fmt: skip
        for channel in channels:
            chance = rng.choice([0.0, 0.3, 0.8])
            channel.set_pause_generator(bool(value < chance) for value in _numbers(rng))

    async def drive(self, jobs: list[Job]) -> None:
        """Send the packets of all tensors and start one after the other."""
        for job in jobs:
            for plane, packet in job.packets.items():
                self.sources[plane].send_nowait(packet)
            await self.start(job)

    async def run(self, jobs: list[Job]) -> None:
        """Send everything and check everything that comes out."""
        counts = {name: await self.read(name) for name in ("TENSORS", "BEATS", "OUTPUT_WAITS")}
        words, waits = len(self.out.times), self.out.waits
        driver = cocotb.start_soon(self.drive(jobs))
        for number, job in enumerate(jobs):
            await self.receive(number, job)
        await within(LIMITS["description"], "the last START", driver)
        await self.idle()
        assert self.sink.empty(), "a beat too many"
        for plane, source in self.sources.items():
            assert source.idle(), f"{plane}: words were left"
        moved = Counter(
            TENSORS=len(jobs), BEATS=len(self.out.times) - words,
            OUTPUT_WAITS=self.out.waits - waits,
        )  # fmt: skip
        for name, before in counts.items():
            counted = await self.read(name) - before
            assert counted == moved[name], f"{name}: {counted} more, not {moved[name]}"
        await self._check_errors({error for job in jobs for error in job.errors})

    async def receive(self, number: int, job: Job) -> None:
        """Wait for all beats of a tensor and check them."""
        what = f"the final beat of tensor {number}, {job.tensor.format.name}"
        frame = await within(LIMITS["tensor"], what, self.sink.recv(compact=False))
        raw = np.frombuffer(bytes(frame.tdata), dtype=np.uint8)
        lanes, size = self.config.lanes, self.value_bytes
        beats = -(-job.weights // lanes)
        bus_bytes = len(self.dut.m_axis_tdata) // 8
        assert len(raw) == beats * bus_bytes, f"tensor {number}: {len(raw)} bytes"
        if not self.codes:
            keep = np.array(frame.tkeep, dtype=bool)
            used = np.arange(keep.size) < job.weights * size
            assert (keep == used).all(), f"tensor {number}: tkeep"
        values = raw.reshape(beats, bus_bytes)[:, : lanes * size].reshape(-1)
        values = values.view(f"<u{size}")[: job.weights]
        wrong = np.flatnonzero(values != job.expected)
        assert not wrong.size, (
            f"tensor {number}, {job.tensor.format.name} {job.tensor.shape}: {wrong.size} "
            f"wrong, weight {wrong[0]} is {values[wrong[0]]:#x}, "
            f"expected {job.expected[wrong[0]]:#x}"
        )
        if self.codes:
            self._check_codes(job, raw.reshape(beats, bus_bytes), frame.tuser)

    def _check_codes(self, job: Job, raw: Any, user: Any) -> None:
        """Scale codes, row scales, layer exponent and mode beside the codes."""
        lanes, slots = self.config.lanes, self.modes.slots(self.config.lanes)
        tensor = job.tensor
        repeat = tensor.format.block_size * slots // lanes
        columns = [tensor.scale_codes.reshape(-1).repeat(repeat)]
        if self.modes.row_scale:
            rows, blocks = tensor.scale_words.shape
            factors = np.zeros(rows, np.uint16) if tensor.row_scales is None else tensor.row_scales
            columns.append(factors.repeat(blocks * repeat))
        for number, expected in enumerate(columns):
            low = lanes * self.value_bytes + 2 * slots * number
            found = np.ascontiguousarray(raw[:, low : low + 2 * slots]).view("<u2").reshape(-1)
            assert (found[: expected.size] == expected).all(), "scale codes or row scales"
        units = self.modes.element_exponent(tensor.format)
        exponent = (tensor.layer_exponent + units) & 0xFFFF
        mode = self.modes.mode_of(tensor.format)
        assert set(np.unique(user).tolist()) == {exponent | mode << 16}, "tuser"

    async def _check_errors(self, wanted: set[str]) -> None:
        """Flags, which of them interrupt, and that each is cleared alone; leaves none."""
        found = await self.flags("ERRORS")
        assert found == wanted, f"errors {found}, expected {wanted}"
        masks = {field.name: field.mask for field in register("ERRORS").fields}
        raised = sum(masks[name] for name in found)
        await self.write("IRQ_ENABLE", 0b10)
        for enabled in (0xFFFFFFFF & ~raised, raised):
            await self.write("ERROR_ENABLE", enabled)
            await self._expect_irq(bool(enabled & raised), "of errors")
        for name in sorted(found):
            await self.write("ERRORS", masks[name])
            left = await self.flags("ERRORS")
            found.discard(name)
            assert left == found, f"errors {left} after {name} was cleared, expected {found}"
        await self._expect_irq(False, "after errors were cleared")
        await self.write("ERROR_ENABLE", 0)

        await self.write("IRQ_ENABLE", 0b01)
        await self.write("IRQ_STATUS", 0b10)
        await self._expect_irq(True, "of done")
        await self.write("IRQ_STATUS", 0b01)
        await self._expect_irq(False, "after done was cleared")
        await self.write("IRQ_ENABLE", 0)

    async def _expect_irq(self, level: bool, what: str) -> None:
        await RisingEdge(self.dut.clk)
        assert bool(self.dut.irq.value) == level, f"interrupt {what} is not {level}"

    async def stop(self, *, hard: bool, cycles: int) -> None:
        """Reset the unit by its input or by the command, and the bus models with it."""
        for part in self.streams:
            part.assert_reset(True)
            part.clear()
        if hard:
            await reset(self.dut, cycles=cycles)
        else:
            assert await self.write("CONTROL", 2) == AxiResp.OKAY
        for part in self.streams:
            part.assert_reset(False)
        self.out.inside = False
        assert await self.flags("STATUS") == {"start_ready", "lut_ready"}
        await self.write("ERRORS", 0xFFFFFFFF)
        await self.write("IRQ_STATUS", 0xFFFFFFFF)


def _numbers(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(256).tolist()


async def ready_harness(dut: Any) -> AxiHarness:
    """A harness after its first reset."""
    # The models look at outputs from their first edge on: these have to be defined by then.
    start_clock(dut)
    await reset(dut)
    return AxiHarness(dut, BenchConfig.from_environment())
