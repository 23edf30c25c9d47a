"""Cocotb bench of :class:`rtl.lut_decoder.LutDecoder`.

The reference is the definition of a lookup: code = LUT[metabit][index], with the n-th set of LUTs
for the n-th tensor. It is fed by monitors on the two inputs.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cocotb
from cocotb.task import Task
from cocotb.triggers import ClockCycles, with_timeout

from rtl.units import LUT_DECODER
from sim.bench_config import BenchConfig
from sim.clock import CLOCK_NS
from sim.lut_model import LutDecoderModel
from tb.scoreboard import InOrderScoreboard
from tb.unit_bench import UnitBench
from tb.unit_coverage import LutCoverage

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LATENCY = LUT_DECODER.clocks()
TENSORS = 12
RESETS = 8
TIMEOUT_CLOCKS = 20_000


@dataclass(frozen=True)
class Tensor:
    """Traffic of one tensor: payloads of its beats and of its LUT writes."""

    beats: list[int]
    lut_writes: list[int]


class LutDecoderBench(UnitBench):
    """Drivers, sink, monitors and scoreboard around one unit."""

    latency = LATENCY

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self.model = LutDecoderModel(config)
        scoreboard = InOrderScoreboard("LutDecoder", self._explain)
        super().__init__(
            dut, config.stalls, config.seed, scoreboard,
            {"i_lut": self.model.write, "i": self._expect},
            lambda counts: LutCoverage(counts, config.modes, config.lanes),
        )  # fmt: skip

    def _expect(self, word: int) -> None:
        self.scoreboard.expect(self.model.decode(word), f"beat {word:#x}")

    def _explain(self, expected: int, actual: int) -> str:
        out = self.model.layout_out
        width = out["codes"].width // self.config.lanes
        lines = []
        for lane in range(self.config.lanes):
            codes = [
                self.model.field(out, word, "codes") >> lane * width & (1 << width) - 1
                for word in (actual, expected)
            ]
            if codes[0] != codes[1]:
                lines.append(f"lane {lane}: got {codes[0]:#x}, expected {codes[1]:#x}")
        for name in set(out.members) - {"codes"}:
            got, wanted = (self.model.field(out, word, name) for word in (actual, expected))
            if got != wanted:
                lines.append(f"{name}: got {got:#x}, expected {wanted:#x}")
        return "; ".join(lines)

    def random_tensor(self, beats: int, mode: int | None = None) -> Tensor:
        """Random indices, scale words, LUTs and mode; `last` on the final beat only."""
        modes, layout = self.model.modes, self.model.layout_lut
        if mode is None:
            mode = self.rng.randrange(len(modes.formats))
        words = [self.rng.getrandbits(self.model.layout_in.size) for _ in range(beats)]
        places = self.model.places(mode)
        self.rng.shuffle(places)
        codes = [self.rng.getrandbits(modes.hif.width) for _ in places]
        exponents = [self.rng.getrandbits(layout["layer_exponent"].width) for _ in places]
        # Only the last write counts.
        noise = [self.rng.getrandbits(max(1, modes.mode_bits)) for _ in places]
        return Tensor(
            self._beats(words, mode),
            self.model.writes(places, codes, exponents, [*noise[:-1], mode]),
        )

    def _beats(self, words: list[int], mode: int) -> list[int]:
        """Payloads from random bits: `last` on the final one, elements as wide as the format's."""
        fmt, layout = self.model.modes.formats[mode], self.model.layout_in
        last = layout["last"].offset
        keep = (1 << last) - 1
        # A source fills up elements and scale words of narrower formats with zeros.
        for name, bits in (("indices", fmt.index_bits), ("scale_words", fmt.word.width)):
            count = layout[name].shape.length
            width = layout[name].width // count
            for position in range(count):
                unused = (1 << width) - (1 << bits)
                keep &= ~(unused << layout[name].offset + position * width)
        ends = [0] * (len(words) - 1) + [1 << last]
        return [word & keep | end for word, end in zip(words, ends, strict=True)]

    def tensors(self) -> "SearchStrategy[Any]":
        """Tensors as data: mode, layer exponent, codes of all entries and bits of beats."""
        from hypothesis import strategies as st

        modes, size = self.model.modes, self.model.layout_in.size
        code_bits = modes.luts * (1 << modes.index_bits) * modes.hif.width
        return st.fixed_dictionaries(
            {
                "mode": st.integers(0, len(modes.formats) - 1),
                "exponent": st.integers(0, 255),
                "codes": st.integers(0, (1 << code_bits) - 1),
                "beats": st.lists(st.integers(0, (1 << size) - 1), min_size=1, max_size=6),
            }
        )

    def play(self, tensors: list[Any]) -> tuple[list[Task[Any]], int, int]:
        """Start sending tensors that :meth:`tensors` describes."""
        made = []
        for tensor in tensors:
            mode, places = tensor["mode"], self.model.places(tensor["mode"])
            width = self.model.modes.hif.width
            codes = [tensor["codes"] >> n * width & (1 << width) - 1 for n in range(len(places))]
            exponents, modes = [tensor["exponent"]] * len(places), [mode] * len(places)
            writes = self.model.writes(places, codes, exponents, modes)
            made.append(Tensor(self._beats(tensor["beats"], mode), writes))
        beats = sum(len(tensor.beats) for tensor in made)
        return self.send(made), beats + sum(len(tensor.lut_writes) for tensor in made), beats

    def forget(self) -> None:
        """Expect nothing any more, as after a reset."""
        super().forget()
        self.model.clear()

    def send(self, tensors: list[Tensor]) -> list[Task[None]]:
        """Start sending tensors and their LUTs."""

        async def luts() -> None:
            for tensor in tensors:
                await self.drivers["i_lut"].send(tensor.lut_writes)

        async def beats() -> None:
            for tensor in tensors:
                await self.driver.send(tensor.beats)

        return [cocotb.start_soon(luts()), cocotb.start_soon(beats())]

    async def receive(self, count: int) -> None:
        """Take ``count`` beats within the time limit."""
        await with_timeout(self.sink.run(count), TIMEOUT_CLOCKS * CLOCK_NS, "ns")


