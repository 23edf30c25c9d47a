"""Wrong versions of SopTile and its parts, each of which the bench must notice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sim.tile_config import TileConfig
from tb.faults import Fault, run_with_fault

TILE, PRODUCTS, FACTOR = "sop_tile", "products", "parts.factor"
PRODUCT, ADDER, PIPELINE = "parts.scaled_product", "parts.float_adder", "parts.pipeline"

# Small, so that they build quickly. Two units and a step without an output; as many steps as clocks
# of a block; fewer outputs than stages of the adder, and codes that are reserved.
PLAIN = TileConfig("HIF7^8sS1E5M5", "INT8^8sUE8M0", 3, 3, "both", 3, "shift_operands")
FULL = TileConfig("HIF7^8sS1E5M5", "INT8^8sUE8M0", 4, 2, "both", 3)
FLOATS = TileConfig("E2M1^8sBF16", "E4M3^8sUE4M4", 2, 2, "both", 3)
SHIFTS = TileConfig("HIF8^8sUE4M4", "E2M3^8sBF16", 2, 2, "both", 3)
SIGNS = TileConfig("HIF7^8sUE4M4", "INT8^8sUE8M0", 2, 1, "both", 3, "sign_magnitude")


def fault(
    name: str, module: str, old: str, new: str, config: TileConfig = PLAIN, tests: str = "random"
) -> Fault:
    """A fault of the tile in one of its modules; random tiles have to show it, or those tests."""
    return Fault(name, "sop_tile", module, old, new, config, tests)


FAULTS = (
    fault("first block not cleared", TILE, "Mux(opens, 0, returning)", "returning"),
    fault("scales of the next block", TILE, 'held(code, f"{name}_{number}_now")', "code"),
    fault("partial sum not cleared", TILE, "Mux(block.first, 0, partial)", "partial"),
    fault("ring stops with outputs in it", TILE, "advance & (valid | Cat(leaving).any())",
          "advance & valid"),
    fault("ring as short as the outputs", TILE, "max(self.used, float_adder.LATENCY)", "self.used",
          FLOATS),
    fault("stalled output overwritten", TILE, "advance.eq(~self.o.valid | self.o.ready)",
          "advance.eq(1)"),
    fault("outputs in the next unit", TILE, "number = unit * self.used + step",
          "number = (unit + 1) % self.units * self.used + step"),
    fault("smallest significand", PRODUCTS, "significand = code[: fmt.significand_bits]",
          "significand = code[: fmt.significand_bits - 1]"),
    fault("product always rounded up", PRODUCT, "increment(kept, denormalized.value[0],",
          "increment(kept, denormalized.value[0] | denormalized.rest,", FLOATS),
    fault("reset keeps operands", TILE, 'name="operands", reset=True', 'name="operands"',
          tests="reset"),
)  # fmt: skip
"""Those of every run."""

MORE_FAULTS = (
    fault("weights not waited for", TILE, "self.i_activation.ready.eq(advance & self.i.valid)",
          "self.i_activation.ready.eq(advance)"),
    fault("activations not waited for", TILE, "self.i.ready.eq(advance & self.i_activation.valid)",
          "self.i.ready.eq(advance)"),
    fault("beats lost when stalled", TILE, "self.i.ready.eq(advance & self.i_activation.valid)",
          "self.i.ready.eq(self.i_activation.valid)"),
    fault("rows in reverse order", TILE, "return number % self.rows,",
          "return self.rows - 1 - number % self.rows,"),
    fault("columns first", TILE, "sums.append(total)", "sums.insert(0, total)"),
    fault("block one beat short", TILE, "place == self.block_size - 1",
          "place == self.block_size - 2"),
    fault("tile may end anywhere", TILE, "opens=held(fresh, \"opens\", begins)",
          "opens=held(fresh, \"opens\")"),
    fault("nothing opens after a reset", TILE, "fresh = Signal(init=1)", "fresh = Signal()"),
    fault("sum cleared one beat late", TILE, 'first=held(~place.any(), "first")',
          'first=held(place == 1, "first")'),
    fault("products added when there are none", TILE,
          "with m.If(advance & block.valid):\n                    m.d.sync += partial",
          "with m.If(advance):\n                    m.d.sync += partial"),
    fault("products added when stalled", TILE,
          "with m.If(advance & block.valid):\n                    m.d.sync += partial",
          "with m.If(block.valid):\n                    m.d.sync += partial"),
    fault("block handed over when stalled", TILE, "advance & block.valid & block.ends",
          "block.valid & block.ends", FULL),
    fault("block handed over twice", TILE, "advance & block.valid & block.ends",
          "advance & block.ends"),
    fault("block handed over before its end", TILE, "advance & block.valid & block.ends",
          "advance & block.valid & block.first"),
    fault("scales of every beat", TILE, 'f"{name}_{number}_next", begins',
          'f"{name}_{number}_next"'),
    fault("scale of the row above", TILE, "values[place[axis]]", "values[place[axis] - 1]"),
    fault("scale of the row for the column", TILE, 'of_step("activation", 1)',
          'of_step("activation", 0)'),
    fault("layer exponent forgotten", TILE, ' + turn.layer_exponent', ""),
    fault("exponents of tokens forgotten", TILE, 'if "token_exponents" in turn.scales:', "if 0:",
          FLOATS),
    fault("exponents of tokens without sign", TILE, 'of_step("token_exponents", 1)',
          'of_step("token_exponents", 1).as_unsigned()', FLOATS),
    fault("unit of the weights forgotten", TILE,
          "unit_exponent(self.weight) + unit_exponent(self.activation)",
          "unit_exponent(self.activation)", FLOATS),
    fault("unit of the activations forgotten", TILE,
          "unit_exponent(self.weight) + unit_exponent(self.activation)",
          "unit_exponent(self.weight)", FLOATS),
    fault("sum without sign", TILE, '("integer", integer)', '("integer", abs(integer))'),
    fault("largest sum does not fit", TILE, "signed(largest.bit_length() + 1)",
          "signed(largest.bit_length())", SIGNS),
    fault("units stop early", TILE, "busy.eq(step != steps - 1)", "busy.eq(step != steps - 2)"),
    fault("units go on", TILE, "busy.eq(step != steps - 1)", "busy.eq(1)"),
    fault("step not reset", TILE, "busy.eq(1), step.eq(0)", "busy.eq(1)"),
    fault("every block leaves", TILE, "turn.closes & (turn.step < shape.used)",
          "turn.step < shape.used"),
    fault("empty steps leave", TILE, "turn.closes & (turn.step < shape.used)", "turn.closes",
          FLOATS),
    fault("last one beat early", TILE, '"last": turn.step == shape.used - 1',
          '"last": turn.step == shape.used - 2'),
    fault("ring moves without a term", TILE, "advance & (valid | Cat(leaving).any())", "advance"),
    fault("ring moves when stalled", TILE, "advance & (valid | Cat(leaving).any())",
          "valid | Cat(leaving).any()"),
    fault("ring one register short", TILE, "[total, *rest][-1]", "[total, *rest[:-1]][-1]",
          TileConfig("HIF7^8sS1E5M5", "INT8^8sUE8M0", 6, 1, "both", 3)),
    fault("overflow of the first unit", TILE, "overflow.eq(Cat(overflows).any())",
          "overflow.eq(overflows[0])"),
    fault("reserved stays", TILE, "reserved_so_far & ~(block.opens & block.first)",
          "reserved_so_far", SHIFTS, "reserved"),
    fault("reserved of the last beat", TILE,
          "block.reserved | (reserved_so_far & ~(block.opens & block.first))", "block.reserved",
          SHIFTS, "reserved"),
    fault("reserved scale not seen", TILE, "[~place.any() & bad_scales]", "[]", FLOATS, "reserved"),
    fault("reserved scale where it does not count", TILE, "[~place.any() & bad_scales]",
          "[bad_scales]", FLOATS),
    fault("reset keeps a step", TILE, "busy = Signal()", "busy = Signal(reset_less=True)",
          tests="reset"),
    fault("reset keeps outputs", TILE, 'name="leaves", reset=True', 'name="leaves"',
          tests="reset"),
    fault("reset keeps the place", TILE, "place = Signal(range(self.block_size))",
          "place = Signal(range(self.block_size), reset_less=True)", tests="reset"),
    fault("top bit of an operand lost", PRODUCTS, "len(integer) + _highest_shift(fmt)",
          "len(integer) + _highest_shift(fmt) - 1"),
    fault("one shift only", PRODUCTS, "sum(shifts[1:], start=shifts[0])", "shifts[0]", SHIFTS),
    fault("lowest exponents of floats", PRODUCTS, "(factor.exponent - 1)", "(factor.exponent)",
          FLOATS),
    fault("sign of the activation lost", PRODUCTS, 'weight["sign"] ^ activation["sign"]',
          'weight["sign"]', SIGNS),
    fault("negative integers", PRODUCTS, "Mux(sign, -magnitude, magnitude)", "magnitude"),
    fault("reserved shift moves further", FACTOR, "Mux(reserved, fmt.shifts - 1, shift)", "shift",
          SHIFTS, "reserved"),
    fault("infinity does not stay", ADDER, "too_large[0]) | normalized.infinite", "too_large[0])"),
    fault("subnormal terms flushed", PRODUCT, "Mux(far, 0, value)", "Mux(below, 0, value)"),
    fault("delay moves without enable", PIPELINE, "with m.If(advance):", "with m.If(1):"),
)  # fmt: skip
"""With --all-simulations."""


@pytest.mark.parametrize("fault", FAULTS + MORE_FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault: Fault, noticed: Callable[..., None]) -> None:
    noticed(fault, MORE_FAULTS)


CONFIGS = {fault.config: fault for fault in FAULTS + MORE_FAULTS}


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.rows}x{config.columns}-{config.multiplier}"
)
def test_control_without_fault(config: TileConfig, build_root: Path, thorough: bool) -> None:
    if config not in (PLAIN, FLOATS) and not thorough:
        pytest.skip("only with --all-simulations")
    fault = CONFIGS[config]
    control = Fault("none", fault.unit, fault.module, fault.old, fault.new, config,
                    "random|reserved|reset")  # fmt: skip
    run_with_fault(control, build_root, broken=False)
