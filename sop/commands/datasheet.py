"""``sop datasheet``."""

from pathlib import Path
from typing import Annotated

import typer

from rtl.units import UNITS
from sop.console import JsonOption, print_json, progress
from sop.hdl.datasheet import TIMING_FOLDER, datasheet_pages
from sop.hdl.drawing import draw
from sop.hdl.resources import read_resources
from sop.output import write_files

__all__ = ["datasheet"]


def datasheet(
    unit: Annotated[str, typer.Argument(help=f"{', '.join(UNITS)}, or all.")] = "all",
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path(
        "build/datasheet"
    ),
    resources: Annotated[
        Path, typer.Option(help="Measured figures; no tables if there is no such file.")
    ] = Path("docs/resources.json"),
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Keep the timing diagrams that are there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the datasheet: one Markdown page a unit, with timing diagrams from simulations.

    Diagrams need Icarus Verilog and the packages of the extras sim and datasheet. The same bytes
    come out on every run. Files of these names are replaced.

    Example: `sop datasheet all -o docs/datasheet`
    """
    units = UNITS if unit == "all" else (unit,)
    pages = datasheet_pages(units, read_resources(resources))
    diagrams: dict[str, str] = {}
    for name in () if text_only else units:
        progress.print(f"simulating {name}")
        diagrams |= _diagrams(name)
    paths = write_files(folder / TIMING_FOLDER, diagrams) if diagrams else []
    paths += write_files(folder, pages)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)


def _diagrams(unit: str) -> dict[str, str]:
    """WaveJSON and pictures of a unit, by file name."""
    from tb.timing import record, wavejson_text  # needs cocotb

    files = {}
    for name, wave in record(unit, Path("build/sim")).items():
        files[f"{name}.json"] = wavejson_text(wave)
        files[f"{name}.svg"] = draw(wave)
    return files
