"""The resource table: which units are synthesized for what, and what is derived from the rows."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golden.notation import QuantFormat
from rtl.child_process import end_children
from rtl.lookup import DEFAULT_LOOKUP
from rtl.units import UNITS, Unit, options_of
from rtl.verilog import port_table, to_verilog
from sop.hdl.resource_file import ResourceTable
from sop.hdl.synthesis import (
    DEVICE,
    GATE_EQUIVALENTS,
    TARGETS,
    fmax,
    passes,
    resources,
    tool_versions,
)
from sop.hdl.tile_comparison import Configuration, compared, tile_tables
from sop.shared.markdown import markdown_table
from sop.shared.progress import StepReport

__all__ = ["Plan", "per_lane", "per_product", "resource_table", "resources_markdown"]

_PLACED = "ecp5"  # the target whose netlists are placed and routed


@dataclass(frozen=True)
class Plan:
    """What to synthesize.

    Parameters
    ----------
    units : tuple of str
        Of :data:`rtl.units.UNITS`, with the default lookup.
    formats : tuple of QuantFormat
    lanes : tuple of int
        Of units that take them.
    targets : tuple of str
        Of :data:`sop.hdl.synthesis.TARGETS`.
    lookups : tuple of str
        Structures of the lookup in which units that compare them are synthesized in addition.
    seeds : int
        Placements per unit on an ECP5, of the smallest size; 0 for none.
    sizes : tuple of (int, int)
        Rows and columns of units that take them.
    options : mapping of str to Any
        Other fields of :class:`rtl.units.Options`.
    compare : bool
        Whether a tile stands beside tiles of the smallest size for other elements.
    cache : Path or None
        Folder that keeps results, as :func:`sop.hdl.synthesis.remembered`.
    """

    units: tuple[str, ...]
    formats: tuple[QuantFormat, ...]
    lanes: tuple[int, ...]
    targets: tuple[str, ...]
    lookups: tuple[str, ...]
    seeds: int
    sizes: tuple[tuple[int, int], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    compare: bool = False
    cache: Path | None = None

    @property
    def places(self) -> bool:
        """Whether anything is placed and routed."""
        return bool(self.seeds) and _PLACED in self.targets

    def configurations(self) -> list["Configuration"]:
        """Everything to synthesize."""
        found = []
        for name in self.units:
            unit = UNITS[name]
            if "lanes" in unit.takes:
                lookups = dict.fromkeys([DEFAULT_LOOKUP])
                if unit.compares_lookups:
                    lookups |= dict.fromkeys(self.lookups)
                found += [
                    self._of(unit, placed=lanes == min(self.lanes), lanes=lanes, lookup=lookup)
                    for lookup in lookups
                    for lanes in sorted(self.lanes)
                ]
                continue
            smallest = min(self.sizes)
            for rows, columns in sorted(self.sizes):
                placed = (rows, columns) == smallest
                found.append(self._of(unit, placed=placed, rows=rows, columns=columns))
            if self.compare:
                found += compared(options_of(self.formats, **self._size(smallest)))
        return found

    def _size(self, size: tuple[int, int]) -> dict[str, Any]:
        return {**self.options, "rows": size[0], "columns": size[1]}

    def _of(self, unit: Unit, *, placed: bool, **options: Any) -> "Configuration":
        # The search for memory blocks takes as long as a placement.
        placed = placed and options.get("lookup") != "memory"
        return Configuration(unit, options_of(self.formats, **self.options, **options), placed)


def resource_table(plan: Plan, *, jobs: int, report: StepReport) -> ResourceTable:
    """Synthesize everything that a plan names.

    Returns
    -------
    table : ResourceTable
        Rows of a tile also have ``parts``, the same figures of each, and ``per_product``; there is
        an entry ``per_lane`` per unit and target, where there are several lane counts.
        Reproducible but for Fmax, which depends on the machine's nextpnr.

    Raises
    ------
    InputError
        If a unit cannot be built.
    SynthesisError
        If a tool fails.
    """
    rows: list[dict[str, Any]] = []
    tasks: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = []
    configurations = plan.configurations()
    for number, configuration in enumerate(configurations):
        report("Verilog", number, len(configurations))
        for row, of_row in _rows(plan, configuration):
            rows.append(row)
            tasks += [(row, task) for task in of_row]
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(task): row for row, task in tasks}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                futures[future].update(future.result())
                report("synthesis, place and route", done, len(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_children()
            raise
    for row in rows:
        if "rows" in row:
            row["per_product"] = per_product(row)
    order = ("unit", "lookup", "target", "lanes", "rows", "columns")
    rows.sort(key=lambda row: [row.get(key) or "" if key in order[:3] else row.get(key) or 0
                               for key in order])  # fmt: skip
    return ResourceTable(
        rows=rows,
        per_lane=per_lane(rows),
        tools=tool_versions(place=plan.places),
        commands={target: list(TARGETS[target]) for target in sorted(plan.targets)},
        gate_equivalents=GATE_EQUIVALENTS,
        device=list(DEVICE) if plan.places else None,
    )


Task = Callable[[], dict[str, Any]]


def _rows(plan: Plan, configuration: Configuration) -> Iterable[tuple[dict[str, Any], list[Task]]]:
    unit, options = configuration.unit, configuration.options
    takes, name = unit.takes, configuration.module
    component = unit.build(options)
    ports, verilog = port_table(component), to_verilog(component, name)
    for target in plan.targets:
        row: dict[str, Any] = {
            "unit": unit.name,
            "module": name,
            "formats": [fmt.name for fmt in options.formats] if "format" in takes else [],
            "lanes": options.lanes if "lanes" in takes else None,
            "output": options.output if "output" in takes else None,
            "lookup": options.lookup if "lookup" in takes else None,
            "target": target,
        }
        if "rows" in takes:
            row |= {"rows": options.rows, "columns": options.columns}
        if "activations" in takes:
            row |= {"activations": options.activations.name, "multiplier": options.multiplier}
        if configuration.beside:
            row["beside"] = configuration.beside
        yield row, _tasks(plan, configuration, row, verilog, ports)


def _tasks(
    plan: Plan, configuration: Configuration, row: Mapping[str, Any], verilog: str,
    ports: list[dict[str, str | int]],
) -> list[Task]:  # fmt: skip
    name, seeds = row["module"], range(1, plan.seeds + 1)
    commands = passes(row["target"], name, lookup=row["lookup"])
    split = configuration.unit.parts
    parts = split(configuration.options) if split else {}
    tasks: list[Task] = [
        lambda: resources(verilog, commands, parts=parts, top=name, cache=plan.cache)
    ]
    if row["target"] == _PLACED and configuration.placed and seeds:
        tasks.append(lambda: fmax(verilog, name, ports, seeds=seeds, cache=plan.cache))
    return tasks


def per_product(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures of a tile and of its parts, of one of its ``rows * columns`` products."""
    products = row["rows"] * row["columns"]
    return {
        name: {figure: round(part[figure] / products, 1) for figure in _FIGURES if figure in part}
        for name, part in {"all": row, **row.get("parts", {})}.items()
    }


