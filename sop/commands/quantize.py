"""``sop quantize``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from golden.codebook_file import read_codebooks
from golden.errors import InputError
from golden.formats import DEFAULT_HIF, HIF_FORMATS
from golden.text_file import decode_text, parse_toml
from sop.files.calibration import Calibration
from sop.files.choice import choose_tensors
from sop.files.models import embedded_model_path, open_model, resolve_model
from sop.quantizing.quantization import quantize_model
from sop.quantizing.run_report import print_nothing, print_plan, print_result, run_as_json
from sop.quantizing.settings import EFFORTS, Override, Settings, decimal_number
from sop.quantizing.workers import Workers
from sop.shared.console import ForceOption, JsonOption, choice, print_json, progress, warn
from sop.shared.output import CHECKPOINT, output_file
from sop.shared.progress import shown_steps

__all__ = ["quantize"]

_DEFAULT_BITS = "4.75"
_SHOWN = 80  # characters of a value in a message

_FILE_KEYS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "bpw": (str, int, float),
    "hif": str,
    "effort": str,
    "opq": (int, float),
    "wr": (int, float),
    "feedback": bool,
    "ladder": list,
    "include": list,
    "exclude": list,
    "override": list,
}


def _read_config(path: Path | None) -> dict[str, Any]:
    """Settings of a TOML file, by the names of the options."""
    if path is None:
        return {}
    table = parse_toml(path.read_bytes(), path)
    for key, value in table.items():
        if key not in _FILE_KEYS:
            raise InputError(f"{path}: unknown key {key!r}, expected {', '.join(_FILE_KEYS)}")
        # TOML's true and false are no numbers, though Python's are.
        if not isinstance(value, _FILE_KEYS[key]) or (
            isinstance(value, bool) and _FILE_KEYS[key] is not bool
        ):
            raise InputError(f"{path}: {key}: {value!r} is of the wrong type")
    for key in ("ladder", "include", "exclude"):
        if not all(isinstance(item, str) for item in table.get(key, [])):
            raise InputError(f"{path}: {key}: must be a list of strings")
    for position, item in enumerate(table.get("override", [])):
        if not (
            isinstance(item, dict)
            and item.keys() == {"match", "format"}
            and all(isinstance(value, str) for value in item.values())
        ):
            raise InputError(f"{path}: override {position}: needs match and format, both strings")
    return table


def _settings(options: dict[str, Any], table: dict[str, Any], codebooks: Path | None) -> Settings:
    """Settings of the command line, then of the file, then the defaults."""
    given = table | {key: value for key, value in options.items() if value is not None}
    if "format" in options and options["format"] is not None and options.get("bpw") is None:
        given.pop("bpw", None)
    if options.get("bpw") is not None and options.get("format") is None:
        given.pop("format", None)
    defaults = Settings()
    hif = choice("hif", given.get("hif", defaults.hif), tuple(HIF_FORMATS))
    text = ""
    if codebooks is not None:
        read_codebooks(codebooks, HIF_FORMATS[hif])  # says what is wrong and where
        text = decode_text(codebooks.read_bytes(), codebooks)
    budget = given.get("bpw", None if "format" in given else _DEFAULT_BITS)
    return Settings(
        format=given.get("format"),
        bits_per_weight=None if budget is None else str(budget),
        ladder=tuple(given.get("ladder", defaults.ladder)),
        hif=hif,
        effort=given.get("effort", defaults.effort),
        outliers=_density("opq", given.get("opq", 0)),
        residuals=_density("wr", given.get("wr", 0)),
        feedback=given.get("feedback", defaults.feedback),
        overrides=tuple(Override(**item) for item in given.get("override", [])),
        codebooks=text,
    )


def _density(name: str, value: str | float) -> float:
    """Share of weights: the text of an option, or a number of a file."""
    number = decimal_number(value) if isinstance(value, str) else value
    if number is None or not 0 <= number < 1:
        raise InputError(f"{name} must be at least 0 and below 1, not {str(value)[:_SHOWN]}")
    return float(number)


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
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help="One format for all tensors; Any4 stands for the best codebook of a layer.",
        ),
    ] = None,
    bpw: Annotated[
        str | None,
        typer.Option(help=f"Budget in bits per weight, spent layer by layer. [{_DEFAULT_BITS}]"),
    ] = None,
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
    effort: Annotated[
        str | None, typer.Option(help=f"{', '.join(EFFORTS)}: time against fidelity. [default]")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Glob of tensors to quantize. [linear weights of the blocks]"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob of tensors to leave as they are.")
    ] = None,
    hif: Annotated[
        str | None,
        typer.Option(help=f"Format of LUT entries: {', '.join(HIF_FORMATS)}. [{DEFAULT_HIF.name}]"),
    ] = None,
    opq: Annotated[str | None, typer.Option(help="Share of outliers stored apart. [0]")] = None,
    wr: Annotated[
        str | None, typer.Option(help="Share of large residuals stored apart. [0]")
    ] = None,
    feedback: Annotated[
        bool | None,
        typer.Option(
            "--feedback/--no-feedback",
            help="Error feedback where the calibration has second moments; worse on text unlike "
            "the calibration's (docs/quantize.md). [off]",
        ),
    ] = None,
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
    target = output
    if not dry_run:
        inputs = (resolve_model(path), calibration, codebooks, config)
        target = output_file(output, CHECKPOINT, inputs, force=force, make_folder=False)
    table = _read_config(config)
    options = {
        "format": format_name, "bpw": bpw, "hif": hif, "effort": effort, "opq": opq, "wr": wr,
        "feedback": feedback,
    }  # fmt: skip
    settings = _settings(options, table, codebooks)
    with open_model(path) as opened:
        if opened.source_note:
            progress.print(escape(opened.source_note), soft_wrap=True)
        chosen = choose_tensors(
            opened, include or table.get("include", ()), exclude or table.get("exclude", ())
        )
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
            workers=Workers(jobs, dask), resume=resume, dry_run=dry_run, progress=on_progress,
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
