"""The resource table: which units are synthesized for what, and what is derived from the rows."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden.notation import QuantFormat
from rtl.child_process import end_children
from rtl.lookup import DEFAULT_LOOKUP
from rtl.units import LOOKUP_UNITS, build_unit, configuration_name, outputs_of
from rtl.verilog import port_table, to_verilog
from sop.progress import StepReport
from sop.synthesis import (
    DEVICE,
    GATE_EQUIVALENTS,
    TARGETS,
    fmax,
    passes,
    resources,
    tool_versions,
)

__all__ = ["Plan", "per_lane", "resource_table", "resources_markdown"]

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
    output, source : str
        As :func:`rtl.units.build_unit`.
    targets : tuple of str
        Of :data:`sop.synthesis.TARGETS`.
    lookups : tuple of str
        Structures in which ``lut_decoder`` is synthesized in addition.
    seeds : int
        Placements per unit on an ECP5, with the smallest number of lanes; 0 for none.
    cache : Path or None
        Folder that keeps results, as :func:`sop.synthesis.remembered`.
    """

    units: tuple[str, ...]
    formats: tuple[QuantFormat, ...]
    lanes: tuple[int, ...]
    output: str
    source: str
    targets: tuple[str, ...]
    lookups: tuple[str, ...]
    seeds: int
    cache: Path | None = None

    @property
    def places(self) -> bool:
        """Whether anything is placed and routed."""
        return bool(self.seeds) and _PLACED in self.targets

    def configurations(self) -> list[tuple[str, str, int]]:
        """Unit, lookup and lanes of everything to synthesize."""
        pairs = dict.fromkeys((unit, DEFAULT_LOOKUP) for unit in self.units)
        pairs |= dict.fromkeys(("lut_decoder", lookup) for lookup in self.lookups)
        return [(unit, lookup, lanes) for unit, lookup in pairs for lanes in sorted(self.lanes)]


def resource_table(plan: Plan, *, jobs: int, report: StepReport) -> dict[str, Any]:
    """Synthesize everything that a plan names.

    Returns
    -------
    table : dict
        ``tools``, ``commands``, ``gate_equivalents``, ``device``, ``rows`` (one per unit, lanes
        and target, flat) and ``per_lane`` (per unit and target, where there are several lane
        counts). Ready for JSON; reproducible but for Fmax, which depends on the machine's nextpnr.

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
    for number, (unit, lookup, lanes) in enumerate(configurations):
        report("Verilog", number, len(configurations))
        for row, texts in _rows(plan, unit, lookup, lanes):
            rows.append(row)
            tasks += [(row, task) for task in _tasks(plan, row, *texts)]
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
    rows.sort(key=lambda row: (row["unit"], row["lookup"] or "", row["target"], row["lanes"]))
    return {
        "tools": tool_versions(place=plan.places),
        "commands": {target: list(TARGETS[target]) for target in sorted(plan.targets)},
        "gate_equivalents": GATE_EQUIVALENTS,
        "device": list(DEVICE) if plan.places else None,
        "rows": rows,
        "per_lane": per_lane(rows),
    }


def _rows(
    plan: Plan, unit: str, lookup: str, lanes: int
) -> Iterable[tuple[dict[str, Any], tuple[str, list[dict[str, str | int]]]]]:
    options: dict[str, Any] = {
        "lanes": lanes, "output": plan.output, "source": plan.source, "lookup": lookup
    }  # fmt: skip
    name = configuration_name(unit, plan.formats, **options)
    component = build_unit(unit, plan.formats, **options)
    ports, verilog = port_table(component), to_verilog(component, name)
    for target in plan.targets:
        row: dict[str, Any] = {
            "unit": unit,
            "module": name,
            "formats": [] if unit == "sparse_merge" else [fmt.name for fmt in plan.formats],
            "lanes": lanes,
            "output": plan.output if outputs_of(unit) else None,
            "lookup": lookup if unit in LOOKUP_UNITS else None,
            "target": target,
        }
        yield row, (verilog, ports)


def _tasks(
    plan: Plan, row: dict[str, Any], verilog: str, ports: list[dict[str, str | int]]
) -> list[Callable[[], dict[str, Any]]]:
    name, seeds = row["module"], range(1, plan.seeds + 1)
    commands = passes(row["target"], name, lookup=row["lookup"])
    tasks: list[Callable[[], dict[str, Any]]] = [
        lambda: resources(verilog, commands, cache=plan.cache)
    ]
    if row["target"] == _PLACED and row["lanes"] == min(plan.lanes) and row["lookup"] != "memory":
        tasks += (
            [lambda: fmax(verilog, name, ports, seeds=seeds, cache=plan.cache)] if seeds else []
        )
    return tasks


_KEY = ("unit", "formats", "output", "lookup", "target")
_FIGURES = ("gate_equivalents", "luts", "flip_flops")


def per_lane(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Slope and rest of each figure, from the smallest and the largest number of lanes."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
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


def resources_markdown(table: Mapping[str, Any]) -> str:
    """Tables of units and of structures of the lookup, from :func:`resource_table`."""
    lines = [
        "# Resources",
        "",
        "Generated by `make synth`; docs/synthesis.md says how to read it.",
        "",
    ]
    lines += [
        "Tools: " + ", ".join(f"{name} {version}" for name, version in table["tools"].items())
    ]
    rows = [row for row in table["rows"] if row["lookup"] in (None, DEFAULT_LOOKUP)]
    lines += ["", "## Units", "", *_unit_table(rows, table["per_lane"])]
    lookups = [row for row in table["rows"] if row["unit"] == "lut_decoder"]
    if len({row["lookup"] for row in lookups}) > 1:
        lines += ["", "## Structures of the lookup", "", *_lookup_table(lookups, table["per_lane"])]
    paths = [row for row in table["rows"] if "critical_path" in row]
    if paths:
        lines += ["", "## Critical paths on ECP5", "", *_path_table(paths)]
    return "\n".join(lines) + "\n"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


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
    return _markdown(
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
    return _markdown(columns, lines)


def _path_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = ["module", "target", "Fmax by seed", "from", "to", "levels", "logic ns", "routing ns"]
    return _markdown(
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
