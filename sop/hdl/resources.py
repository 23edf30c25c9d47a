"""What units cost (:mod:`sop.hdl.resource_file`) as tables of the datasheet."""

from collections.abc import Mapping, Sequence
from typing import Any

from sop.hdl.resource_file import IDENTITY, ResourceTable
from sop.shared.markdown import markdown_table

__all__ = ["resource_table"]

# Columns that say what was measured come first; all others are figures. What is not a number or a
# text (critical paths, other cells) is not for a datasheet.
_HIDDEN = ("unit", "module")
_TITLES = {
    "luts": "LUTs", "flip_flops": "flip-flops", "fmax_mhz": "Fmax, MHz",
    "logic_depth": "gates on the longest path",
}  # fmt: skip


def resource_table(unit: str, resources: ResourceTable) -> list[str]:
    """Markdown lines with what was measured of a unit; none if nothing was."""
    rows = [row for row in resources.rows if row.get("unit") == unit and not row.get("beside")]
    if not rows:
        return []
    lines = ["Measured with `sop synth`; how to read it: [synthesis](../synthesis.md).", ""]
    lines += _table(rows)
    parts = [
        {name: row[name] for name in ("target", "rows", "columns")} | {"part": part, **figures}
        for row in rows
        for part, figures in row.get("per_product", {}).items()
    ]
    if parts:
        lines += ["", "What one product of the tile costs, part by part; beside others: "
                  "[resources](../resources.md#tiles).", "", *_table(parts)]  # fmt: skip
    derived = [_flat(row) for row in resources.per_lane if row.get("unit") == unit]
    if derived:
        lines += ["", "What a lane costs, and the rest, from the smallest and the largest number "
                  "of lanes:", "", *_table(derived)]  # fmt: skip
    return lines


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A derived row with a column for every figure, a lane and fixed."""
    lanes, fixed = row.get("per_lane", {}), row.get("fixed", {})
    cells = {name: f"{_cell(lanes[name])} a lane {_signed(fixed[name])}" for name in lanes}
    return {name: row[name] for name in IDENTITY if name in row} | cells


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'} {_cell(abs(value))}"


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that some row has, without those that are empty in all of them."""
    names = [*IDENTITY, *(name for row in rows for name in row if name not in _HIDDEN)]
    columns = [
        name
        for name in dict.fromkeys(names)
        if any(row.get(name) not in (None, []) for row in rows)
        and not any(isinstance(row.get(name), dict) for row in rows)
    ]
    titles = [_TITLES.get(name, name.replace("_", " ")) for name in columns]
    return markdown_table(titles, ([_cell(row.get(name)) for name in columns] for row in rows))
