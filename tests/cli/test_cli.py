"""The command line as users see it: text, JSON, exit codes and files."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import sop.cli
import sop.hdl.verilog_files
from golden.formats import HIF8T
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tensor import QuantizedTensor, decode
from rtl.units import UNITS
from sim.installed import quickest_simulator
from sop import __version__
from sop.shared.format_list import KNOWN_FORMATS
from sop.shared.output import write_files

ROOT = Path(__file__).resolve().parents[2]
LANES = 16


@dataclass(frozen=True)
class Result:
    """What one run of the program did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Sop = Callable[..., Result]


@pytest.fixture
def sop_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sop:
    """Run ``sop`` in this process; the exit code is what ``sys.exit`` got."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sop", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            sop.cli.main()
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


def sop_process(*arguments: object, **environment: str) -> Result:
    """Run ``sop`` as a process of its own."""
    command = [sys.executable, "-m", "sop.cli", *map(str, arguments)]
    run = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return Result(run.returncode, run.stdout, run.stderr)


# --- version and help -----------------------------------------------------------------------------


def test_version() -> None:
    assert sop_process("--version") == Result(0, f"scaled-outer-product {__version__}\n", "")


LOOKS_AT_A_UNIT = """
import gc
import sys
import sop.cli
from amaranth.hdl import Fragment
from golden.notation import parse_format
from rtl.units import build_unit

sys.argv = ["sop", "--version"]
try:
    sop.cli.main()
except SystemExit:
    unit = build_unit("float_to_hif", parse_format("NF4sUE4M4"), lanes=1)
    Fragment.get(unit, None)  # Amaranth warns only where something was used
    unit = build_unit("float_to_hif", parse_format("NF4sUE4M4"), lanes=1)
    del unit
    gc.collect()
"""


def test_units_that_are_only_looked_at_are_no_mistake_of_the_user() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOOKS_AT_A_UNIT], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""


COMMANDS = (
    "formats", "verilog", "sim", "vectors", "calibrate", "quantize", "eval", "inspect", "compare",
    "diff", "decode", "export", "report", "paper", "synth",
)  # fmt: skip


def command_names() -> list[str]:
    """Every command of the program."""
    commands = sop.cli.app.registered_commands
    return [
        command.name or command.callback.__name__.replace("_", "-")
        for command in commands
        if command.callback
    ]


def test_expected_commands_exist() -> None:
    assert set(command_names()) >= set(COMMANDS)


@pytest.mark.parametrize("command", command_names())
def test_help_has_an_example(command: str) -> None:
    result = sop_process(command, "--help", TERMINAL_WIDTH="200", COLUMNS="200", NO_COLOR="1")
    assert result.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    assert re.search(rf"Example: +sop {command}\b", plain)


def test_help_lists_the_commands(sop_run: Sop) -> None:
    result = sop_run("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", result.out)


# --- formats --------------------------------------------------------------------------------------


def hif_values(significand_bits: int, shifts: int) -> set[int]:
    half = 1 << (significand_bits - 1)
    return {m << e for m in range(-half, half) for e in range(shifts)}


def float_values(exponent_bits: int, mantissa_bits: int) -> set[Fraction]:
    """Values of a signed float with subnormals, bias 2**(e-1)-1 and no special codes."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = set()
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = Fraction(mantissa, 2**mantissa_bits) + (exponent > 0)
        values.add(fraction * Fraction(2) ** (max(exponent, 1) - bias))
    return values | {-value for value in values}


ATOM_VALUES: dict[str, tuple[int, set[Any]]] = {
    "HIF7": (7, hif_values(5, 4)),
    "HIF8": (8, hif_values(5, 5)),
    "HIF8T": (8, hif_values(6, 4)),
    "E2M1": (4, float_values(2, 1)),
    "E2M3": (6, float_values(2, 3)),
    "E3M2": (6, float_values(3, 2)),
    # The two codes with all exponent and mantissa bits set are NaN.
    "E4M3": (8, float_values(4, 3) - {Fraction(480), Fraction(-480)}),
    "E3M4": (8, float_values(3, 4)),
    "E4M5": (10, float_values(4, 5)),
    "E5M6": (12, float_values(5, 6)),
    "INT4": (4, set(range(-7, 8))),
    "INT8": (8, set(range(-127, 128))),
}


@pytest.mark.parametrize(
    ("name", "count"), [("HIF7", 80), ("HIF8", 96), ("HIF8T", 160), ("E2M3", 63)]
)
def test_counts_that_the_sources_state(name: str, count: int) -> None:
    # The test's own sets must hold what is published before they judge the program.
    assert len(ATOM_VALUES[name][1]) == count


