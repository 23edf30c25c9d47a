"""SparseMerge alone, under random traffic, on every simulator."""

from pathlib import Path

import pytest

from rtl.layouts import BFLOAT16, FLOAT32
from rtl.sparse_merge import SparseMerge
from rtl.verilog import to_verilog
from tb.bench import BenchConfig
from tb.simulator import Design, simulate
from tb.stalls import STALL_MODES


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize(("lanes", "output"), [(16, "float32"), (24, "bfloat16")])
def test_sparse_merge(
    lanes: int, output: str, stalls: str, simulator: str, build_root: Path
) -> None:
    layout = {"float32": FLOAT32, "bfloat16": BFLOAT16}[output]
    unit = SparseMerge(lanes=lanes, float_layout=layout)
    name = f"sparse_merge_{lanes}_{output}"
    config = BenchConfig("NF4sUE4M4", lanes=lanes, output=output, stalls=stalls, seed=3)
    simulate(
        Design(name, to_verilog(unit, name), randomize=True),
        module="tb.sparse_merge_bench",
        simulator=simulator,
        build_root=build_root,
        environment=config.as_environment(),
        seed=config.seed,
    )


@pytest.mark.parametrize("lanes", [0, -1, 513])
def test_wrong_lanes(lanes: int) -> None:
    with pytest.raises(ValueError, match=f"lanes must be 1 to 512, not {lanes}"):
        SparseMerge(lanes=lanes)
