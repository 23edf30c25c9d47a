"""Scenarios of :class:`rtl.sop_decoder_axi.SopDecoderAxi` for the timing diagrams.

Weights that come out are compared with the golden model, as in :mod:`sim.timing.stream_bench`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from numpy.typing import NDArray

from golden.corrections import Corrections
from golden.tensor import QuantizedTensor, decode
from rtl.registers import LUT_WINDOW, PLANES, REGISTERS, register
from sim.clock import reset
from sim.planes import plane_packets
from sim.random_tensors import random_tensor
from sim.timing.recorder import RecordedScene, among
from sim.timing.wavejson import Cell

__all__ = ["AxiScene"]

ROWS, COLUMNS = 4, 48
LONG_ROWS = 96  # the next tensor is described meanwhile
TIMEOUT_CLOCKS = 400  # for an answer or an interrupt

_NAMES = {item.address: item.name for item in REGISTERS}
# Longer names do not fit.
_SHORT = {"LAYER_EXPONENT": "LAYER_EXP", "ERROR_ENABLE": "ERR_ENABLE", "IRQ_ENABLE": "IRQ_ENA"}
_LETTERS = {"indices": "I", "scales": "S", "columns": "C", "values": "V"}


def _register_name(address: int) -> Cell:
    name = _NAMES.get(address, f"{address:03X}")
    return Cell(_SHORT.get(name, name))


def _hexadecimal(word: int) -> Cell:
    return Cell(f"{word:X}")


@dataclass(frozen=True, eq=False)
class Job:
    """A tensor, its planes as they are sent, its number of corrections, and what comes out."""

    tensor: QuantizedTensor
    packets: Mapping[str, bytes]
    entries: int
    values: NDArray[np.float32]


class AxiScene(RecordedScene):
    """The simplest possible bus masters, and the recorder."""

    def __init__(self, dut: Any) -> None:
        super().__init__(dut)
        self.edge = RisingEdge(dut.clk)
        buses = {plane: getattr(dut, f"s_axis_{plane}_tdata", None) for plane in PLANES}
        self.widths = {plane: len(bus) for plane, bus in buses.items() if bus is not None}
        for channel in ("aw", "w", "b", "ar", "r"):
            getattr(dut, f"s_axil_{channel}{'ready' if channel in 'br' else 'valid'}").value = 0
        for plane in self.widths:
            getattr(dut, f"s_axis_{plane}_tvalid").value = 0
        dut.m_axis_tready.value = 1
        dut.s_axil_bready.value = dut.s_axil_rready.value = 1

    async def begin(self) -> None:
        """Reset, and record from a clock before anything happens."""
        await reset(self.dut)
        await self.clocks(1)
        self.recorder.start()
        await self.clocks(1)

    # --- AXI4-Lite --------------------------------------------------------------------------------

    async def _offer(self, channel: str, **signals: int) -> None:
        for name, value in signals.items():
            getattr(self.dut, f"s_axil_{channel}{name}").value = value
        valid, ready = (getattr(self.dut, f"s_axil_{channel}{part}") for part in ("valid", "ready"))
        valid.value = 1
        await self._until(ready)
        valid.value = 0

    async def _until(self, signal: Any) -> None:
        """The next edge before which the signal is high."""
        for _ in range(TIMEOUT_CLOCKS):
            await self.edge
            if str(signal.value) == "1":
                return
        raise AssertionError(f"{signal._name} stays low")

    async def write(self, address: int, word: int, strobe: int = 15) -> int:
        """Write a word; gives the response."""
        both = [
            cocotb.start_soon(self._offer("aw", addr=address, prot=0)),
            cocotb.start_soon(self._offer("w", data=word, strb=strobe)),
        ]
        for task in both:
            await task
        await self._until(self.dut.s_axil_bvalid)
        return int(self.dut.s_axil_bresp.value)

    async def set(self, **values: int) -> None:
        """Write registers by name, in order."""
        for name, value in values.items():
            assert await self.write(register(name).address, value) == 0, f"{name} refused"

    async def read(self, name: str) -> int:
        """Read a register."""
        await self._offer("ar", addr=register(name).address, prot=0)
        await self._until(self.dut.s_axil_rvalid)
        return int(self.dut.s_axil_rdata.value)

    # --- streams ----------------------------------------------------------------------------------

    def job(self, positions: Mapping[int, int] | None = None, rows: int = ROWS) -> Job:
        """A tensor; corrections of 1.5 in these rows, at these columns."""
        shape = (rows, COLUMNS)
        tensor = random_tensor(self.rng, self.config.formats[0], shape)
        values = decode(tensor, padded=True)
        if not positions:
            return Job(tensor, plane_packets(tensor), 0, values)
        mask = np.zeros(shape, dtype=bool)
        mask[list(positions), list(positions.values())] = True
        corrections = Corrections.from_mask(mask, np.full(shape, 1.5, dtype=np.float32))
        packets = plane_packets(tensor, corrections)
        return Job(tensor, packets, corrections.entries, corrections.add_to(values))

    def words(self, job: Job, plane: str) -> list[int]:
        """Words of a packet; what lacks in the final one is zero."""
        size, packet = self.widths[plane] // 8, job.packets.get(plane, b"")
        return [
            int.from_bytes(packet[start : start + size], "little")
            for start in range(0, len(packet), size)
        ]

    def send(self, plane: str, *packets: list[int]) -> None:
        """Send packets from the next clock on."""

        async def run() -> None:
            prefix = f"s_axis_{plane}_t"
            data, valid, last = (getattr(self.dut, prefix + n) for n in ("data", "valid", "last"))
            await self.edge
            for packet in packets:
                for number, word in enumerate(packet):
                    data.value, valid.value = word, 1
                    last.value = int(number == len(packet) - 1)
                    await self._until(getattr(self.dut, f"{prefix}ready"))
            valid.value = 0

        cocotb.start_soon(run())

    async def describe(self, job: Job) -> None:
        """LUTs and registers, but START."""
        for number, lut in enumerate(job.tensor.luts):
            for start in range(0, len(lut.codes), 4):
                word = int.from_bytes(bytes(lut.codes[start : start + 4]), "little")
                address = LUT_WINDOW + (number << self.modes.index_bits) + start
                assert await self.write(address, word) == 0, "LUT write refused"
        rows, columns = job.tensor.shape
        await self.set(
            MODE=0, LAYER_EXPONENT=job.tensor.layer_exponent & 0xFF, ROWS=rows, COLUMNS=columns,
            CORRECTIONS=job.entries,
        )  # fmt: skip

    # --- rows -------------------------------------------------------------------------------------

    def _channel(self, group: str, channel: str, **words: Callable[[int], Cell]) -> None:
        valid = f"s_axil_{channel}valid"
        self.recorder.bit(valid, group)
        self.recorder.bit(f"s_axil_{channel}ready", group)
        for name, show in words.items():
            self.recorder.word(f"s_axil_{channel}{name}", valid, show, group)

    def watch_writes(self) -> None:
        """Rows of the three channels of a write."""
        self._channel("write", "aw", addr=_register_name)
        self._channel("write", "w", data=_hexadecimal, strb=_hexadecimal)
        self._channel("write", "b", resp=_hexadecimal)

    def watch_start(self) -> None:
        """Rows of the address and data of a write, narrow ones."""
        self._channel("AXI4-Lite", "aw", addr=lambda address: Cell(f"{address:03X}"))
        self._channel("AXI4-Lite", "w", data=_hexadecimal)

    def watch_commands(self) -> None:
        """Rows of the address and data of writes and reads."""
        for channel in ("aw", "ar"):
            self._channel("AXI4-Lite", channel, addr=_register_name)
            self._channel("AXI4-Lite", "r" if channel == "ar" else "w", data=_hexadecimal)

    def watch_reads(self) -> None:
        """Rows of the two channels of a read."""
        self._channel("read", "ar", addr=_register_name)
        self._channel("read", "r", data=_hexadecimal, resp=_hexadecimal)

    def watch_plane(self, plane: str, *jobs: Job) -> None:
        """Rows of the stream of a plane; row pointers are shown, other words numbered."""
        labels = {
            word: Cell(
                str(word) if plane == "row_pointers" else f"{_LETTERS[plane]}{place}", tensor
            )
            for tensor, job in enumerate(jobs)
            for place, word in enumerate(self.words(job, plane))
        }
        self._stream(f"s_axis_{plane}", plane, labels)

    def watch_output(self, *jobs: Job) -> None:
        """Rows of the output; beats are named in order."""
        labels = {}
        for tensor, job in enumerate(jobs):
            for place, row in enumerate(job.values.reshape(-1, self.lanes)):
                word = int.from_bytes(row.astype("<f4").tobytes(), "little")
                labels[word] = Cell(f"W{place}", tensor)
        self._stream("m_axis", "m_axis", labels)

    def watch_cut_output(self, job: Job) -> None:
        """As :meth:`watch_output`, and how many bytes count; without any, what is there is none."""
        keep = self.dut.m_axis_tkeep
        beats = [
            int.from_bytes(row.astype("<f4").tobytes(), "little")
            for row in job.values.reshape(-1, self.lanes)
        ]
        labels = {word: Cell(f"W{place}") for place, word in enumerate(beats)}

        def known(word: int) -> Cell:
            return among(labels, "m_axis")(word) if int(keep.value) else Cell("-")

        for part in ("tvalid", "tready"):
            self.recorder.bit(f"m_axis_{part}", "m_axis")
        self.recorder.word("m_axis_tdata", "m_axis_tvalid", known, "m_axis")
        self.recorder.word(
            "m_axis_tkeep", "m_axis_tvalid", lambda bits: Cell(str(bits.bit_count())), "m_axis"
        )
        self.recorder.bit("m_axis_tlast", "m_axis", "m_axis_tvalid")

    def _stream(self, prefix: str, group: str, labels: Mapping[int, Cell]) -> None:
        valid = f"{prefix}_tvalid"
        for part in ("tvalid", "tready"):
            self.recorder.bit(f"{prefix}_{part}", group)
        self.recorder.word(f"{prefix}_tdata", valid, among(labels, prefix), group)
        self.recorder.bit(f"{prefix}_tlast", group, valid)


@cocotb.test()
async def sop_decoder_axi_write(dut: Any) -> None:
    """A write, and one that is refused."""
    scene = AxiScene(dut)
    scene.watch_writes()
    await scene.begin()
    await scene.set(ROWS=0x1234)
    await scene.clocks(1)
    assert await scene.write(register("ID").address, 0) == 2
    await scene.finish("sop_decoder_axi_write", 1)


@cocotb.test()
async def sop_decoder_axi_read(dut: Any) -> None:
    """Two reads."""
    scene = AxiScene(dut)
    scene.watch_reads()
    await scene.begin()
    await scene.read("ID")
    await scene.read("CONFIG")
    await scene.finish("sop_decoder_axi_read", 2)


@cocotb.test()
async def sop_decoder_axi_luts(dut: Any) -> None:
    """Two words of four entries."""
    scene = AxiScene(dut)
    scene.watch_writes()
    await scene.begin()
    for number, word in enumerate((0x03020100, 0x07060504)):
        assert await scene.write(LUT_WINDOW + 4 * number, word) == 0
    await scene.finish("sop_decoder_axi_luts", 1)


async def _tensor(dut: Any, name: str, positions: Mapping[int, int] | None) -> None:
    scene = AxiScene(dut)
    job = scene.job(positions)
    planes = [plane for plane in scene.widths if plane in job.packets]
    if not positions:
        scene.watch_start()
    for plane in planes:
        scene.watch_plane(plane, job)
    scene.watch_output(job)
    scene.recorder.bit("irq")
    await reset(dut)
    await scene.set(IRQ_ENABLE=1)
    await scene.describe(job)
    scene.recorder.start()
    for plane in planes:
        scene.send(plane, scene.words(job, plane))
    await scene.clocks(1)
    await scene.set(CONTROL=1)
    await scene._until(dut.irq)
    await scene.finish(name, 1)
    assert await scene.read("TENSORS") == 1
    assert await scene.read("ERRORS") == 0


@cocotb.test()
async def sop_decoder_axi_tensor(dut: Any) -> None:
    """Start to interrupt."""
    await _tensor(dut, "sop_decoder_axi_tensor", None)


@cocotb.test()
async def sop_decoder_axi_corrections(dut: Any) -> None:
    """Three corrections, none in the first row, two in the second."""
    await _tensor(dut, "sop_decoder_axi_corrections", {1: 2, 2: 40, 3: 47})


@cocotb.test()
async def sop_decoder_axi_two(dut: Any) -> None:
    """A second tensor is described and started while the first one runs."""
    scene = AxiScene(dut)
    jobs = [scene.job(rows=LONG_ROWS), scene.job()]
    scene.watch_plane("indices", *jobs)
    scene.watch_output(*jobs)
    await reset(dut)
    await scene.describe(jobs[0])
    for plane in jobs[0].packets:
        scene.send(plane, *(scene.words(job, plane) for job in jobs))
    await scene.set(CONTROL=1)
    await scene._until(dut.m_axis_tvalid)
    scene.recorder.start()
    await scene.describe(jobs[1])
    await scene.set(CONTROL=1)
    left = 0
    while left < len(jobs):
        await scene._until(dut.m_axis_tvalid)
        left += int(dut.m_axis_tlast.value)
    await scene.finish("sop_decoder_axi_two", 1)


@cocotb.test()
async def sop_decoder_axi_error(dut: Any) -> None:
    """A packet of indices that lacks its final word."""
    scene = AxiScene(dut)
    job = scene.job()
    words = scene.words(job, "indices")[:-1]
    size = scene.widths["indices"] // 8 * len(words)
    tensor = job.tensor
    given = np.where(np.arange(tensor.indices.size) < 2 * size, tensor.indices.reshape(-1), 0)
    tensor = replace(tensor, indices=given.astype(np.uint8).reshape(tensor.indices.shape))
    job = replace(job, values=decode(tensor, padded=True))
    scene.watch_commands()
    scene.watch_plane("indices", job)
    scene.watch_output(job)
    scene.recorder.bit("irq")
    await reset(dut)
    await scene.set(IRQ_ENABLE=2, ERROR_ENABLE=0xFFFFFFFF)
    await scene.describe(job)
    await scene.set(CONTROL=1)
    scene.send("scales", scene.words(job, "scales"))
    await scene.clocks(60)
    scene.recorder.start()
    scene.send("indices", words)
    await scene._until(dut.irq)
    errors = await scene.read("ERRORS")
    (short,) = (f for f in register("ERRORS").fields if f.name == "short_indices")
    assert errors == short.mask
    await scene.set(ERRORS=errors)
    await scene.clocks(3)
    assert dut.irq.value == 0
    scene.recorder.write("sop_decoder_axi_error")


@cocotb.test()
async def sop_decoder_axi_stop(dut: Any) -> None:
    """A stop while the output waits."""
    scene = AxiScene(dut)
    job = scene.job(rows=LONG_ROWS)
    scene.watch_start()
    scene.watch_plane("indices", job)
    scene.watch_cut_output(job)
    await reset(dut)
    await scene.describe(job)
    for plane in job.packets:
        scene.send(plane, scene.words(job, plane))
    await scene.set(CONTROL=1)
    await scene._until(dut.m_axis_tvalid)
    await scene.clocks(4)
    dut.m_axis_tready.value = 0
    await scene.clocks(30)  # until the planes wait too
    scene.recorder.start()
    await scene.clocks(2)
    await scene.set(CONTROL=4)
    await scene.clocks(2)
    dut.m_axis_tready.value = 1
    stopped = next(field.mask for field in register("STATUS").fields if field.name == "stopped")
    await scene.clocks(5)
    scene.recorder.write("sop_decoder_axi_stop")
    assert await scene.read("STATUS") == stopped
    await scene.set(CONTROL=2)
