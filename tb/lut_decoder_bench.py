"""Cocotb bench of :class:`rtl.lut_decoder.LutDecoder`.

The reference is the definition of a lookup: code = LUT[metabit][index], with the n-th set of LUTs
for the n-th tensor. It is fed by monitors on the two inputs.
"""

import random
from typing import Any

import cocotb
from cocotb.task import Task
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout

from rtl.layouts import hif_beat_layout, index_beat_layout, lut_write_layout
from tb.bench import CLOCK_NS, BenchConfig, reset, start_clock
from tb.scoreboard import InOrderScoreboard
from tb.stalls import random_stalls, stall_pair
from tb.stream import StreamDriver, StreamMonitor, StreamPins, StreamSink

LATENCY = 1
TENSORS = 12
RESETS = 8
TIMEOUT_CLOCKS = 20_000


class LutDecoderModel:
    """Lookup with LUT sets that take their turn tensor by tensor."""

    def __init__(self, config: BenchConfig) -> None:
        fmt = config.format
        self.layout_in = index_beat_layout(
            lanes=config.lanes, index_bits=fmt.index_bits, block_size=fmt.block_size, word=fmt.word
        )
        self.layout_lut = lut_write_layout(
            luts=len(fmt.codebooks), index_bits=fmt.index_bits, hif=fmt.hif
        )
        self.layout_out = hif_beat_layout(
            lanes=config.lanes, block_size=fmt.block_size, hif=fmt.hif, word=fmt.word
        )
        self.config = config
        self.scale_width = fmt.word.scale.width
        self.clear()

    def clear(self) -> None:
        """Forget everything, as a reset does."""
        self.loading: dict[tuple[int, int], int] = {}
        self.loaded: list[tuple[dict[tuple[int, int], int], int]] = []
        self.tensor = 0

    def write(self, word: int) -> None:
        """One LUT write."""
        fields = self.layout_lut.from_bits(word)
        lut = fields.lut if self.layout_lut["lut"].width else 0
        self.loading[lut, fields.index] = fields.code.as_bits()
        if fields.last:
            self.loaded.append((self.loading, fields.layer_exponent))
            self.loading = {}

    def decode(self, word: int) -> int:
        """Output word of one input beat."""
        fields = self.layout_in.from_bits(word)
        luts, layer_exponent = self.loaded[self.tensor]
        self.tensor += int(fields.last)
        words = [scale.as_bits() for scale in fields.scale_words]
        block_size = self.config.format.block_size
        codes = [
            luts[words[lane // block_size] >> self.scale_width, index]
            for lane, index in enumerate(fields.indices)
        ]
        scales = [scale & ((1 << self.scale_width) - 1) for scale in words]
        out = self.layout_out
        result = int(fields.last) << out["last"].offset
        result |= (layer_exponent & 0xFF) << out["layer_exponent"].offset
        for name, values in (("codes", codes), ("scales", scales)):
            width = out[name].shape.elem_shape.size
            for position, value in enumerate(values):
                result |= value << (out[name].offset + position * width)
        return result


class LutDecoderBench:
    """Drivers, sink, monitors and scoreboard around one unit."""

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.dut, self.config = dut, config
        self.rng = random.Random(config.seed)
        self.model = LutDecoderModel(config)
        self.scoreboard = InOrderScoreboard("LutDecoder", self._explain)
        source, sink = stall_pair(config.stalls, config.seed)
        pins = {name: StreamPins(dut, name, dut.clk) for name in ("i", "i_lut", "o")}
        self.driver = StreamDriver(pins["i"], source)
        stalled = config.stalls in ("in", "both")
        self.lut_driver = StreamDriver(
            pins["i_lut"], random_stalls(f"lut-{config.seed}") if stalled else None
        )
        self.sink = StreamSink(pins["o"], sink)
        self.lut_monitor = StreamMonitor(pins["i_lut"], self.model.write)
        self.input_monitor = StreamMonitor(pins["i"], self._expect)
        self.output_monitor = StreamMonitor(pins["o"], self.scoreboard.actual)

    def _expect(self, word: int) -> None:
        self.scoreboard.expect(self.model.decode(word), f"beat {word:#x}")

    def _explain(self, expected: int, actual: int) -> str:
        wanted = self.model.layout_out.from_bits(expected)
        got = self.model.layout_out.from_bits(actual)
        return "; ".join(
            f"lane {lane}: got {got.codes[lane].as_bits():#x}, expected {code.as_bits():#x}"
            for lane, code in enumerate(wanted.codes)
            if got.codes[lane].as_bits() != code.as_bits()
        )

    def random_tensor(self, beats: int) -> list[int]:
        """Payloads of one tensor: random bits, `last` on the final beat only."""
        layout = self.model.layout_in
        last = layout["last"].offset
        words = [self.rng.getrandbits(layout.size) & ~(1 << last) for _ in range(beats)]
        words[-1] |= 1 << last
        return words

    def random_luts(self) -> list[int]:
        """LUT writes for one tensor: every entry once, in random order, random codes."""
        fmt, layout = self.config.format, self.model.layout_lut
        places = [(lut, index) for lut in range(len(fmt.codebooks))
                  for index in range(fmt.lut_entries)]  # fmt: skip
        self.rng.shuffle(places)
        words = []
        for position, (lut, index) in enumerate(places):
            word = index << layout["index"].offset | lut << layout["lut"].offset
            word |= self.rng.getrandbits(fmt.hif.width) << layout["code"].offset
            word |= self.rng.getrandbits(8) << layout["layer_exponent"].offset
            words.append(word | int(position == len(places) - 1) << layout["last"].offset)
        return words

    async def start(self) -> None:
        """Clock, reset, monitors."""
        start_clock(self.dut)
        await reset(self.dut)
        for monitor in (self.lut_monitor, self.input_monitor, self.output_monitor):
            monitor.start()

    def send(self, tensors: list[list[int]]) -> list[Task[None]]:
        """Start sending tensors and as many sets of LUTs."""

        async def luts() -> None:
            for _ in tensors:
                await self.lut_driver.send(self.random_luts())

        async def beats() -> None:
            for tensor in tensors:
                await self.driver.send(tensor)

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
    bench.send(tensors)
    await bench.receive(sum(map(len, tensors)))
    bench.scoreboard.finish(sum(map(len, tensors)))


@cocotb.test()
async def no_bubble_between_tensors(dut: Any) -> None:
    """With LUTs loaded in time, one beat is taken every clock across tensor boundaries."""
    config = BenchConfig.from_environment()
    bench = LutDecoderBench(dut, config)
    if config.stalls != "none":
        dut._log.info("timing is checked where nothing stalls")
        return
    await bench.start()
    fmt = config.format
    writes = len(fmt.codebooks) * fmt.lut_entries
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
async def waits_for_luts(dut: Any) -> None:
    """Without LUTs no beat is taken, at the start and after the last tensor."""
    bench = LutDecoderBench(dut, BenchConfig.from_environment())
    await bench.start()
    beat = bench.random_tensor(1)
    task = cocotb.start_soon(bench.driver.send(beat))
    await ClockCycles(dut.clk, 50)
    assert not bench.input_monitor.transfers, "a beat was taken before any LUT was loaded"
    cocotb.start_soon(bench.lut_driver.send(bench.random_luts()))
    await bench.receive(1)
    await task
    cocotb.start_soon(bench.driver.send(beat))
    await ClockCycles(dut.clk, 50)
    assert len(bench.input_monitor.transfers) == 1, "a tensor was decoded with the LUTs before it"


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset at any moment drops what is under way and leaves nothing behind."""
    bench = LutDecoderBench(dut, BenchConfig.from_environment())
    await bench.start()
    for _ in range(RESETS):
        tensors = [bench.random_tensor(bench.rng.randint(1, 30)) for _ in range(4)]
        tasks = [*bench.send(tensors), cocotb.start_soon(bench.sink.run(sum(map(len, tensors))))]
        await ClockCycles(dut.clk, bench.rng.randint(1, 120))
        for task in tasks:
            task.cancel()
        monitors = (bench.lut_monitor, bench.input_monitor, bench.output_monitor)
        for monitor in monitors:
            monitor.stop()
        for pins in (bench.driver.pins, bench.lut_driver.pins):
            pins.valid.value = 0
        bench.sink.pins.ready.value = 0
        await reset(dut, cycles=1)
        await RisingEdge(dut.clk)
        assert not dut.o__valid.value, "a beat survived the reset"
        assert not dut.i__ready.value, "LUTs survived the reset"
        bench.model.clear()
        bench.scoreboard.clear()
        for monitor in monitors:
            monitor.start()
    tensors = [bench.random_tensor(20), bench.random_tensor(5)]
    checked = bench.scoreboard.checked
    bench.send(tensors)
    await bench.receive(25)
    bench.scoreboard.finish(checked + 25)
