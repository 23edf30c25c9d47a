"""Cocotb bench of :class:`rtl.hif_to_float.HifToFloat`.

The reference is :func:`golden.float_output.hif_to_float`.

The input monitor, not the driver, feeds the golden model: the reference sees what the pins did.
"""

import random
from collections.abc import Iterator
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import ClockCycles, with_timeout

from golden.float_output import hif_to_float
from rtl.layouts import float_beat_layout, hif_beat_layout
from rtl.units import FLOAT_LAYOUTS
from tb.bench import CLOCK_NS, BenchConfig, reset, start_clock
from tb.scoreboard import InOrderScoreboard
from tb.stalls import stall_pair
from tb.stream import StreamDriver, StreamMonitor, StreamPins, StreamSink

LATENCY = 2
RANDOM_BEATS = 400
TIMEOUT_CLOCKS_PER_BEAT = 64


class HifToFloatBench:
    """Driver, sink, monitors and scoreboard around one unit."""

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.config = config
        self.dut = dut
        fmt = config.format
        lanes = config.lanes
        self.blocks = lanes // fmt.block_size
        self.layout_in = hif_beat_layout(
            lanes=lanes, block_size=fmt.block_size, hif=fmt.hif, word=fmt.word
        )
        self.layout_out = float_beat_layout(lanes=lanes, float_layout=FLOAT_LAYOUTS[config.output])
        source, sink = stall_pair(config.stalls, config.seed)
        input_pins, output_pins = StreamPins(dut, "i", dut.clk), StreamPins(dut, "o", dut.clk)
        self.driver = StreamDriver(input_pins, source)
        self.sink = StreamSink(output_pins, sink)
        self.scoreboard = InOrderScoreboard("HifToFloat", self._explain)
        self.input_monitor = StreamMonitor(input_pins, self._expect)
        self.output_monitor = StreamMonitor(output_pins, self.scoreboard.actual)

    def pack(self, codes: list[int], scales: list[int], layer_exponent: int, last: int) -> int:
        """Payload of one input beat."""
        layout = self.layout_in
        word = last << layout["last"].offset
        word |= (layer_exponent & 0xFF) << layout["layer_exponent"].offset
        for field, values in (("codes", codes), ("scales", scales)):
            width = layout[field].shape.elem_shape.size
            for position, value in enumerate(values):
                word |= value << (layout[field].offset + position * width)
        return word

    def _unpack(self, word: int) -> tuple[list[int], list[int], int, int]:
        fields = self.layout_in.from_bits(word)
        codes = [code.as_bits() for code in fields.codes]
        scales = [scale.as_bits() for scale in fields.scales]
        return codes, scales, fields.layer_exponent, fields.last

    def _expect(self, word: int) -> None:
        codes, scales, layer_exponent, last = self._unpack(word)
        fmt = self.config.format
        result = hif_to_float(
            np.array(codes).reshape(self.blocks, -1),
            np.array(scales)[:, None],
            layer_exponent,
            hif=fmt.hif,
            scale=fmt.word.scale,
            output=self.config.output,
        )
        expected = last << self.layout_out["last"].offset
        for flag in ("reserved", "overflow", "underflow"):
            expected |= int(getattr(result, flag).any()) << self.layout_out[flag].offset
        width = FLOAT_LAYOUTS[self.config.output].size
        for lane, bits in enumerate(result.bits.reshape(-1).tolist()):
            expected |= bits << lane * width
        source = f"scales {[hex(s) for s in scales]}, f {layer_exponent}, codes {codes}"
        self.scoreboard.expect(expected, source)

    def _explain(self, expected: int, actual: int) -> str:
        wanted, got = self.layout_out.from_bits(expected), self.layout_out.from_bits(actual)
        lines = [
            f"lane {lane}: got {got.values[lane].as_bits():#x}, expected {value.as_bits():#x}"
            for lane, value in enumerate(wanted.values)
            if got.values[lane].as_bits() != value.as_bits()
        ]
        for flag in ("reserved", "overflow", "underflow", "last"):
            if getattr(got, flag) != getattr(wanted, flag):
                lines.append(f"{flag}: got {getattr(got, flag)}")
        return "; ".join(lines)

    async def run(self, words: list[int]) -> None:
        """Send beats and check every one that comes out, and the timing where nothing stalls."""
        start_clock(self.dut)
        await reset(self.dut)
        self.input_monitor.start()
        self.output_monitor.start()
        cocotb.start_soon(self.driver.send(words))
        limit = (len(words) + 10) * TIMEOUT_CLOCKS_PER_BEAT * CLOCK_NS
        await with_timeout(self.sink.run(len(words)), limit, "ns")
        self.scoreboard.finish(len(words))
        if self.config.stalls == "none":
            taken = self.input_monitor.transfers
            assert taken == list(range(taken[0], taken[0] + len(words))), "input was stalled"
            latencies = {
                out - into for into, out in zip(taken, self.output_monitor.transfers, strict=True)
            }
            assert latencies == {LATENCY}, f"latencies {latencies}"


