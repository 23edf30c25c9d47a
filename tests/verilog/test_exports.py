"""What accompanies exported Verilog: read by the tools, or languages, that it is for."""

import ast
import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from golden.errors import InputError
from golden.notation import QuantFormat, parse_format
from rtl.registers import ADDRESS_BITS, IDENTIFICATION, LUT_WINDOW, REGISTERS, register
from rtl.units import UNITS, configuration_name, outputs_of
from sop.hdl.verilog_files import verilog_files, write_verilog_files

FORMATS = [parse_format(name) for name in ("BOF4-NF4sS1E5M5", "NF4^64sRS1E2M4", "E2M3sUE4M4")]


@pytest.fixture(scope="module")
def axi() -> dict[str, str]:
    """Files of the AXI decoder, of three formats, by what follows the module's name."""
    files = verilog_files("sop_decoder_axi", FORMATS, lanes=16, output="float32")
    module = next(name for name in files if name.endswith(".v")).removesuffix(".v")
    return {name.removeprefix(module): text for name, text in files.items()} | {"module": module}


# --- registers ------------------------------------------------------------------------------------


def test_registers_do_not_overlap() -> None:
    assert len({item.name for item in REGISTERS}) == len(REGISTERS)
    addresses = [item.address for item in REGISTERS]
    assert addresses == sorted(set(addresses))
    assert all(address % 4 == 0 and address < LUT_WINDOW for address in addresses)
    assert 2 * LUT_WINDOW <= 1 << ADDRESS_BITS
    for item in REGISTERS:
        bits = [bit for field in item.fields for bit in range(32) if field.mask >> bit & 1]
        assert len(bits) == len(set(bits)) == sum(field.width for field in item.fields)
        assert item.access in ("ro", "rw", "w1c", "wo")


PROGRAM = """\
#include <stdio.h>
#include "{name}"
int main(void) {{
    printf("%x %x %x ", SOP_ID_EXPECTED, SOP_BUILD_ID_EXPECTED, SOP_MODE_2_FORMAT_ID);
    printf("%x %x %x %x %d\\n", SOP_ERRORS, SOP_ERRORS_SHORT_SCALES_MASK,
           1u << SOP_ERRORS_SHORT_SCALES_SHIFT, SOP_LUT_WINDOW + SOP_LUT_STRIDE,
           SOP_INDICES_STREAM_BITS);
    return 0;
}}
"""


