"""The handshake rules that come with the AXI decoder: compiled, proved, and refuted."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rtl.units import unit_verilog
from sim.bench_config import BenchConfig
from sim.installed import verilator_environment
from sop.hdl.description import describe
from sop.hdl.rules import OUTPUT_RULES, rules_file, rules_instance
from sop.hdl.verilog_files import verilog_files
from tb.axi_proof import Proof, prove, with_rules
from tb.faults import Fault, faulty_verilog

UNIT = "sop_decoder_axi"
SMALL = BenchConfig("NF4sUE4M4", "HIF7", 8, "bfloat16")
LARGE = BenchConfig("BOF4-NF4^8sRS1E5M5 E2M3sUE4M4", "HIF8T", 16, "float32")
CODES = BenchConfig("NF4sUE4M4 E2M3^32sUE4M4", "HIF8T", 16, "codes")


def described(config: BenchConfig) -> dict[str, Any]:
    _, description = describe(UNIT, config.formats, lanes=config.lanes, output=config.output)
    return description


def proof_of(verilog: str, description: dict[str, Any], folder: Path, *rules: str) -> Proof:
    module = description["module"]
    instance = rules_instance(description, check_inputs=False)
    design = with_rules(verilog, module, rules_file(description), instance)
    return prove(design, module, folder, rules)


@pytest.mark.parametrize("config", [SMALL, LARGE, CODES], ids=["8 lanes", "16 lanes", "codes"])
def test_rules_are_proved(config: BenchConfig, tmp_path: Path, thorough: bool) -> None:
    """Without bound, every one of them, and as many as there have to be."""
    if config != SMALL and not thorough:
        pytest.skip("only with --all-simulations")
    _, verilog = unit_verilog(UNIT, config.formats, lanes=config.lanes, output=config.output)
    proof = proof_of(verilog, described(config), tmp_path)
    assert proof.proved
    assert proof.assertions == OUTPUT_RULES == 18


def fault(name: str, module: str, old: str, new: str, rule: str) -> Any:
    """A fault, and the rule that it breaks."""
    return pytest.param(Fault(name, UNIT, module, old, new, SMALL), rule, id=name)


FAULTS = [
    fault("word changes while it waits", "register_slice", "with m.If(~self.o.valid | self.o.ready",
          "with m.If(~self.o.valid | self.i.valid", "m_axis_payload_stays"),
    fault("stop takes back what is offered", UNIT, "ResetInserter(reset)(out)",
          "ResetInserter(core_reset)(out)", "m_axis_valid_stays"),
    fault("stop does not wait for the end of the packet", UNIT, "stopping & ~inside",
          "stopping", "stop_ends_packet"),
    fault("write is answered before its data", "axi_lite", "address_here & data_here & ~self",
          "address_here & ~self", "b_answers"),
    fault("second address is taken", "axi_lite", "with m.Elif(~address_here):", "with m.Else():",
          "aw_one_at_a_time"),
    fault("answer to a read does not wait", "axi_lite", "self.axi_rvalid & self.axi_rready",
          "self.axi_rvalid", "r_valid_stays"),
    fault("answer that AXI4-Lite has not", "axi_lite", "_OKAY, _SLVERR = 0, 2",
          "_OKAY, _SLVERR = 0, 1", "b_response"),
    fault("addresses are taken no more", "axi_lite", "with m.Elif(~self.read & ~self.axi_rvalid):",
          "with m.Elif(self.read):", "ar_ready_comes"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "rule"), FAULTS)
def test_broken_decoder_is_refuted(
    broken: Fault, rule: str, tmp_path: Path, thorough: bool
) -> None:
    """By the rule that it breaks, alone."""
    if broken.module == "axi_lite" and rule != "b_answers" and not thorough:
        pytest.skip("only with --all-simulations")
    verilog = faulty_verilog(broken, broken=True)
    description = {**described(SMALL), "module": f"{UNIT}_under_test"}
    proof = proof_of(verilog, description, tmp_path, rule)
    assert proof.assertions == 1
    assert not proof.proved


def test_every_rule_is_there_once() -> None:
    text = rules_file(described(LARGE))
    inputs = text.index("begin : inputs")
    driven, others = (
        re.findall(r"\b(\w+): assert \(", part) for part in (text[:inputs], text[inputs:])
    )
    assert len(set(driven)) == len(driven) == OUTPUT_RULES
    assert {param.values[1] for param in FAULTS} <= set(driven)
    streams = [name for name in described(LARGE)["plane_widths"]]
    names = [*("aw", "w", "ar"), *(f"s_axis_{name}" for name in streams)]
    assert others == [f"{name}_{what}_stays" for name in names for what in ("valid", "payload")]


@pytest.mark.parametrize("config", [SMALL, LARGE, CODES], ids=["8 lanes", "16 lanes", "codes"])
def test_bind_file_compiles(
    config: BenchConfig, tmp_path: Path, slang: Callable[..., str], thorough: bool
) -> None:
    """With Verilator, without a warning, and with slang; and the instance is there."""
    if config != SMALL and not thorough:
        pytest.skip("only with --all-simulations")
    files = verilog_files(UNIT, config.formats, lanes=config.lanes, output=config.output)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    unit = next(tmp_path / name for name in files if name.endswith(".v"))
    rules = next(tmp_path / name for name in files if name.endswith("_rules.sv"))
    # Expressions of the unit that mix signed and unsigned are Yosys' own; its file is checked
    # in tests/verilog/test_verilog.py.
    assert "rules.sv" not in slang(unit, rules, standard="1800-2023")
    result = verilator(unit, rules)
    assert "%" not in result.stdout + result.stderr
    assert result.returncode == 0
    rules.write_text(rules.read_text().replace(".stopped(stopped)", ".nowhere(stopped)"))
    assert "nowhere" in slang(unit, rules, standard="1800-2023")
    assert verilator(unit, rules).returncode != 0


def verilator(unit: Path, rules: Path) -> subprocess.CompletedProcess[str]:
    """What Verilator's lint says, with the waivers that come with the unit."""
    found = verilator_environment()
    if found is None:
        pytest.skip("RULES NOT LINTED: verilator is not installed")
    environment = {**os.environ, **found[0]}
    program = shutil.which("verilator", path=environment["PATH"])
    assert program is not None
    return subprocess.run(
        [program, "--lint-only", "-Wall", "--assert", f"{unit.stem}.vlt", unit, rules,
         "--top", unit.stem],
        env=environment, cwd=unit.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
