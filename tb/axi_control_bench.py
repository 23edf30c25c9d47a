"""Cocotb tests of what software does to :class:`rtl.sop_decoder_axi.SopDecoderAxi`.

Commands, refusals, identification, stops, timeouts: everything beside tensors that go right.
"""

from dataclasses import replace
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiResp

from rtl.identity import build_text, format_text, identification
from rtl.lookup import TAKING_TURNS
from rtl.registers import LUT_WINDOW, register
from sim.clock import CLOCK_NS
from tb.axi_harness import AxiHarness, StreamWatch, ready_harness, within
from tb.axi_traffic import Job, random_job, whole_words

__all__ = ["start_without_luts"]

TEST_CLOCKS = 400_000
SLICE_WORDS = 2  # that each input takes before a tensor wants them
LIMIT = 300  # clocks of TIMEOUT
ACCESS = 12  # clocks between an event and what a read of a register shows of it
STOP_CLOCKS = 4_000  # of a stop, with pauses

_directed = cocotb.test(timeout_time=TEST_CLOCKS * CLOCK_NS, timeout_unit="ns")
COMMANDS = {field.name: field.mask for field in register("CONTROL").fields}


class Rules:
    """Watches handshakes: nothing undefined, and what is offered stays until it is taken."""

    def __init__(self, dut: Any) -> None:
        self.dut = dut
        self.broken: list[str] = []
        names = [name for name in dir(dut) if name.startswith(("m_axis_t", "s_axi"))]
        self.always = [
            getattr(dut, name) for name in names
            if name.endswith(("awready", "wready", "bvalid", "arready", "rvalid"))
            or (name.endswith("tready") and name.startswith("s_axis"))
        ] + [dut.m_axis_tvalid, dut.irq]  # fmt: skip
        payload = [getattr(dut, name) for name in names if name.startswith("m_axis_t")]
        flow = (dut.m_axis_tvalid, dut.m_axis_tready)
        self.offers = {
            "m_axis": (*flow, [part for part in payload if part not in flow]),
            "b": (dut.s_axil_bvalid, dut.s_axil_bready, [dut.s_axil_bresp]),
            "r": (dut.s_axil_rvalid, dut.s_axil_rready, [dut.s_axil_rresp, dut.s_axil_rdata]),
        }
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        edge = RisingEdge(self.dut.clk)
        before: dict[str, list[str] | None] = dict.fromkeys(self.offers)
        while True:
            await edge
            for handle in self.always:
                if not handle.value.is_resolvable:
                    self.broken.append(f"{handle._name} is {handle.value}")
            for name, (valid, ready, parts) in self.offers.items():
                now = [str(part.value) for part in parts] if str(valid.value) == "1" else None
                if now and any(set(text) - set("01") for text in now):
                    self.broken.append(f"{name} offers undefined bits")
                if before[name] and now != before[name]:
                    self.broken.append(f"{name} changed what it had offered")
                before[name] = now if str(ready.value) != "1" else None

    def check(self) -> None:
        """Raise AssertionError if a rule was broken."""
        assert not self.broken, f"{len(self.broken)} times: {self.broken[:3]}"


def jobs_of(
    bench: AxiHarness, rng: np.random.Generator, shapes: list[tuple[int, int]]
) -> list[Job]:
    """Tensors of these shapes without corrections, of the first format."""
    fmt, output = bench.config.formats[0], bench.config.output
    return [
        whole_words(rng, random_job(rng, fmt, output, shape, 0.0), bench.widths)
        for shape in shapes
    ]  # fmt: skip


async def describe(bench: AxiHarness, job: Job) -> None:
    """Registers of a tensor, but neither LUTs nor START."""
    rows, columns = job.tensor.shape
    for name, value in {
        "MODE": bench.modes.mode_of(job.tensor.format), "ROWS": rows, "COLUMNS": columns,
        "LAYER_EXPONENT": job.tensor.layer_exponent & 0xFF, "CORRECTIONS": job.entries,
    }.items():  # fmt: skip
        assert await bench.write(name, value) == AxiResp.OKAY, name