def test_atoms_have_the_derived_counts_and_ranges(sop_run: Sop) -> None:
    atoms = {atom["name"]: atom for atom in sop_run("formats", "--json").json["atoms"]}
    expected = {
        name: {"name": name, "bits": bits, "distinct_values": len(values),
               "min": float(min(values)), "max": float(max(values))}
        for name, (bits, values) in ATOM_VALUES.items()
    }  # fmt: skip
    assert atoms == expected


def test_scales_have_the_widths_of_their_names(sop_run: Sop) -> None:
    for scale in sop_run("formats", "--json").json["scales"]:
        match = re.fullmatch(r"(U|S1)E(\d)M(\d)", scale["name"])
        if match is None:
            assert (scale["name"], scale["bits"]) == ("BF16", 16)
            continue
        assert scale["bits"] == (match[1] == "S1") + int(match[2]) + int(match[3])
        assert scale["min"] == (0 if match[1] == "U" else -scale["max"])


# Bits of an element plus bits of a scale word over the block size, by hand.
BITS_PER_WEIGHT = {
    "E2M3sUE4M4": 6 + 8 / 16,
    "NF4-BOF4sS1E5M5": 4 + (1 + 1 + 5 + 5) / 16,
    "E4M3^0sUE8M0": 8.0,
    "E2M1^32sUE8M0": 4 + 8 / 32,
    "NF4sUE4M4": 4 + 8 / 16,
    "BOF4-NF4sUE4M3": 4 + (1 + 7) / 16,
    "DD6sS1E4M3": 6 + 8 / 16,
}


def test_listed_bits_per_weight(sop_run: Sop) -> None:
    listed = {f["name"]: f["bits_per_weight"] for f in sop_run("formats", "--json").json["formats"]}
    assert set(listed) == set(KNOWN_FORMATS)
    assert {name: listed[name] for name in BITS_PER_WEIGHT} == BITS_PER_WEIGHT
    assert (BITS_PER_WEIGHT["E2M3sUE4M4"], BITS_PER_WEIGHT["NF4-BOF4sS1E5M5"]) == (6.5, 4.75)


def test_every_listed_name_parses_to_itself(sop_run: Sop) -> None:
    listing = sop_run("formats", "--json").json["formats"]
    assert len(listing) > 10
    for entry in listing:
        assert parse_format(entry["name"]).name == entry["name"]
        assert entry["note"]


def test_codebooks_ascend_from_the_full_scale(sop_run: Sop) -> None:
    books = sop_run("formats", "--json").json["codebooks"]
    paper = ["NF4", "BOF4", "Split87", "SH4"]
    assert [book["name"] for book in books] == [*paper, *(f"{name}T" for name in paper)]
    for book in books:
        for hif, levels in book["levels"].items():
            values = ATOM_VALUES[hif][1]
            assert levels == sorted(set(levels))
            assert len(levels) == 16
            assert set(levels) <= values
            if book["name"] in paper:  # the twins are moved up
                assert levels[0] == min(values)


@pytest.mark.parametrize(("name", "bits"), BITS_PER_WEIGHT.items(), ids=BITS_PER_WEIGHT)
def test_single_format(name: str, bits: float, sop_run: Sop) -> None:
    listing = sop_run("formats", name, "--json").json
    assert list(listing) == ["formats"]
    (entry,) = listing["formats"]
    assert (entry["name"], entry["bits_per_weight"]) == (name, bits)


def test_several_formats_in_the_order_given(sop_run: Sop) -> None:
    names = ["SH4^8sS1E2M4", "BOF4-NF4^32sS1E5M5", "INT4^64sBF16"]
    result = sop_run("formats", *names, "--json")
    assert [entry["name"] for entry in result.json["formats"]] == names


def test_default_block_size_is_not_spelled_out(sop_run: Sop) -> None:
    (entry,) = sop_run("formats", "NF4^16sUE4M4", "--json").json["formats"]
    assert (entry["name"], entry["block_size"]) == ("NF4sUE4M4", 16)


def test_text_mentions_every_name(sop_run: Sop) -> None:
    listing = sop_run("formats", "--json").json
    result = sop_run("formats")
    words = set(result.out.split())
    for group in ("atoms", "scales", "codebooks", "formats"):
        assert {entry["name"] for entry in listing[group]} <= words
    for entry in listing["formats"]:
        assert entry["note"] in result.out
    assert result.err == ""


def test_text_of_a_single_format(sop_run: Sop) -> None:
    result = sop_run("formats", "E2M3sUE4M4")
    (line,) = (line for line in result.out.splitlines() if line.startswith("E2M3sUE4M4"))
    assert line.split()[1:5] == ["6.5", "6", "16", "8"]


# --- bad input ------------------------------------------------------------------------------------


