"""``sop verilog`` as users see it: what it refuses, and the files that it writes."""

import json
import re
import sys
from pathlib import Path

import pytest

import sop.cli
import sop.hdl.verilog_files
from rtl.units import UNITS
from sop import __version__
from tests.support.commands import Sop, assert_refused, sop_process
from tests.support.folders import contents

ROOT = Path(__file__).resolve().parents[2]
LANES = 16


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


def small_verilog(folder: Path) -> list[object]:
    return ["verilog", "-f", "NF4sUE4M4", "--lanes", LANES, "-o", folder]


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
        assert raw is not None
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