async def command(bench: AxiHarness, *names: str) -> AxiResp:
    """Write CONTROL."""
    return await bench.write("CONTROL", sum(COMMANDS[name] for name in names))


@_directed
async def start_without_luts(dut: Any) -> None:
    """START with no LUT, with one of two, and with all but one entry is refused.

    From power-up, if it runs first, and after both resets; for every format.
    """
    bench = await ready_harness(dut)
    rules = Rules(dut)
    rng = np.random.default_rng(11)
    # Formats without LUTs last: a tensor of one need not wait for any.
    for number, fmt in enumerate(bench.config.formats * 2):
        job = whole_words(
            rng, random_job(rng, fmt, bench.config.output, (2, 50), 0.0), bench.widths
        )
        await describe(bench, job)
        luts = [bytes(lut.codes) for lut in job.tensor.luts]
        for missing in (1, 4, len(luts[-1]), sum(map(len, luts))) if luts else ():
            assert await command(bench, "start") == AxiResp.SLVERR, f"{fmt.name}: {missing} missing"
            assert await bench.flags("ERRORS") == {"luts_missing"}
            assert await bench.flags("STATUS") == {"start_ready", "lut_ready"}
            await bench.write("ERRORS", 0xFFFFFFFF)
            await _write_all_but(bench, luts, missing)
        await bench.run([job])
        if luts:
            await _start_again(bench, job)
        await bench.stop(hard=bool(number % 2), cycles=2)
    rules.check()


async def _start_again(bench: AxiHarness, job: Job) -> None:
    """Without writing LUTs: they are still there, but not in a bank that takes turns."""
    await describe(bench, job)
    if bench.config.lookup in TAKING_TURNS:
        assert await command(bench, "start") == AxiResp.SLVERR
        assert await bench.flags("ERRORS") == {"luts_missing"}
        return
    for plane, packet in job.packets.items():
        bench.sources[plane].send_nowait(packet)
    assert await command(bench, "start") == AxiResp.OKAY
    await bench.receive(0, job)
    await bench.idle()


async def _write_all_but(bench: AxiHarness, luts: list[bytes], missing: int) -> None:
    """All entries, but so many at the end of the last LUTs."""
    for number, codes in enumerate(luts):
        last = sum(map(len, luts[number + 1 :]))
        count = min(len(codes), max(0, len(codes) + last - missing))
        if count:
            address = LUT_WINDOW + (number << bench.modes.index_bits)
            assert await bench.write_at(address, codes[:count]) == AxiResp.OKAY


