"""``sop quantize``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sop.commands.setting_options import with_settings
from sop.files.calibration import Calibration
from sop.files.choice import choose_tensors
from sop.files.models import embedded_model_path, open_model, resolve_model
from sop.quantizing.engines import ENGINES, engine_named
from sop.quantizing.quantization import quantize_model
from sop.quantizing.run_report import print_nothing, print_plan, print_result, run_as_json
from sop.quantizing.settings_keys import merged_settings, read_settings, settings_of
from sop.quantizing.workers import Workers
from sop.shared.console import ForceOption, JsonOption, choice, print_json, progress, warn
from sop.shared.output import CHECKPOINT, output_file
from sop.shared.progress import shown_steps

__all__ = ["quantize"]


@with_settings
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            help="GGUF or safetensors file, Hugging Face folder or hub name; "
            "without it, the embedded SmolLM2-135M."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint file to write.")] = Path(
        "build/model.sop.safetensors"
    ),
    *,
    options: dict[str, Any],
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="Written by `sop calibrate`.")
    ] = None,
    allow_other_calibration: Annotated[
        bool,
        typer.Option(
            "--allow-other-calibration",
            help="Use a calibration of other weights, such as those this model was tuned from.",
        ),
    ] = False,
    codebooks: Annotated[
        Path | None, typer.Option(help="TOML file with codebooks of your own.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with settings and formats per pattern (docs/quantize.md)."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Worker processes.")] = 2,
    dask: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler to run the jobs.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(ENGINES)}: what computes, with the same bytes (docs/engine.md)."
        ),
    ] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print formats and sizes; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model into a checkpoint file that the hardware decodes.

    Example: `sop quantize model.gguf -c stats.safetensors --bpw 4.75 -o model.sop.safetensors`
    """
    path = model or str(embedded_model_path())
    engine_named(choice("engine", engine, ENGINES))  # says what is missing
    target = output
    if not dry_run:
        inputs = (resolve_model(path), calibration, codebooks, config)
        target = output_file(output, CHECKPOINT, inputs, force=force, make_folder=False)
    given = merged_settings(options, read_settings(config))
    settings = settings_of(given, codebooks)
    with open_model(path) as opened:
        if opened.source_note:
            progress.print(escape(opened.source_note), soft_wrap=True)
        chosen = choose_tensors(opened, given.get("include", ()), given.get("exclude", ()))
        for note in chosen.notes:
            progress.print(escape(note), soft_wrap=True)
        for override in settings.overrides:
            opened.select([override.match])
    if calibration is not None:
        for warning in Calibration(calibration).warnings():
            warn(f"{calibration}: {warning}")
    with shown_steps() as on_progress:
        run = quantize_model(
            path, list(dict.fromkeys(matrix.tensor for matrix in chosen.matrices)), target,
            settings, left_out=chosen.left_out, calibration_path=calibration,
            other_calibration=allow_other_calibration,
            workers=Workers(jobs, dask, engine), resume=resume, dry_run=dry_run,
            progress=on_progress,
        )  # fmt: skip
    run = run if dry_run else replace(run, output=output)  # as the user calls it
    if as_json:
        print_json(run_as_json(run))
    elif dry_run:
        print_plan(run)
    elif run.layers:
        print_result(run)
    else:
        print_nothing(run)
