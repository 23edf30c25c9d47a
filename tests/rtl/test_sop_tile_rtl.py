"""SopTile alone, against the golden kernel, on every simulator."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from golden.formats import E4M3, HIF7, INT8, UE8M0, scale_format
from rtl.products import DEFAULT_MULTIPLIER, MULTIPLIERS
from rtl.sop_tile import SopTile, TileShape
from rtl.units import options_of, unit_record
from rtl.verilog import to_verilog
from sim.installed import available_simulators, quickest_simulator
from sim.simulator import Design, simulate
from sim.stalls import STALL_MODES
from sim.tile_config import EpilogueConfig, LutTileConfig, TileConfig
from tb.traffic import EXAMPLES_VARIABLE, RANDOM_TRAFFIC, UNIT_VARIABLE
from tb.unit_run import run_unit

FASTEST = quickest_simulator()
EXAMPLES, ALL_EXAMPLES = 50, 2000  # the second with --all-simulations

CONFIGS = (
    TileConfig(),
    # Outputs that are no multiple of the block; powers of two per token; codes that are reserved.
    TileConfig("HIF8^8sBF16", "E4M3^8sUE4M4", 3, 5, multiplier="shift_product"),
    # One token.
    TileConfig("HIF8T^16sUE4M4", "HIF8^16sBF16", 16, 1),
    # Fewer outputs than stages of the adder; sums of 42 bits.
    TileConfig("E4M3^16sUE4M3", "E4M3^16sUE4M4", 2, 2),
    TileConfig("E2M1^16sUE4M3", "E2M1^16sUE4M4", 2, 3),
    TileConfig("E2M3^32sUE4M4", "HIF7^32sUE8M0", 4, 4, multiplier="shift_operands"),
    TileConfig("INT8^64sS1E5M5", "INT4^64sUE8M0", 3, 3),
    TileConfig("INT4^8sUE8M0", "E2M3^8sBF16", 5, 3),
    TileConfig("HIF7^16sUE4M4", "HIF8T^16sUE8M0", 1, 16),
)


def label(config: TileConfig) -> str:
    return f"{config.rows}x{config.columns}-{config.weights}-{config.activations}"


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_sop_tile(
    config: TileConfig, stalls: str, built_by_both: str, build_root: Path, thorough: bool
) -> None:
    if not thorough and CONFIGS.index(config) > 3:
        pytest.skip("only with --all-simulations")
    # Of other configurations every pair of codes takes long.
    short = "^(?!.*every_code_pair)" if not thorough and config != CONFIGS[0] else ".*"
    run_unit("sop_tile", replace(config, stalls=stalls, seed=5), built_by_both, build_root, short)


@pytest.mark.parametrize("multiplier", sorted(set(MULTIPLIERS) - {DEFAULT_MULTIPLIER}))
def test_multiplier_structures(multiplier: str, build_root: Path, thorough: bool) -> None:
    """Every structure multiplies every pair of codes."""
    if not thorough:
        pytest.skip("only with --all-simulations")
    for config in CONFIGS:
        run_unit(
            "sop_tile",
            replace(config, multiplier=multiplier),
            FASTEST,
            build_root,
            "every_code_pair",
        )


def test_a_tile_of_256_outputs(build_root: Path, thorough: bool) -> None:
    if not thorough:
        pytest.skip("only with --all-simulations")
    config = TileConfig("HIF7^16sS1E5M5", "INT8^16sUE8M0", 16, 16)
    run_unit("sop_tile", config, FASTEST, build_root, "random_tiles")


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]], ids=label)
def test_random_traffic(config: TileConfig, build_root: Path, thorough: bool) -> None:
    if not thorough and config != CONFIGS[0]:
        pytest.skip("only with --all-simulations")
    environment = {EXAMPLES_VARIABLE: str(ALL_EXAMPLES if thorough else EXAMPLES)}
    run_unit("sop_tile", config, FASTEST, build_root, RANDOM_TRAFFIC, environment)


@pytest.mark.skipif("icarus" not in available_simulators(), reason="Icarus is not installed")
@pytest.mark.parametrize(
    ("unit", "config"),
    [
        ("sop_tile", TileConfig(rows=2, columns=3)),
        ("lut_tile", LutTileConfig(rows=2, columns=3)),
        ("tile_epilogue", EpilogueConfig(rows=2, columns=3, output="bfloat16")),
    ],
    ids=["sop_tile", "lut_tile", "tile_epilogue"],
)
def test_defined_after_one_clock_of_reset(unit: str, config: TileConfig, build_root: Path) -> None:
    """From undefined registers, with payloads undefined whenever no word is offered."""
    component = unit_record(unit).build(options_of(config.formats, **config.options))
    simulate(
        Design("tile_power_up", to_verilog(component, "tile_power_up")),
        module="tb.tile_power_up_bench",
        simulator="icarus",
        build_root=build_root,
        environment={**config.as_environment(), UNIT_VARIABLE: unit},
    )


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (4, 4), (3, 5), (16, 1), (64, 1), (16, 16), (7, 9)]
)
def test_every_output_has_one_place(rows: int, columns: int, size: int) -> None:
    shape = TileShape(rows, columns, size)
    places = [shape.place(unit, step) for unit in range(shape.units) for step in range(shape.steps)]
    outputs = sorted(place for place in places if place)
    assert outputs == [(row, column) for row in range(rows) for column in range(columns)]
    assert shape.units == -(-rows * columns // size)
    assert shape.steps <= size  # the units keep up with the blocks


ARGUMENTS: dict[str, Any] = {
    "rows": 4, "columns": 4, "block_size": 16, "weight": HIF7, "activation": INT8,
    "weight_scale": scale_format("S1E5M5"), "activation_scale": UE8M0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "must be at least 1 and have at most 4096 outputs, not 0 x 4"),
        ({"rows": 65, "columns": 64}, "at most 4096 outputs, not 65 x 64"),
        ({"block_size": 12}, "block_size must be one of (8, 16, 32, 64), not 12"),
        ({"multiplier": "none"}, "multiplier must be one of ('shift_product', 'shift_operands', "),
    ],
)  # fmt: skip
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SopTile(**ARGUMENTS | changes)


def test_sums_hold_the_largest_blocks() -> None:
    """42 bits and sign for E4M3, whose reserved codes count too."""
    tile = SopTile(**ARGUMENTS | {"weight": E4M3, "activation": E4M3})
    assert 16 * (15 << 14) ** 2 < 1 << tile.sum_shape.width - 1 <= 2 * 16 * (15 << 14) ** 2
