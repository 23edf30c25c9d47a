"""LutTile, its bench and wrong versions of it, each of which the bench must notice."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from golden.formats import E5M6, INT8, UE8M0
from golden.notation import parse_format
from rtl.lookup import LOOKUPS
from rtl.lut_tile import LutTile
from rtl.modes import Modes
from sim.installed import quickest_simulator
from sim.stalls import STALL_MODES
from sim.tile_config import LutTileConfig
from tb.faults import Fault, run_with_fault
from tb.traffic import EXAMPLES_VARIABLE, RANDOM_TRAFFIC
from tb.unit_run import run_unit

PAIR = LutTileConfig(rows=3, columns=2)
# One LUT, a promoted format and wider indices; powers of two per token.
MIXED = LutTileConfig(
    "HIF8^8sUE4M4", "INT8^8sUE4M4", 2, 2, stored="BOF4-NF4^8sUE4M4 E2M3^8sUE4M4 DD5^8sUE4M4",
    hif_name="HIF8", lookup="memory",
)  # fmt: skip
LONG = LutTileConfig("HIF8T^32sS1E5M5", "E4M3^32sBF16", 5, 3, stored="DD5-DD5^32sRS1E5M5",
                     hif_name="HIF8T", lookup="two_banks")  # fmt: skip
# Atoms pass through, and LUT writes bring their layer exponent only.
ATOMS = LutTileConfig("E2M1^16sUE4M3", "E4M3^16sUE4M4", 1, 4, stored="E2M1^16sUE4M3")
CONFIGS = (PAIR, MIXED, LONG, ATOMS)


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.formats)
def test_lut_tile(
    config: LutTileConfig, stalls: str, built_by_both: str, build_root: Path, thorough: bool
) -> None:
    if not thorough and CONFIGS.index(config) > 1:
        pytest.skip("only with --all-simulations")
    run_unit("lut_tile", replace(config, stalls=stalls, seed=5), built_by_both, build_root)


def test_random_traffic(build_root: Path, thorough: bool) -> None:
    environment = {EXAMPLES_VARIABLE: str(1000 if thorough else 30)}
    run_unit("lut_tile", MIXED, quickest_simulator(), build_root, RANDOM_TRAFFIC, environment)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_lookup_structures(lookup: str, build_root: Path, thorough: bool) -> None:
    if not thorough:
        pytest.skip("only with --all-simulations")
    config = replace(PAIR, lookup=lookup)
    run_unit("lut_tile", config, quickest_simulator(), build_root)


def modes(*names: str) -> Modes:
    return Modes(tuple(map(parse_format, names)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lookup": "none"}, "lookup must be one of one_hot, tree, "),
        ({"rows": 0}, "must be at least 1 and have at most 4096 outputs, not 0 x 4"),
        (
            {"modes": modes("NF4sUE4M4", "NF4^32sUE4M4")},
            "NF4^32sUE4M4 has another block size than NF4sUE4M4: a tile has one",
        ),
        (
            {"modes": modes("NF4sUE4M4", "NF4-BOF4sS1E5M5")},
            "NF4-BOF4sS1E5M5 has another scale format than NF4sUE4M4",
        ),
        (
            {"modes": modes("NF4sUE4M4", "E4M3sUE4M4")},
            "E4M3sUE4M4 has another element format than NF4sUE4M4",
        ),
        ({"modes": modes("E5M6sUE4M4")}, f"{E5M6.name} is no element of a tile"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "rows": 4, "columns": 4, "modes": modes("NF4sUE4M4"), "activation": INT8,
        "activation_scale": UE8M0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        LutTile(**arguments | changes)


# --- wrong versions -------------------------------------------------------------------------------

STALLED, STALLED_MIX = (replace(config, stalls="both", seed=3) for config in (PAIR, MIXED))
TILE, BANKS = "lut_tile", "lut_banks"


def fault(
    name: str,
    module: str,
    old: str,
    new: str,
    config: LutTileConfig = STALLED,
    tests: str = "random",
) -> Fault:
    return Fault(name, "lut_tile", module, old, new, config, tests)


FAULTS = (
    fault("metabit of every beat", TILE, "Mux(first, now, kept)", "now"),
    fault("metabit of the block before", TILE, "Mux(first, now, kept)", "kept"),
    fault("LUTs change in mid-block", TILE, "change_at(step & final &", "change_at(step &"),
)  # fmt: skip
"""Those of every run."""

MORE_FAULTS = (
    fault("scale of every beat", TILE, "with m.If(step & first):", "with m.If(step):"),
    fault("metabits of the first row", TILE, "banks.metabit(word)",
          "banks.metabit(self.i.p.scale_words[0])"),
    fault("LUTs change with every tile", TILE, "self.i.p.last & self.i.p.last_tile)",
          "self.i.p.last)"),
    fault("beat lost when stalled", TILE, "banks.loaded & (~valid | tile.i.ready)",
          "banks.loaded"),
    fault("reset keeps a beat", TILE, "valid = Signal()", "valid = Signal(reset_less=True)",
          tests="reset"),
    fault("takes a beat without LUTs", TILE, "banks.loaded & (~valid", "(~valid",
          tests="waits_for_luts"),
    fault("promotion without its exponent", BANKS, " + by_mode(self.mode, units)", "",
          STALLED_MIX),
)  # fmt: skip
"""With --all-simulations."""


@pytest.mark.parametrize("fault", FAULTS + MORE_FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault: Fault, noticed: Callable[..., None]) -> None:
    noticed(fault, MORE_FAULTS)


def test_control_without_fault(build_root: Path) -> None:
    control = replace(FAULTS[0], testcase="random|reset|waits")
    run_with_fault(control, build_root, broken=False)
