"""The benches, a record each: what simulates a unit, with which traffic, and what is counted.

Needs no simulator: bench modules, which do, are named and imported where they are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rtl import units
from rtl.units import Unit
from sim.bench_config import BenchConfig, Config, ConverterConfig
from sim.tile_config import EpilogueConfig, LutTileConfig, MatmulConfig, TileConfig
from tb import coverage_bins

__all__ = ["BENCHES", "MIXED", "Bench"]

MIXED = "BOF4-NF4^64sRS1E2M4 DD5-DD5sS1E5M5 DD6-DD6sUE4M4 E2M3sUE4M4 E3M4sUE4M4 INT8sS1E3M4"
"""Formats of one decoder: pairs of LUTs of every size, atoms, row scales, two block sizes."""

_LUT_TILE = LutTileConfig(
    "HIF8^8sUE4M4", "INT8^8sUE4M4", 3, 2, stored="BOF4-NF4^8sUE4M4 E2M3^8sUE4M4", hif_name="HIF8"
)

_ROWS = "NF4sBF16 BOF4-NF4^64sRS1E2M4"
_TRAFFIC = "random_beats|reset_in_mid_traffic"
_TILES = "random_tiles|reserved_codes|reset_in_mid_traffic"


@dataclass(frozen=True)
class Bench:
    """How one unit is simulated.

    Parameters
    ----------
    unit : Unit
    module : str
        Module with the cocotb tests; several are separated by commas, as cocotb wants them.
    config : type of Config
        Class of its configurations.
    player : str
        Class of the module that plays random traffic (:class:`tb.shrink.Player`); empty if none
        does.
    whole_tensors : bool
        :func:`sim.tensor_run.run_tensors` prepares its traffic and judges what comes out.
    coverage : mapping of str to tuple of str
        Declared bins of each group.
    runs : tuple
        Configurations, each with a regular expression of tests, that together hit every bin; few,
        so that they can run at every change.
    """

    unit: Unit
    module: str
    config: type[Config] = BenchConfig
    player: str = ""
    whole_tensors: bool = False
    coverage: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    runs: tuple[tuple[Config, str], ...] = ()


BENCHES: dict[str, Bench] = {
    bench.unit.name: bench
    for bench in (
        Bench(
            units.LUT_DECODER,
            "tb.lut_decoder_bench",
            player="LutDecoderBench",
            coverage=coverage_bins.LUT_DECODER,
            runs=(
                (BenchConfig(MIXED, "HIF8T", 16, stalls="both", seed=1), ".*"),
                (BenchConfig("BOF4-NF4sS1E5M5", lanes=32, seed=1), ".*"),
            ),
        ),
        Bench(
            units.HIF_TO_FLOAT,
            "tb.hif_to_float_bench",
            player="HifToFloatBench",
            coverage=coverage_bins.HIF_TO_FLOAT,
            runs=(
                (BenchConfig(MIXED, "HIF8T", 16, stalls="both", seed=1), _TRAFFIC),
                (BenchConfig(_ROWS, "HIF8", 16, "bfloat16", "both", 1), _TRAFFIC),
                (BenchConfig("NF4sUE4M4 E4M3sUE2M1", lanes=16, seed=1), "every_code_pair"),
            ),
        ),
        Bench(
            units.SPARSE_MERGE,
            "tb.sparse_merge_bench",
            player="SparseMergeBench",
            coverage=coverage_bins.SPARSE_MERGE,
            runs=(
                (BenchConfig("NF4sUE4M4", lanes=16, stalls="both", seed=3), ".*"),
                (BenchConfig("NF4sUE4M4", "HIF7", 24, "bfloat16", "both", 3), "random_tens"),
            ),
        ),
        Bench(
            units.FLOAT_TO_HIF,
            "tb.float_to_hif_bench",
            ConverterConfig,
            player="FloatToHifBench",
            coverage=coverage_bins.FLOAT_TO_HIF,
            runs=(
                (ConverterConfig("E2M1", "HIF8T", 1, stalls="both", seed=1), ".*"),
                (ConverterConfig("E2M3", "HIF7", 1, shift=6), "every_code"),
                (ConverterConfig("E3M2", "HIF8", 1), "every_code"),
                (ConverterConfig("E4M3", "HIF8", 1, shift=1), "every_code"),
                (ConverterConfig("BF16", "HIF8T", 4, shift=10, stalls="both"), _TRAFFIC),
            ),
        ),
        Bench(
            units.SOP_TILE,
            "tb.sop_tile_bench",
            TileConfig,
            player="SopTileBench",
            coverage=coverage_bins.SOP_TILE,
            runs=(
                (TileConfig("HIF8^8sUE4M4", "E4M3^8sBF16", 2, 2, "both"), _TILES),
                (TileConfig("INT8^8sS1E5M5", "HIF8^8sBF16", 2, 2, "both"), _TILES),
                (TileConfig("INT8^8sS1E5M5", "HIF8^8sBF16", 2, 2, "out"), _TILES),
            ),
        ),
        Bench(
            units.LUT_TILE,
            "tb.lut_tile_bench",
            LutTileConfig,
            player="LutTileBench",
            coverage=coverage_bins.LUT_TILE,
            runs=(
                (_LUT_TILE, ".*"),
                (replace(_LUT_TILE, stalls="both"), ".*"),
                (replace(_LUT_TILE, stalls="out"), "random_tensors|reset_in_mid_traffic"),
            ),
        ),
        Bench(
            units.MATMUL_TILE,
            "sim.bulk_bench",
            MatmulConfig,
        ),
        Bench(
            units.TILE_EPILOGUE,
            "tb.tile_epilogue_bench",
            EpilogueConfig,
            player="TileEpilogueBench",
            coverage=coverage_bins.TILE_EPILOGUE,
            runs=(
                (EpilogueConfig(rows=8, columns=4, stalls="both"), ".*"),
                (
                    EpilogueConfig("NF4^8sUE4M4", "E4M3^8sUE4M4", 3, 3, "in", output="bfloat16"),
                    ".*",
                ),
                (EpilogueConfig(rows=4, columns=2, stalls="out"), "random_tiles"),
                (EpilogueConfig(rows=4, columns=2), "random_tiles"),
            ),
        ),
        Bench(
            units.FLOAT_DECODER,
            "tb.tensor_bench",
            whole_tensors=True,
            coverage=coverage_bins.FLOAT_DECODER,
            runs=((BenchConfig("BOF4-NF4sS1E5M5", lanes=32, stalls="both", seed=5), ".*"),),
        ),
        Bench(units.SPARSE_DECODER, "sim.bulk_bench"),
        Bench(
            units.SOP_DECODER_AXI,
            "tb.axi_bench,tb.axi_control_bench",
        ),
    )
}
"""Benches by the name of their unit."""
