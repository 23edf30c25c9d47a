"""SopDecoderAxi under the bus models of cocotbext-axi."""

from pathlib import Path

import pytest

from sim.bench_config import BenchConfig
from sim.installed import available_simulators, quickest_simulator
from tb.axi_bench import SEEDS_VARIABLE
from tb.unit_run import run_unit

# Of each configuration on Verilator; the second with --all-simulations.
SEEDS, ALL_SEEDS = 20, 250

CONFIGS = {
    "pair": BenchConfig("BOF4-NF4sS1E5M5", "HIF7", 16, "float32"),
    "mixed": BenchConfig(
        "BOF4-NF4^64sRS1E2M4 DD5^8sUE4M4 E2M3sUE4M4 INT8^32sUE8M0", "HIF8", 16, "bfloat16"
    ),
    "narrow": BenchConfig("NF4sUE4M4", "HIF7", 8, "float32"),
    "codes": BenchConfig("DD4-NF4^8sRS1E2M4", "HIF8T", 16, "codes"),
    "wide codes": BenchConfig("NF4sUE4M4 E2M3^32sUE4M4 E5M6sUE4M4", "HIF8", 8, "codes"),
}

BANKS = BenchConfig("DD4-NF4sUE4M4", "HIF8T", 16, "bfloat16", lookup="memory")  # taking turns


def seeds_on(simulator: str, *, thorough: bool) -> int:
    """Seeds of each configuration."""
    seeds = ALL_SEEDS if thorough else SEEDS
    # Icarus is slower, and is here for what it knows about undefined values.
    return seeds if simulator == "verilator" else seeds // (2 if thorough else 4)


@pytest.mark.timeout(3600)  # all seeds take minutes, on a busy machine more than ten
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_axi(config: BenchConfig, built_by_both: str, build_root: Path, thorough: bool) -> None:
    seeds = seeds_on(built_by_both, thorough=thorough)
    run_unit(
        "sop_decoder_axi", config, built_by_both, build_root,
        testcase="^(?!.*wide_columns)",
        environment={SEEDS_VARIABLE: f"1 {seeds}"},
    )  # fmt: skip


def test_start_without_luts_from_power_up(build_root: Path, thorough: bool) -> None:
    """Refused, and no undefined bit is ever seen: Icarus, alone, so that nothing ran before."""
    if "icarus" not in available_simulators():
        pytest.skip("Icarus Verilog is not installed")
    for name in ("pair", "mixed", "banks", "codes") if thorough else ("pair", "banks"):
        run_unit("sop_decoder_axi", {**CONFIGS, "banks": BANKS}[name], "icarus", build_root,
                 "start_without_luts")  # fmt: skip


def test_wide_columns(build_root: Path) -> None:
    """With many lanes, or it would take long."""
    config = BenchConfig("NF4sUE4M4", "HIF7", 64, "bfloat16")
    run_unit("sop_decoder_axi", config, quickest_simulator(), build_root, "wide_columns")