_KEY = ("unit", "formats", "output", "lookup", "target")
_FIGURES = ("gate_equivalents", "luts", "flip_flops")


def per_lane(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Slope and rest of each figure, from the smallest and the largest number of lanes."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["lanes"] is None:
            continue
        groups.setdefault(json.dumps([row[key] for key in _KEY]), []).append(row)
    derived = []
    for group in groups.values():
        low = min(group, key=lambda row: row["lanes"])
        high = max(group, key=lambda row: row["lanes"])
        span = high["lanes"] - low["lanes"]
        if not span:
            continue
        entry: dict[str, Any] = {key: low[key] for key in _KEY}
        entry["lanes"] = [low["lanes"], high["lanes"]]
        entry["per_lane"], entry["fixed"] = {}, {}
        for figure in _FIGURES:
            if figure in low:
                slope = (high[figure] - low[figure]) / span
                entry["per_lane"][figure] = round(slope, 1)
                entry["fixed"][figure] = round(low[figure] - slope * low["lanes"])
        derived.append(entry)
    return derived


def resources_markdown(table: ResourceTable) -> str:
    """Tables of units and of structures of the lookup, from :func:`resource_table`."""
    lines = [
        "# Resources",
        "",
        "Generated by `make synth`; docs/synthesis.md says how to read it.",
        "",
    ]
    lines += ["Tools: " + ", ".join(f"{name} {version}" for name, version in table.tools.items())]
    rows = [row for row in table.rows if row["lookup"] in (None, DEFAULT_LOOKUP)]
    units = [row for row in rows if row["lanes"] is not None]
    if units:
        lines += ["", "## Units", "", *_unit_table(units, table.per_lane)]
    tiles = [row for row in rows if "per_product" in row]
    if tiles:
        lines += ["", "## Tiles", "", *tile_tables(tiles)]
    lookups = [row for row in table.rows if row["unit"] in _with_several_lookups(table.rows)]
    if lookups:
        lines += ["", "## Structures of the lookup", "", *_lookup_table(lookups, table.per_lane)]
    paths = [row for row in table.rows if "critical_path" in row]
    if paths:
        lines += ["", "## Critical paths on ECP5", "", *_path_table(paths)]
    return "\n".join(lines) + "\n"


def _with_several_lookups(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    lookups: dict[str, set[str]] = {}
    for row in rows:
        lookups.setdefault(row["unit"], set()).add(row["lookup"])
    return {unit for unit, names in lookups.items() if len(names) > 1}


def _derived(row: Mapping[str, Any], derived: Sequence[Mapping[str, Any]], figure: str) -> str:
    for entry in derived:
        if all(entry[key] == row[key] for key in _KEY):
            fixed = entry["fixed"][figure]
            return f"{entry['per_lane'][figure]:,} {'-' if fixed < 0 else '+'} {abs(fixed):,}"
    return ""


def _main_figure(row: Mapping[str, Any]) -> str:
    return "gate_equivalents" if "gate_equivalents" in row else "luts"


def _other(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {cell}" for cell, count in row["other"].items())


def _unit_table(
    rows: Sequence[Mapping[str, Any]], derived: Sequence[Mapping[str, Any]]
) -> list[str]:
    columns = ["unit", "lanes", "target", "GE or LUTs", "a lane + fixed", "flip-flops",
               "a lane + fixed", "other cells", "gates deep", "Fmax, MHz"]  # fmt: skip
    return markdown_table(
        columns,
        (
            [
                f"`{row['unit']}`",
                str(row["lanes"]),
                row["target"],
                f"{row[_main_figure(row)]:,}",
                _derived(row, derived, _main_figure(row)),
                f"{row['flip_flops']:,}",
                _derived(row, derived, "flip_flops"),
                _other(row),
                str(row.get("logic_depth", "")),
                str(row.get("fmax_mhz", "")),
            ]
            for row in rows
        ),
    )


def _lookup_table(
    rows: Sequence[Mapping[str, Any]], derived: Sequence[Mapping[str, Any]]
) -> list[str]:
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lanes = min(row["lanes"] for row in rows)
    columns = ["lookup", *(f"{target}, {lanes} lanes (a lane + fixed)" for target in targets)]
    columns += [f"Fmax {target}, MHz" for target in targets if target == _PLACED]
    lines = []
    for lookup in dict.fromkeys(row["lookup"] for row in rows):
        by_target = {
            row["target"]: row for row in rows if (row["lookup"], row["lanes"]) == (lookup, lanes)
        }
        cells = [
            f"{row[_main_figure(row)]:,} ({_derived(row, derived, _main_figure(row))})".replace(
                " ()", ""
            )
            for row in by_target.values()
        ]
        speeds = [str(row.get("fmax_mhz", "")) for key, row in by_target.items() if key == _PLACED]
        lines.append([f"`{lookup}`", *cells, *speeds])
    return markdown_table(columns, lines)


def _path_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = ["module", "target", "Fmax by seed", "from", "to", "levels", "logic ns", "routing ns"]
    return markdown_table(
        columns,
        (
            [
                f"`{row['module']}`",
                row["target"],
                ", ".join(map(str, row["fmax_by_seed"].values())),
                f"`{row['critical_path']['from']}`",
                f"`{row['critical_path']['to']}`",
                *(str(row["critical_path"][key]) for key in ("levels", "logic_ns", "routing_ns")),
            ]
            for row in rows
        ),
    )
