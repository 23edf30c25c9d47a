"""Cocotb bench of :class:`rtl.sop_decoder_axi.SopDecoderAxi`.

A seed is one or more tensors, with pauses on every stream; some seeds have a wrong packet, some a
reset in mid-traffic, after which everything has to work as if nothing had been.
"""

import os
from dataclasses import replace
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import ClockCycles
from cocotbext.axi import AxiResp
from numpy.typing import NDArray

from golden.corrections import Corrections
from rtl.registers import LUT_WINDOW, OF_THE_BUILD, REGISTERS, Register
from sim.clock import CLOCK_NS
from tb.axi_damage import WRONG_ENTRIES, damaged, possible_damage
from tb.axi_harness import LIMITS, AxiHarness, StreamWatch, ready_harness, within
from tb.axi_traffic import Job, extreme_job, judged, random_job, whole_words

__all__ = ["SEEDS_VARIABLE"]

SEEDS_VARIABLE = "SOP_AXI_SEEDS"
"""First seed and number of seeds, separated by a space."""

SEED_CLOCKS = 100_000  # none may take longer
TEST_CLOCKS = 400_000  # nor a directed test
WIDE_COLUMNS = (1 << 16) + 40
RATE_BEATS, RATE_ROWS = 192, 8  # of a tensor
RATE_CORRECTIONS = 4  # of a row
LARGE_VALUE = 0x7000  # bfloat16
MORE_WORDS = 600  # of a packet that is much too long
PILE, PILE_CLOCKS = 3, 1_500  # tensors that can be started while no beat leaves
SIZE_CLOCKS = 40  # from START to ERRORS.too_large
FILL_CLOCKS = 80  # of the way from planes to output, and of the size of a tensor
START_CLOCKS, WRITE_CLOCKS = 50, 8  # of a start before the end of the tensor before; of its write
GAP_CLOCKS = 8  # between tensors whose corrections meet

_directed = cocotb.test(timeout_time=TEST_CLOCKS * CLOCK_NS, timeout_unit="ns")


def random_jobs(
    bench: AxiHarness, rng: np.random.Generator, count: int, kind: str = "right"
) -> list[Job]:
    """Random tensors; of kind "wrong" the first is damaged, of kind "extreme" all raise flags."""
    made = []
    for number in range(count):
        fmt = bench.config.formats[rng.integers(len(bench.config.formats))]
        make = extreme_job if kind == "extreme" else random_job
        job = make(rng, fmt, bench.config.output)
        if kind == "wrong" and number == 0:
            damage = str(rng.choice(possible_damage(job, bench.widths)))
            made.append(damaged(rng, job, damage, bench.widths, bench.config.output))
        else:
            made.append(whole_words(rng, job, bench.widths))
    return made


async def interrupted(bench: AxiHarness, rng: np.random.Generator) -> None:
    """Start a tensor, then reset in the middle."""
    # The command has to wait for its turn: only one tensor can be under way then.
    driver = cocotb.start_soon(bench.drive(random_jobs(bench, rng, 1)))
    await ClockCycles(bench.dut.clk, int(rng.integers(1, 600)))
    hard = rng.random() < 0.5
    if not hard:  # a transaction on AXI4-Lite is not interrupted
        await within(LIMITS["description"], "START", driver)
    driver.cancel()
    await bench.stop(hard=hard, cycles=int(rng.integers(1, 4)))


async def seed(bench: AxiHarness, number: int) -> None:
    """One seed from start to end."""
    rng = np.random.default_rng(number)
    bench.set_pauses(rng)
    kind = rng.choice(["right", "wrong", "extreme", "reset"], p=[0.4, 0.3, 0.1, 0.2])
    if kind == "reset":
        await interrupted(bench, rng)
    await bench.run(random_jobs(bench, rng, int(rng.integers(1, 4)), kind))


@cocotb.test()
async def random_seeds(dut: Any) -> None:
    """Every seed; what fails names its seed."""
    bench = await ready_harness(dut)
    first, count = map(int, os.environ.get(SEEDS_VARIABLE, "0 10").split())
    for number in range(first, first + count):
        try:
            await within(SEED_CLOCKS, "the end of a seed", seed(bench, number))
        except BaseException as error:
            error.add_note(f"seed {number}") if hasattr(error, "add_note") else None
            dut._log.error("seed %d failed: %r", number, error)
            raise