@_directed
async def commands_together(dut: Any) -> None:
    """CONTROL with several commands is refused, and none of them is carried out."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(12)
    (job,) = jobs_of(bench, rng, [(2, 40)])
    await bench.load(job)
    await describe(bench, job)
    for names in (("start", "reset"), ("start", "stop"), ("reset", "stop"), tuple(COMMANDS)):
        assert await command(bench, *names) == AxiResp.SLVERR, names
        assert await bench.flags("STATUS") == {"start_ready", "lut_ready"}, names
        found = await bench.flags("ERRORS")
        assert found == ({"start_refused"} if "start" in names else set()), names
        await bench.write("ERRORS", 0xFFFFFFFF)
    # Nothing was reset: the LUTs are still there.
    for plane, packet in job.packets.items():
        bench.sources[plane].send_nowait(packet)
    assert await command(bench, "start") == AxiResp.OKAY
    await bench.receive(0, job)
    # Bytes without a strobe are no command.
    assert await bench.write_at(register("CONTROL").address + 1, b"\1") == AxiResp.OKAY
    await bench.idle()


async def stop_and_go_on(bench: AxiHarness, *, dry: bool = False) -> list[bool]:
    """Stop, wait for the end of the packet and of all that is sent, and reset.

    The bus models are not reset. Gives ``tlast`` of each beat that left meanwhile.
    """
    dut, lasts = bench.dut, []

    async def watch() -> None:
        while True:
            await RisingEdge(dut.clk)
            if dut.m_axis_tvalid.value and dut.m_axis_tready.value:
                lasts.append(bool(dut.m_axis_tlast.value))

    watching = cocotb.start_soon(watch())
    assert await command(bench, "stop") == AxiResp.OKAY
    bench.sink.pause = False
    await bench.until_status(STOP_CLOCKS, {"stopped"}, {"busy", "start_ready", "lut_ready"})
    for plane, source in bench.sources.items():
        if not dry:
            await within(STOP_CLOCKS, f"{plane} to be taken", source.wait())
    assert await command(bench, "start") == AxiResp.SLVERR
    wanted = {"start_refused"}
    if bench.modes.luts:
        assert await bench.write_at(LUT_WINDOW, b"\1") == AxiResp.SLVERR
        wanted.add("lut_refused")
    assert wanted <= await bench.flags("ERRORS")
    assert await command(bench, "reset") == AxiResp.OKAY
    watching.cancel()
    await bench.write("ERRORS", 0xFFFFFFFF)
    await bench.write("IRQ_STATUS", 0xFFFFFFFF)
    assert await bench.flags("STATUS") == {"start_ready", "lut_ready"}
    return lasts


@_directed
async def stop_in_mid_packet(dut: Any) -> None:
    """A stop at any time ends the output packet and takes what is sent; no rule is broken."""
    bench = await ready_harness(dut)
    rules = Rules(dut)
    rng = np.random.default_rng(13)
    lanes = bench.config.lanes
    inside = []
    for number, beats in enumerate([0, 1, 2, 5, 9, 14, 15, 16]):
        bench.set_pauses(rng)
        (job,) = jobs_of(bench, rng, [(1, 16 * lanes)])
        taken = len(bench.out.times)
        bench.sink.pause = not beats
        await bench.drive([job])
        await bench.until_beats(taken + beats)
        if number % 2:  # a beat is offered and not taken
            bench.sink.pause = True
            await ClockCycles(dut.clk, 40)
        inside.append(bench.out.inside)
        lasts = await stop_and_go_on(bench)
        assert not any(lasts[:-1]), "beats after the last one"
        assert not bench.out.inside, "the packet was not ended"
        _check_cut(bench, job)
        bench.set_pauses(rng)
        await bench.run(jobs_of(bench, rng, [(3, 20)]))
    assert {True, False} == set(inside), "one kind of stop did not happen"
    rules.check()


def _check_cut(bench: AxiHarness, job: Job) -> None:
    """What left of a tensor that was stopped: its first beats, and one without values."""
    if bench.sink.empty():
        return
    frame = bench.sink.recv_nowait(compact=False)
    assert bench.sink.empty(), "two packets of one tensor"
    size = len(bench.dut.m_axis_tdata) // 8
    raw = np.frombuffer(bytes(frame.tdata), dtype=np.uint8).reshape(-1, size)
    lanes, width = bench.config.lanes, bench.value_bytes
    whole = len(raw) * lanes == job.weights  # it had all its beats, or all but one and the added
    if not whole and not bench.codes:
        assert not any(frame.tkeep[-size:]), "the added beat has values"
    values = raw[:-1, : lanes * width].reshape(-1).view(f"<u{width}")
    assert (values == job.expected[: values.size]).all(), "wrong values before the stop"


@_directed
async def stop_when_idle(dut: Any) -> None:
    """Then too: what comes in is dropped until the reset."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(14)
    assert await command(bench, "stop") == AxiResp.OKAY
    assert await bench.flags("STATUS") == {"stopped"}
    for source in bench.sources.values():
        source.send_nowait(bytes(200))
    await stop_and_go_on(bench)
    await bench.run(jobs_of(bench, rng, [(2, 30)]))


