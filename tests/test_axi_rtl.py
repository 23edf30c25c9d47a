"""SopDecoderAxi under the bus models of cocotbext-axi."""

import os
from pathlib import Path

import pytest

from rtl.units import build_unit
from rtl.verilog import to_verilog
from tb.axi_bench import SEEDS_VARIABLE
from tb.bench import BenchConfig
from tb.simulator import Design, simulate

# Seeds of each configuration; `make test-axi` runs 1,000 in all.
SEEDS = int(os.environ.get("SOP_AXI_SEEDS_PER_CONFIG", "20"))

CONFIGS = {
    "pair": BenchConfig("BOF4-NF4sS1E5M5", "HIF7", 16, "float32"),
    "mixed": BenchConfig(
        "BOF4-NF4^64sRS1E2M4 DD5sUE4M4 E2M3sUE4M4 INT8^32sUE8M0", "HIF8", 32, "bfloat16"
    ),
    "narrow": BenchConfig("NF4sUE4M4", "HIF7", 8, "float32"),
    "codes": BenchConfig("DD4-NF4^8sRS1E2M4", "HIF8T", 16, "codes"),
}


def run(config: BenchConfig, simulator: str, build_root: Path, testcase: str, seeds: str) -> None:
    unit = build_unit("sop_decoder_axi", config.formats, lanes=config.lanes, output=config.output)
    name = f"sop_decoder_axi_{config.lanes}_{config.output}"
    simulate(
        Design(name, to_verilog(unit, name), randomize=True),
        module="tb.axi_bench",
        simulator=simulator,
        build_root=build_root,
        environment={**config.as_environment(), SEEDS_VARIABLE: seeds},
        testcase=testcase,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_axi(name: str, simulator: str, build_root: Path) -> None:
    # Icarus is slower, and is here for what it knows about undefined values.
    seeds = SEEDS if simulator == "verilator" else max(5, SEEDS // 10)
    run(CONFIGS[name], simulator, build_root, ".*", f"1 {seeds}")
