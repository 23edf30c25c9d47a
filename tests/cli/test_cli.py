"""The command line as users see it: text, JSON, exit codes and files."""

import itertools
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import sop.cli
import sop.hdl.verilog_files
from golden.notation import parse_format
from sop import __version__
from sop.shared.format_list import KNOWN_FORMATS
from tests.support.commands import Result, Sop, assert_refused, sop_process

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


def test_bad_input_as_a_process(tmp_path: Path) -> None:
    assert_refused(sop_process("verilog", "-f", "Foo", "-o", tmp_path / "out"), "'Foo'")
    assert not list(tmp_path.iterdir())
