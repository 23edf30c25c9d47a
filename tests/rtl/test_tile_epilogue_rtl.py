"""TileEpilogue, its bench and wrong versions of it, each of which the bench must notice."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from golden.formats import INT8, UE8M0
from rtl.layouts import FLOAT32
from rtl.tile_banks import EpilogueShape
from rtl.tile_epilogue import TileEpilogue, clocks_of_tile
from sim.installed import quickest_simulator
from sim.simulator import SimulationError
from sim.stalls import STALL_MODES
from sim.tile_config import EpilogueConfig
from tb.faults import Fault, run_with_fault
from tb.traffic import EXAMPLES_VARIABLE, RANDOM_TRAFFIC
from tb.unit_run import run_unit

FASTEST = quickest_simulator()
EXAMPLES, ALL_EXAMPLES = 50, 1000  # the second with --all-simulations

PLAIN = EpilogueConfig(rows=8, columns=2)
# Several tokens and rows of a bank; powers of two per token; codes that are reserved.
TURNS = EpilogueConfig("NF4^8sUE4M4", "E4M3^8sUE4M4", 3, 3, output="bfloat16")
CONFIGS = (
    PLAIN,
    TURNS,
    # One token: an adder serves four banks.
    EpilogueConfig("NF4^16sRUE4M4", "HIF8^16sBF16", 64, 1, slots=16, output="bfloat16"),
    # Outputs of a token in two banks; one row.
    EpilogueConfig(activations="HIF8T^8sBF16", rows=3, columns=5, slots=2),
    EpilogueConfig(activations="E2M3^8sUE8M0", rows=1, columns=3, slots=4),
    EpilogueConfig("NF4^16sUE4M4", "INT4^16sUE4M4", 16, 3, slots=4),
)


def label(config: EpilogueConfig) -> str:
    return f"{config.rows}x{config.columns}-{config.weights}-{config.activations}"


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_tile_epilogue(
    config: EpilogueConfig, stalls: str, built_by_both: str, build_root: Path, thorough: bool
) -> None:
    if not thorough and CONFIGS.index(config) > 1:
        pytest.skip("only with --all-simulations")
    run_unit("tile_epilogue", replace(config, stalls=stalls, seed=5), built_by_both, build_root)


@pytest.mark.parametrize("config", [PLAIN, TURNS], ids=label)
def test_random_traffic(config: EpilogueConfig, build_root: Path, thorough: bool) -> None:
    if not thorough and config != PLAIN:
        pytest.skip("only with --all-simulations")
    environment = {EXAMPLES_VARIABLE: str(ALL_EXAMPLES if thorough else EXAMPLES)}
    run_unit("tile_epilogue", config, FASTEST, build_root, RANDOM_TRAFFIC, environment)


@pytest.mark.parametrize(
    ("rows", "columns", "size"),
    [(16, 16, 16), (64, 1, 16), (4, 3, 16), (3, 5, 8), (1, 16, 16), (256, 1, 16), (7, 9, 8)],
)
def test_every_output_has_one_place(rows: int, columns: int, size: int) -> None:
    """Each token of each row once, over the turns of its corrections, at most one a lane."""
    shape = EpilogueShape(rows, columns, size)
    places = set()
    for row in range(rows):
        tokens = []
        for turn in range(shape.turns):
            for lane in range(shape.lanes):
                target = shape.target(lane, row, turn)
                if target is not None:
                    bank, address, column = target
                    unit = lane * shape.banks_per_lane + bank
                    assert shape.place(unit, address) == (row, column)
                    places.add((unit, address))
                    tokens.append(column)
        assert sorted(tokens) == list(range(columns))
    assert len(places) == rows * columns


def test_clocks_of_a_tile() -> None:
    """One correction a clock; one of the same row waits for the sum before it."""
    shape = EpilogueShape(16, 16, 16)
    rows = list(range(16))
    assert shape.turns == 1
    assert clocks_of_tile(shape, [], row_scales=False) == 33
    assert clocks_of_tile(shape, [], row_scales=True) == 37
    assert clocks_of_tile(shape, rows, row_scales=True) == 32 + 16 + 11
    assert clocks_of_tile(shape, rows + rows, row_scales=True) == 32 + 32 + 11
    assert clocks_of_tile(shape, [3, 3, 3], row_scales=True) == 32 + 13 + 11
    # Three tokens in one bank take three clocks.
    assert clocks_of_tile(EpilogueShape(4, 3, 16), [0, 1], row_scales=False) == 24 + 6 + 11


ARGUMENTS: dict[str, Any] = {
    "rows": 4, "columns": 4, "block_size": 16, "activation": INT8, "activation_scale": UE8M0,
    "slots": 8, "row_scales": False, "float_layout": FLOAT32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 0}, "slots must be a power of two from 2 to 65536, not 0"),
        ({"slots": 12}, "slots must be a power of two from 2 to 65536, not 12"),
        ({"float_layout": None}, "float_layout must be FLOAT32 or BFLOAT16, not None"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TileEpilogue(**ARGUMENTS | changes)


# --- wrong versions -------------------------------------------------------------------------------

STALLED, STALLED_TURNS = (replace(config, stalls="both", seed=3) for config in (PLAIN, TURNS))
TOKEN = replace(CONFIGS[2], rows=16, weights="NF4^8sRUE4M4", activations="INT8^8sUE8M0",
                stalls="in", seed=3)  # fmt: skip
EPILOGUE, BANKS, CAPTURE = "tile_epilogue", "tile_banks", "column_capture"


def fault(
    name: str, old: str, new: str, config: EpilogueConfig = STALLED, tests: str = "random",
    module: str = EPILOGUE,
) -> Fault:  # fmt: skip
    return Fault(name, "tile_epilogue", module, old, new, config, tests)


FAULTS = (
    fault("row scale after the corrections", "valid[-1], address, values)",
          "valid[-1], address, [v.as_value() for v in self.i.p.values])"),
    fault("correction does not wait for the sum before", "issue.eq(ready & usable & ~waits)",
          "issue.eq(ready & usable)"),
    fault("row scale of another row", "scales[row].as_value() for",
          "scales[row - 1].as_value() for"),
    fault("outputs leave before the last sum", "leaving & ~filled & ~added", "leaving & ~filled"),
    fault("activations of the other half", "Cat(self.slot, reads)", "Cat(self.slot, ~reads)",
          module=CAPTURE),
)  # fmt: skip
"""Those of every run."""

MORE_FAULTS = (
    fault("row scales of the tile before", "accept & final),\n        ]\n        clocks",
          "accept & ~step.any()),\n        ]\n        clocks"),
    fault("row scale not rounded", "held.sign ^ factor.sign,\n            factor.significand",
          "held.sign ^ factor.sign,\n            factor.significand & 0xF8"),
    fault("infinity times zero", "infinite, _INFINITE << 23, product", "0, 0, product"),
    fault("infinity keeps its sign", "Cat(magnitude, product.sign)",
          "Cat(magnitude, Mux(infinite, 0, product.sign))"),
    fault("subnormal sums have the exponent below", "held.exponent[0] | ~normal",
          "held.exponent[0]"),
    fault("sums are overwritten", "self.i.ready.eq(filling & self.i_row_scale.valid)",
          "self.i.ready.eq(self.i_row_scale.valid)"),
    fault("sums do not wait for row scales", "self.i.ready.eq(filling & self.i_row_scale.valid)",
          "self.i.ready.eq(filling)", tests="late"),
    fault("sum not added", "total, _ = add_floats(m, data.View(FLOAT32, before), product",
          "total, _ = add_floats(m, data.View(FLOAT32, before & 0), product"),
    fault("-0 and -0 are +0", "total.sign | negative", "total.sign"),
    fault("waits one clock too few",
          'delayed(m, key, float_adder.LATENCY, advance=Const(1), name="correction_key")',
          'delayed(m, key, float_adder.LATENCY - 1, advance=Const(1), name="correction_key")'),
    fault("sum written one clock early", "self._valid[-1]", "self._valid[-2]", module=BANKS),
    fault("sum read one clock early", "banks.read_at(lane, targets.address(lane, _PRODUCT))",
          "banks.read_at(lane, targets.address(lane, _PRODUCT - 1))"),
    fault("written to the address of a later correction",
          "targets.address(lane, _SUM), total", "targets.address(lane, _SUM - 1), total"),
    fault("product not rounded", "registered(\"significand\", factor.significand)",
          "registered(\"significand\", factor.significand & 0xFFFE)"),
    fault("sign of an activation of zero", "(element.sign ^ scale.sign) & ~zero)",
          "(element.sign ^ scale.sign))"),
    fault("sign of the activation lost", "value.sign ^ ((element.sign ^ scale.sign) & ~zero)",
          "value.sign"),
    fault("unit of the activation lost", "(factor.offset + element.offset)", "factor.offset",
          STALLED_TURNS),
    fault("exponent of the token lost", 'if "token_exponents" in kept', "if 0",
          STALLED_TURNS),
    fault("exponent of the token without sign", 'kept["token_exponents"].as_signed()',
          'kept["token_exponents"].as_unsigned()', STALLED_TURNS),
    fault("first token for all", "column = targets.column(lane)", "column = Const(0)"),
    fault("turn not counted", "m.d.sync += turn.eq(turn + 1)", "pass", STALLED_TURNS),
    fault("last turn left out", "turn == shape.turns - 1", "turn == shape.turns - 2",
          STALLED_TURNS),
    fault("turns do not count for waiting", "key = Cat(turn, entry.row)",
          "key = Cat(Const(0, len(turn)), entry.row)", STALLED_TURNS),
    fault("all banks of a lane are written", "valid & (bank == number)", "valid", TOKEN,
          module=BANKS),
    fault("first bank of a lane is read", "pick(values, bank)",
          "pick(values[:1], bank)", TOKEN, module=BANKS),
    fault("does not wait for activations", "self.i_correction.valid & capture.complete",
          "self.i_correction.valid"),
    fault("half not released", "capture.release.eq(taken & entry.last)", "capture.release.eq(0)"),
    fault("half released early", "capture.release.eq(taken & entry.last)",
          "capture.release.eq(taken & ~entry.last)"),
    fault("correction taken when it waits", "(~waits & (turn", "((turn"),
    fault("infinite correction added", "usable.eq(~(entry.empty | outside | infinite))",
          "usable.eq(~(entry.empty | outside))", tests="dropped"),
    fault("slot that is not kept", " | (entry.slot >= capture.count)", "", tests="dropped"),
    fault("row that is not there", "(entry.row >= self.rows) | ", "", STALLED_TURNS, "dropped"),
    fault("empty correction added", "~(entry.empty | outside", "~(outside"),
    fault("misplaced stays", "misplaced.eq(0)", "misplaced.eq(misplaced)", tests="dropped"),
    fault("reserved stays", "(reserved & step.any()) |", "reserved |", tests="dropped"),
    fault("reserved of the sums lost", "| self.i.p.reserved | bad_scales", "| bad_scales",
          tests="dropped"),
    fault("reserved row scale not seen", "| self.i.p.reserved | bad_scales",
          "| self.i.p.reserved", tests="dropped"),
    fault("columns dropped in silence", " | (entry.last & capture.misplaced)", "",
          tests="dropped"),
    fault("overflow of the first unit", "beat.overflow.eq(Cat(overflows).any())",
          "beat.overflow.eq(overflows[0])"),
    fault("bfloat16 cut off", "rounded.eq(kept + up)", "rounded.eq(kept)", STALLED_TURNS),
    fault("output lost when stalled", "free.eq(~self.o.valid | self.o.ready)", "free.eq(1)"),
    fault("places without an output", "value = read.data if there == shape.used else "
          "Mux(self.step < there, read.data, 0)", "value = read.data",
          replace(TURNS, weights="NF4^8sRUE4M4"), module=BANKS),
    fault("reset keeps corrections", 'name="correction", reset=True', 'name="correction"',
          replace(PLAIN, weights="NF4^8sUE4M4"), "reset"),
    fault("reset keeps the state", "adding, leaving = Signal(init=1), Signal(), Signal()",
          "adding, leaving = Signal(init=1), Signal(reset_less=True), Signal(reset_less=True)",
          tests="reset"),
    fault("reset keeps what was kept", 'Signal(name=f"complete_{half}")',
          'Signal(name=f"complete_{half}", reset_less=True)', tests="reset", module=CAPTURE),
    fault("reset keeps the channel", "channel, count = Signal(32)",
          "channel, count = Signal(32, reset_less=True)", tests="reset", module=CAPTURE),
    fault("scales of every beat", "now = Mux(place.any(), held, now)", "pass", module=CAPTURE),
    fault("scales of the block before", "now = Mux(place.any(), held, now)", "now = held",
          module=CAPTURE),
    fault("half overwritten", "~Mux(writes, complete[1], complete[0]) & ~rest & known",
          "~rest & known", module=CAPTURE),
    fault("columns not waited for", "known.eq(listed | self.i_column.valid)", "known.eq(1)",
          module=CAPTURE),
    fault("columns of the next tile", "listed.eq(none_left)", "listed.eq(0)", module=CAPTURE),
    fault("rest of the columns not dropped", "m.d.sync += rest.eq(~none_left)", "pass",
          tests="dropped", module=CAPTURE),
    fault("slots start over", "room.eq(count != self.slots)", "room.eq(1)", tests="dropped",
          module=CAPTURE),
)  # fmt: skip
"""With --all-simulations."""


@pytest.mark.parametrize("fault", FAULTS + MORE_FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault: Fault, build_root: Path, thorough: bool) -> None:
    if fault in MORE_FAULTS and not thorough:
        pytest.skip("only with --all-simulations")
    with pytest.raises(SimulationError, match=r"AssertionError|SimTimeoutError|FAILED"):
        run_with_fault(fault, build_root, broken=True)


CONTROLS = {fault.config: fault for fault in FAULTS + MORE_FAULTS}


@pytest.mark.parametrize("config", CONTROLS, ids=label)
def test_control_without_fault(config: EpilogueConfig, build_root: Path, thorough: bool) -> None:
    if config != STALLED and not thorough:
        pytest.skip("only with --all-simulations")
    run_with_fault(replace(CONTROLS[config], testcase=".*"), build_root, broken=False)
