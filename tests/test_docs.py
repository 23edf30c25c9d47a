"""Counts that the documentation names are those of the tests: typed by hand they would rot."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

WORDS = {7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}


def defined_in(path: str) -> dict[str, Any]:
    """What a module of tests defines, without running its tests."""
    return runpy.run_path(str(ROOT / path))


def cases(test: Any) -> int:
    """How many a test is parametrized with."""
    (mark,) = test.pytestmark
    return len(mark.args[1])


def counts() -> dict[str, str]:
    """Pieces of docs/verification.md, by what they count."""
    units, axi = defined_in("tests/test_rtl_faults.py"), defined_in("tests/test_axi_faults.py")
    converter, power_up = (
        defined_in(f"tests/test_{name}.py") for name in ("float_to_hif_rtl", "power_up")
    )
    axi_rtl, shrink, units_rtl = (
        defined_in(f"tests/test_{name}.py") for name in ("axi_rtl", "shrink", "units_rtl")
    )
    determinism = defined_in("golden/tests/test_determinism.py")
    additions = defined_in("tb/sparse_merge_bench.py")["PAIRS"]

    examples, all_examples = shrink["EXAMPLES"], shrink["ALL_EXAMPLES"]
    faults, more = len(axi["FAULTS"]), len(axi["MORE_FAULTS"])
    seeds, configurations = axi_rtl["seeds_on"], len(axi_rtl["CONFIGS"])
    # Without --all-simulations Verilator, which builds slowly, has the first configuration only.
    few = seeds("verilator", thorough=False) + configurations * seeds("icarus", thorough=False)
    many = configurations * sum(seeds(name, thorough=True) for name in ("verilator", "icarus"))
    registers = cases(power_up["test_a_register_without_reset_is_noticed"])
    sizes = cases(units_rtl["test_full_rate_at_every_size"])
    return {
        "faults of units": f"{len(units['FAULTS'])} wrong versions of the units",
        "faults of FloatToHif": f"{len(converter['FAULTS'])} of `FloatToHif`",
        "faults of the AXI decoder": (
            f"{faults} of the AXI decoder, {faults + more} with `make test-all`"
        ),
        "AXI seeds": f"{few} seeds at every change, {many:,} with `make test-all`",
        "additions": f"{additions:,} additions of every kind",
        "examples": f"{examples:,} examples a unit, {all_examples:,} with `make test-all`",
        "registers": f"{WORDS[registers]} registers without reset are noticed",
        "sizes": f"{WORDS[sizes]} sizes",
        "formats": f"{WORDS[len(units_rtl['MIXED'].split())]} formats in one decoder",
        "kinds": f"{WORDS[len(determinism['CASES'])]} kinds of quantization",
    }


COUNTS = counts()


@pytest.mark.parametrize("what", COUNTS)
def test_counts_of_the_verification_page(what: str) -> None:
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    assert COUNTS[what] in text
