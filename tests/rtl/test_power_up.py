"""Four-state simulation from power-up: what a reset must define, and that nothing else matters."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from amaranth.lib import wiring

import rtl.correction_window
import rtl.float_to_hif
import rtl.hif_to_float
import rtl.lut_banks
import rtl.lut_decoder
import rtl.parts.pipeline
import rtl.sparse_merge
from golden.float_input import SOURCES
from golden.formats import HIF8
from rtl.layouts import FLOAT32
from rtl.units import build_unit
from rtl.verilog import to_verilog
from sim.bench_config import BenchConfig
from sim.installed import available_simulators
from sim.simulator import Design, SimulationError, simulate
from tb.faults import changed_module

pytestmark = pytest.mark.skipif(
    "icarus" not in available_simulators(), reason="Icarus Verilog is not installed"
)

CONFIG = BenchConfig("NF4-BOF4sS1E2M1", "HIF8", lanes=16, seed=1)


def run(unit: wiring.Component, name: str, build_root: Path) -> None:
    simulate(
        Design(name, to_verilog(unit, name)),
        module="tb.power_up_bench",
        simulator="icarus",
        build_root=build_root,
        environment=CONFIG.as_environment(),
    )


@pytest.mark.parametrize(
    ("unit", "output"),
    [
        ("lut_decoder", "float32"),
        ("hif_to_float", "bfloat16"),
        ("float_to_hif", "float32"),
        ("float_decoder", "float32"),
        ("sparse_merge", "float32"),
        ("sparse_merge", "bfloat16"),
        ("sparse_decoder", "bfloat16"),
    ],
)
def test_defined_after_one_clock_of_reset(unit: str, output: str, build_root: Path) -> None:
    component = build_unit(unit, CONFIG.formats, lanes=CONFIG.lanes, output=output)
    run(component, f"{unit}_power_up", build_root)


# --- registers that a reset forgets ---------------------------------------------------------------

LUT, FLOAT = rtl.lut_decoder, rtl.hif_to_float
MERGE, CONVERT = rtl.sparse_merge, rtl.float_to_hif
PIPELINE, WINDOW, BANKS = rtl.parts.pipeline, rtl.correction_window, rtl.lut_banks


def without_reset(
    module: ModuleType, register: str, lanes: int, part: ModuleType | None = None
) -> wiring.Component:
    """A unit from its source text, where the signal that begins like this has no reset.

    The text is that of ``part``, if given.
    """
    separator = "" if register.endswith("(") else ", "
    old, new = register, f"{register}{separator}reset_less=True, "
    faulty = changed_module(module, old, new, part=part)
    modes = CONFIG.modes
    if module is LUT:
        unit: wiring.Component = faulty.LutDecoder(lanes=lanes, modes=modes)
    elif module is FLOAT:
        unit = faulty.HifToFloat(lanes=lanes, modes=modes, float_layout=FLOAT32)
    elif module is MERGE:
        unit = faulty.SparseMerge(lanes=lanes, float_layout=FLOAT32)
    else:
        unit = faulty.FloatToHif(lanes=lanes, source=SOURCES["E4M3"], hif=HIF8)
    return unit


@pytest.mark.parametrize(
    ("module", "part", "register", "message"),
    [
        (LUT, BANKS, 'Signal(name="loaded"', "i__ready is X after reset 0"),
        (LUT, BANKS, 'Signal(name="pending"', "i_lut__ready is X after reset 0"),
        (FLOAT, PIPELINE, 'Signal(name=f"valid_{stage}"', "o: valid is X at edge 1"),
        (CONVERT, PIPELINE, 'Signal(name=f"valid_{stage}"', "o: valid is X at edge 1"),
        (MERGE, WINDOW, "entry_valid = Signal(", "i: ready is X at edge 1"),
        (MERGE, WINDOW, "following_valid = Signal(", "i: ready is X at edge 1"),
        (MERGE, None, "complete = Signal(", "o__valid is X after reset 0"),
        (MERGE, None, "started = Signal(", "X at edge|X after reset"),
        (MERGE, None, "exhausted = Signal(", "X at edge|X after reset"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_register_without_reset_is_noticed(
    module: ModuleType, part: ModuleType | None, register: str, message: str, build_root: Path
) -> None:
    unit = without_reset(module, register, CONFIG.lanes, part)
    name = f"{module.__name__.rpartition('.')[2]}_no_reset"
    with pytest.raises(SimulationError, match=message):
        run(unit, name, build_root)


@pytest.mark.skipif("verilator" not in available_simulators(), reason="Verilator is not installed")
@pytest.mark.parametrize("register", ["lowest = Signal(33", 'name=f"end_{beats}"'])
def test_what_undefined_values_hide_random_ones_show(
    register: str, build_root: Path, thorough: bool
) -> None:
    """An ``if`` on an undefined value is not taken, so the data path can hide a missing reset."""
    if not thorough:
        pytest.skip("only with --all-simulations")
    run(without_reset(MERGE, register, CONFIG.lanes, WINDOW), "sparse_merge_no_reset", build_root)
    unit = without_reset(MERGE, register, 4, WINDOW)
    with pytest.raises(SimulationError, match="AssertionError"):
        simulate(
            Design("merge", to_verilog(unit, "merge"), randomize=True),
            module="tb.sparse_merge_bench",
            simulator="verilator",
            build_root=build_root,
            environment=replace(CONFIG, lanes=4).as_environment(),
            testcase="random_additions",  # whose first tensor has corrections
        )
