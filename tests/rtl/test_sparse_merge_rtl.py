"""SparseMerge alone, under random traffic, on every simulator."""

from pathlib import Path

import pytest

from rtl.sparse_merge import SparseMerge
from sim.bench_config import BenchConfig
from sim.stalls import STALL_MODES
from tb.unit_run import run_unit


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize(("lanes", "output"), [(16, "float32"), (24, "bfloat16")])
def test_sparse_merge(
    lanes: int, output: str, stalls: str, built_by_both: str, build_root: Path
) -> None:
    config = BenchConfig("NF4sUE4M4", lanes=lanes, output=output, stalls=stalls, seed=3)
    run_unit("sparse_merge", config, built_by_both, build_root)


@pytest.mark.parametrize("lanes", [0, -1, 513])
def test_wrong_lanes(lanes: int) -> None:
    with pytest.raises(ValueError, match=f"lanes must be 1 to 512, not {lanes}"):
        SparseMerge(lanes=lanes)
