"""LutDecoder and HifToFloat alone, under random and exhaustive traffic, on every simulator."""

from pathlib import Path

import pytest

from rtl.lookup import DEFAULT_LOOKUP, LOOKUPS
from sim.bench_config import BenchConfig
from sim.installed import quickest_simulator
from sim.stalls import STALL_MODES
from tb.unit_run import run_unit

MIXED = "BOF4-NF4^64sRS1E2M4 DD5-DD5sS1E5M5 DD6sUE4M4 E2M3sUE4M4 E3M4sUE4M4 E5M6sUE4M4 INT8sS1E3M4"
"""Formats of one decoder: LUTs of all widths, atoms, row scales, two block sizes."""


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize(
    "config",
    [
        BenchConfig("BOF4-NF4sS1E5M5", lanes=32),
        BenchConfig("NF4sUE4M4", hif_name="HIF8"),
        BenchConfig("BOF4-NF4^64sUE8M0", lanes=16),  # four beats a block
        BenchConfig(MIXED, hif_name="HIF8T"),
    ],
    ids=lambda config: f"{config.format_name.replace(' ', '+')}-{config.hif_name}-{config.lanes}",
)
def test_lut_decoder(
    config: BenchConfig, stalls: str, built_by_both: str, build_root: Path
) -> None:
    traffic = BenchConfig(config.format_name, config.hif_name, config.lanes, stalls=stalls, seed=7)
    run_unit("lut_decoder", traffic, built_by_both, build_root)


@pytest.mark.parametrize("lookup", sorted(set(LOOKUPS) - {DEFAULT_LOOKUP}))
@pytest.mark.parametrize("format_name", ["BOF4-NF4sS1E5M5", "DD5sUE4M4"])
def test_lookup_structures(format_name: str, lookup: str, build_root: Path, thorough: bool) -> None:
    """Every structure of the lookup does the same."""
    if format_name.startswith("DD5") and not thorough:
        pytest.skip("only with --all-simulations")
    config = BenchConfig(format_name, stalls="both", seed=13, lookup=lookup)
    run_unit("lut_decoder", config, quickest_simulator(), build_root)


@pytest.mark.parametrize(
    "config",
    # Every lane count, index width, block size, LUT entry format, scale word width of 8, 10, 12 and
    # 16 bits, and number of LUTs occurs, most pairs of them too.
    [
        BenchConfig("DD4-DD4^8sUE4M3", "HIF7", 16),
        BenchConfig("DD5-DD5^64sS1E5M5", "HIF8T", 16),
        BenchConfig("DD6^32sBF16", "HIF8", 16),
        BenchConfig("DD6-DD6sUE5M4", "HIF8T", 32),
        BenchConfig("DD5^64sUE5M5", "HIF7", 32),
        BenchConfig("DD4^32sUE4M4", "HIF8", 64),
        BenchConfig("DD6-DD6^8sS1E5M5", "HIF7", 64),
        BenchConfig("DD5^16sBF16", "HIF8T", 128),
        BenchConfig("DD4-DD4^64sUE5M4", "HIF8", 256),
        BenchConfig("DD4sUE4M4", "HIF7", 512),
    ],
    ids=lambda config: f"{config.format_name}-{config.hif_name}-{config.lanes}",
)
def test_full_rate_at_every_size(config: BenchConfig, build_root: Path) -> None:
    """``lanes`` weights a clock, asserted by the bench, also across the end of a tensor."""
    simulator = quickest_simulator()
    run_unit("lut_decoder", config, simulator, build_root, "no_bubble_between_tensors")
    if config.lanes <= 64:  # its lanes are all alike, and many of them take long to simulate
        run_unit("hif_to_float", config, simulator, build_root, "random_beats")


@pytest.mark.parametrize(
    "config",
    [
        BenchConfig("NF4sUE4M4"),
        BenchConfig("NF4sUE4M4", hif_name="HIF8", output="bfloat16"),
        BenchConfig("INT8sUE4M4 E5M6sUE2M1 E4M3sUE4M4", output="bfloat16"),
    ],
    ids=lambda config: f"{config.format_name.replace(' ', '+')}-{config.hif_name}-{config.output}",
)
def test_hif_to_float_exhaustive(config: BenchConfig, built_by_both: str, build_root: Path) -> None:
    run_unit("hif_to_float", config, built_by_both, build_root, "every_code_pair")


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize(
    "config",
    [
        BenchConfig("BOF4-NF4sS1E5M5"),
        BenchConfig("NF4^8sBF16", output="bfloat16"),
        BenchConfig("DD5sS1E5M7", hif_name="HIF8T", output="bfloat16"),
        BenchConfig("NF4^32sUE8M0", hif_name="HIF8", lanes=64),
        BenchConfig("BOF4-NF4^64sRS1E2M4", lanes=16),
        BenchConfig(MIXED, hif_name="HIF8T"),
    ],
    ids=lambda config: f"{config.format_name.replace(' ', '+')}-{config.hif_name}-{config.output}",
)
def test_hif_to_float_random(
    config: BenchConfig, stalls: str, built_by_both: str, build_root: Path
) -> None:
    traffic = BenchConfig(
        config.format_name, config.hif_name, config.lanes, config.output, stalls, seed=11
    )
    run_unit(
        "hif_to_float", traffic, built_by_both, build_root,
        "random_beats|fills_while_stalled|reset_in_mid_traffic",
    )  # fmt: skip
