"""Timing diagrams: what a simulation recorded clock by clock, as WaveJSON of WaveDrom.

A column of a diagram is one clock: from just after its rising edge to just before the next one,
where the signals are read.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sim.timing.scenarios import Scenario

__all__ = ["Cell", "Row", "wavejson", "wavejson_text"]

# Of a longer stretch of clocks in which no handshake changes, these many are kept at each end.
_KEPT_BEFORE, _KEPT_AFTER = 3, 2

_LABEL_LENGTH = 5  # of a clock of scale 1

_GAP = "|"
_UNDEFINED = "x"


@dataclass(frozen=True)
class Cell:
    """A word in one clock: its label, and which tensor it belongs to, which chooses the colour."""

    label: str
    tensor: int = 0


@dataclass(frozen=True)
class Row:
    """One signal of a diagram.

    ``cells`` has an entry a clock: ``"0"``, ``"1"`` or ``"x"``, or, of a row of words, a Cell, None
    where the word means nothing.
    """

    name: str
    group: str
    words: bool
    cells: Sequence[str | Cell | None]


_COLOURS = "3456"


def _folded(rows: Sequence[Row]) -> list[int | None]:
    """Clocks to show, None for a gap: where no handshake changes for long, only both ends."""
    clocks = len(rows[0].cells)
    levels = [tuple(row.cells[n] for row in rows if not row.words) for n in range(clocks)]
    shown: list[int | None] = []
    start = 0
    for clock in range(1, clocks + 1):
        if clock < clocks and levels[clock] == levels[start]:
            continue
        stretch = list(range(start, clock))
        if len(stretch) > _KEPT_BEFORE + _KEPT_AFTER + 1:
            shown += [*stretch[:_KEPT_BEFORE], None, *stretch[-_KEPT_AFTER:]]
        else:
            shown += stretch
        start = clock
    return shown


def _signal(row: Row, shown: Iterable[int | None]) -> dict[str, Any]:
    wave, data = "", []
    before: str | Cell | None = ""
    for clock in shown:
        if clock is None:
            wave += _GAP
            continue
        cell = row.cells[clock]
        if cell == before:
            wave += "."
        elif isinstance(cell, Cell):
            wave += _COLOURS[cell.tensor]
            data.append(cell.label)
        else:
            wave += _UNDEFINED if cell is None else cell
        before = cell
    return {"name": row.name, "wave": wave, **({"data": data} if data else {})}


def wavejson(scenario: Scenario, rows: Sequence[Row]) -> dict[str, Any]:
    """A recording as WaveJSON, with the clock's number and the clock above it.

    Parameters
    ----------
    scenario : Scenario
    rows : sequence of Row
        All of the same length; rows of a group follow each other.
    """
    for row in rows:
        for cell in row.cells:
            fits = not isinstance(cell, Cell) or len(cell.label) <= _LABEL_LENGTH * scenario.scale
            assert fits, f"{scenario.name}: {cell} of {row.name} is too long"
    shown = _folded(rows)
    numbers = ["" if clock is None else str(clock) for clock in shown]
    number_wave = "".join(_GAP if clock is None else "2" for clock in shown)
    signals: list[Any] = [
        {"name": "clock", "wave": number_wave, "data": [text for text in numbers if text]},
        {"name": "clk", "wave": "p" + "".join(_GAP if c is None else "." for c in shown[1:])},
    ]
    groups: dict[str, list[Any]] = {}
    for row in rows:
        if row.group:
            if row.group not in groups:
                signals.append(groups.setdefault(row.group, [row.group]))
            groups[row.group].append(_signal(row, shown))
        else:
            signals.append(_signal(row, shown))
    return {"signal": signals, "config": {"hscale": scenario.scale}}


def wavejson_text(wave: dict[str, Any]) -> str:
    """As text, one signal a line."""
    lines = ['{"config": ' + json.dumps(wave["config"]) + ",", ' "signal": [']
    entries = []
    for item in wave["signal"]:
        if isinstance(item, list):
            members = [json.dumps(item[0]), *(json.dumps(member) for member in item[1:])]
            entries.append("  [" + ",\n   ".join(members) + "]")
        else:
            entries.append("  " + json.dumps(item))
    return "\n".join([*lines, ",\n".join(entries), " ]}"]) + "\n"
