"""Every checker can fail: wrong versions of the RTL, each of which a bench must notice.

A fault replaces one piece of source text of a unit, which must occur exactly once, so that a fault
cannot silently stop being one.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from amaranth.lib import data, wiring

import rtl.hif_to_float
import rtl.lut_decoder
import rtl.sparse_merge
from rtl.units import FLOAT_LAYOUTS
from rtl.verilog import to_verilog
from tb.bench import BenchConfig
from tb.simulator import Design, SimulationError, available_simulators, simulate

PAIR = BenchConfig("BOF4-NF4sS1E5M5", lanes=16, stalls="both", seed=3)
STEADY = BenchConfig("BOF4-NF4sS1E5M5", lanes=32, seed=3)
MIXED = BenchConfig("BOF4-NF4^32sRS1E2M4 E2M3sUE4M4 NF4sUE4M4 INT8sUE4M4", "HIF8", 32, seed=3)
BFLOAT = BenchConfig("NF4sBF16", "HIF8", 16, "bfloat16", "both", 3)
MERGE = BenchConfig("NF4sUE4M4", lanes=16, stalls="both", seed=3)
MERGE_STEADY = BenchConfig("NF4sUE4M4", lanes=16, seed=3)
MERGE_BFLOAT = BenchConfig("NF4sUE4M4", lanes=16, output="bfloat16", stalls="both", seed=3)


@dataclass(frozen=True)
class Fault:
    """One wrong version: text of the unit's module and what it becomes, and the traffic."""

    name: str
    module: ModuleType
    old: str
    new: str
    config: BenchConfig

    @property
    def unit(self) -> str:
        """Name of the unit."""
        return self.module.__name__.rpartition(".")[2]


LUT, FLOAT, MERGER = rtl.lut_decoder, rtl.hif_to_float, rtl.sparse_merge

FAULTS = (
    Fault("lanes in reverse order", LUT, "in enumerate(codes)", "in enumerate(codes[::-1])", PAIR),
    Fault("metabit inverted", LUT, "code.eq(Mux(select, second, first))",
          "code.eq(Mux(select, first, second))", PAIR),
    Fault("metabit of the first block", LUT,
          "for word in self.i.p.scale_words:",
          "for word in [self.i.p.scale_words[0]] * modes.slots(self.lanes):", STEADY),
    Fault("metabit one bit too low", LUT, "word[fmt.word.scale.width] if",
          "word[fmt.word.scale.width - 1] if", PAIR),
    Fault("bank never changes", LUT, "m.d.sync += entry.eq(shadow)", "pass", PAIR),
    Fault("writes go to the active bank", LUT, "m.d.sync += shadow.eq(self.i_lut.p.code)",
          "m.d.sync += [shadow.eq(self.i_lut.p.code), entry.eq(self.i_lut.p.code)]", PAIR),
    Fault("bits of the index in reverse order", LUT, "chosen[slots[lane]], index[:",
          "chosen[slots[lane]], index[::-1][:", PAIR),
    Fault("bank changes before the last beat", LUT, "~loaded | (step & self.i.p.last)",
          "~loaded | step", STEADY),
    Fault("beat lost when stalled", LUT, "loaded & (~self.o.valid | self.o.ready)", "loaded", PAIR),
    Fault("beat doubled after a stall", LUT, "with m.If(self.o.ready):",
          "with m.If(self.o.ready & self.i.valid):", PAIR),
    Fault("takes a beat without LUTs", LUT, "loaded & (~self.o.valid", "(~self.o.valid", PAIR),
    Fault("last lost", LUT, "beat.last.eq(self.i.p.last)", "beat.last.eq(0)", PAIR),
    Fault("layer exponent of the next tensor", LUT, 'exponent = active_settings["layer_exponent"]',
          'exponent = pending_settings["layer_exponent"]', STEADY),
    Fault("mode of the next tensor", LUT, 'mode = active_settings.get("mode", Const(0))',
          'mode = pending_settings.get("mode", Const(0))', MIXED),
    Fault("promotion without its exponent", LUT, "exponent + by_mode(mode, units)", "exponent",
          MIXED),
    Fault("promotion to half", LUT, "2**E2M3.mantissa_bits", "2 ** (E2M3.mantissa_bits - 1)",
          MIXED),
    Fault("reset keeps the bank", LUT, "loaded = Signal()", "loaded = Signal(reset_less=True)",
          PAIR),
    Fault("scale exponent off by one", FLOAT, "FLOAT_BIAS + modes.product_bits",
          "128 + modes.product_bits", PAIR),
    Fault("subnormal scale taken as normal", FLOAT, "normal = field.any()", "normal = Const(1)",
          PAIR),
    Fault("sign of the scale lost", FLOAT, "self.sign ^ other.sign", "other.sign", MIXED),
    Fault("row scale of the first slot", FLOAT, "beat.row_scales[slot]", "beat.row_scales[0]",
          MIXED),
    Fault("lowest HIF significand lost", FLOAT, "[: fmt.significand_bits]\n    return",
          "[: fmt.significand_bits - 1]\n    return", PAIR),
    Fault("tie away from zero", FLOAT, "half & (rest | kept[0])", "half", BFLOAT),
    Fault("overflow not seen", FLOAT, "exponent >= FLOAT_TOP_EXPONENT",
          "exponent > FLOAT_TOP_EXPONENT", PAIR),
    Fault("underflow one binade low", FLOAT, "(exponent < 1)", "(exponent < 0)", PAIR),
    Fault("reserved not seen", FLOAT, "reserved = shift >= fmt.shifts", "reserved = Const(0)",
          BFLOAT),
    Fault("stage overwritten when stalled", FLOAT, "ready[1].eq(~self.o.valid | self.o.ready)",
          "ready[1].eq(1)", PAIR),
    Fault("sticky bit lost", MERGER, "wide[width] | wide[:width].any()", "wide[width]", MERGE),
    Fault("tie up", MERGER, "(value[1] | value[0] | value[3])", "1", MERGE),
    Fault("minus zero", MERGER, "partial.sign & partial.sum.any()", "partial.sign", MERGE),
    Fault("subnormals flushed", MERGER, "moved + step <= left", "moved + step <= partial.exponent",
          MERGE),
    Fault("correction in the neighbour's lane", MERGER, "m.If(steps[1].lane[lane])",
          "m.If(steps[1].lane[lane - 1])", MERGE),
    Fault("entry lost when stalled", MERGER, "(take_entry & advance)", "take_entry", MERGE),
    Fault("position not reset", MERGER, "Mux(beat.last, 0, past_beat)", "past_beat", MERGE),
    Fault("misplaced not seen", MERGER, "misplaced.eq(misplaced | wrong)", "misplaced.eq(0)",
          MERGE),
    Fault("one correction a beat only", MERGER, "entry.last | belongs_later(following)", "1",
          MERGE),
    Fault("clock lost with every correction", MERGER, "entry.last | belongs_later(following)", "0",
          MERGE_STEADY),
    Fault("bfloat16 truncated", MERGER, "bits[16:] + (bits[15] & (bits[16] | bits[:15].any()))",
          "bits[16:]", MERGE_BFLOAT),
)  # fmt: skip