def assert_refused(result: Result, *parts: str, progress: bool = False) -> None:
    """Exit code 2, one line of the form ``sop: ...`` with all parts, and no traceback.

    With ``progress``, lines that report progress may stand before it.
    """
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert [line.startswith("sop: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("sop: ")
    if not progress:
        assert len(lines) == 1
    for part in parts:
        assert part in lines[-1]


IMPOSSIBLE_FORMATS = {
    "not-a-name": ("Foo", "is not of the form"),
    "empty": ("", "is not of the form"),
    "line-break": ("NF4sUE4M4\n", "is not of the form"),
    "unknown-codebook": ("NF5sUE4M4", "'NF5'; atoms are E2M1, "),
    "unknown-scale": ("NF4sXE4M4", "unknown scale format 'XE4M4'"),
    "three-codebooks": ("NF4-BOF4-SH4sUE4M4", "3 codebooks"),
    "same-codebook-twice": ("NF4-NF4sUE4M4", "holds nothing new"),
    "different-index-widths": ("NF4-DD5sUE4M4", "same index width"),
    "atom-in-a-pair": ("E2M3-NF4sUE4M4", "atom E2M3 cannot be part of a codebook pair"),
    "block-size": ("NF4^12sUE4M4", "block size 12, must be one of 8, 16, 32, 64"),
    "layer-scale-of-codebook": ("NF4^0sUE4M4", "block size 0"),
    "exponent-too-wide": ("E2M3sUE9M4", "exponent of 9 bits, must be 2 to 8"),
    "mantissa-too-wide": ("E2M3sUE4M8", "mantissa of 8 bits, at most 7"),
    "beyond-float32": ("E2M3sUE8M1", "8-bit exponents exist only as UE8M0 and BF16"),
    "word-too-wide": ("NF4-BOF4sBF16", "scale word of 17 bits, at most 16"),
    "row-scale-of-atom": ("E2M3sRUE4M4", "row scales exist for codebook formats only"),
}


@pytest.mark.parametrize(("name", "part"), IMPOSSIBLE_FORMATS.values(), ids=IMPOSSIBLE_FORMATS)
@pytest.mark.parametrize("command", ["formats", "verilog"])
def test_impossible_format(
    command: str, name: str, part: str, tmp_path: Path, sop_run: Sop
) -> None:
    if command == "formats":
        result = sop_run("formats", name)
    else:
        result = sop_run("verilog", "--format", name, "-o", tmp_path / "out")
    assert_refused(result, repr(name), part)
    assert not list(tmp_path.iterdir())


BAD_VERILOG = {
    "unit": (
        ["nosuch"],
        "unknown unit 'nosuch': units are lut_decoder, hif_to_float, float_to_hif, float_decoder,",
    ),
    "lanes": (
        ["--lanes", "24"],
        "lanes must be a multiple or a divisor of the block size 16, 8 to 512, not 24",
    ),
    "lanes-zero": (["--lanes", "0"], "not 0"),
    "lanes-large": (["--lanes", "1024"], "not 1024"),
    "hif": (["--hif", "HIF9"], "--hif must be one of HIF7, HIF8, HIF8T, not 'HIF9'"),
    "output": (["--output", "float16"], "unknown output 'float16': outputs are float32, bfloat16"),
    "atom": (["-f", "E2M3^0sUE4M4"], "E2M3^0sUE4M4 has no blocks"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD_VERILOG.values(), ids=BAD_VERILOG)
def test_bad_input_of_verilog(
    arguments: list[str], part: str, tmp_path: Path, sop_run: Sop
) -> None:
    assert_refused(sop_run("verilog", *arguments, "-o", tmp_path / "out"), part)
    assert not list(tmp_path.iterdir())


def test_output_folder_that_is_a_file(tmp_path: Path, sop_run: Sop) -> None:
    (tmp_path / "out").write_text("mine")
    result = sop_run("verilog", "lut_decoder", "--lanes", LANES, "-o", tmp_path / "out")
    assert_refused(result, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


NAMES = ("model.layers.0.a.weight", "model.layers.0.b.weight")
NORM = "model.layers.0.norm.weight"


def weights() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Two matrices, one whose rows are no whole blocks, and a vector."""
    rng = np.random.default_rng(5)
    return {
        NAMES[0]: rng.standard_normal((32, 64)).astype(np.float32),
        NAMES[1]: rng.standard_normal((16, 40)).astype(np.float32),
        NORM: np.ones(64, np.float32),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model file."""
    path = tmp_path / "model" / "tiny.safetensors"
    path.parent.mkdir()
    save_file(weights(), path)
    return path


def sim_arguments(
    model: Path, build: Path, *more: object, format_name: str = "NF4sUE4M4"
) -> list[object]:
    given = ["--sim", quickest_simulator(), "-f", format_name, "--lanes", LANES, "--build", build]
    return ["sim", model, *given, *more]


BAD_SIM = {
    "simulator": (["--sim", "vcs"], "unknown simulator 'vcs': expected verilator or icarus"),
    "hif": (["--hif", "hif7"], "--hif must be one of HIF7, HIF8, HIF8T, not 'hif7'"),
    "output": (["--output", "float16"], "--output must be one of float32, bfloat16, not 'float16'"),
    "stalls": (["--stalls", "all"], "--stalls must be one of none, in, out, both, not 'all'"),
    "scale-mode": (["--scale-mode", "best"], "--scale-mode must be one of absmax, argmax, search"),
    "lanes": (
        ["--lanes", "40"],
        "lanes must be a multiple or a divisor of the block size 16, 8 to 512, not 40",
    ),
    "fault-short": (
        ["--inject-fault", "index:1"],
        "'index:1' is not of the form KIND:POSITION:BIT",
    ),
    "fault-long": (["--inject-fault", "index:1:2:3"], "is not of the form KIND:POSITION:BIT"),
    "fault-empty": (["--inject-fault", ""], "is not of the form KIND:POSITION:BIT"),
    "fault-sign": (["--inject-fault", "index:1:-1"], "is not of the form KIND:POSITION:BIT"),
    "fault-word": (["--inject-fault", "index:one:1"], "is not of the form KIND:POSITION:BIT"),
    "missing-pattern": (["-t", "*zz*"], "tiny.safetensors: pattern '*zz*': matches no tensor"),
    "one-bad-pattern": (["-t", "*", "-t", "zz"], "pattern 'zz': matches no tensor"),
    "atom": (["-f", "E2M3^0sUE4M4"], "E2M3^0sUE4M4 has no blocks"),
    "impossible": (["-f", "NF4-NF4sUE4M4"], "holds nothing new"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD_SIM.values(), ids=BAD_SIM)
def test_bad_input_of_sim(
    arguments: list[str], part: str, model: Path, tmp_path: Path, sop_run: Sop
) -> None:
    first = sim_arguments(model, tmp_path / "build")  # the last of two equal options counts
    assert_refused(sop_run(*first, *arguments), part)
    assert not (tmp_path / "build").exists()


BAD_FAULTS = {
    "kind": ("weight:0:0", "unknown kind of fault 'weight': expected index, scale, lut"),
    # 32 x 64 weights of 4 bits in 128 blocks with 8-bit words; 16 entries of 8 bits.
    "index": ("index:2048:0", "fault index:2048:0 does not exist: 2048 elements of 4 bits"),
    "index-bit": ("index:0:4", "fault index:0:4 does not exist"),
    "scale": ("scale:128:0", "fault scale:128:0 does not exist: 128 elements of 8 bits"),
    "scale-bit": ("scale:0:8", "fault scale:0:8 does not exist"),
    "lut": ("lut:16:0", "fault lut:16:0 does not exist: 16 elements of 8 bits"),
    "lut-bit": ("lut:0:8", "fault lut:0:8 does not exist"),
}


@pytest.mark.parametrize(("fault", "part"), BAD_FAULTS.values(), ids=BAD_FAULTS)
def test_fault_that_does_not_exist(
    fault: str, part: str, model: Path, tmp_path: Path, sop_run: Sop
) -> None:
    arguments = sim_arguments(model, tmp_path / "build", "--inject-fault", fault)
    assert_refused(sop_run(*arguments), part, progress=True)
    assert not (tmp_path / "build").exists()


def write_nothing(path: Path) -> None:
    assert not path.exists()


def write_truncated(path: Path) -> None:
    complete = path.with_name("complete.safetensors")
    save_file(weights(), complete)
    path.write_bytes(complete.read_bytes()[:2000])


def write_truncated_gguf(path: Path) -> None:
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(3))


def write_text(path: Path) -> None:
    path.write_text("not a model")


BAD_FILES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("none.safetensors", write_nothing, "no such file"),
    "truncated": ("cut.safetensors", write_truncated, "not a valid safetensors file"),
    "truncated-gguf": ("cut.gguf", write_truncated_gguf, "field 'tensor_count'"),
    "text": ("text.safetensors", write_text, "not a valid safetensors file"),
    "suffix": ("model.txt", write_text, "suffix '.txt', expected .gguf or .safetensors"),
    "pickle": ("model.bin", write_text, "pickled files are never opened"),
}


@pytest.mark.parametrize(("name", "write", "part"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_model_file(
    name: str, write: Callable[[Path], None], part: str, tmp_path: Path, sop_run: Sop
) -> None:
    write(tmp_path / name)
    result = sop_run(*sim_arguments(tmp_path / name, tmp_path / "build"))
    assert_refused(result, str(tmp_path / name), part)
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus-inf"])
def test_weight_that_is_not_finite(value: float, tmp_path: Path, sop_run: Sop) -> None:
    tensors = weights()
    tensors[NAMES[1]][3, 17] = value
    tensors[NAMES[1]][9, 1] = value
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    result = sop_run(*sim_arguments(path, tmp_path / "build"))
    parts = (str(path), repr(NAMES[1]), "row 3, column 17", str(value), "2 weights are not finite")
    assert_refused(result, *parts, progress=True)
    assert not (tmp_path / "build").exists()


def test_vector_is_refused_by_name(model: Path, tmp_path: Path, sop_run: Sop) -> None:
    result = sop_run(*sim_arguments(model, tmp_path / "build", "-t", NORM))
    assert_refused(result, str(model), repr(NORM), "matrix", "[64]", progress=True)
    assert not (tmp_path / "build").exists()


def test_trained_codebook_is_refused(model: Path, tmp_path: Path, sop_run: Sop) -> None:
    arguments = sim_arguments(model, tmp_path / "build", format_name="NF4-DD4sS1E5M5")
    parts = ("NF4-DD4sS1E5M5", "codebook DD4 is trained per layer")
    assert_refused(sop_run(*arguments), *parts, progress=True)
    assert not (tmp_path / "build").exists()


def test_bad_input_as_a_process(tmp_path: Path) -> None:
    assert_refused(sop_process("verilog", "-f", "Foo", "-o", tmp_path / "out"), "'Foo'")
    assert not list(tmp_path.iterdir())


# --- sim ------------------------------------------------------------------------------------------


def test_simulation_passes(simulator: str, model: Path, build_root: Path, sop_run: Sop) -> None:
    result = sop_run(*sim_arguments(model, build_root, "--sim", simulator, "--json"))
    assert result.code == 0
    report = result.json
    assert report["passed"] is True
    assert (report["format"], report["bits_per_weight"]) == ("NF4sUE4M4", 4.5)
    assert (report["lanes"], report["output"], report["simulator"]) == (LANES, "float32", simulator)
    assert (report["weights"], report["mismatches"]) == (32 * 64 + 16 * 40, 0)
    assert (report["model"], report["waveform"]) == (str(model), None)
    first, second = report["tensors"]
    assert [first["name"], second["name"]] == list(NAMES)
    assert [first["shape"], second["shape"]] == [[32, 64], [16, 40]]
    assert [first["weights"], second["weights"]] == [2048, 640]
    for tensor in (first, second):
        assert (tensor["mismatches"], tensor["misplaced_last"], tensor["flags"]) == (0, 0, [])
        assert tensor["first_mismatch"] is None
        assert tensor["lut_shares"] == [1, 0]
    # One beat a clock. The first tensor waits for its 16 LUT entries and one clock for the swap of
    # banks; the LUTs of the second, whose rows are padded to 48, load while the first one streams.
    assert first["clocks"] == 32 * 64 // LANES + 16 + 1
    assert second["clocks"] == 16 * 48 // LANES
    assert report["clocks"] == first["clocks"] + second["clocks"]


def test_report_in_text(model: Path, build_root: Path, sop_run: Sop) -> None:
    result = sop_run(*sim_arguments(model, build_root))
    assert result.code == 0
    assert result.out.splitlines()[-1] == "PASS: every bit equals the golden model"
    assert "2,688 weights in 193 clocks, 0 mismatched" in result.out
    for name, shape in zip(NAMES, ("32x64", "16x40"), strict=True):
        assert re.search(rf"{re.escape(name)} +{shape} ", result.out)
        assert f"quantizing {name}" in result.err
    used = f"LUT entries HIF8T), {LANES} lanes, float32, {quickest_simulator()}"
    assert f"NF4sUE4M4 (4.5 bits per weight, {used}" in result.out


@pytest.mark.parametrize(
    ("more", "format_name"),
    [
        (["--stalls", "both", "--seed", "9"], "NF4sUE4M4"),
        (["--output", "bfloat16", "--scale-mode", "absmax"], "NF4sUE4M4"),
        (["--hif", "HIF8"], "BOF4-NF4sS1E5M5"),
    ],
    ids=["stalls", "bfloat16", "pair-hif8"],
)
def test_simulation_options(
    more: list[str], format_name: str, model: Path, build_root: Path, sop_run: Sop
) -> None:
    arguments = sim_arguments(model, build_root, "--json", format_name=format_name)
    result = sop_run(*arguments, *more)
    assert result.code == 0
    report = result.json
    assert (report["passed"], report["mismatches"], report["weights"]) == (True, 0, 2688)
    if "--stalls" in more:
        assert report["clocks"] > 193
    if format_name != "NF4sUE4M4":
        assert all(0 < tensor["lut_shares"][1] < 1 for tensor in report["tensors"])


def test_padding_bits_of_a_plane_are_no_beat(
    tmp_path: Path, build_root: Path, sop_run: Sop
) -> None:
    # Four 9-bit scale words fill 36 of 40 bits; the 4 bits that remain hold no scale word.
    path = tmp_path / "pad.safetensors"
    save_file({"w": np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)}, path)
    arguments = sim_arguments(path, build_root, "--json", format_name="BOF4-NF4^32sUE8M0")
    result = sop_run(*arguments, "-t", "w", "--lanes", 64)
    assert result.code == 0
    (tensor,) = result.json["tensors"]
    assert (tensor["misplaced_last"], tensor["mismatches"]) == (0, 0)
    assert tensor["clocks"] == 2 + 32 + 1


def golden_tensor() -> QuantizedTensor:
    return quantize(weights()[NAMES[0]], parse_format("NF4sUE4M4", HIF8T))  # the default of sim


def index_fault() -> tuple[str, QuantizedTensor]:
    tensor = golden_tensor()
    # Levels ascend strictly, so any other index under a scale that is not 0 is another value.
    position, bit = 5 * 64 + 19, 2
    indices = tensor.indices.copy()
    indices.reshape(-1)[position] ^= 1 << bit
    return f"index:{position}:{bit}", replace(tensor, indices=indices)


def scale_fault() -> tuple[str, QuantizedTensor]:
    tensor = golden_tensor()
    # Any bit of a scale code changes the scale, and with it the largest weight of the block.
    position, bit = 77, 1
    words = tensor.scale_words.copy()
    words.reshape(-1)[position] ^= 1 << bit
    return f"scale:{position}:{bit}", replace(tensor, scale_words=words)


def lut_fault() -> tuple[str, QuantizedTensor]:
    tensor = golden_tensor()
    (lut,) = tensor.luts
    # The change must keep the table ascending, or the golden model would not take it either.
    for position, bit in itertools.product(range(16), range(8)):
        codes = list(lut.codes)
        codes[position] ^= 1 << bit
        try:
            changed = replace(tensor, luts=(replace(lut, codes=tuple(codes)),))
        except ValueError:
            continue
        if (tensor.indices == position).any():
            return f"lut:{position}:{bit}", changed
    raise AssertionError("no entry can be changed by one bit")


FAULTS = {"index": index_fault, "scale": scale_fault, "lut": lut_fault}


@pytest.mark.parametrize("kind", FAULTS)
def test_injected_fault_is_found(kind: str, model: Path, build_root: Path, sop_run: Sop) -> None:
    fault, changed = FAULTS[kind]()
    before = decode(golden_tensor(), padded=True).view(np.uint32).reshape(-1)
    after = decode(changed, padded=True).view(np.uint32).reshape(-1)
    wrong = np.flatnonzero(before != after)
    assert len(wrong), "this fault must change a value"
    position = int(wrong[0])
    row, column = divmod(position, 64)
    block, element = divmod(column, 16)

    result = sop_run(*sim_arguments(model, build_root, "--inject-fault", fault))
    assert result.code == 1
    (line,) = (line for line in result.out.splitlines() if line.startswith("MISMATCH"))
    values = [
        f"0x{bits[position]:08x} ({bits.view(np.float32)[position]:.9g})"
        for bits in (after, before)
    ]
    assert line == (
        f"MISMATCH {NAMES[0]}: row {row}, block {block}, element {element} "
        f"(beat {position // LANES}, lane {position % LANES}): RTL {values[0]}, golden {values[1]}"
    )
    assert f" {len(wrong)} mismatched;" in result.out
    assert result.out.splitlines()[-1] == "FAIL"
    (waveform,) = re.findall(r"^Waveform: (.+)$", result.out, flags=re.MULTILINE)
    assert Path(waveform).is_relative_to(build_root)
    assert Path(waveform).stat().st_size > 100


def test_injected_fault_in_json(
    simulator: str, model: Path, build_root: Path, sop_run: Sop
) -> None:
    fault, changed = index_fault()
    position = 5 * 64 + 19
    options = ["--sim", simulator, "--inject-fault", fault, "--json"]
    result = sop_run(*sim_arguments(model, build_root, *options))
    assert result.code == 1
    report = result.json
    assert (report["passed"], report["mismatches"]) == (False, 1)
    assert [tensor["mismatches"] for tensor in report["tensors"]] == [1, 0]
    assert report["tensors"][0]["first_mismatch"] == {
        "tensor": 0, "row": 5, "column": 19, "block": 1, "element": 3,
        "beat": position // LANES, "lane": 3,
        "expected": int(decode(golden_tensor()).view(np.uint32)[5, 19]),
        "actual": int(decode(changed).view(np.uint32)[5, 19]),
    }  # fmt: skip
    waveform = Path(report["waveform"])
    assert waveform.suffix in (".fst", ".vcd")
    assert waveform.stat().st_size > 100


# --- verilog --------------------------------------------------------------------------------------


def small_verilog(folder: Path) -> list[object]:
    return ["verilog", "-f", "NF4sUE4M4", "--lanes", LANES, "-o", folder]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All units, exported by a process with one seed of Python's hashes."""
    folder = tmp_path_factory.mktemp("verilog") / "new" / "folder"
    result = sop_process(*small_verilog(folder), PYTHONHASHSEED="0")
    assert (result.code, result.err) == (0, "")
    assert sorted(result.out.splitlines()) == sorted(map(str, folder.iterdir()))
    return folder


AXI = "sop_decoder_axi_16_hif8t_lut4g16ue4m4_float32"


def test_exported_files(exported: Path) -> None:
    names = {
        "lut_decoder_16_hif8t_lut4g16ue4m4",
        "hif_to_float_16_hif8t_lut4g16ue4m4_float32",
        "float_decoder_16_hif8t_lut4g16ue4m4_float32",
        "sparse_merge_16_float32",
        "sparse_decoder_16_hif8t_lut4g16ue4m4_float32",
        "float_to_hif_16_bf16_hif8t",
        AXI,
    }
    kinds = (".v", ".vlt", ".core", "_litex.py", ".librelane.yaml", ".sdc", ".json")
    files = {f"{name}{kind}" for name in names for kind in kinds}
    assert set(contents(exported)) == files | {
        f"{AXI}{kind}" for kind in (".h", "_registers.md", "_rules.sv")
    }


def test_same_bytes_in_another_process(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    assert sop_process(*small_verilog(folder), PYTHONHASHSEED="1").code == 0
    assert contents(folder) == contents(exported)


def test_tile(tmp_path: Path, sop_run: Sop) -> None:
    tile = ["verilog", "sop_tile", "-f", "BOF4-NF4^8sS1E5M5", "--hif", "HIF7", "-o", tmp_path]
    result = sop_run(*tile, "--rows", 2, "--columns", 5, "--activations", "INT8^32sBF16")
    assert (result.code, result.err) == (0, "")
    name = "sop_tile_2x5_g8_hif7s1e5m5_int8bf16"
    description = json.loads((tmp_path / f"{name}.json").read_text())
    assert {Path(file).stem.split(".")[0] for file in contents(tmp_path)} == {
        name, f"{name}_litex",
    }  # fmt: skip
    parameters = description["parameters"]
    assert (parameters["scale_units"], parameters["output_beats"]) == (2, 5)
    places = [place for beat in parameters["outputs"] for place in beat if place]
    assert sorted(places) == [[row, column] for row in range(2) for column in range(5)]
    assert [field["width"] for field in description["streams"][2]["fields"]] == [64, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", 0], "rows and columns must be at least 1"),
        (["--columns", 4096], "at most 4096 outputs, not 16 x 4096"),
        (["--activations", "none"], "--activations none: a tile multiplies quantized ones"),
        (["--activations", "NF4sUE4M4"], "activation format 'NF4sUE4M4': element NF4, must be"),
        (["--activations", "INT8^8sUE8M0"], "blocks of 8 channels are not whole blocks of 16"),
        (["--multiplier", "fast"], "multiplier must be one of"),
        (
            ["-f", "NF4sUE4M4", "-f", "E2M3sUE4M4"],
            "sop_tile for NF4sUE4M4, E2M3sUE4M4 and INT8sUE8M0: takes one format, not 2",
        ),
        (["-f", "E5M6sUE4M4"], "E5M6 is no element of a tile"),
        (["--testbench"], "--testbench: there is none for sop_tile"),
        (["--lanes", 16], "--lanes is for other units; sop_tile: --rows, --columns, --format"),
        (["--lookup", "tree"], "--lookup is for other units"),
    ],
)
def test_tiles_that_cannot_be(
    arguments: list[object], message: str, tmp_path: Path, sop_run: Sop
) -> None:
    result = sop_run("verilog", "sop_tile", *arguments, "-o", tmp_path / "none")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert not (tmp_path / "none").exists()


def test_same_bytes_again_over_old_files(exported: Path, tmp_path: Path, sop_run: Sop) -> None:
    for _ in range(2):
        result = sop_run(*small_verilog(tmp_path), "--json")
        assert (result.code, result.err) == (0, "")
        assert [Path(name).parent for name in result.json["files"]] == [tmp_path] * len(
            contents(exported)
        )
        assert contents(tmp_path) == contents(exported)


def test_no_path_of_this_machine(exported: Path) -> None:
    home = str(Path.home())
    forbidden = [str(ROOT), str(exported), sys.prefix, *([home + "/"] if len(home) > 1 else [])]
    for name, raw in contents(exported).items():
        for path in forbidden:
            assert path.encode() not in raw, f"{path} in {name}"
        assert b".py:" not in raw, "a source position"


def verilog_ports(text: str, module: str) -> dict[str, tuple[str, int]]:
    """Direction and width of every port, parsed from the text."""
    body = text[text.index(f"module {module}(") :]
    header, body = body[: body.index(";")], body[: body.index("endmodule")]
    body = re.sub(r"^ *function .*?endfunction", "", body, flags=re.MULTILINE | re.DOTALL)
    declarations = re.findall(
        r"^ *(input|output) (?:\[(\d+):0\] )?(\w+);", body, flags=re.MULTILINE
    )
    ports = {name: (direction, int(high or 0) + 1) for direction, high, name in declarations}
    assert set(re.findall(r"\w+", header[header.index("(") :])) == set(ports)
    return ports


def test_json_describes_the_ports(exported: Path) -> None:
    described = sorted(exported.glob("*.json"))
    assert len(described) == sum("lanes" in unit.takes for unit in UNITS.values())
    for path in described:
        description = json.loads(path.read_text())
        assert description["module"] == path.stem
        ports = {port["name"]: (port["direction"], port["width"]) for port in description["ports"]}
        assert ports == verilog_ports(path.with_suffix(".v").read_text(), path.stem)
        for port in description["ports"]:
            assert ("fields" in port) == port["name"].endswith("__payload")
            bit = 0
            for field in port.get("fields", ()):
                assert field["offset"] == bit
                bit += field["width"]
            assert bit == port["width"] or "fields" not in port


def test_json_names_the_parameters(exported: Path) -> None:
    path = exported / "float_decoder_16_hif8t_lut4g16ue4m4_float32.json"
    assert json.loads(path.read_text())["parameters"] == {
        "lanes": 16, "lut_entry": "HIF8T", "output": "float32", "lookup": "one_hot",
        "formats": [
            {
                "element": "LUT of 16", "luts": 1, "index_bits": 4, "block_size": 16,
                "scale": "UE4M4", "metabit": False, "scale_word_bits": 8, "row_scale": False,
            }
        ],
    }  # fmt: skip
    path = exported / "float_to_hif_16_bf16_hif8t.json"
    assert json.loads(path.read_text())["parameters"] == {
        "lanes": 16, "source": "BF16", "lut_entry": "HIF8T", "shift": 8,
    }  # fmt: skip


def test_header_names_module_and_generator(exported: Path) -> None:
    for path in exported.glob("*.v"):
        first = path.read_text().splitlines()[0]
        assert first.startswith(f"// {path.stem}: generated by scaled-outer-product {__version__}")


def test_codebook_names_do_not_shape_the_hardware(tmp_path: Path, sop_run: Sop) -> None:
    for folder, name in (("a", "NF4sUE4M4"), ("b", "BOF4sUE4M4")):
        options = ["-f", name, "--lanes", 16, "-o", tmp_path / folder]
        assert sop_run("verilog", "lut_decoder", *options).code == 0
    first, second = (sorted((tmp_path / folder).iterdir()) for folder in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_nothing_is_written_if_a_later_unit_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sop_run: Sop
) -> None:
    made = []

    def fails_the_second_time(component: object, name: str) -> str:
        made.append(name)
        if len(made) == 2:
            raise RuntimeError("the tool is out of order")
        return "module\n"

    monkeypatch.setattr(sop.hdl.verilog_files, "to_verilog", fails_the_second_time)
    result = sop_run(*small_verilog(tmp_path / "out"))
    assert (result.code, len(made)) == (3, 2)
    assert "the tool is out of order" in result.err
    assert result.out == ""
    assert not list(tmp_path.iterdir())


# --- write_files ----------------------------------------------------------------------------------


def test_write_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    files = {"one.v": "module\n", "two.json": "ü\n"}
    assert write_files(folder, files) == [folder / "one.v", folder / "two.json"]
    assert contents(folder) == {name: text.encode() for name, text in files.items()}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_write_files_replaces(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("old and longer")
    (tmp_path / "other").write_text("kept")
    write_files(tmp_path, {"one": "new"})
    assert contents(tmp_path) == {"one": b"new", "other": b"kept"}


def test_write_files_keeps_the_old_file_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").write_text("old")
    seen: list[bytes] = []

    def fail(source: str, target: Path) -> None:
        seen.append(Path(source).read_bytes())
        assert Path(source).parent == tmp_path, "a rename across file systems is not atomic"
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_files(tmp_path, {"one": "new"})
    assert seen == [b"new"], "the file must be complete before it takes its name"
    assert contents(tmp_path) == {"one": b"old"}


def test_write_files_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_files(tmp_path, {"good": "text", "bad": "\ud800"})
    assert contents(tmp_path) == {"good": b"text"}
