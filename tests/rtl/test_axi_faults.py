"""Wrong versions of SopDecoderAxi's parts, each of which its bench must notice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sim.bench_config import BenchConfig
from tb.axi_bench import SEEDS_VARIABLE
from tb.faults import Fault, run_with_fault

UNIT = "sop_decoder_axi"
SEEDS = {SEEDS_VARIABLE: "1 8"}

# Two beats a block; blocks shorter than a beat, with row scales; without corrections and floats.
HELD = BenchConfig("NF4sUE4M4", "HIF7", 8)
SHORT = BenchConfig("NF4^8sRS1E2M4", "HIF7", 16)
CODES = BenchConfig("DD4-NF4^8sRS1E2M4", "HIF8T", 16, "codes")
# Its banks of LUTs take turns.
BANKS = BenchConfig("DD4-NF4sUE4M4", "HIF8T", 16, "bfloat16", lookup="memory")
WIDE = BenchConfig("NF4sUE4M4", "HIF7", 64, "bfloat16")

PLANE, CSR, ROW_SCALES, SOURCE = "plane_reader", "csr_reader", "row_scales", "beat_source"
LITE, SLICE, CORE, TOP = "axi_lite", "register_slice", "tensor_core", UNIT
WINDOW = "correction_window"


def fault(name: str, module: str, old: str, new: str, config: BenchConfig, testcase: str) -> Fault:
    """A fault of the unit in one of its modules."""
    return Fault(name, UNIT, module, old, new, config, testcase, SEEDS)


FAULTS = (
    fault("short packet not flagged", PLANE, "~dry & self.i.p.last & ~final", "0",
          CODES, "every_damage"),
    fault("rest of a long packet not dropped", PLANE, "final & ~dry & ~self.i.p.last", "0",
          CODES, "every_damage"),
    fault("buffer not cleared", PLANE, "kept.eq(Mux(begins, 0, Mux(step, shifted, buffer)))",
          "kept.eq(Mux(step, shifted, buffer))", CODES, "random_seeds"),
    fault("clock lost between planes", PLANE, "(~fill.any() | (step & final_piece))",
          "~fill.any()", CODES, "full_rate"),
    fault("columns need not ascend", WINDOW,
          "Mux(self.used, position <= entry.position, position < lowest)", "0",
          HELD, "every_damage"),
    fault("column bound off by one", CSR, "(column < columns)", "(column <= columns)",
          HELD, "every_damage"),
    fault("row pointer not checked", CSR, "with m.If(fits):", "with m.If(fits | 1):",
          HELD, "every_damage"),
    fault("unwanted entries kept for the next tensor", CORE, "sink, clear=finish", "sink",
          HELD, "every_damage"),
    fault("row scale one slot too long", ROW_SCALES, "ends.eq(left <= room)",
          "ends.eq(left < room)", CODES, "random_seeds"),
    fault("neighbouring elements swapped", SOURCE,
          "[lane * fmt.index_bits : (lane + 1) * fmt.index_bits]",
          "[(lane ^ 1) * fmt.index_bits : ((lane ^ 1) + 1) * fmt.index_bits]",
          CODES, "random_seeds"),
    fault("scale word not held", SOURCE, "step & (enough | final)", "step", HELD, "random_seeds"),
    fault("LUT write taken while a tensor waits", CORE, "decode.i_lut.ready & ~waiting.pending",
          "decode.i_lut.ready | waiting.pending", CODES, "refused"),
    fault("layer exponent of the next tensor", CORE, 'waiting.values["layer_exponent"]),',
          "self.layer_exponent),", CODES, "random_seeds"),
    fault("word lost when stalled", SLICE, "spare.eq(self.i.p), spare_valid.eq(1)",
          "spare.eq(self.i.p)", CODES, "random_seeds"),
    fault("word given twice", SLICE, "~self.o.valid | self.o.ready",
          "~self.o.valid | (self.o.ready & self.i.valid)", CODES, "random_seeds"),
    fault("reset command keeps words of streams", TOP, "ResetInserter(core_reset)(cut)", "cut",
          CODES, "reset_in_mid_packet"),
    fault("clearing one flag clears all", TOP, "~clear[field.lowest]", "~clear.any()",
          HELD, "every_damage"),
    fault("enable of interrupts ignored", TOP, '(interrupts & values["IRQ_ENABLE"]).any()',
          "interrupts.any()", CODES, "random_seeds"),
    fault("START without LUTs", CORE, "~by_mode(self.mode, complete)", "0",
          HELD, "start_without_luts"),
    fault("two commands at once", TOP, "several = (asked", "several = 0 & (asked",
          HELD, "commands_together"),
    fault("stop that does not end the packet", TOP, "Mux(stopping, inside, self.core.o.valid)",
          "self.core.o.valid", HELD, "stop_in_mid_packet"),
    fault("values in the beat that ends a stopped packet", TOP, "& ~stopping for lane",
          "for lane", HELD, "stop_in_mid_packet"),
    fault("timeout that counts on", TOP, "Mux(quiet, clocks + 1, 0)", "clocks + 1",
          HELD, "timeout"),
    fault("identification of another mode", TOP, 'by_mode(values["MODE"], formats), 0)',
          'by_mode(values["MODE"], formats), 1)', HELD, "identities"),
    fault("tlast missing", TOP, "out.i.p.last.eq(beat.last | stopping)",
          "out.i.p.last.eq(stopping)",
          CODES, "random_seeds"),
)  # fmt: skip

# Those that --all-simulations adds.
MORE_FAULTS = (
    fault("tail off by one", SOURCE, "remaining[: len(self.tail)]",
          "remaining[: len(self.tail)] - 1", SHORT, "random_seeds"),
    fault("next packet used where one is short", PLANE, "Mux(dry, 0, self.i.p.data)",
          "self.i.p.data", CODES, "every_damage"),
    fault("row after a wrong pointer kept", CSR, "skip.eq(~sure)", "skip.eq(0)",
          HELD, "every_damage"),
    fault("tail of the tensor before", CORE, "Mux(gone, tails[1], tails[0])", "tails[0]",
          SHORT, "random_seeds"),
    fault("final word counts as a whole", PLANE, "Mux(final, tail_now + 1, width // unit)",
          "width // unit", CODES, "random_seeds"),
    fault("rest of dropped corrections kept", PLANE, "with m.If(~ended & ~dry):",
          "with m.If(ended):", HELD, "every_damage"),
    fault("upper half of columns ignored", CSR, "columns > 1 << 16", "columns > 1 << 20",
          WIDE, "wide_columns"),
    fault("first row counted", CSR, "Mux(row.any(), row_weights, 0)", "row_weights",
          HELD, "random_seeds"),
    fault("partial final beat never complete", ROW_SCALES, "final.eq(rows == 1)", "final.eq(0)",
          CODES, "random_seeds"),
    fault("clock lost between row scales", ROW_SCALES,
          "self.done | (step & ends & (rows == 1))", "self.done", CODES, "full_rate"),
    fault("clock lost between tensors", SOURCE, "self.done | (step & final)", "self.done",
          CODES, "full_rate"),
    fault("tensor done before its packets end", CORE, "Cat(waiting.over).all()", "1",
          CODES, "long_packet"),
    fault("next tensor overtakes", CORE, "(under_way != _MOST_TENSORS)", "1",
          SHORT, "overlap"),
    fault("write carried out twice", LITE, "address_here & data_here & ~self.axi_bvalid",
          "address_here & data_here", CODES, "random_seeds"),
    fault("every read is answered with OKAY", LITE, "self._response(self.read_refused)", "_OKAY",
          CODES, "registers"),
    fault("byte strobes ignored", TOP, "Cat(bit.replicate(8) for bit in bridge.write_strobe)",
          "Const(0xFFFFFFFF, 32)", CODES, "registers"),
    fault("ERROR_ENABLE ignored", TOP, '(flags & values["ERROR_ENABLE"]).any()', "flags.any()",
          CODES, "every_damage"),
    fault("one LUT of two is enough", CORE, "for lut in range(len(fmt.codebooks))",
          "for lut in range(1)", BANKS, "start_without_luts"),
    fault("a bank counts for both", CORE, "range(1 + turns)", "range(1)",
          BANKS, "start_without_luts"),
    fault("START after a stop", TOP, "core.start_ready & ~commands.stopping", "core.start_ready",
          HELD, "stop_when_idle"),
    fault("timeout without a tensor", TOP, "self.core.busy & ~moves", "~moves", HELD, "timeout"),
    fault("timeout while words move", TOP, "& ~moves & ~written", "& ~written", HELD, "timeout"),
    fault("counter stuck", TOP, "counter.eq(counter + event)", "counter.eq(event)",
          CODES, "random_seeds"),
    fault("reset command does not reach the core", TOP, "ResetInserter(core_reset)(core)", "core",
          CODES, "reset_in_mid_packet"),
)  # fmt: skip


@pytest.mark.parametrize(
    "fault", FAULTS + MORE_FAULTS, ids=lambda fault: f"{fault.module}: {fault.name}"
)
def test_fault_is_noticed(fault: Fault, noticed: Callable[..., None]) -> None:
    noticed(fault, MORE_FAULTS, match="AssertionError")


@pytest.mark.parametrize(
    "config", [HELD, SHORT, CODES, BANKS], ids=lambda config: config.format_name
)
def test_control_without_fault(config: BenchConfig, build_root: Path, thorough: bool) -> None:
    """Of the same builds and tests; what only ``thorough`` needs is left out without it."""
    tests = {
        fault.testcase
        for fault in FAULTS + (MORE_FAULTS if thorough else ())
        if fault.config == config
    }
    if not tests:
        pytest.skip("only with --all-simulations")
    control = fault("control", PLANE, "", "", config, "|".join(sorted(tests)))
    run_with_fault(control, build_root, broken=False)
