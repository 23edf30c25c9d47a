"""Every checker can fail: wrong versions of the RTL, each of which a bench must notice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sim.bench_config import BenchConfig
from tb.faults import Fault, run_with_fault

PAIR = BenchConfig("BOF4-NF4sS1E5M5", lanes=16, stalls="both", seed=3)
STEADY = BenchConfig("BOF4-NF4sS1E5M5", lanes=32, seed=3)
MIXED = BenchConfig("BOF4-NF4^32sRS1E2M4 E2M3sUE4M4 NF4sUE4M4 INT8sUE4M4", "HIF8", 32, seed=3)
# Lanes of a converter are all alike.
NARROW = BenchConfig("BOF4-NF4sS1E5M5", lanes=8, stalls="both", seed=3)
BFLOAT = BenchConfig("NF4sBF16", "HIF8", 8, "bfloat16", "both", 3)
# A correction takes a clock whatever the number of lanes.
MERGE = BenchConfig("NF4sUE4M4", lanes=8, stalls="both", seed=3)
MERGE_STEADY = BenchConfig("NF4sUE4M4", lanes=8, seed=3)
MERGE_BFLOAT = BenchConfig("NF4sUE4M4", lanes=8, output="bfloat16", stalls="both", seed=3)


def fault(name: str, unit: str, old: str, new: str, config: BenchConfig, module: str = "") -> Fault:
    """A fault in the module of the unit itself, or in one that it is made of."""
    # Random traffic is enough, and the exhaustive test of a 16-bit scale takes minutes.
    testcase = "random_beats|fills|reset" if unit == FLOAT else ".*"
    return Fault(name, unit, module or unit, old, new, config, testcase)


LUT, FLOAT, MERGER = "lut_decoder", "hif_to_float", "sparse_merge"
ADDER, FACTOR, ROUNDING = "parts.float_adder", "parts.factor", "parts.rounding"
FIELDS = "parts.float_fields"
PIPELINE, WINDOW, BANKS = "parts.pipeline", "correction_window", "lut_banks"

FAULTS = (
    fault("lanes in reverse order", LUT, "in enumerate(codes)", "in enumerate(codes[::-1])", PAIR),
    fault("metabit inverted", LUT, "code.eq(Mux(metabit, second, first))",
          "code.eq(Mux(metabit, first, second))", PAIR, BANKS),
    fault("metabit of the first block", LUT, "[banks.metabit(word) for word in scale_words]",
          "[banks.metabit(scale_words[0])] * modes.slots(self.lanes)", STEADY),
    fault("metabit one bit too low", LUT, "word[fmt.word.scale.width] if",
          "word[fmt.word.scale.width - 1] if", PAIR, BANKS),
    fault("bank never changes", LUT, "m.d.sync += entry.eq(shadow)", "pass", PAIR, BANKS),
    fault("writes go to the active bank", LUT, "m.d.sync += shadow.eq(self._i_lut.p.code)",
          "m.d.sync += [shadow.eq(self._i_lut.p.code), entry.eq(self._i_lut.p.code)]", PAIR, BANKS),
    fault("bits of the index in reverse order", LUT, "chosen[slots[lane]], index[:",
          "chosen[slots[lane]], index[::-1][:", PAIR, BANKS),
    fault("bank changes before the last beat", LUT, "change_at(step & self.i.p.last)",
          "change_at(step)", STEADY),
    fault("beat lost when stalled", LUT, "banks.loaded & (~self.o.valid | self.o.ready)",
          "banks.loaded", PAIR),
    fault("beat doubled after a stall", LUT, "with m.If(self.o.ready):",
          "with m.If(self.o.ready & self.i.valid):", PAIR),
    fault("takes a beat without LUTs", LUT, "banks.loaded & (~self.o.valid", "(~self.o.valid",
          PAIR),
    fault("last lost", LUT, "beat.last.eq(self.i.p.last)", "beat.last.eq(0)", PAIR),
    fault("layer exponent of the next tensor", LUT, 'self._active_settings["layer_exponent"]',
          'self._pending_settings["layer_exponent"]', STEADY, BANKS),
    fault("mode of the next tensor", LUT, 'self._active_settings.get("mode", Const(0))',
          'self._pending_settings.get("mode", Const(0))', MIXED, BANKS),
    fault("promotion without its exponent", LUT, " + by_mode(self.mode, units)", "", MIXED, BANKS),
    fault("promotion to half", LUT, "promoted_codes(modes.hif).tolist()",
          "[modes.hif.encode(modes.hif.decode(int(code)).value / 2)"
          " for code in promoted_codes(modes.hif)]", MIXED, BANKS),
    fault("reset keeps the bank", LUT, 'Signal(name="loaded")',
          'Signal(name="loaded", reset_less=True)', PAIR, BANKS),
    fault("scale exponent off by one", FLOAT, "BIAS + modes.product_bits",
          "128 + modes.product_bits", NARROW),
    fault("subnormal scale taken as normal", FLOAT, "Cat(mantissa, exponent.any())",
          "Cat(mantissa, 1)", NARROW, FIELDS),
    fault("exponent of subnormals one low", FLOAT, "exponent[0] | ~exponent.any()", "exponent[0]",
          NARROW, FIELDS),
    fault("sign of the scale lost", FLOAT, "self.sign ^ other.sign", "other.sign", MIXED, FACTOR),
    fault("row scale of the first slot", FLOAT, "beat.row_scales[slot]", "beat.row_scales[0]",
          MIXED),
    fault("lowest HIF significand lost", FLOAT, "[: fmt.significand_bits]\n    return",
          "[: fmt.significand_bits - 1]\n    return", NARROW, FACTOR),
    fault("tie away from zero", FLOAT, "half & (rest | kept[0])", "half", BFLOAT, ROUNDING),
    fault("overflow not seen", FLOAT, "exponent >= TOP_EXPONENT",
          "exponent > TOP_EXPONENT", NARROW),
    fault("underflow one binade low", FLOAT, "(exponent < 1)", "(exponent < 0)", NARROW),
    fault("rounding into infinity not seen", FLOAT, "into_infinity = carry &",
          "into_infinity = 0 &", BFLOAT),
    fault("rounding into range taken as underflow", FLOAT, "into_range = carry &",
          "into_range = 0 &", BFLOAT),
    fault("exponent of the product kept", FLOAT, "product.exponent - zeros", "product.exponent",
          NARROW),
    fault("reserved not seen", FLOAT, "reserved = shift >= fmt.shifts", "reserved = Const(0)",
          BFLOAT, FACTOR),
    fault("stage overwritten when stalled", FLOAT, "ready[-1].eq(~o.valid | o.ready)",
          "ready[-1].eq(1)", NARROW, PIPELINE),
    fault("reset keeps a beat", FLOAT, 'Signal(name=f"valid_{stage}")',
          'Signal(name=f"valid_{stage}", reset_less=True)', NARROW, PIPELINE),
    fault("sticky bit lost", MERGER, "Cat(value[0] | sticky, value[1:])", "value", MERGE, ADDER),
    fault("far operand not lost", MERGER, "Mux(far, 0, Cat(", "Mux(0, 0, Cat(", MERGE, ADDER),
    fault("tie up", MERGER, "half & (rest | kept[0])", "half", MERGE, ROUNDING),
    fault("minus zero", MERGER, "normalized.sign & (value.any() | normalized.infinite)",
          "normalized.sign", MERGE, ADDER),
    fault("subnormals flushed", MERGER, "result.probe.eq(result.sum | marker)",
          "result.probe.eq(result.sum)", MERGE, ADDER),
    fault("exponent not raised by rounding", MERGER,
          "Mux(carry, fields[1], fields[0])", "fields[0]", MERGE, ADDER),
    fault("infinity of the dense value lost", MERGER,
          "too_large[0]) | normalized.infinite", "too_large[0])", MERGE, ADDER),
    fault("overflow by rounding not seen", MERGER, "Mux(carry, too_large[1], too_large[0])",
          "too_large[0]", MERGE, ADDER),
    fault("correction in the neighbour's lane", MERGER, "before.lane == lane for",
          "before.lane == (lane ^ 1) for", MERGE),
    fault("value of the neighbour's lane", MERGER, "Mux(issued.lane == lane,",
          "Mux(issued.lane == (lane ^ 1),", MERGE),
    fault("entry lost when stalled", MERGER, "entries.take.eq(advance & take_entry)",
          "entries.take.eq(take_entry)", MERGE),
    fault("position not reset", MERGER, "*(end.eq(end.init) for end in ends)", "", MERGE, WINDOW),
    fault("lowest position not reset", MERGER, "lowest.eq(0), ", "", MERGE, WINDOW),
    fault("lowest position not raised by a beat", MERGER, "lowest.eq(ends[0])", "lowest.eq(lowest)",
          MERGE, WINDOW),
    fault("misplaced not seen", MERGER, "misplaced.eq(misplaced | wrong)", "misplaced.eq(0)",
          MERGE),
    fault("one correction a beat only", MERGER,
          "entry.last | (~beat.last & entries.following_later)", "1", MERGE),
    fault("clock lost with every correction", MERGER,
          "entry.last | (~beat.last & entries.following_later)", "0", MERGE_STEADY),
    fault("later beats of a held entry not counted", MERGER,
          "following_after.eq(after(2, position, following_after, position >= ends[2]))",
          "following_after.eq(after(2, position, following_after, 0))", MERGE, WINDOW),
    fault("bfloat16 truncated", MERGER, "rounded.eq(kept + up)", "rounded.eq(kept)",
          MERGE_BFLOAT),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.unit}: {fault.name}")
def test_fault_is_noticed(fault: Fault, noticed: Callable[[Fault], None]) -> None:
    noticed(fault)


@pytest.mark.parametrize(
    "fault",
    {(fault.unit, fault.config): fault for fault in FAULTS}.values(),
    ids=lambda fault: f"{fault.unit}-{FAULTS.index(fault)}",
)
def test_control_without_fault(fault: Fault, build_root: Path) -> None:
    run_with_fault(fault, build_root, broken=False)