@_directed
async def timeout(dut: Any) -> None:
    """The flag comes so many clocks after the last word, with a tensor that is not fed."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(15)
    (job,) = jobs_of(bench, rng, [(1, 16 * bench.config.lanes)])
    await bench.load(job)
    await describe(bench, job)
    assert await command(bench, "start") == AxiResp.OKAY
    await ClockCycles(dut.clk, 2 * LIMIT)
    assert await bench.flags("ERRORS") == set(), "a limit of 0 is none"
    await bench.write("ERROR_ENABLE", 0xFFFFFFFF)
    await bench.write("IRQ_ENABLE", 0b10)

    async def until_interrupt() -> int:
        start = bench.out.clock
        while not dut.irq.value:
            await RisingEdge(dut.clk)
            assert bench.out.clock - start < 2 * LIMIT, "no interrupt"
        assert await bench.flags("ERRORS") == {"timeout"}
        await bench.write("ERRORS", 0xFFFFFFFF)
        return bench.out.clock - start

    await bench.write("TIMEOUT", LIMIT)
    assert abs(await until_interrupt() - LIMIT) < 2 * ACCESS
    await ClockCycles(dut.clk, 2 * LIMIT)
    assert await bench.flags("ERRORS") == set(), "raised twice for one silence"
    await bench.write("TIMEOUT", LIMIT)  # counts anew
    for part in bench.streams:  # a word now and then is progress
        part.set_pause_generator(iter(([True] * (LIMIT // 2) + [False]) * 10_000))
    for plane, packet in job.packets.items():
        bench.sources[plane].send_nowait(packet)
    await bench.receive(0, job)
    await bench.idle()
    assert await bench.flags("ERRORS") == set(), "raised though words moved"
    await ClockCycles(dut.clk, 2 * LIMIT)
    assert await bench.flags("ERRORS") == set(), "raised when idle"


@_directed
async def packet_without_tlast(dut: Any) -> None:
    """Its plane is complete: flagged at once, decoded right, but busy; the next one is dropped."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(16)
    first, second = jobs_of(bench, rng, [(2, 40), (2, 40)])
    await bench.write("TIMEOUT", LIMIT)
    watch = StreamWatch(dut, "s_axis_indices")
    words = len(first.packets["indices"]) * 8 // bench.widths["indices"]
    joined = first.packets["indices"] + second.packets["indices"]
    for plane, packet in first.packets.items():
        bench.sources[plane].send_nowait(joined if plane == "indices" else packet)
    await bench.start(first)
    while len(watch.times) < words:
        await RisingEdge(dut.clk)
    bench.sources["indices"].pause = True  # the end of what was sent without tlast
    await bench.receive(0, first)
    await ClockCycles(dut.clk, LIMIT + ACCESS)
    assert await bench.flags("ERRORS") == {"long_indices", "timeout"}
    assert "busy" in await bench.flags("STATUS")
    assert await bench.read("TENSORS") == 0
    # The packet of the next tensor ends the one before.
    bench.sources["indices"].pause = False
    bench.sources["scales"].send_nowait(second.packets["scales"])
    await bench.start(second)
    await ClockCycles(dut.clk, 2 * LIMIT)
    assert await bench.read("TENSORS") == 1
    assert bench.sink.empty(), "a beat without indices"
    assert {"busy"} <= await bench.flags("STATUS")
    await stop_and_go_on(bench)
    await bench.write("TIMEOUT", 0)
    while not bench.sink.empty():
        bench.sink.recv_nowait()
    await bench.run(jobs_of(bench, rng, [(2, 40)]))


@_directed
async def identities(dut: Any) -> None:
    """BUILD_ID is that of the configuration; FORMAT_ID that of the format that MODE names."""
    bench = await ready_harness(dut)
    config, formats = bench.config, bench.config.formats
    text = build_text(
        formats, lut_entry=bench.modes.hif.name, lanes=config.lanes, output=config.output
    )
    assert await bench.read("BUILD_ID") == identification(text)
    for mode in range(16):
        await bench.write("MODE", mode)
        known = identification(format_text(formats[mode])) if mode < len(formats) else 0
        assert await bench.read("FORMAT_ID") == known, f"mode {mode}"
    await bench.write("MODE", 0)