@cocotb.test()
async def random_tensors(dut: Any) -> None:
    """Tensors shorter than a LUT load, where the input waits, and longer ones."""
    bench = LutDecoderBench(dut, BenchConfig.from_environment())
    await bench.start()
    tensors = [bench.random_tensor(bench.rng.choice([1, 2, 7, 40])) for _ in range(TENSORS)]
    beats = sum(len(tensor.beats) for tensor in tensors)
    bench.send(tensors)
    await bench.receive(beats)
    bench.scoreboard.finish(beats)


@cocotb.test()
async def no_bubble_between_tensors(dut: Any) -> None:
    """With LUTs loaded in time, one beat is taken every clock across tensor boundaries."""
    config = BenchConfig.from_environment()
    bench = LutDecoderBench(dut, config)
    if config.stalls != "none":
        dut._log.info("timing is checked where nothing stalls")
        return
    await bench.start()
    writes = max(len(fmt.codebooks) * fmt.lut_entries for fmt in config.formats)
    # The shadow bank is free from the swap on; the load takes one clock per entry.
    tensors = [bench.random_tensor(writes + 1) for _ in range(4)]
    bench.send(tensors)
    await bench.receive(4 * (writes + 1))
    bench.scoreboard.finish(4 * (writes + 1))
    taken = bench.input_monitor.transfers
    assert taken == list(range(taken[0], taken[0] + len(taken))), "a bubble between tensors"
    latencies = {
        out - into for into, out in zip(taken, bench.output_monitor.transfers, strict=True)
    }
    assert latencies == {LATENCY}, f"latencies {latencies}"


