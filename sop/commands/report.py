"""``sop report``."""

from pathlib import Path
from typing import Annotated

import typer

from golden.errors import InputError
from sop.report import write_report
from sop.shared.console import ForceOption, JsonOption, print_json, warn
from sop.shared.progress import shown_steps

__all__ = ["report"]


def report(
    files: Annotated[list[Path], typer.Argument(help="Checkpoints that `sop quantize` wrote.")],
    output: Annotated[
        Path, typer.Option("--out", "-o", help="Page to write, with the suffix .html.")
    ] = Path("build/report.html"),
    evaluation: Annotated[
        Path | None,
        typer.Option(help="JSON of `sop eval`, of these checkpoints and of baselines."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The weights before quantization: errors and histograms are measured."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="File of `sop calibrate` that weights the errors; goes with --model."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--png", help="Folder for the figures as PNG, 300 dpi.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page about quantized models: it needs no network and no other file.

    Needs the extra `report`.

    Example: `sop report a.safetensors --model model.gguf -o report.html --png figures`
    """
    if output.suffix != ".html":
        raise InputError(f"--out {output}: the suffix must be .html")
    with shown_steps() as on_tensor:
        written = write_report(
            files, output, evaluation=evaluation, model=model, calibration=calibration,
            images=images, force=force, on_tensor=on_tensor,
        )  # fmt: skip
    for warning in written.warnings:
        warn(warning)
    if as_json:
        print_json(written.to_json())
        return
    print(f"{written.page}: {written.figures} figures, {written.page_bytes:,} bytes")
    for path in written.images:
        print(path)