@_directed
async def addresses(dut: Any) -> None:
    """The two lowest bits of an address do not count; beyond the LUT window no flag is set."""
    bench = await ready_harness(dut)
    rows = register("ROWS").address
    assert await bench.write("ROWS", 0x01020304) == AxiResp.OKAY
    for low in range(4):
        answer = await within(600, "a read", bench.master.read(rows + low, 1))
        assert bytes(answer.data) == bytes([4 - low])
    entries = bench.modes.luts << bench.modes.index_bits
    assert await bench.flags("ERRORS") == set()
    for address in range(LUT_WINDOW + entries, 0x1000, 0x7C):
        assert await bench.write_at(address & ~3, b"\1\2\3\4") == AxiResp.SLVERR, hex(address)
        wanted = {"lut_refused"} if address < 2 * LUT_WINDOW else set()
        assert await bench.flags("ERRORS") == wanted, hex(address)
        await bench.write("ERRORS", 0xFFFFFFFF)
        assert (await bench.read_at(address & ~3)).resp == AxiResp.SLVERR
    assert (await bench.read_at(LUT_WINDOW)).resp == AxiResp.SLVERR
    # From here on the model of the master sees answers that it did not ask for: it only reads.
    assert await _raw_write(bench, rows + 3, 0x0A0B0C0D, 0b0110) == AxiResp.OKAY
    assert await bench.read("ROWS") == 0x010B0C04
    # Bytes without a strobe are no entries, wherever they are.
    assert await _raw_write(bench, LUT_WINDOW + entries, 0, 0) == AxiResp.OKAY
    assert await bench.flags("ERRORS") == set()


async def _raw_write(bench: AxiHarness, address: int, word: int, strobe: int) -> int:
    """A write as pins, which no master in between makes aligned; gives the answer."""
    dut, edge = bench.dut, RisingEdge(bench.dut.clk)
    dut.s_axil_awaddr.value, dut.s_axil_wdata.value, dut.s_axil_wstrb.value = address, word, strobe
    dut.s_axil_awvalid.value = dut.s_axil_wvalid.value = 1
    for _ in range(20):
        await edge
        if dut.s_axil_awready.value:
            dut.s_axil_awvalid.value = 0
        if dut.s_axil_wready.value:
            dut.s_axil_wvalid.value = 0
        if dut.s_axil_bvalid.value:
            answer = int(dut.s_axil_bresp.value)
            assert dut.s_axil_bready.value
            await edge
            return answer
    raise AssertionError("no answer")


@_directed
async def words_before_start(dut: Any) -> None:
    """Each input takes two words before START, which are the tensor's; then it waits."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(17)
    jobs = jobs_of(bench, rng, [(8, 8 * bench.config.lanes)])
    watches = {plane: StreamWatch(dut, f"s_axis_{plane}") for plane in jobs[0].packets}
    for plane, packet in jobs[0].packets.items():
        bench.sources[plane].send_nowait(packet)
    await ClockCycles(dut.clk, 50)
    for plane, watch in watches.items():
        assert len(watch.times) == SLICE_WORDS, f"{plane}: {len(watch.times)} words"
    await bench.run([replace(jobs[0], packets={})])


@_directed
async def done_of_several(dut: Any) -> None:
    """IRQ_STATUS.done is one bit for all tensors that are over; TENSORS counts them."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(18)
    jobs = jobs_of(bench, rng, [(1, 8), (1, 8), (1, 8)])
    await bench.drive(jobs)
    for number, job in enumerate(jobs):
        await bench.receive(number, job)
    await bench.idle()
    assert await bench.flags("IRQ_STATUS") == {"done"}
    await bench.write("IRQ_STATUS", 1)
    assert await bench.flags("IRQ_STATUS") == set()
    assert await bench.read("TENSORS") == len(jobs)
