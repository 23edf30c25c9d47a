"""The simulations whose traffic hits every declared bin of :mod:`tb.coverage`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golden.quantize import quantize
from sim.bench_config import BenchConfig, Config
from sim.decoder import Decoder
from sim.installed import quickest_simulator
from sim.tensor_run import run_tensors
from tb.benches import BENCHES
from tb.coverage import VARIABLE
from tb.unit_run import run_unit

__all__ = ["RUNS", "Run", "run_all"]


@dataclass(frozen=True)
class Run:
    """One simulation: unit, configuration, regular expression of the tests to run."""

    unit: str
    config: Config
    testcase: str = ".*"

    def start(self, build_root: Path) -> None:
        """Run it, on the simulator that builds faster."""
        simulator, config = quickest_simulator(), self.config
        bench = BENCHES[self.unit]
        if not bench.whole_tensors:
            run_unit(self.unit, config, simulator, build_root, self.testcase)
            return
        assert isinstance(config, BenchConfig)
        decoder = Decoder(
            self.unit, config.formats, config.lanes, config.output, simulator, build_root
        )
        rng = np.random.default_rng(config.seed)
        shapes = [(3, 40), (1, 16), (1, 64), (1, 96), (7, 33)] * 5
        tensors = [
            quantize(rng.standard_t(4, shape).astype(np.float32), config.formats[0])
            for shape in shapes
        ]
        results, _ = run_tensors(
            decoder, tensors, stalls=config.stalls, seed=config.seed, module=bench.module
        )
        assert all(result.passed for result in results), results


RUNS = tuple(
    Run(unit, config, testcase)
    for unit, bench in BENCHES.items()
    for config, testcase in bench.runs
)
"""Those of all benches."""


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