def build(fault: Fault, *, broken: bool) -> wiring.Component:
    """The unit from its source text, with or without the fault."""
    source = inspect.getsource(fault.module)
    if broken:
        assert source.count(fault.old) == 1, f"{fault.old!r} occurs {source.count(fault.old)} times"
        source = source.replace(fault.old, fault.new)
    module = ModuleType("rtl.faulty")
    exec(compile(source, fault.module.__file__ or "", "exec"), vars(module))
    layout: data.StructLayout = FLOAT_LAYOUTS[fault.config.output]
    lanes = fault.config.lanes
    if fault.module is LUT:
        unit: wiring.Component = module.LutDecoder(lanes=lanes, modes=fault.config.modes)
    elif fault.module is FLOAT:
        unit = module.HifToFloat(lanes=lanes, modes=fault.config.modes, float_layout=layout)
    else:
        unit = module.SparseMerge(lanes=lanes, float_layout=layout)
    return unit


def run(fault: Fault, build_root: Path, *, broken: bool) -> None:
    name = f"{fault.unit}_under_test"
    simulate(
        Design(name, to_verilog(build(fault, broken=broken), name), randomize=True),
        module=f"tb.{fault.unit}_bench",
        simulator=available_simulators()[-1],
        build_root=build_root,
        environment=fault.config.as_environment(),
        # Random traffic is enough, and the exhaustive test of a 16-bit scale takes minutes.
        testcase="random_beats|fills_while_stalled" if fault.module is FLOAT else ".*",
        seed=fault.config.seed,
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.unit}: {fault.name}")
def test_fault_is_noticed(fault: Fault, build_root: Path) -> None:
    with pytest.raises(SimulationError, match=r"AssertionError|SimTimeoutError|FAILED"):
        run(fault, build_root, broken=True)


@pytest.mark.parametrize(
    "fault",
    {(fault.module, fault.config): fault for fault in FAULTS}.values(),
    ids=lambda fault: f"{fault.unit}-{FAULTS.index(fault)}",
)
def test_control_without_fault(fault: Fault, build_root: Path) -> None:
    run(fault, build_root, broken=False)
