"""``docs/resources.json``, where somebody measured what units cost, as tables of the datasheet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from golden.errors import InputError

__all__ = ["read_resources", "resource_table"]

# Columns that say what was measured come first; all others are figures.
_IDENTITY = ("formats", "lanes", "output", "lookup", "target")
_HIDDEN = ("unit", "module")


def read_resources(path: Path) -> list[dict[str, Any]]:
    """Rows of the file, a list or an object with ``rows``; none if there is no file.

    Raises
    ------
    InputError
        If it holds something else.
    """
    if not path.exists():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    rows = value.get("rows") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of rows")
    return rows


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def resource_table(unit: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown lines with the rows of a unit; none if there are none."""
    own = [row for row in rows if row.get("unit") == unit]
    if not own:
        return []
    names = list(dict.fromkeys(name for row in own for name in row if name not in _HIDDEN))
    scalar = [name for name in names if not any(isinstance(row.get(name), dict) for row in own)]
    columns = [name for name in _IDENTITY if name in scalar]
    columns += [name for name in scalar if name not in columns]
    titles = [name.replace("_", " ") for name in columns]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in own]
    return ["Measured with `sop synth`.", "", *lines]
