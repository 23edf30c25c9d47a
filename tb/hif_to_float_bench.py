"""Cocotb bench of :class:`rtl.hif_to_float.HifToFloat`.

The reference is :func:`golden.float_output.element_to_float`.

The input monitor, not the driver, feeds the golden model: the reference sees what the pins did.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import cocotb
import numpy as np

from golden.float_output import element_to_float
from golden.formats import BF16, FloatFormat, NumberFormat
from rtl.layouts import float_beat_layout, hif_beat_layout
from rtl.units import FLOAT_LAYOUTS, HIF_TO_FLOAT
from sim.bench_config import BenchConfig
from tb.pipeline_bench import PipelineBench
from tb.scoreboard import InOrderScoreboard
from tb.unit_bench import float_ends
from tb.unit_coverage import FloatCoverage

RANDOM_BEATS = 400


class HifToFloatBench(PipelineBench):
    """Driver, sink, monitors and scoreboard around one unit."""

    latency = HIF_TO_FLOAT.clocks()

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self.modes = config.modes
        self.slots = self.modes.slots(config.lanes)
        self.layout_in = hif_beat_layout(lanes=config.lanes, modes=self.modes)
        self.layout_out = float_beat_layout(
            lanes=config.lanes, float_layout=FLOAT_LAYOUTS[config.output]
        )
        # Of each mode what rounds up into the next binade; only bfloat16 rounds.
        self.carrying = [
            _carrying(self.modes.decoded(fmt), fmt.word.scale)
            if config.output == "bfloat16"
            else []
            for fmt in self.modes.formats
        ]
        super().__init__(
            dut, config.stalls, config.seed, InOrderScoreboard("HifToFloat", self._explain),
            {"i": self._expect},
            lambda counts: FloatCoverage(counts, self.modes, config.lanes, config.output),
        )  # fmt: skip

    def pack(self, values: Mapping[str, int | list[int]]) -> int:
        """Payload of one input beat from its fields; those that are not given are zero."""
        layout, word = self.layout_in, 0
        for name, value in values.items():
            items = value if isinstance(value, list) else [value]
            width = layout[name].width // len(items)
            for position, item in enumerate(items):
                word |= (item & (1 << width) - 1) << (layout[name].offset + position * width)
        return word

    def _items(self, word: int, name: str, count: int) -> list[int]:
        field = self.layout_in[name]
        width = field.width // count
        bits = word >> field.offset
        return [bits >> position * width & (1 << width) - 1 for position in range(count)]

    def _expect(self, word: int) -> None:
        layout, lanes = self.layout_in, self.config.lanes
        mode = self._items(word, "mode", 1)[0] if self.modes.mode_bits else 0
        fmt = self.modes.formats[mode]
        element, scale = self.modes.decoded(fmt), fmt.word.scale
        # Bits above the format's own are not read.
        codes = [code & (1 << element.width) - 1 for code in self._items(word, "codes", lanes)]
        scales = [fmt.word.scale_code(code) for code in self._items(word, "scales", self.slots)]
        exponent = layout.from_bits(word).layer_exponent
        row_scales = None
        if fmt.row_scale:
            row_scales = np.array(self._items(word, "row_scales", self.slots))[:, None]
        result = element_to_float(
            np.array(codes).reshape(self.slots, -1),
            np.array(scales)[:, None],
            exponent,
            element=element,
            scale=scale,
            row_scales=row_scales,
            output=self.config.output,
        )
        expected = self._items(word, "last", 1)[0] << self.layout_out["last"].offset
        for flag in ("reserved", "overflow", "underflow"):
            expected |= int(getattr(result, flag).any()) << self.layout_out[flag].offset
        width = FLOAT_LAYOUTS[self.config.output].size
        for lane, bits in enumerate(result.bits.reshape(-1).tolist()):
            expected |= bits << lane * width
        source = f"{fmt.name}: scales {[hex(s) for s in scales]}, f {exponent}, codes {codes}"
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

    def random_words(self, count: int) -> list[int]:
        """Random codes, scales and layer exponents; the whole exponent range, so flags occur."""
        rng, layout = self.rng, self.layout_in
        width = layout["layer_exponent"].width
        words = []
        for _ in range(count):
            # The ends reach overflow and underflow, small ones are the common case.
            ranges = [(-128, 127), (-30, 10), (-128, -118), (118, 127)]
            exponent = rng.randint(*rng.choice(ranges))
            if rng.random() < 0.05:
                exponent = rng.choice([-1 << width - 1, 0, (1 << width - 1) - 1])
            mode = rng.randrange(len(self.modes.formats))
            fields: dict[str, int | list[int]] = {
                name: rng.getrandbits(layout[name].width) for name in layout.members
            }
            fields["layer_exponent"] = exponent
            if self.modes.mode_bits:
                fields["mode"] = mode
            if rng.random() < 0.2:
                ends = float_ends(self.modes.formats[mode].word.scale)
                fields["scales"] = [rng.choice(ends) for _ in range(self.slots)]
            if self.modes.row_scale:
                fields["row_scales"] = [self._random_row_scale() for _ in range(self.slots)]
            elif self.carrying[mode] and rng.random() < 0.2:
                fields |= self._carry_at_an_end(mode)
            words.append(self.pack(fields))
        return words

    def _carry_at_an_end(self, mode: int) -> dict[str, int | list[int]]:
        """In every lane a product that rounds up to infinity, to the least normal or nearby."""
        rng, scale = self.rng, self.modes.formats[mode].word.scale
        code, mantissa, binade = rng.choice(self.carrying[mode])
        # Exponent field of the scale, were it alone to bring the product there; f gives the rest.
        alone = rng.choice([127, -127]) + rng.randint(-1, 1) - binade + scale.bias
        lowest, highest = max(1, alone - 127), min((1 << scale.exponent_bits) - 2, alone + 128)
        field = rng.randint(lowest, max(lowest, highest))
        return {
            "codes": [code] * self.config.lanes,
            "scales": [field << scale.mantissa_bits | mantissa] * self.slots,
            "layer_exponent": alone - field,
        }

    def _random_row_scale(self) -> int:
        """Half of them near 1, as real ones are; any bit pattern, ends of classes."""
        kind = self.rng.random()
        if kind < 0.2:
            return self.rng.getrandbits(16)
        if kind < 0.5:
            return self.rng.choice(float_ends(BF16))
        return 0x3F00 + self.rng.getrandbits(8)

    def legal(self, word: int) -> int:
        """The word with a mode that exists."""
        if not self.modes.mode_bits:
            return word
        field = self.layout_in["mode"]
        mode = word >> field.offset & (1 << field.width) - 1
        wanted = min(mode, len(self.modes.formats) - 1)
        return word ^ (mode ^ wanted) << field.offset


def _carrying(element: NumberFormat, scale: FloatFormat) -> list[tuple[int, int, int]]:
    """What rounds up to a power of two as a bfloat16: element codes, mantissas of scales.

    With the binade of the product before rounding, for scales in [1, 2).
    """
    found = []
    for code in range(1 << element.width):
        decoded = element.decode(code)
        for mantissa in range(1 << scale.mantissa_bits):
            product = decoded.significand * (mantissa + (1 << scale.mantissa_bits))
            dropped = product.bit_length() - 8
            # All of 8 bits set, and the half below them: up, at a tie too.
            if dropped > 0 and product >> dropped - 1 == (1 << 9) - 1:
                binade = product.bit_length() - 1 + decoded.exponent - scale.mantissa_bits
                found.append((code, mantissa, binade))
    return found


def _every_code_pair(bench: HifToFloatBench) -> Iterator[int]:
    """Every element code with every scale code, at layer exponent 0, in every mode."""
    lanes = bench.config.lanes
    for mode, fmt in enumerate(bench.modes.formats):
        for scale in range(1 << fmt.word.scale.width):
            for first in range(0, 1 << bench.modes.decoded(fmt).width, lanes):
                codes = list(range(first, first + lanes))
                fields: dict[str, int | list[int]] = {
                    "codes": codes,
                    "scales": [scale] * bench.slots,
                    "last": scale & 1,
                }
                if bench.modes.mode_bits:
                    fields["mode"] = mode
                yield bench.pack(fields)


@cocotb.test()
async def every_code_pair(dut: Any) -> None:
    """Exhaustive: every element code under every scale code, reserved ones included."""
    bench = HifToFloatBench(dut, BenchConfig.from_environment())
    await bench.start()
    await bench.run(list(_every_code_pair(bench)))


@cocotb.test()
async def random_beats(dut: Any) -> None:
    """Random codes, scales and layer exponents; the whole exponent range, so flags occur."""
    bench = HifToFloatBench(dut, BenchConfig.from_environment())
    await bench.start()
    await bench.run(bench.random_words(RANDOM_BEATS))
    outputs = [bench.layout_out.from_bits(word) for word in bench.sink.words]
    for flag in ("overflow", "underflow"):
        assert any(getattr(beat, flag) for beat in outputs), f"no beat raised {flag}"


@cocotb.test()
async def fills_while_stalled(dut: Any) -> None:
    """While the output is stalled the unit still takes one beat per pipeline stage, and no more."""
    bench = HifToFloatBench(dut, BenchConfig.from_environment())
    await bench.start()
    codes, scales = [1] * bench.config.lanes, [1] * bench.slots
    words = [
        bench.pack({"codes": codes, "scales": scales, "layer_exponent": exponent})
        for exponent in range(5)
    ]
    await bench.fill_while_stalled(words)


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset at any moment drops what is under way and leaves nothing behind."""
    bench = HifToFloatBench(dut, BenchConfig.from_environment())
    await bench.start()
    await bench.reset_in_mid_traffic(beats=20, clocks=20)
