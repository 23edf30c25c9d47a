"""Which cells of a flat netlist belong to which part of a unit.

The netlist alone is looked at, so parts add up to the whole and nothing is synthesized twice. A
flip-flop belongs to the part whose registers it is one bit of (the last such part, as what only
passes a register on has its bits, too), a cell without a clock to the first
part to whose registers it leads. What leads to no register of a part is the rest.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["REST", "cells_by_part"]

REST = "rest"
"""Name of what belongs to no part."""

# Of flip-flops: data, and resets, which Yosys makes of data that may be 0. What leads to enables is
# the rest.
_DATA_PINS = {"D", "DI", "R", "LSR"}


def cells_by_part(
    netlist: str, top: str, parts: Mapping[str, str], flip_flop: re.Pattern[str]
) -> dict[str, Counter[str]]:
    """Number of cells of each type in each part, the rest last.

    Parameters
    ----------
    netlist : str
        What ``write_json`` of Yosys wrote about a flat design.
    top : str
        Its module.
    parts : mapping of str to str
        Regular expressions of the names of registers, as in the source.
    flip_flop : re.Pattern
        Of types of cells.
    """
    module = json.loads(netlist)["modules"][top]
    cells: dict[str, Any] = module["cells"]
    owners = _owners(module["netnames"], parts)
    result: dict[str, Counter[str]] = {part: Counter() for part in (*parts, REST)}
    ends: dict[str, list[int | str]] = {part: [] for part in parts}
    drivers: dict[int | str, str] = {}
    for name, cell in cells.items():
        outputs = _bits(cell, "output")
        if not flip_flop.match(cell["type"]):
            drivers |= dict.fromkeys(outputs, name)
            continue
        part = next((owners[bit] for bit in outputs if bit in owners), REST)
        result[part][cell["type"]] += 1
        if part != REST:
            ends[part] += _bits(cell, "input", _DATA_PINS)
    waiting = {name for name, cell in cells.items() if not flip_flop.match(cell["type"])}
    for part, bits in ends.items():
        while bits:
            driver = drivers.get(bits.pop())
            if driver in waiting:
                waiting.remove(driver)
                result[part][cells[driver]["type"]] += 1
                bits += _bits(cells[driver], "input")
    result[REST].update(cells[name]["type"] for name in waiting)
    return result


def _owners(netnames: Mapping[str, Any], parts: Mapping[str, str]) -> dict[int | str, str]:
    """Part of every bit of a register of one; of the last one where it has several names."""
    owners: dict[int | str, str] = {}
    for part, names in parts.items():
        for name, net in netnames.items():
            if re.fullmatch(names, name.removeprefix("\\")):
                owners |= dict.fromkeys(net["bits"], part)
    return owners


def _bits(cell: Mapping[str, Any], direction: str, pins: Iterable[str] = ()) -> list[int | str]:
    """Nets at the pins of one direction; only at those named, if any is."""
    return [
        bit
        for pin, bits in cell["connections"].items()
        if cell["port_directions"][pin] == direction and (not pins or pin in pins)
        for bit in bits
    ]
