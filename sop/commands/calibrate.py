"""``sop calibrate``."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from golden.errors import InputError
from sop.files.calibration import Calibration
from sop.files.models import embedded_model_path
from sop.llm.gathering import calibrate_model, partial_path
from sop.llm.opening import open_torch_model
from sop.llm.windows import default_text, read_text
from sop.shared.console import (
    BosOption,
    ForceOption,
    JsonOption,
    SkipTokensOption,
    TextOption,
    WindowOption,
    print_json,
    print_rows,
    progress,
    warn,
)
from sop.shared.output import CALIBRATION, PARTIAL, writing_file
from sop.shared.progress import shown_progress

__all__ = ["calibrate"]


def _silent_channels(calibration: Calibration) -> dict[str, int]:
    """Input channels of each layer that were zero at every token."""
    return {name: int((calibration.channel_norms(name) == 0).sum()) for name in calibration.layers}


def _print_report(calibration: Calibration, silent: dict[str, int], output: Path) -> None:
    run = calibration.run
    rows = [
        [name, str(calibration.channel_norms(name).size), str(count)]
        for name, count in silent.items()
        if count
    ]
    if rows:
        title = "Layers with input channels that were zero at every token"
        print_rows(title, ["layer", "channels", "always zero"], rows)
        print()
    what = "channel norms and second moments" if run.second_moment else "channel norms"
    first, last = run.skip_tokens, run.skip_tokens + run.tokens - 1
    print(
        f"{what} of {len(silent)} of {len(silent) + len(calibration.uncovered)} layers over tokens "
        f"{first:,}..{last:,} of {run.text}, each window {_start(run.prefix_tokens)}; "
        f"{len(rows)} layers have channels that were always zero"
    )
    print(output)


def _check_partial(path: Path) -> None:
    if os.path.lexists(path) and not (path.is_file() and PARTIAL.made_here(path)):
        raise InputError(f"{path}: is in the way, and is not {PARTIAL.name}")


def _start(prefix: tuple[int, ...]) -> str:
    if not prefix:
        return "without a begin-of-text token"
    return f"after token {', '.join(map(str, prefix))}"


def calibrate(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="GGUF file or Hugging Face folder; without it, the embedded SmolLM2-135M."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="File to write, with the suffix .safetensors.")
    ] = Path("build/calibration.safetensors"),
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(help="Use at most this many tokens of the text.")] = 49152,
    window: WindowOption = None,
    skip_tokens: SkipTokensOption = 0,
    bos: BosOption = "auto",
    second_moment: Annotated[
        bool,
        typer.Option(
            "--second-moment",
            help="Gather the second moment of the inputs too: much larger, and used by "
            "`sop quantize --feedback` only.",
        ),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a model over a text and write how strongly each input channel of its layers is driven.

    Needs the extra `llm`. An interrupted run continues from its `.partial` file when called again.

    Example: `sop calibrate model.gguf -o stats.safetensors --text prose.txt --tokens 16384`
    """
    if output.suffix != ".safetensors":
        raise InputError(f"--out {output}: the suffix must be .safetensors")
    prose = default_text() if text is None else read_text(text)
    path = model or embedded_model_path()
    with writing_file(output, CALIBRATION, [path, text], force=force) as target:
        _check_partial(partial_path(target))
        progress.print(escape(f"loading {path}"), soft_wrap=True)
        loaded = open_torch_model(path)
        with shown_progress("windows") as on_window:
            calibration = calibrate_model(
                loaded, prose, target, tokens=tokens, window=window, skip_tokens=skip_tokens,
                second_moment=second_moment, bos=bos, on_window=on_window,
            )  # fmt: skip
    for warning in calibration.warnings():
        warn(warning)
    silent = _silent_channels(calibration)
    if as_json:
        layers = [
            {
                "name": name,
                "columns": calibration.channel_norms(name).size,
                "silent_channels": silent[name],
                "tokens": calibration.layer_tokens[name],
                "statistics_of": leader,
            }
            for name, leader in calibration.layers.items()
        ]
        print_json(
            {
                "output": str(output),
                **asdict(calibration.run),
                "warnings": list(calibration.warnings()),
                "uncovered": dict(calibration.uncovered),
                "layers": layers,
            }
        )
    else:
        _print_report(calibration, silent, output)
