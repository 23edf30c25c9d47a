"""The datasheet: committed pages, recordings and pictures are what the generator gives now."""

import inspect
import json
import pydoc
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.activations import parse_activation_format
from golden.checkpoint import CheckpointWriter
from golden.errors import InputError
from golden.formats import HIF_FORMATS
from golden.notation import parse_format
from golden.quantize import quantize
from rtl.registers import LUT_WINDOW, register
from rtl.units import UNITS, build_unit, latency_of, unit_verilog
from sim.bench_config import parse_formats
from sim.installed import available_simulators
from sim.timing.diagrams import DIAGRAMS, diagrams_of, record
from sim.timing.scenarios import Scenario
from sim.timing.wavejson import Cell, Row, wavejson, wavejson_text
from sop.hdl.datasheet import (
    INDEX,
    TIMING_FOLDER,
    datasheet_pages,
    driver_code,
    payload_formulas,
    symbol_values,
    template,
)
from sop.hdl.datasheet_text import TEXTS
from sop.hdl.description import describe, timing
from sop.hdl.drawing import draw
from sop.hdl.instance import instance_example
from sop.hdl.register_map import c_header
from sop.hdl.resource_file import ResourceTable
from sop.hdl.resources import resource_table
from tests.support.commands import invoke_or_raise, json_of, output_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "datasheet"
REPAIR = "run `make datasheet` and commit what it writes"

WITH_LANES = [name for name, unit in UNITS.items() if "lanes" in unit.takes]
SCENARIOS = [scenario for diagrams in DIAGRAMS.values() for scenario in diagrams.scenarios]

# The others are made of these.
RECORDED_BY_DEFAULT = ("lut_decoder", "hif_to_float", "sparse_merge", "sop_decoder_axi")


# --- committed files ------------------------------------------------------------------------------


def test_committed_pages_are_what_the_generator_gives() -> None:
    pages = datasheet_pages(UNITS, ResourceTable.read(ROOT / "docs" / "resources.json"))
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    assert set(committed) == set(pages), REPAIR
    for name, text in pages.items():
        assert committed[name] == text, f"{name}: {REPAIR}"


def test_committed_diagrams_are_those_of_the_scenarios() -> None:
    names = {f"{scenario.name}.{ending}" for scenario in SCENARIOS for ending in ("json", "svg")}
    assert {path.name for path in (FOLDER / TIMING_FOLDER).iterdir()} == names, REPAIR


@pytest.mark.parametrize("unit", UNITS)
def test_committed_recordings_are_what_the_hardware_does(
    unit: str, build_root: Path, thorough: bool
) -> None:
    if "icarus" not in available_simulators():
        pytest.skip("DIAGRAMS NOT CHECKED: icarus is not installed")
    if unit not in RECORDED_BY_DEFAULT and not thorough:
        pytest.skip("only with --all-simulations")
    for name, wave in record(unit, build_root).items():
        committed = (FOLDER / TIMING_FOLDER / f"{name}.json").read_text(encoding="utf-8")
        assert committed == wavejson_text(wave), f"{name}: {REPAIR}"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_committed_pictures_are_drawn_from_the_recordings(scenario: Scenario) -> None:
    pytest.importorskip("wavedrom")
    path = FOLDER / TIMING_FOLDER / f"{scenario.name}.json"
    picture = path.with_suffix(".svg").read_text(encoding="utf-8")
    assert picture == draw(json.loads(path.read_text(encoding="utf-8"))), REPAIR


def test_links_lead_somewhere() -> None:
    for path in FOLDER.glob("*.md"):
        links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
        assert links
        missing = [link for link in links if not (path.parent / link).exists()]
        assert not missing, f"{path.name}: {missing}"