def _every_code_pair(bench: HifToFloatBench) -> Iterator[int]:
    """Every HIF code with every scale code, at layer exponent 0."""
    fmt, lanes = bench.config.format, bench.config.lanes
    for scale in range(1 << fmt.word.scale.width):
        for first in range(0, 1 << fmt.hif.width, lanes):
            codes = list(range(first, first + lanes))
            yield bench.pack(codes, [scale] * bench.blocks, 0, scale & 1)


@cocotb.test()
async def every_code_pair(dut: Any) -> None:
    """Exhaustive: every HIF code under every scale code, reserved ones included."""
    bench = HifToFloatBench(dut, BenchConfig.from_environment())
    await bench.run(list(_every_code_pair(bench)))


@cocotb.test()
async def random_beats(dut: Any) -> None:
    """Random codes, scales and layer exponents; the whole exponent range, so flags occur."""
    bench = HifToFloatBench(dut, BenchConfig.from_environment())
    fmt, rng = bench.config.format, random.Random(bench.config.seed)
    words = []
    for _ in range(RANDOM_BEATS):
        codes = [rng.randrange(1 << fmt.hif.width) for _ in range(bench.config.lanes)]
        scales = [rng.randrange(1 << fmt.word.scale.width) for _ in range(bench.blocks)]
        # Large exponents reach overflow and underflow, small ones the common case.
        exponent = rng.choice([rng.randint(-128, 127), rng.randint(-30, 10)])
        words.append(bench.pack(codes, scales, exponent, rng.randint(0, 1)))
    await bench.run(words)
    outputs = [bench.layout_out.from_bits(word) for word in bench.sink.words]
    for flag in ("overflow", "underflow"):
        assert any(getattr(beat, flag) for beat in outputs), f"no beat raised {flag}"


@cocotb.test()
async def fills_while_stalled(dut: Any) -> None:
    """While the output is stalled the unit still takes one beat per pipeline stage, and no more."""
    bench = HifToFloatBench(dut, BenchConfig.from_environment())
    start_clock(dut)
    await reset(dut)
    bench.input_monitor.start()
    bench.output_monitor.start()
    codes, scales = [1] * bench.config.lanes, [1] * bench.blocks
    words = [bench.pack(codes, scales, exponent, 0) for exponent in range(5)]
    # The first beat reaches the output before the next one is offered: an empty stage in between.
    await bench.driver.send(words[:1])
    await ClockCycles(dut.clk, 10)
    cocotb.start_soon(bench.driver.send(words[1:]))
    await ClockCycles(dut.clk, 100)
    assert len(bench.input_monitor.transfers) == LATENCY
    await with_timeout(bench.sink.run(len(words)), 1000 * CLOCK_NS, "ns")
    bench.scoreboard.finish(len(words))
