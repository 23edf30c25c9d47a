"""``sop synth``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from golden.errors import InputError
from golden.float_input import SOURCES
from rtl.lookup import DEFAULT_LOOKUP, LOOKUPS
from rtl.units import UNITS
from sop.console import (
    DEFAULT_FORMAT,
    HifOption,
    JsonOption,
    OutputOption,
    choice,
    parse_format_option,
    print_json,
    print_rows,
)
from sop.output import write_files
from sop.progress import shown_steps
from sop.resource_table import Plan, resource_table, resources_markdown
from sop.synthesis import TARGETS, require_tools

__all__ = ["synth"]


def _print_table(table: dict[str, Any]) -> None:
    columns = ["unit", "lookup", "lanes", "target", "GE", "depth", "LUTs", "flip-flops",
               "Fmax MHz", "other cells"]  # fmt: skip
    rows = [
        [
            row["unit"],
            row["lookup"] or "",
            str(row["lanes"]),
            row["target"],
            f"{row['gate_equivalents']:,}" if "gate_equivalents" in row else "",
            str(row.get("logic_depth", "")),
            f"{row['luts']:,}" if "luts" in row else "",
            f"{row['flip_flops']:,}",
            str(row.get("fmax_mhz", "")),
            ", ".join(f"{count} {cell}" for cell, count in row["other"].items()),
        ]
        for row in table["rows"]
    ]
    print_rows("Resources after synthesis", columns, rows)
    rows = [
        [
            entry["unit"],
            entry["lookup"] or "",
            entry["target"],
            figure.replace("_", " "),
            f"{entry['per_lane'][figure]:,}",
            f"{entry['fixed'][figure]:,}",
        ]
        for entry in table["per_lane"]
        for figure in entry["per_lane"]
    ]
    if rows:
        print_rows("By lane", ["unit", "lookup", "target", "figure", "a lane", "fixed"], rows)


def synth(
    unit: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(UNITS)}; repeatable. Default: all.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(TARGETS)}; repeatable. Default: all.")
    ] = None,
    format_names: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help=f"Format name; several make one decoder for all. Default: {DEFAULT_FORMAT}.",
        ),
    ] = None,
    lanes: Annotated[
        list[int] | None,
        typer.Option(
            help="Weights per clock; two numbers give the cost of a lane and the rest. "
            "Default: 16 and 32."
        ),
    ] = None,
    lookup: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Structures in which to synthesize lut_decoder: {', '.join(LOOKUPS)}, or all; "
            f"repeatable. Default: {DEFAULT_LOOKUP}."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=0, help="Placements on an ECP5 whose median Fmax counts; 0: none.")
    ] = 3,
    output: OutputOption = "float32",
    source: Annotated[
        str, typer.Option(help=f"What float_to_hif converts: {', '.join(SOURCES)}.")
    ] = "BF16",
    hif: HifOption = "HIF7",
    folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for resources.json and resources.md."),
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Folder that keeps results, so that a second run is short.")
    ] = Path("build/synth"),
    jobs: Annotated[int, typer.Option(min=1, help="Tools that run at the same time.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Synthesize the units: gates, LUTs and flip-flops, and the clock that an ECP5 reaches.

    Targets: `gates` counts gate equivalents of generic gates, NAND2 = 1, without flip-flops, and
    the longest path in gates; `ecp5`, `ecp5_lut4` (without multiplexers behind the LUTs), `ice40`
    and `xilinx` count cells. Fmax is of the smallest number of lanes, between registers around and
    in the unit. Needs the extra `synth`.

    Example: `sop synth --unit lut_decoder --target ecp5 --lanes 16 --lanes 64 --seeds 1`
    """
    units = [choice("unit", name, UNITS) for name in unit or UNITS]
    targets = [choice("target", name, tuple(TARGETS)) for name in target or TARGETS]
    chosen = LOOKUPS if lookup == ["all"] else tuple(lookup or [DEFAULT_LOOKUP])
    lookups = [choice("lookup", name, LOOKUPS) for name in chosen]
    if "lut_decoder" not in units:
        if lookup:
            raise InputError("--lookup is for lut_decoder, which --unit leaves out")
        lookups = []
    formats = [parse_format_option(name, hif) for name in format_names or [DEFAULT_FORMAT]]
    plan = Plan(
        tuple(units), tuple(formats), tuple(lanes or (16, 32)), output, source, tuple(targets),
        tuple(lookups), seeds, cache,
    )  # fmt: skip
    require_tools(place=plan.places)
    with shown_steps() as report:
        table = resource_table(plan, jobs=jobs, report=report)
    if folder is not None:
        write_files(
            folder,
            {
                "resources.json": json.dumps(table, indent=1) + "\n",
                "resources.md": resources_markdown(table),
            },
        )
    if as_json:
        print_json(table)
    else:
        _print_table(table)
