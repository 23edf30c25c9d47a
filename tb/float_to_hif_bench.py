"""Cocotb bench of :class:`rtl.float_to_hif.FloatToHif`.

The reference is :func:`golden.float_input.float_to_hif`.

The input monitor, not the driver, feeds the golden model: the reference sees what the pins did.
"""

import random
from collections.abc import Iterable
from typing import Any

import cocotb
import numpy as np

from golden.float_input import checked_shift, float_to_hif
from rtl.float_to_hif import converted_beat_layout, source_beat_layout
from rtl.units import FLOAT_TO_HIF
from sim.bench_config import ConverterConfig
from tb.coverage import Counts
from tb.pipeline_bench import PipelineBench
from tb.scoreboard import InOrderScoreboard
from tb.unit_bench import float_ends
from tb.unit_coverage import ConverterCoverage

__all__ = ["ConverterConfig", "FloatToHifBench"]

RANDOM_BEATS = 400


class FloatToHifBench(PipelineBench):
    """Driver, sink, monitors and scoreboard around one unit."""

    latency = FLOAT_TO_HIF.clocks()

    def __init__(self, dut: Any, config: ConverterConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self.lanes = config.lanes
        self.every_code = range(1 << config.source.width)
        self.layout_in = source_beat_layout(lanes=config.lanes, source=config.source)
        self.layout_out = converted_beat_layout(lanes=config.lanes, hif=config.hif)
        result = float_to_hif(
            np.array(self.every_code), config.source, config.hif, shift=config.shift
        )
        # A value's code with its flags above it, as in the output's payload.
        self.reference = (
            result.codes.astype(np.int64)
            | result.inexact.astype(np.int64) << config.hif.width
            | result.saturated.astype(np.int64) << config.hif.width + 1
            | result.nan.astype(np.int64) << config.hif.width + 2
        ).tolist()
        super().__init__(
            dut, config.stalls, config.seed, InOrderScoreboard("FloatToHif", self._explain),
            {"i": self._expect}, self._coverage,
        )  # fmt: skip

    def _coverage(self, counts: Counts) -> ConverterCoverage:
        config = self.config
        shift = checked_shift(config.source, config.hif, config.shift)
        return ConverterCoverage(
            counts, config.source, config.hif, config.lanes, shift, self.reference,
            self.layout_in, self.layout_out,
        )  # fmt: skip

    def pack(self, codes: Iterable[int], last: int = 0) -> int:
        """Payload of one input beat; lanes without a code are zero."""
        width, word = self.config.source.width, last << self.layout_in["last"].offset
        for lane, code in enumerate(codes):
            word |= code << lane * width
        return word

    def random_words(self, count: int) -> list[int]:
        """Beats of random codes; in most of them few lanes can raise a flag."""
        ends = float_ends(self.config.source)
        plain = [code for code in self.every_code if self.reference[code] < 1 << self.hif_width]
        words = []
        for _ in range(count):
            chance = self.rng.choice([0.0, 1 / self.lanes, 1.0])
            any_code = self.rng.choice([self.every_code, self.every_code, ends])
            codes = [
                self.rng.choice(any_code if self.rng.random() < chance else plain)
                for _ in range(self.lanes)
            ]
            words.append(self.pack(codes, self.rng.getrandbits(1)))
        return words

    @property
    def hif_width(self) -> int:
        """Bits of a code that comes out."""
        return self.config.hif.width

    def _expect(self, word: int) -> None:
        width, lanes = self.config.source.width, self.lanes
        codes = [word >> lane * width & (1 << width) - 1 for lane in range(lanes)]
        expected = flags = 0
        for lane, code in enumerate(codes):
            reference = self.reference[code]
            expected |= (reference & (1 << self.hif_width) - 1) << lane * self.hif_width
            flags |= reference >> self.hif_width
        expected |= flags << self.layout_out["inexact"].offset
        expected |= (word >> self.layout_in["last"].offset) << self.layout_out["last"].offset
        self.scoreboard.expect(expected, f"{self.config.source_name} {list(map(hex, codes))}")

    def _explain(self, expected: int, actual: int) -> str:
        wanted, got = self.layout_out.from_bits(expected), self.layout_out.from_bits(actual)
        lines = [
            f"lane {lane}: got {got.codes[lane].as_bits():#x}, expected {code.as_bits():#x}"
            for lane, code in enumerate(wanted.codes)
            if got.codes[lane].as_bits() != code.as_bits()
        ]
        for flag in ("inexact", "saturated", "nan", "last"):
            if getattr(got, flag) != getattr(wanted, flag):
                lines.append(f"{flag}: got {getattr(got, flag)}")
        return "; ".join(lines)


@cocotb.test()
async def every_code(dut: Any) -> None:
    """Exhaustive: every code of the source, in order."""
    bench = FloatToHifBench(dut, ConverterConfig.from_environment())
    await bench.start()
    codes, lanes = bench.every_code, bench.lanes
    await bench.run(
        [bench.pack(codes[first : first + lanes]) for first in range(0, len(codes), lanes)]
    )


@cocotb.test()
async def random_beats(dut: Any) -> None:
    """Random codes in every lane; many beats in which one lane or none can raise a flag."""
    bench = FloatToHifBench(dut, ConverterConfig.from_environment())
    await bench.start()
    await bench.run(bench.random_words(RANDOM_BEATS))
    flags = {word >> bench.layout_out["inexact"].offset & 0b111 for word in bench.sink.words}
    possible = {0, *(reference >> bench.hif_width for reference in bench.reference)}
    for bit in range(3):
        for value in {flag >> bit & 1 for flag in possible}:
            assert any(flag >> bit & 1 == value for flag in flags), f"flag {bit} never {value}"


@cocotb.test()
async def fills_while_stalled(dut: Any) -> None:
    """While the output is stalled the unit still takes one beat per pipeline stage, and no more."""
    bench = FloatToHifBench(dut, ConverterConfig.from_environment())
    await bench.start()
    await bench.fill_while_stalled(bench.random_words(5))


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset at any moment drops what is under way and leaves nothing behind."""
    bench = FloatToHifBench(dut, ConverterConfig.from_environment())
    await bench.start()
    await bench.reset_in_mid_traffic(beats=50, clocks=40)
