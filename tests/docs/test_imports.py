"""What starting the program and importing golden loads."""

import pkgutil

import pytest

import golden
from tests.support.imports import imported_by


@pytest.mark.parametrize("module", ["tb.scoreboard", "sim.stalls"])
def test_reference_parts_of_tb_need_no_simulator(module: str) -> None:
    packages = imported_by(module)
    assert module.partition(".")[0] in packages
    assert not packages & {"cocotb", "cocotb_test", "amaranth"}


def test_the_command_line_starts_without_simulator_and_torch() -> None:
    packages = imported_by("sop.cli")
    assert "sim" in packages
    assert not packages & {"tb", "cocotb", "cocotb_test", "torch", "transformers", "matplotlib"}


def test_golden_imports_neither_hardware_nor_testbench() -> None:
    modules = [info.name for info in pkgutil.iter_modules(golden.__path__, "golden.")]
    assert "golden.tensor" in modules
    packages = imported_by(*(name for name in modules if name != "golden.tests"))
    assert "numpy" in packages
    assert not packages & {"rtl", "tb", "sop", "amaranth", "cocotb"}
