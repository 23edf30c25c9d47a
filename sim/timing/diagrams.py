"""Which timing diagrams a unit has, in which configuration, and their recording."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtl import units
from rtl.units import Unit, unit_verilog
from sim.bench_config import BenchConfig, Config
from sim.simulator import Design, simulate
from sim.tile_config import EpilogueConfig, LutTileConfig, MatmulConfig, TileConfig
from sim.timing import scenarios
from sim.timing.scenarios import Scenario

__all__ = ["DIAGRAMS", "EXAMPLE", "Diagrams", "diagrams_of", "record"]

EXAMPLE = BenchConfig("BOF4-NF4sS1E5M5", lanes=32)
"""What datasheet and diagrams show: lanes, scale words of a beat and LUT entries all differ."""


@dataclass(frozen=True)
class Diagrams:
    """The timing diagrams of one unit.

    Parameters
    ----------
    unit : Unit
    scenarios : tuple of Scenario
        In the order of the datasheet.
    example : Config
        Configuration that the datasheet shows.
    module : str
        Module with the scenarios.
    """

    unit: Unit
    scenarios: tuple[Scenario, ...] = ()
    example: Config = EXAMPLE
    module: str = "sim.timing.stream_bench"


DIAGRAMS: dict[str, Diagrams] = {
    diagrams.unit.name: diagrams
    for diagrams in (
        Diagrams(units.LUT_DECODER, scenarios.LUT_DECODER),
        Diagrams(units.HIF_TO_FLOAT, scenarios.HIF_TO_FLOAT),
        Diagrams(units.FLOAT_TO_HIF, scenarios.FLOAT_TO_HIF),
        Diagrams(units.FLOAT_DECODER, scenarios.FLOAT_DECODER),
        Diagrams(units.SPARSE_MERGE, scenarios.SPARSE_MERGE),
        Diagrams(units.SPARSE_DECODER, scenarios.SPARSE_DECODER),
        Diagrams(
            units.SOP_TILE,
            scenarios.SOP_TILE,
            TileConfig("HIF7^16sS1E5M5", "INT8sUE8M0", 8, 4),
            "sim.timing.tile_bench",
        ),
        # No diagrams of these.
        Diagrams(
            units.LUT_TILE,
            example=LutTileConfig("HIF7^16sS1E5M5", "INT8sUE8M0", 8, 4, stored="BOF4-NF4sS1E5M5"),
        ),
        Diagrams(
            units.TILE_EPILOGUE,
            example=EpilogueConfig("NF4^16sRUE4M4", "INT8sUE8M0", 8, 4, slots=16),
        ),
        Diagrams(
            units.MATMUL_TILE,
            example=MatmulConfig(
                "HIF7^16sS1E2M4", "INT8sUE8M0", 8, 4, stored="BOF4-NF4sRS1E2M4", slots=16
            ),
        ),
        Diagrams(units.SOP_DECODER_AXI, scenarios.SOP_DECODER_AXI, module="sim.timing.axi_bench"),
    )
}
"""Diagrams by the name of their unit."""


def diagrams_of(unit: str) -> Diagrams:
    """Diagrams of a unit, none and the usual example if there is no record of it."""
    return DIAGRAMS.get(unit) or Diagrams(units.UNITS[unit])


def record(unit: str, build_root: Path, simulator: str = "icarus") -> dict[str, dict[str, Any]]:
    """Simulate every scenario of a unit.

    Parameters
    ----------
    unit : str
        Name of the unit.
    build_root : Path
        Folder of all builds.
    simulator : str
        One of :data:`sim.installed.SIMULATORS`; Icarus knows what is undefined.

    Returns
    -------
    diagrams : dict of str to dict
        WaveJSON by name of scenario.

    Raises
    ------
    InputError
        If the simulator is not installed.
    SimulationError
        If what comes out is not what the golden model says.
    """
    diagrams = diagrams_of(unit)
    names = [scenario.name for scenario in diagrams.scenarios]
    if not names:
        return {}
    top, verilog = unit_verilog(unit, diagrams.example.formats, **diagrams.example.options)
    folder = simulate(
        Design(top, verilog),
        module=diagrams.module,
        simulator=simulator,
        build_root=build_root,
        environment=diagrams.example.as_environment(),
        testcase="|".join(names),
    )
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
