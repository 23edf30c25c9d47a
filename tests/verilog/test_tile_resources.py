"""What a tile costs: which cells belong to which part, and what it stands beside."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sop.commands.synth
from golden.errors import InputError
from golden.formats import HIF_FORMATS
from golden.notation import parse_format
from rtl.units import SOP_TILE, Options, Unit, options_of
from rtl.verilog import to_verilog
from sop.commands.synth import synth
from sop.hdl.netlist_parts import REST, cells_by_part
from sop.hdl.resource_file import ResourceTable
from sop.hdl.resource_table import Plan, per_product, resources_markdown
from sop.hdl.resources import resource_table
from sop.hdl.synthesis import passes, resources
from sop.hdl.tile_comparison import FLOAT_TILE, compared

needs_yosys = pytest.mark.skipif(
    importlib.util.find_spec("pyosys") is None,
    reason="SYNTHESIS NOT RUN: pyosys is not installed (pip install pyosys)",
)

FORMAT = parse_format("BOF4-NF4^8sS1E5M5", HIF_FORMATS["HIF7"])


def cell(kind: str, output: int, **inputs: int) -> dict[str, Any]:
    pin = "Q" if kind == "DFF" else "Y"
    return {
        "type": kind,
        "port_directions": {pin: "output", **dict.fromkeys(inputs, "input")},
        "connections": {pin: [output], **{name: [bit] for name, bit in inputs.items()}},
    }


def test_cells_go_to_the_first_part_to_whose_registers_they_lead() -> None:
    """NOT leads to both registers, AND and NOR to the second, OR to an enable, XOR nowhere."""
    cells = {
        "first": cell("DFF", 1, D=10),
        "second": cell("DFF", 2, D=11, EN=12, R=14),
        "other": cell("DFF", 3, D=2),
        "not": cell("NOT", 10, A=3),
        "and": cell("AND", 11, A=10, B=1),
        "or": cell("OR", 12, A=1, B=2),
        "xor": cell("XOR", 13, A=1, B=2),
        "nor": cell("NOR", 14, A=1, B=3),
    }
    # The second register is also called as what it is made from, and only passes on.
    names = {"sum_0": [1], "\\taken$1": [2], "sum_1": [2], "held": [3]}
    module = {"cells": cells, "netnames": {name: {"bits": bits} for name, bits in names.items()}}
    text = json.dumps({"modules": {"top": module}})
    parts = {"sums": r"sum_\d", "results": r"taken\$\d"}
    assert cells_by_part(text, "top", parts, re.compile("DFF")) == {
        "sums": Counter(DFF=1, NOT=1),
        "results": Counter(DFF=1, AND=1, NOR=1),
        REST: Counter(DFF=1, OR=1, XOR=1),
    }


def split_resources(unit: Unit, options: Options, target: str) -> dict[str, Any]:
    assert unit.parts is not None
    name = unit.module(options)
    verilog = to_verilog(unit.build(options), name)
    return resources(verilog, passes(target, name), parts=unit.parts(options), top=name)


@needs_yosys
@pytest.mark.parametrize("columns", [2, 3])  # with 2, a name of the adder's is not given twice
def test_parts_of_a_tile_are_all_of_it(columns: int, thorough: bool) -> None:
    if columns > 2 and not thorough:
        pytest.skip("only with --all-simulations")
    options = options_of(FORMAT, rows=1, columns=columns)
    figures = split_resources(SOP_TILE, options, "gates")
    parts = figures["parts"]
    assert list(parts) == ["integer products", "second register", "scale units", "accumulators",
                           "rest"]  # fmt: skip
    assert sum(part["flip_flops"] for part in parts.values()) == figures["flip_flops"]
    whole = sum(part["gate_equivalents"] for part in parts.values())
    assert whole == pytest.approx(figures["gate_equivalents"], abs=len(parts))
    # A sum of 8 products of 6 and 7 bits and the copy of it, for each output; multiples of 8 at
    # least have no low bits of their own.
    sums, copies = (parts[part]["flip_flops"] for part in ("integer products", "second register"))
    assert sums == copies
    assert columns * 16 <= sums <= columns * (6 + 7 + 3 + 3)
    assert not parts["second register"]["gate_equivalents"]
    # The adder's four registers between its steps, its sum and its flag; a float32 in three more.
    assert parts["accumulators"]["flip_flops"] > 3 * 32
    assert parts["rest"]["gate_equivalents"] < parts["accumulators"]["gate_equivalents"]


@needs_yosys
def test_parts_of_a_float_tile() -> None:
    options = options_of(FORMAT, rows=1, columns=1, output="bfloat16")
    parts = split_resources(FLOAT_TILE, options, "gates")["parts"]
    assert list(parts) == ["weights to float", "float products", "accumulators", "rest"]
    # Nothing is left but the register of the activation, and what begins a sum.
    assert parts["rest"] == {"gate_equivalents": 0, "flip_flops": 16, "other": {}}
    assert all(parts[part]["gate_equivalents"] > 100 for part in list(parts)[:3])


def test_what_a_tile_stands_beside() -> None:
    found = [
        configuration.module
        for configuration in compared(options_of(FORMAT, rows=2, columns=3))
        if configuration.beside == "sop_tile_2x3_g8_hif7s1e5m5_int8ue8m0"
    ]
    assert found == [
        *(f"sop_tile_2x3_g8_{weight}s1e5m5_{activation}ue8m0" for weight, activation in (
            ("hif8t", "int8"), ("int8", "int8"), ("e2m1", "e2m1"), ("e2m3", "e2m3"),
            ("e4m3", "e4m3"),
        )),
        "float_tile_2x3_hif7s1e5m5_float32", "float_tile_2x3_hif7s1e5m5_bfloat16",
    ]  # fmt: skip


def test_plan_compares_at_the_smallest_size_and_places_it() -> None:
    plan = Plan(
        (SOP_TILE.name,), (FORMAT,), (), ("gates",), (), 1, sizes=((4, 8), (2, 2)), compare=True
    )
    sizes = [
        (item.options.rows, item.options.columns, item.placed) for item in plan.configurations()
    ]
    assert sizes == [(2, 2, True), (4, 8, False), *[(2, 2, False)] * 7]


def test_table_of_tiles() -> None:
    part = {"gate_equivalents": 30, "flip_flops": 8, "other": {}}
    row: dict[str, Any] = {
        "unit": "sop_tile", "module": "tile", "formats": [], "lanes": None, "output": None,
        "lookup": None, "target": "gates", "rows": 2, "columns": 2, "gate_equivalents": 50,
        "flip_flops": 20, "other": {}, "logic_depth": 7,
        "parts": {"scale units": part, "rest": {**part, "gate_equivalents": 20}},
    }  # fmt: skip
    row["per_product"] = per_product(row)
    assert row["per_product"] == {
        "all": {"gate_equivalents": 12.5, "flip_flops": 5.0},
        "scale units": {"gate_equivalents": 7.5, "flip_flops": 2.0},
        "rest": {"gate_equivalents": 5.0, "flip_flops": 2.0},
    }
    other = {**row, "module": "other", "beside": "tile", "per_product": {
        "all": {"gate_equivalents": 25.0, "flip_flops": 4.0},
    }}  # fmt: skip
    table = ResourceTable([row, other])
    text = resources_markdown(table)
    assert "## Units" not in text
    assert (
        "| `tile` | gates | 50 | 12.5 |  | scale units 7.5, rest 5.0 | 20 | 5.0 |  "
        "| scale units 2.0, rest 2.0 |  | 7 |  |"
    ) in text
    page = resource_table("sop_tile", table)
    assert page[2].startswith("| target | rows | columns | gate equivalents | flip-flops |")
    assert page[4].startswith("| gates | 2 | 2 | 50 | 20 |")
    assert "| gates | 2 | 2 | scale units | 7.5 | 2 |" in page
    assert not any("25" in line for line in page)
    assert "| `other` | gates | 50 | 25.0 | 2.00 |  | 20 | 4.0 | 0.80 |  |  | 7 |  |" in text


@pytest.mark.parametrize("formats", [["NF4sUE4M4"], ["NF4sUE4M4", "E2M3sUE4M4"]])
def test_a_tile_is_left_out_where_formats_are_several(
    formats: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans: list[Plan] = []

    def table(plan: Plan, **_: Any) -> ResourceTable:
        plans.append(plan)
        return ResourceTable()

    monkeypatch.setattr(sop.commands.synth, "resource_table", table)
    monkeypatch.setattr(sop.commands.synth, "require_tools", lambda **_: None)
    synth(format_names=formats, cache=tmp_path, as_json=True)
    (plan,) = plans
    assert ("sop_tile" in plan.units) == (len(formats) == 1)
    assert "sparse_decoder" in plan.units


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": ["lut_decoder"], "rows": [2], "columns": [2]}, "--rows is for other units"),
        ({"unit": ["sop_tile"], "lanes": [2]}, "--lanes is for other units; sop_tile: --rows"),
        ({"unit": ["sop_tile"], "rows": [2]}, "--rows and --columns: a tile has both"),
        ({"unit": ["sparse_merge"], "compare": True}, "--compare is for tiles, which --unit"),
        ({"unit": ["sop_tile"], "activations": "none"}, "--activations none: a tile multiplies"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        synth(**options)