@cocotb.test()
async def every_entry(dut: Any) -> None:
    """Every entry of every LUT of every format is read, in order."""
    bench = LutDecoderBench(dut, BenchConfig.from_environment())
    await bench.start()
    layout, lanes = bench.model.layout_in, bench.config.lanes
    width, slots = bench.model.modes.element_bits, layout["scale_words"].shape.length
    tensors = []
    for mode, fmt in enumerate(bench.model.modes.formats):
        words = []
        for lut in range(len(fmt.codebooks)):
            scale = fmt.word.join(0, lut)
            scales = sum(scale << slot * bench.model.modes.word_bits for slot in range(slots))
            for first in range(0, fmt.lut_entries, lanes):
                indices = [(first + lane) % fmt.lut_entries for lane in range(lanes)]
                word = sum(index << lane * width for lane, index in enumerate(indices))
                words.append(word | scales << layout["scale_words"].offset)
        if words:
            tensors.append(bench.random_tensor(1, mode))
            tensors[-1] = Tensor(bench._beats(words, mode), tensors[-1].lut_writes)
    beats = sum(len(tensor.beats) for tensor in tensors)
    bench.send(tensors)
    await bench.receive(beats)
    bench.scoreboard.finish(beats)


@cocotb.test()
async def every_change_of_mode(dut: Any) -> None:
    """Short tensors: every format after every format, itself included."""
    bench = LutDecoderBench(dut, BenchConfig.from_environment())
    modes = len(bench.model.modes.formats)
    if modes == 1:
        dut._log.info("there is one format only")
        return
    await bench.start()
    order = []
    for first in range(modes):
        order += [first, first]
        for second in range(first + 1, modes):
            order += [second, first]
    tensors = [bench.random_tensor(bench.rng.choice([1, 2, 3]), mode) for mode in order]
    beats = sum(len(tensor.beats) for tensor in tensors)
    bench.send(tensors)
    await bench.receive(beats)
    bench.scoreboard.finish(beats)


@cocotb.test()
async def waits_for_luts(dut: Any) -> None:
    """Without LUTs no beat is taken, at the start and after the last tensor."""
    bench = LutDecoderBench(dut, BenchConfig.from_environment())
    await bench.start()
    tensor = bench.random_tensor(1)
    task = cocotb.start_soon(bench.driver.send(tensor.beats))
    await ClockCycles(dut.clk, 50)
    assert not bench.input_monitor.transfers, "a beat was taken before any LUT was loaded"
    cocotb.start_soon(bench.drivers["i_lut"].send(tensor.lut_writes))
    await bench.receive(1)
    await task
    cocotb.start_soon(bench.driver.send(tensor.beats))
    await ClockCycles(dut.clk, 50)
    assert len(bench.input_monitor.transfers) == 1, "a tensor was decoded with the LUTs before it"


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset at any moment drops what is under way and leaves nothing behind."""
    bench = LutDecoderBench(dut, BenchConfig.from_environment())
    await bench.start()
    writes = max(len(fmt.codebooks) * fmt.lut_entries for fmt in bench.config.formats) or 1
    for number in range(RESETS):
        lengths = [bench.rng.choice([1, bench.rng.randint(1, 30)]) for _ in range(4)]
        # The first time nothing is under way; in every third round nothing is taken, so that LUTs
        # wait behind tensors and a short tensor in the output.
        tensors = [bench.random_tensor(length) for length in lengths[: 4 * bool(number)]]
        tasks = bench.send(tensors)
        if number % 3:
            tasks.append(cocotb.start_soon(bench.sink.run(sum(lengths))))
            await ClockCycles(dut.clk, bench.rng.randint(1, 4 * writes))
        else:
            await ClockCycles(dut.clk, bench.rng.randint(2, 6) * writes)
        await bench.interrupt(tasks, LATENCY)
        assert not dut.i__ready.value, "LUTs survived the reset"
        bench.watch()
    tensors = [bench.random_tensor(20), bench.random_tensor(5)]
    checked = bench.scoreboard.checked
    bench.send(tensors)
    await bench.receive(25)
    bench.scoreboard.finish(checked + 25)