# --- what pages say -------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", WITH_LANES)
@pytest.mark.parametrize(
    ("names", "hif", "lanes", "output", "source"),
    [
        ("BOF4-NF4sUE4M3", "HIF8", 16, "float32", "E4M3"),
        ("BOF4-NF4^64sRS1E2M4 DD6sUE4M4 E2M3sUE4M4 INT8sUE4M4", "HIF8T", 128, "bfloat16", "E2M1"),
        ("E5M6^8sBF16", "HIF7", 24, "bfloat16", "BF16"),
    ],
)
def test_formulas_of_widths_hold(
    unit: str, names: str, hif: str, lanes: int, output: str, source: str
) -> None:
    formats = parse_formats(names, hif)
    _, description = describe(unit, formats, lanes=lanes, output=output, source=source)
    values = symbol_values(unit, formats, lanes=lanes, output=output, source=source)
    formulas = payload_formulas(unit, description, values)
    fields = [(item["name"], field["name"]) for item in description["streams"]
              for field in item["fields"]]  # fmt: skip
    assert list(formulas) == fields
    with pytest.raises(AssertionError, match=r"lanes x .* is not"):
        payload_formulas(
            "hif_to_float",
            describe("hif_to_float", formats, lanes=lanes, output=output)[1],
            symbol_values("hif_to_float", formats, lanes=lanes) | {"lanes": lanes + 1},
        )


@pytest.mark.parametrize(
    ("weights", "activations", "rows", "columns"),
    [
        ("BOF4-NF4sUE4M3", "INT8sUE8M0", 3, 40),
        ("E2M3^32sUE4M4", "E4M3^32sUE4M4", 16, 16),
        ("INT4^8sBF16", "HIF8^8sBF16", 1, 1),
    ],
)
def test_formulas_of_widths_of_a_tile_hold(
    weights: str, activations: str, rows: int, columns: int
) -> None:
    options = {
        "rows": rows, "columns": columns, "activations": parse_activation_format(activations)
    }  # fmt: skip
    formats = [parse_format(weights)]
    _, description = describe("sop_tile", formats, **options)
    formulas = payload_formulas(
        "sop_tile", description, symbol_values("sop_tile", formats, **options)
    )
    scaled = ("i_activation", "token_exponents") in formulas
    assert scaled == ("UE4M4" in activations)


def test_names_that_pages_mention_exist() -> None:
    assert set(TEXTS) == set(UNITS)
    for page, text in datasheet_pages().items():
        for name in re.findall(r"`(golden\.[\w.]+|rtl\.[\w.]+)`", text):
            assert pydoc.locate(name), f"{page}: {name}"
    for unit in TEXTS.values():
        assert all((ROOT / name).is_file() for name in unit.benches)


@pytest.mark.parametrize("unit", UNITS)
def test_every_flag_of_a_unit_is_explained(unit: str) -> None:
    _, description = describe(unit, parse_format("NF4sUE4M4"), lanes=16, output="float32")
    flags = {flag.name for text in TEXTS.values() for flag in text.flags}
    raised = {
        field["name"]
        for item in description["streams"]
        if item["direction"] == "output"
        for field in item["fields"]
        if field["name"] in flags
    }
    assert {flag.name for flag in TEXTS[unit].flags} == raised


