"""``sop compare``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sop.checkpoints.compare import Comparison, compare_weights
from sop.files.calibration import Calibration
from sop.files.recorded_source import other_source
from sop.files.weights import open_weights
from sop.shared.console import JsonOption, out, print_json, print_rows, warn
from sop.shared.progress import shown_progress

__all__ = ["compare"]


def _gap(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_comparison(comparison: Comparison, title: str) -> None:
    rows = [
        [
            tensor.name,
            "x".join(map(str, tensor.shape)),
            f"{tensor.weights:,}",
            f"{tensor.relative_mse:.3e}",
            _gap(tensor.gap_ppm),
            f"{tensor.max_difference:.3e}",
        ]
        for tensor in comparison.tensors
    ]
    mse = comparison.mean_relative_mse
    weights = sum(tensor.weights for tensor in comparison.tensors)
    rows.append(
        [
            "all (means by weights)",
            "",
            f"{weights:,}",
            "-" if mse is None else f"{mse:.3e}",
            _gap(comparison.mean_gap_ppm),
            f"{comparison.max_difference:.3e}",
        ]
    )
    columns = ["tensor", "shape", "weights", "rel. MSE", "gap ppm", "max. difference"]
    print_rows(title, columns, rows)
    for what, names in (
        ("only in A", comparison.only_in_a),
        ("only in B", comparison.only_in_b),
        ("not compared, no floats", comparison.no_floats),
    ):
        for name in names:
            out.print(escape(f"{what}: {name}"), soft_wrap=True)


def compare(
    a: Annotated[Path, typer.Argument(help="Checkpoint or model: what is right.")],
    b: Annotated[Path, typer.Argument(help="Checkpoint or model: what is judged.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="File of `sop calibrate`: weight the cosine by activations."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how far the weights of B are from those of A.

    The gap is that of the cosine in parts per million. With a calibration it is weighted by
    activations, and tensors that the calibration does not have get none.

    Example: `sop compare model.gguf quantized.safetensors --calibration stats.safetensors`
    """
    statistics = None if calibration is None else Calibration(calibration)
    with open_weights(a) as first, open_weights(b) as second, shown_progress("tensors") as report:
        warning = other_source(first.origin, second.origin)
        if warning:
            warn(warning)
        comparison = compare_weights(first, second, statistics, report)
    if as_json:
        warnings = [warning] if warning else []
        print_json({"a": str(a), "b": str(b), "warnings": warnings, **comparison.as_dict()})
    else:
        _print_comparison(comparison, f"{b} against {a}")