@_directed
async def every_damage(dut: Any) -> None:
    """Each kind of wrong packet, those of the dense planes in each format, then right traffic."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(2)
    output, done = bench.config.output, set()
    for fmt in bench.config.formats:
        # More bits than a word of every bus, and rows that have several entries.
        job = random_job(rng, fmt, output, (9, bench.config.lanes + 3), 0.25)
        bench.set_pauses(rng)
        for kind in possible_damage(job, bench.widths):
            if kind not in done or kind.endswith(("indices", "scales")):
                try:
                    await bench.run([damaged(rng, job, kind, bench.widths, output)])
                except AssertionError as error:
                    raise AssertionError(f"{fmt.name}, {kind}: {error}") from None
            done.add(kind)
        await bench.run(random_jobs(bench, rng, 1))
    planes = {f"{length}_{plane}" for length in ("short", "long") for plane in bench.widths}
    assert done == planes | (set() if bench.codes else set(WRONG_ENTRIES)), f"only {done}"


@_directed
async def long_packet(dut: Any) -> None:
    """A tensor is not over before its packets have ended, even if all its beats have left."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(8)
    job = whole_words(
        rng, random_job(rng, bench.config.formats[0], bench.config.output), bench.widths
    )
    tail = rng.bytes(MORE_WORDS * bench.widths["scales"] // 8)
    packets = {**job.packets, "scales": job.packets["scales"] + tail}
    await bench.drive([replace(job, packets=packets)])
    await bench.receive(0, job)
    assert not bench.sources["scales"].idle(), "no word was left: too few for this test"
    assert await bench.read("TENSORS") == 0, "counted too early"
    assert "busy" in await bench.flags("STATUS")
    await bench.idle()
    assert bench.sources["scales"].idle(), "not busy while words are left"
    assert await bench.read("TENSORS") == 1
    assert await bench.flags("ERRORS") == {"long_scales"}


@_directed
async def reset_in_mid_packet(dut: Any) -> None:
    """Both resets while packets are half taken, with and without beats half given."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(3)
    watches = {plane: StreamWatch(dut, f"s_axis_{plane}") for plane in ("indices", "scales")}
    # Of the longest blocks too, more scale words than there are beats in the pipeline.
    shape = (16, 16 * bench.config.lanes)
    for number, (hard, beats) in enumerate([(True, 0), (True, 5), (False, 0), (False, 5)]):
        fmt = bench.config.formats[number % len(bench.config.formats)]
        job = random_job(rng, fmt, bench.config.output, shape, 0.02)
        bench.sink.pause = not beats
        taken = len(bench.out.times)
        await bench.drive([whole_words(rng, job, bench.widths)])
        await bench.until_beats(taken + beats)
        bench.sink.pause = True
        await ClockCycles(dut.clk, FILL_CLOCKS)
        phases = {plane: watch.inside for plane, watch in watches.items()}
        phases["output"] = bench.out.inside
        assert phases == {"indices": True, "scales": True, "output": bool(beats)}, phases
        await bench.stop(hard=hard, cycles=2)
        for watch in watches.values():
            watch.inside = False
        bench.sink.pause = False
        await bench.run(random_jobs(bench, rng, 2))


async def clocks_of_beats(bench: AxiHarness, jobs: list[Job]) -> NDArray[np.int64]:
    """Clocks of every beat but the first, since the one before it."""
    before = len(bench.out.times)
    await bench.run(jobs)
    return np.diff(bench.out.times[before:])


@_directed
async def full_rate(dut: Any) -> None:
    """Without pauses: ``lanes`` weights every clock, also from one tensor to the next.

    All formats one after the other and back to the first; then all with a few corrections.
    """
    bench = await ready_harness(dut)
    rng = np.random.default_rng(1)
    lanes, formats = bench.config.lanes, bench.config.formats
    shape = (RATE_ROWS, RATE_BEATS // RATE_ROWS * lanes)

    def tensors(density: float) -> list[Job]:
        jobs = (
            random_job(rng, fmt, bench.config.output, shape, density)
            for fmt in (*formats, formats[0])
        )
        return [whole_words(rng, job, bench.widths) for job in jobs]

    clocks = await clocks_of_beats(bench, tensors(0.0))
    late = np.flatnonzero(clocks != 1)
    assert not late.size, f"{clocks[late]} clocks after beats {late} of {RATE_BEATS} a tensor"
    if bench.codes:
        return
    jobs = tensors(RATE_CORRECTIONS / shape[1])
    clocks = await clocks_of_beats(bench, jobs)
    allowed = np.concatenate([_clocks_with_corrections(job, lanes) for job in jobs])
    late = np.flatnonzero(clocks > allowed[1:])
    assert not late.size, (
        f"{clocks[late]} clocks after beats {late} of {RATE_BEATS} a tensor, "
        f"{allowed[late + 1]} allowed"
    )


@_directed
async def late_start(dut: Any) -> None:
    """A tensor that is started just in time follows without a gap."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(7)
    shape = (RATE_ROWS, RATE_BEATS // RATE_ROWS * bench.config.lanes)
    jobs = [
        whole_words(rng, random_job(rng, fmt, bench.config.output, shape, 0.0), bench.widths)
        for fmt in (bench.config.formats[0], bench.config.formats[-1])
    ]
    await bench.drive(jobs[:1])
    for plane, packet in jobs[1].packets.items():
        bench.sources[plane].send_nowait(packet)
    await bench.describe(jobs[1])
    beats_before = START_CLOCKS + WRITE_CLOCKS
    assert len(bench.out.times) < RATE_BEATS - beats_before, "described too late for this test"
    await bench.until_beats(RATE_BEATS - beats_before)
    started = bench.out.clock
    assert await bench.write("CONTROL", 1) == AxiResp.OKAY
    assert bench.out.clock <= started + WRITE_CLOCKS, "the write took too long for this test"
    for number, job in enumerate(jobs):
        await bench.receive(number, job)
    clocks = np.diff(bench.out.times)
    late = np.flatnonzero(clocks != 1)
    assert not late.size, f"{clocks[late]} clocks after beats {late} of {RATE_BEATS} a tensor"


def _clocks_with_corrections(job: Job, lanes: int) -> NDArray[np.int64]:
    """Most clocks of each beat: one for each correction, and for each row pointer after it.

    A beat is complete when the entry after its last correction is known. The first entry of a
    tensor may be read only after the last one of the tensor before was used.
    """
    assert job.csr is not None
    rows: NDArray[np.int64] = np.searchsorted(
        job.csr.pointers, np.arange(job.entries), side="right"
    ).astype(np.int64)
    beats = (rows - 1) * (job.weights // job.tensor.shape[0]) + job.csr.columns
    clocks = np.zeros(-(-job.weights // lanes), dtype=np.int64)
    np.add.at(clocks, beats // lanes, 1 + np.diff(rows, append=rows[-1]))
    clocks[-1] += bool(clocks[-1])  # what marks the end comes as an entry of its own
    clocks = np.maximum(1, clocks)
    clocks[0] += GAP_CLOCKS + rows[0]
    return clocks


@_directed
async def overlap(dut: Any) -> None:
    """Tiny tensors that pile up behind an output that pauses, until no more can be started."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(6)
    jobs = []
    for number in range(8):
        fmt = bench.config.formats[number % len(bench.config.formats)]
        shape = (1, int(rng.integers(1, bench.config.lanes + 1)))
        job = random_job(rng, fmt, bench.config.output, shape)
        jobs.append(whole_words(rng, job, bench.widths))
    bench.sink.pause = True

    async def go_on() -> None:
        await ClockCycles(dut.clk, PILE_CLOCKS)
        assert not bench.out.times, "a beat in spite of the pause"
        assert "start_ready" not in await bench.flags("STATUS"), "one more could be started"
        assert bench.started == PILE, f"{bench.started} tensors piled up"
        bench.sink.pause = False

    later = cocotb.start_soon(go_on())
    await bench.run(jobs)
    await later


@_directed
async def wide_columns(dut: Any) -> None:
    """More columns than 16 bits can name: column numbers of 32 bits, right and wrong."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(4)
    job = random_job(rng, bench.config.formats[0], bench.config.output, (1, WIDE_COLUMNS), 5e-4)
    csr = job.csr
    assert csr is not None
    assert csr.columns.dtype == np.uint32
    csr.columns[-2:] = 1 << 16, WIDE_COLUMNS - 1  # the lower halves alone would descend
    Corrections(job.tensor.shape, csr.pointers.astype(np.int64), csr.columns, csr.values)
    csr.columns[5] |= 1 << 16  # outside, and what it names in 16 bits is inside
    csr.values[[5, -2, -1]] = LARGE_VALUE  # to be seen whatever it is added to
    packets = {**job.packets, **csr.planes}
    job = judged(replace(job, packets=packets), bench.config.output)
    assert job.errors == {"wrong_corrections"}
    await bench.run([whole_words(rng, job, bench.widths)])


@_directed
async def registers(dut: Any) -> None:
    """Constants, reset values, byte strobes, and everything that is refused."""
    bench = await ready_harness(dut)
    for item in REGISTERS:
        value = await bench.read(item.name)
        if item.name not in (*OF_THE_BUILD, "STATUS"):
            wanted = sum(field.reset << field.lowest for field in item.fields)
            assert value == wanted, f"{item.name}: {value:#x} after reset"
        await _check_access(bench, item)
    config = await bench.read("CONFIG")
    assert config & 0x3FF == bench.config.lanes
    assert config >> 12 & 0x1F == len(bench.config.formats)

    for address in (0x54, 0x3FC, LUT_WINDOW + (bench.modes.luts << bench.modes.index_bits)):
        assert await bench.write_at(address, b"\1\2\3\4") == AxiResp.SLVERR
    assert (await bench.read_at(0x54)).resp == AxiResp.SLVERR
    await bench.write("ERRORS", 0xFFFFFFFF)

    await bench.write("ROWS", 0)  # no tensor has no rows
    assert await bench.write("CONTROL", 1) == AxiResp.SLVERR
    assert await bench.flags("ERRORS") == {"start_refused"}
    await bench.write("ERRORS", 0xFFFFFFFF)
    await bench.write("CORRECTIONS", 0)
    await bench.write("MODE", 0)


@_directed
async def too_large(dut: Any) -> None:
    """A shape of 2**32 weights or more is skipped, alone and while a tensor runs."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(5)
    for rows, columns in ((1 << 20, 1 << 12), (1, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF)):
        for running in (False, True):
            jobs = random_jobs(bench, rng, 2)
            bench.sink.pause = True
            if running:
                await bench.drive(jobs[:1])
                await bench.until_status(LIMITS["description"], {"start_ready"}, set())
            await bench.until_status(LIMITS["description"], {"lut_ready"}, set())
            await bench.load(jobs[1])
            await bench.write("MODE", bench.modes.mode_of(jobs[1].tensor.format))
            for name, value in (("ROWS", rows), ("COLUMNS", columns), ("CONTROL", 1)):
                assert await bench.write(name, value) == AxiResp.OKAY, name
            await ClockCycles(dut.clk, SIZE_CLOCKS)
            assert "too_large" in await bench.flags("ERRORS"), f"{rows} x {columns}"
            bench.sink.pause = False
            if running:
                await bench.receive(0, jobs[0])
            await bench.idle()
            wanted = {"too_large"} | (jobs[0].errors if running else set())
            assert await bench.flags("ERRORS") == wanted, f"{rows} x {columns}"
            await bench.write("ERRORS", 0xFFFFFFFF)
            await bench.run(jobs[1:])


@_directed
async def refused(dut: Any) -> None:
    """One runs without data, one waits, the next is refused, and so are its LUTs."""
    bench = await ready_harness(dut)
    rng = np.random.default_rng(9)
    job = random_job(rng, bench.config.formats[0], bench.config.output, (1, 1), 0.0)
    await bench.describe(job)
    for _ in range(2):
        await bench.load(job)
        assert await bench.write("CONTROL", 1) == AxiResp.OKAY
        await ClockCycles(dut.clk, 50)
    assert await bench.write("CONTROL", 1) == AxiResp.SLVERR
    assert await bench.flags("STATUS") == {"busy"}
    waits = await bench.read("INPUT_WAITS")
    await ClockCycles(dut.clk, 20)
    assert await bench.read("INPUT_WAITS") >= waits + 20
    if bench.modes.luts:
        assert await bench.write_at(LUT_WINDOW, b"\1") == AxiResp.SLVERR
        assert await bench.flags("ERRORS") == {"start_refused", "lut_refused"}
    assert await bench.write("CONTROL", 2) == AxiResp.OKAY
    assert await bench.flags("STATUS") == {"start_ready", "lut_ready"}


async def _check_access(bench: AxiHarness, item: Register) -> None:
    used = sum(field.mask for field in item.fields)
    if item.access == "ro":
        before = await bench.read(item.name)
        assert await bench.write(item.name, 0xFFFFFFFF) == AxiResp.SLVERR, item.name
        assert await bench.read(item.name) == before, item.name
    if item.access == "rw":
        await bench.write(item.name, 0xA5C3F00F)
        assert await bench.read(item.name) == 0xA5C3F00F & used, item.name
        assert await bench.write_at(item.address + 2, b"\x5a") == AxiResp.OKAY
        assert await bench.read(item.name) == 0xA55AF00F & used, item.name
        await bench.write(item.name, 0)