@pytest.mark.parametrize("unit", UNITS)
def test_instance_compiles_with_the_unit(unit: str, tmp_path: Path) -> None:
    if shutil.which("iverilog") is None:
        pytest.skip("INSTANCE NOT COMPILED: icarus is not installed")
    example = diagrams_of(unit).example
    _, description = describe(unit, example.formats, **example.options)
    _, text = unit_verilog(unit, example.formats, **example.options)
    (tmp_path / "example.v").write_text(instance_example(description))
    (tmp_path / "unit.v").write_text(text)
    command = ["iverilog", "-g2005", "-Wall", "-Wno-timescale", "-s", "example", "-o", "example"]
    run = subprocess.run(
        [*command, "example.v", "unit.v"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0
    # Icarus warns about ports of another width, and about those that are left open.
    assert "example.v" not in run.stdout + run.stderr


@pytest.mark.parametrize("unit", [name for name, unit in UNITS.items() if unit.latency])
def test_latencies_are_those_of_the_docstrings(unit: str) -> None:
    """The benches assert what :func:`rtl.units.latency_of` says."""
    component = build_unit(unit, parse_format("BOF4-NF4sS1E5M5"), lanes=16)
    text = " ".join((inspect.getdoc(component) or "").split())
    narrow, wide = latency_of(unit, "bfloat16"), latency_of(unit)
    assert f"Latency {wide} cycle" in text
    assert (f"with bfloat16 {narrow}" in text) == (narrow != wide)
    assert timing(unit, "bfloat16")["latency_clocks"] == narrow


HARNESS = """
#include <stdio.h>
#include <stdlib.h>
static uint32_t memory[1024];
/* Arguments: what FORMAT_ID and BUILD_ID of the hardware read, and the tensor's format. */
int main(int count, char **words) {
    uint8_t luts[32];
    struct sop_tensor tensor = {0, 0, -3, 7, 48, 5, luts, 2, 16};
    uint32_t counted = 0xffffffffu, over;
    int lut;
    if (count != 4) return 1;
    for (lut = 0; lut < 32; lut++) luts[lut] = (uint8_t)(lut + 1);
    if (sop_init(memory, 9) != -1) return 2;
    memory[SOP_ID / 4] = SOP_ID_EXPECTED;
    memory[SOP_VERSION / 4] = SOP_VERSION_MAJOR_EXPECTED << SOP_VERSION_MAJOR_SHIFT;
    memory[SOP_FORMAT_ID / 4] = (uint32_t)strtoul(words[1], NULL, 16);
    memory[SOP_BUILD_ID / 4] = (uint32_t)strtoul(words[2], NULL, 16);
    tensor.format_id = (uint32_t)strtoul(words[3], NULL, 16);
    if (sop_init(memory, 9) != 0) return 3;
    if (sop_start(memory, &tensor) != SOP_NOT_READY) return 4;
    memory[SOP_STATUS / 4] = SOP_STATUS_START_READY_MASK | SOP_STATUS_LUT_READY_MASK;
    if (sop_start(memory, &tensor) != 0) return memory[SOP_CONTROL / 4] ? 5 : 100;
    for (lut = 0; lut < 1024; lut++)
        if (memory[lut]) printf("%x %x\\n", 4 * lut, memory[lut]);
    memory[SOP_TENSORS / 4] = 2;
    memory[SOP_ERRORS / 4] = 0x10000;
    if (sop_interrupt(memory, &counted, &over) != 0x10000) return 6;
    if (over != 3 || counted != 2 || memory[SOP_IRQ_STATUS / 4] != 1) return 7;
    sop_stop(memory);
    if (memory[SOP_CONTROL / 4] != 4 || sop_stopped(memory)) return 8;
    memory[SOP_STATUS / 4] = SOP_STATUS_STOPPED_MASK;
    if (!sop_stopped(memory)) return 9;
    sop_reset(memory);
    return memory[SOP_CONTROL / 4] == 2 ? 0 : 10;
}
"""
OTHER_BUILD, OTHER_FORMAT = 3, 100  # what it returns then

DECODED = "BOF4-NF4sS1E5M5"


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By format of LUT entries: compiled C code, and the description of the hardware."""
    if shutil.which("gcc") is None:
        pytest.skip("DRIVER NOT COMPILED: gcc is not installed")
    made = {}
    for hif in HIF_FORMATS.values():
        folder = tmp_path_factory.mktemp(hif.name)
        _, description = describe(
            "sop_decoder_axi", parse_format(DECODED, hif), lanes=16, output="float32"
        )
        module = description["module"]
        (folder / f"{module}.h").write_text(c_header(description))
        (folder / "main.c").write_text(driver_code(module) + HARNESS)
        options = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-o", "main", "main.c"]
        subprocess.run(["gcc", *options], cwd=folder, check=True)
        made[hif.name] = folder / "main", description["identification"]
    return made


def run_driver(program: Path, hardware: dict[str, Any], format_id: str) -> Any:
    command = [program, hardware["formats"][0]["format_id"], hardware["build_id"], format_id]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_driver_writes_what_the_registers_want(drivers: dict[str, Any]) -> None:
    program, hardware = drivers["HIF8T"]
    run = run_driver(program, hardware, hardware["formats"][0]["format_id"])
    assert run.returncode == 0
    memory = {int(a, 16): int(b, 16) for a, b in (line.split() for line in run.stdout.splitlines())}
    settings = {"LAYER_EXPONENT": 0xFFFFFFFD, "ROWS": 7, "COLUMNS": 48, "CORRECTIONS": 5}
    for name, value in {**settings, "CONTROL": 1, "IRQ_ENABLE": 3, "TIMEOUT": 9}.items():
        assert memory[register(name).address] == value, name
    luts = b"".join(memory[LUT_WINDOW + 4 * word].to_bytes(4, "little") for word in range(8))
    assert luts == bytes(range(1, 33))


@pytest.mark.parametrize("stored", HIF_FORMATS)
def test_driver_refuses_hardware_of_other_lut_entries(
    stored: str, drivers: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint of each format of LUT entries meets hardware of each."""
    weights = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)
    path = tmp_path / "model.sop.safetensors"
    with CheckpointWriter(path, {}) as writer:
        writer.add("w", quantize(weights, parse_format(DECODED, HIF_FORMATS[stored])), None, "F32")
    (tensor,) = json_of("inspect", path)["tensors"]
    assert tensor["hif"] == stored
    for built, (program, hardware) in drivers.items():
        run = run_driver(program, hardware, tensor["format_id"])
        assert run.returncode == (0 if built == stored else OTHER_FORMAT), built


def test_driver_refuses_another_build(drivers: dict[str, Any]) -> None:
    program, hardware = drivers["HIF7"]
    other = {**hardware, "build_id": drivers["HIF8"][1]["build_id"]}
    assert run_driver(program, other, "0x0").returncode == OTHER_BUILD


RESET_BENCH = """
module bench;
  reg clk = 0, aresetn = 1; wire rst;
  reset_synchronizer unit (.clk(clk), .aresetn(aresetn), .rst(rst));
  always #5 clk = ~clk;
  initial begin
    #12 aresetn = 0; #1 $display("%b", rst);
    #10 $display("%b", rst);
    aresetn = 1; #1 $display("%b", rst);
    @(posedge clk) #1 $display("%b", rst);
    @(posedge clk) #1 $display("%b", rst);
    $finish(0);
  end
endmodule
"""


def test_reset_synchronizer_releases_reset_with_the_clock(tmp_path: Path) -> None:
    if shutil.which("iverilog") is None:
        pytest.skip("RESET NOT SIMULATED: icarus is not installed")
    (tmp_path / "reset.v").write_text(template("reset_synchronizer.v") + RESET_BENCH)
    subprocess.run(
        ["iverilog", "-g2005", "-Wall", "-o", "reset", "reset.v"], cwd=tmp_path, check=True
    )
    run = subprocess.run([tmp_path / "reset"], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "1", "1", "1", "0"]


# --- resources ------------------------------------------------------------------------------------

RESOURCE_ROWS = [
    {"unit": "lut_decoder", "module": "m", "formats": ["NF4sUE4M4", "E2M3sUE4M4"], "lanes": 16,
     "output": None, "target": "generic", "gates": 12345, "depth": 236.52, "other": {"a": 1}},
    {"unit": "lut_decoder", "lanes": 64, "target": "ecp5", "fmax_mhz": None},
    {"unit": "sparse_merge", "lanes": 64},
]  # fmt: skip
PER_LANE = [
    {"unit": "lut_decoder", "formats": [], "target": "ecp5", "lanes": [16, 64],
     "per_lane": {"luts": 12.5}, "fixed": {"luts": 2340}},
]  # fmt: skip


def test_resources_become_tables(tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    assert resource_table("lut_decoder", ResourceTable.read(path)) == []
    for value in (RESOURCE_ROWS, {"tools": {}, "rows": RESOURCE_ROWS, "per_lane": PER_LANE}):
        path.write_text(json.dumps(value))
        resources = ResourceTable.read(path)
        lines = resource_table("lut_decoder", resources)
        assert lines[2] == "| target | formats | lanes | gates | depth |"
        assert lines[4] == "| generic | NF4sUE4M4, E2M3sUE4M4 | 16 | 12,345 | 236.5 |"
        assert lines[5] == "| ecp5 |  | 64 |  |  |"
        assert "## Resources" in datasheet_pages(["lut_decoder"], resources)["lut_decoder.md"]
    assert lines[9] == "| target | lanes | LUTs |"
    assert lines[11] == "| ecp5 | 16, 64 | 12.5 a lane + 2,340 |"


@pytest.mark.parametrize(
    "text", ["{", "1", '{"rows": 2}', "[1]", '{"per_lane": [2]}', '{"tools": 1}']
)
def test_resources_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"resources\.json: "):
        ResourceTable.read(path)


# --- recordings -----------------------------------------------------------------------------------

SCENARIO = Scenario("name", "title", "text")


def test_recording_becomes_wavejson() -> None:
    beat, other = Cell("A0"), Cell("B0", 1)
    rows = [
        Row("rst", "", False, ["x", "1", "0", "0"]),
        Row("o__valid", "o", False, ["0", "0", "1", "1"]),
        Row("o__payload", "o", True, [None, None, beat, other]),
    ]
    wave = wavejson(SCENARIO, rows)
    assert wave["signal"][0]["data"] == ["0", "1", "2", "3"]
    assert wave["signal"][2] == {"name": "rst", "wave": "x10."}
    assert wave["signal"][3] == [
        "o",
        {"name": "o__valid", "wave": "0.1."},
        {"name": "o__payload", "wave": "x.34", "data": ["A0", "B0"]},
    ]
    assert json.loads(wavejson_text(wave)) == wave


def test_long_stretches_without_a_handshake_are_cut() -> None:
    rows = [
        Row("valid", "", False, ["0", *"1" * 20, "0"]),
        Row("payload", "", True, [None, *(Cell(f"A{n}") for n in range(20)), None]),
    ]
    wave = wavejson(SCENARIO, rows)["signal"]
    assert wave[0]["data"] == ["0", "1", "2", "3", "19", "20", "21"]
    assert wave[2]["wave"] == "01..|..0"
    assert wave[3] == {
        "name": "payload", "wave": "x333|33x", "data": ["A0", "A1", "A2", "A18", "A19"],
    }  # fmt: skip


def test_label_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"name: .* of payload is too long"):
        wavejson(SCENARIO, [Row("payload", "", True, [Cell("A12345")])])


# --- command --------------------------------------------------------------------------------------


def test_command_writes_pages(tmp_path: Path) -> None:
    found = json_of("datasheet", "lut_decoder", "--text-only", "-o", tmp_path)
    written = {Path(path).name for path in found["files"]}
    assert written == {path.name for path in tmp_path.iterdir()} == {INDEX, "lut_decoder.md"}


def test_command_refuses_an_unknown_unit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown unit 'decoder'"):
        invoke_or_raise("datasheet", "decoder", "-o", tmp_path)
    assert not list(tmp_path.iterdir())


def test_diagrams_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "icarus" not in available_simulators():
        pytest.skip("DIAGRAMS NOT CHECKED: icarus is not installed")
    pytest.importorskip("wavedrom")
    monkeypatch.chdir(tmp_path)
    output_of("datasheet", "float_to_hif", "-o", "out")
    for path in (tmp_path / "out" / TIMING_FOLDER).iterdir():
        assert path.read_bytes() == (FOLDER / TIMING_FOLDER / path.name).read_bytes(), path.name
