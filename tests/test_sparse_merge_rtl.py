"""SparseMerge alone, under random traffic, on every simulator."""

from dataclasses import replace
from pathlib import Path

import pytest

from rtl.sparse_merge import SparseMerge
from tb.bench import BenchConfig
from tb.stalls import STALL_MODES
from tb.unit_run import run_unit


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize(
    "config",
    [
        BenchConfig("NF4sUE4M4", lanes=16, output="float32", seed=3),
        BenchConfig("NF4sUE4M4", lanes=24, output="bfloat16", seed=3),
    ],
    ids=lambda config: f"{config.lanes}-{config.output}",
)
def test_sparse_merge(
    config: BenchConfig, stalls: str, built_by_both: str, build_root: Path
) -> None:
    run_unit("sparse_merge", replace(config, stalls=stalls), built_by_both, build_root)


@pytest.mark.parametrize("lanes", [0, -1, 513])
def test_wrong_lanes(lanes: int) -> None:
    with pytest.raises(ValueError, match=f"lanes must be 1 to 512, not {lanes}"):
        SparseMerge(lanes=lanes)
