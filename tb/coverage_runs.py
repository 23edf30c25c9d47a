"""The simulations whose traffic hits every declared bin of :mod:`tb.coverage`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golden.quantize import quantize
from tb.bench import BenchConfig
from tb.coverage import VARIABLE
from tb.float_to_hif_bench import ConverterConfig
from tb.simulator import quickest_simulator
from tb.tensor_run import Decoder, run_tensors
from tb.tile_config import TileConfig
from tb.unit_run import run_unit

__all__ = ["MIXED", "RUNS", "Run", "run_all"]

MIXED = "BOF4-NF4^64sRS1E2M4 DD5-DD5sS1E5M5 DD6-DD6sUE4M4 E2M3sUE4M4 E3M4sUE4M4 INT8sS1E3M4"
"""Formats of one decoder: pairs of LUTs of every size, atoms, row scales, two block sizes."""


@dataclass(frozen=True)
class Run:
    """One simulation: unit, configuration, regular expression of the tests to run."""

    unit: str
    config: BenchConfig | ConverterConfig | TileConfig
    testcase: str = ".*"

    def start(self, build_root: Path) -> None:
        """Run it, on the simulator that builds faster."""
        simulator, config = quickest_simulator(), self.config
        if isinstance(config, BenchConfig) and self.unit == "float_decoder":
            decoder = Decoder(config.formats, config.lanes, config.output, simulator, build_root)
            rng = np.random.default_rng(config.seed)
            shapes = [(3, 40), (1, 16), (1, 64), (1, 96), (7, 33)] * 5
            tensors = [
                quantize(rng.standard_t(4, shape).astype(np.float32), config.formats[0])
                for shape in shapes
            ]
            results, _ = run_tensors(decoder, tensors, stalls=config.stalls, seed=config.seed)
            assert all(result.passed for result in results), results
        else:
            run_unit(self.unit, config, simulator, build_root, self.testcase)


ROWS = "NF4sBF16 BOF4-NF4^64sRS1E2M4"
TRAFFIC = "random_beats|reset_in_mid_traffic"
TILES = "random_tiles|reserved_codes|reset_in_mid_traffic"

RUNS = (
    Run("lut_decoder", BenchConfig(MIXED, "HIF8T", 16, stalls="both", seed=1)),
    Run("lut_decoder", BenchConfig("BOF4-NF4sS1E5M5", lanes=32, seed=1)),
    Run("hif_to_float", BenchConfig(MIXED, "HIF8T", 16, stalls="both", seed=1), TRAFFIC),
    Run("hif_to_float", BenchConfig(ROWS, "HIF8", 16, "bfloat16", "both", 1), TRAFFIC),
    Run("hif_to_float", BenchConfig("NF4sUE4M4 E4M3sUE2M1", lanes=16, seed=1), "every_code_pair"),
    Run("sparse_merge", BenchConfig("NF4sUE4M4", lanes=16, stalls="both", seed=3)),
    Run("sparse_merge", BenchConfig("NF4sUE4M4", "HIF7", 24, "bfloat16", "both", 3), "random_tens"),
    Run("float_to_hif", ConverterConfig("E2M1", "HIF8T", 1, stalls="both", seed=1)),
    Run("float_to_hif", ConverterConfig("E2M3", "HIF7", 1, shift=6), "every_code"),
    Run("float_to_hif", ConverterConfig("E3M2", "HIF8", 1), "every_code"),
    Run("float_to_hif", ConverterConfig("E4M3", "HIF8", 1, shift=1), "every_code"),
    Run("float_to_hif", ConverterConfig("BF16", "HIF8T", 4, shift=10, stalls="both"), TRAFFIC),
    Run("sop_tile", TileConfig("HIF8^8sUE4M4", "E4M3^8sBF16", 2, 2, "both"), TILES),
    Run("sop_tile", TileConfig("INT8^8sS1E5M5", "HIF8^8sBF16", 2, 2, "both"), TILES),
    Run("sop_tile", TileConfig("INT8^8sS1E5M5", "HIF8^8sBF16", 2, 2, "out"), TILES),
    Run("float_decoder", BenchConfig("BOF4-NF4sS1E5M5", lanes=32, stalls="both", seed=5)),
)
"""Few, so that they can run at every change."""


def run_all(folder: Path, build_root: Path, runs: Iterable[Run] = RUNS) -> None:
    """Run simulations one after the other; their counts go into a folder."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder.resolve())
    try:
        for run in runs:
            run.start(build_root)
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