@pytest.mark.parametrize("compiler", [["gcc", "-std=c99"], ["g++", "-std=c++11", "-x", "c++"]])
def test_header_compiles_and_has_the_table(
    compiler: list[str], axi: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"HEADER NOT COMPILED: {compiler[0]} is not installed")
    (tmp_path / "sop.h").write_text(axi[".h"])
    (tmp_path / "main.c").write_text(PROGRAM.format(name="sop.h"))
    options = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-o", "main", "main.c"]
    subprocess.run([*compiler, *options], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    errors = register("ERRORS")
    mask = next(field.mask for field in errors.fields if field.name == "short_scales")
    identity = json.loads(axi[".json"])["identification"]
    ids = [int(text, 16) for text in (identity["build_id"], identity["formats"][2]["format_id"])]
    expected = [IDENTIFICATION, *ids, errors.address, mask, mask, LUT_WINDOW + 16]
    assert printed.stdout.split() == [*(f"{value:x}" for value in expected), "128"]


def test_register_map_has_every_field(axi: dict[str, str]) -> None:
    text = axi["_registers.md"]
    for item in REGISTERS:
        part = text[text.index(f"## {item.name} (0x{item.address:03x})") :]
        rows = re.findall(
            r"^\| (\d+)(?::(\d+))? \| `(\w+)` \|", part.split("\n## ")[0], re.MULTILINE
        )
        assert [(name, int(low or high), int(high)) for high, low, name in rows] == [
            (field.name, field.lowest, field.lowest + field.width - 1) for field in item.fields
        ]


def test_json_has_the_registers(axi: dict[str, str]) -> None:
    description = json.loads(axi[".json"])
    assert [item["name"] for item in description["registers"]] == [item.name for item in REGISTERS]
    assert description["lut_window"] == {"address": LUT_WINDOW, "entries": 32, "stride": 16}
    assert set(description["plane_widths"]) == {
        "indices", "scales", "row_scales", "row_pointers", "columns", "values"
    }  # fmt: skip


def test_json_says_what_identifies_the_hardware(axi: dict[str, str]) -> None:
    """The texts are spelled out, and are all that the hashes are made of."""
    identity = json.loads(axi[".json"])["identification"]
    texts = ["hif7_lut4g16ms1e5m5", "hif7_lut4g64rs1e2m4", "e2m3g16ue4m4"]
    assert [entry["text"] for entry in identity["formats"]] == texts
    assert identity["text"] == (
        f"sop_decoder_axi 1.1 lanes=16 output=float32 lut_entry=hif7 formats={','.join(texts)}"
    )
    for entry in identity["formats"]:
        assert entry["format_id"] == f"0x{hashlib.sha256(entry['text'].encode()).hexdigest()[:8]}"
    assert identity["build_id"] == f"0x{hashlib.sha256(identity['text'].encode()).hexdigest()[:8]}"


# --- other build systems --------------------------------------------------------------------------


@cache
def files_of(unit: str, *, testbench: bool = False) -> dict[str, str]:
    """What is written about a unit; of a tile a small one, which takes one format."""
    formats = FORMATS if "lanes" in UNITS[unit].takes else FORMATS[:1]
    return verilog_files(unit, formats, lanes=16, rows=2, columns=2, testbench=testbench)


@pytest.mark.parametrize(
    ("unit", "testbench"),
    [(unit, testbench) for unit in UNITS for testbench in (False, True)
     if not testbench or "lanes" in UNITS[unit].takes],
)  # fmt: skip
def test_files_of_every_unit(unit: str, testbench: bool) -> None:
    files = files_of(unit, testbench=testbench)
    description = json.loads(files[next(name for name in files if name.endswith(".json"))])
    module = description["module"]
    for name, text in files.items():
        if not name.endswith(".json"):
            assert description["files"][name] == hashlib.sha256(text.encode()).hexdigest()

    core = files[f"{module}.core"]
    assert core.startswith("CAPI=2:\n")
    parsed = yaml.safe_load(core.removeprefix("CAPI=2:\n"))
    assert re.fullmatch(r"[\w.-]+:[\w.-]+:[\w.-]+:[\w.-]+", parsed["name"])
    entries = [entry for part in parsed["filesets"].values() for entry in part["files"]]
    listed = {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
    wanted = {name for name in files if name.endswith((".v", ".vlt", ".hex", ".sdc"))}
    assert listed == wanted
    assert ("sim" in parsed["targets"]) == testbench
    for name, target in parsed["targets"].items():
        assert target["toplevel"] == (f"{module}_tb" if name == "sim" else module)
        assert set(target["filesets"]) <= set(parsed["filesets"])

    flow = yaml.safe_load(files[f"{module}.librelane.yaml"])
    assert (flow["DESIGN_NAME"], flow["CLOCK_PORT"]) == (module, "clk")
    assert flow["VERILOG_FILES"] == [f"dir::{module}.v"]
    assert flow["PNR_SDC_FILE"] == flow["SIGNOFF_SDC_FILE"] == f"dir::{module}.sdc"
    assert f"{module}.sdc" in files

    header, body = files[f"{module}.v"].split("\n\n", 1)
    assert hashlib.sha256(body.encode()).hexdigest() in header


@pytest.mark.parametrize("unit", UNITS)
def test_litex_component_connects_every_port(unit: str) -> None:
    files = files_of(unit)
    description = json.loads(files[next(name for name in files if name.endswith(".json"))])
    tree = ast.parse(files[f"{description['module']}_litex.py"])
    (instance,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Instance"
    )
    connected = {keyword.arg for keyword in instance.keywords}
    assert connected == {f"{port['direction'][0]}_{port['name']}" for port in description["ports"]}


# --- writing --------------------------------------------------------------------------------------


def small() -> dict[str, str]:
    return verilog_files("lut_decoder", FORMATS[0], lanes=16, output="float32")


@pytest.mark.parametrize("name", [".v", ".core"])
def test_edited_file_is_not_overwritten(name: str, tmp_path: Path) -> None:
    files = small()
    paths = write_verilog_files(tmp_path, files)
    assert write_verilog_files(tmp_path, files) == paths
    edited = next(path for path in paths if path.name.endswith(name))
    edited.write_text(edited.read_text() + "\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        InputError, match=re.escape(f"{edited}: exists and is not a file of `sop verilog`")
    ):
        write_verilog_files(tmp_path, files)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_file_of_an_older_version_is_overwritten(tmp_path: Path) -> None:
    files = small()
    name = next(name for name in files if name.endswith(".v"))
    old = files | {name: files[name] + "// old\n"}
    json_name = next(name for name in files if name.endswith(".json"))
    description = json.loads(old[json_name])
    description["files"][name] = hashlib.sha256(old[name].encode()).hexdigest()
    write_verilog_files(tmp_path, old | {json_name: json.dumps(description)})
    write_verilog_files(tmp_path, files)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


# --- names ----------------------------------------------------------------------------------------

MANY = [
    parse_format(name)
    for name in (
        "BOF4-NF4sS1E5M5 NF4^64sRS1E2M4 DD5sUE4M4 DD6sUE4M4 E2M3sUE4M4 E3M4sUE4M4 INT8sUE4M4"
    ).split()
]


def test_names_of_many_formats_are_short_and_different() -> None:
    names = {
        configuration_name(unit, formats, lanes=lanes, output=output)
        for unit in ("lut_decoder", "sop_decoder_axi")
        for lanes in (32, 512)
        for output in (outputs_of(unit) or ("float32",))
        for formats in itertools.permutations(MANY[:6])
    }
    assert len(names) == 2 * (1 + len(outputs_of("sop_decoder_axi"))) * math.factorial(6)
    assert max(map(len, names)) <= 64
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)


def test_names_stay_what_they_were() -> None:
    def name(formats: list[QuantFormat]) -> str:
        return configuration_name("sparse_decoder", formats, lanes=64, output="bfloat16")

    # Of what has 64 characters or fewer, everything is spelled out.
    assert name(MANY[:1]) == "sparse_decoder_64_hif7_lut4g16ms1e5m5_bfloat16"
    digest = hashlib.sha256(
        b"sparse_decoder_64_hif7_lut4g16ms1e5m5_lut4g64rs1e2m4_lut5g16ue4m4_bfloat16"
    ).hexdigest()
    assert name(MANY[:3]) == f"sparse_decoder_64_hif7_3formats_{digest[:8]}_bfloat16"
    renamed = [fmt.with_codebooks(("DD4",) * len(fmt.codebooks)) for fmt in MANY[:2]]
    assert name([*renamed, MANY[2]]) == name(MANY[:3])


def test_short_name_has_its_formats_in_the_description() -> None:
    files = verilog_files("lut_decoder", MANY, lanes=16, output="float32")
    description = json.loads(files[next(name for name in files if name.endswith(".json"))])
    assert len(description["module"]) <= 64
    described = [item["block_size"] for item in description["parameters"]["formats"]]
    assert described == [fmt.block_size for fmt in MANY]
