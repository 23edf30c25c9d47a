"""``sop eval``."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from golden.activations import ActivationFormat, parse_activation_format
from golden.checkpoint import Checkpoint
from golden.errors import InputError
from golden.hashing import text_sha256
from sop.baselines.others import BASELINES
from sop.files.calibration import Calibration
from sop.files.calibration_description import CalibrationSummary
from sop.files.evaluation_file import EvaluationFile, RecordedEvaluation, RecordedLayer
from sop.files.recorded_source import other_model
from sop.llm.candidates import (
    Candidate,
    baseline_candidate,
    checkpoint_candidate,
    unused_tensors,
)
from sop.llm.evaluation import (
    DEFAULT_SKIP_TOKENS,
    DEFAULT_TOKENS,
    Evaluation,
    evaluate,
    overlapping_tokens,
)
from sop.llm.kernel_candidates import activation_candidate, kernel_candidate
from sop.llm.model import TorchModel
from sop.llm.opening import open_torch_model
from sop.llm.places import UNUSED
from sop.llm.windows import Text, Windows, cut_windows, default_text, read_text
from sop.shared.console import (
    BosOption,
    JsonOption,
    SkipTokensOption,
    TextOption,
    WindowOption,
    out,
    print_json,
    print_rows,
    progress,
    warn,
)
from sop.shared.progress import shown_steps
from sop.shared.shares import percent

__all__ = ["eval_command"]

_USUAL_BASELINES = ("FP8", "MXFP6", "NVFP4", "NF4", "MXFP4")


def _baseline_names(usual: bool, named: list[str]) -> list[str]:
    """Names of the baselines to measure, each once; refuses those that are not available."""
    names = list(dict.fromkeys([*(_USUAL_BASELINES if usual else ()), *named]))
    for name in names:
        if name not in BASELINES:
            raise InputError(f"--baseline {name!r} is none of {', '.join(BASELINES)}")
        if not BASELINES[name].available:
            raise InputError(f"--baseline {BASELINES[name].why_not}")
    return names


def _activation_formats(names: list[str]) -> list[ActivationFormat]:
    """Formats of activations, each once and without ``none``, which is always measured."""
    formats = [parse_activation_format(name) for name in names]
    return list(dict.fromkeys(fmt for fmt in formats if fmt is not None))


def _candidates(
    model: TorchModel,
    checkpoints: list[Checkpoint],
    activations: list[ActivationFormat],
    baselines: list[str],
    calibration: Calibration | None,
) -> list[Candidate]:
    """The checkpoints, each also with quantized activations, or these with the model's own weights.

    Then the baselines on all tensors that any checkpoint replaces.
    """
    candidates = []
    for checkpoint in checkpoints:
        candidates.append(checkpoint_candidate(checkpoint, model))
        candidates += [kernel_candidate(checkpoint, model, fmt) for fmt in activations]
    if not checkpoints:
        candidates += [activation_candidate(model, fmt) for fmt in activations]
    replaced = {name for candidate in candidates for name in candidate.names(model)}
    tensors = tuple(name for name in model.places if name in replaced) or None
    norms = None if calibration is None else calibration.known_norms
    candidates += [baseline_candidate(BASELINES[name], model, tensors, norms) for name in baselines]
    return candidates


def _warnings(
    candidates: list[Candidate],
    calibrations: Mapping[str, CalibrationSummary],
    model: TorchModel,
    text: Text,
    skip_tokens: int,
    windows: Windows,
) -> Iterator[str]:
    """What makes the figures less than they seem; `calibrations` are runs by file name."""
    for path, run in calibrations.items():
        tokens = windows.tokens
        if seen := overlapping_tokens(run, text, skip_tokens, tokens):
            yield f"{path}: its calibration has seen {seen:,} of the {tokens:,} tokens evaluated"
        if run.model_sha256 not in (None, model.sha256):
            yield f"{path}: its calibration was run on another model than {model.path}"
        then = run.prefix_tokens
        if then is not None and then != windows.prefix:
            yield (
                f"{path}: its calibration began windows with {_tokens(then)}, this evaluation "
                f"with {_tokens(windows.prefix)}"
            )
    first = candidates[0]
    for one in candidates[1:]:
        if one.names(model) != first.names(model):
            yield f"{one.name} replaces other tensors than {first.name}"


def _unknown_norms(
    candidates: list[Candidate], statistics: Calibration | None, model: TorchModel
) -> Iterator[str]:
    """Replaced tensors that the statistics to weigh by do not know."""
    if statistics is not None:
        names = {name for one in candidates for name in one.names(model)}
        unknown = [name for name in model.places if name in names - statistics.layers.keys()]
        if unknown:
            yield (
                f"{statistics.path}: no statistics of {len(unknown)} of {len(names)} tensors, so "
                f"their channels count alike; the first: {unknown[0]}"
            )


def _other_models(checkpoints: list[Checkpoint], model: TorchModel) -> Iterator[str]:
    """Checkpoints that were quantized from other weights than the reference."""
    for checkpoint in checkpoints:
        if problem := other_model(checkpoint, model.path, lambda: model.sha256):
            yield problem


def _unused(checkpoints: list[Checkpoint], model: TorchModel) -> Iterator[str]:
    """Tensors that are quantized and make no difference here."""
    for checkpoint in checkpoints:
        if names := unused_tensors(checkpoint, model):
            yield (
                f"{checkpoint.path}: {len(names)} of {len(checkpoint.names)} tensors are not "
                f"evaluated: {UNUSED}; the first: {names[0]}"
            )


def _tokens(prefix: Sequence[int]) -> str:
    return f"token {', '.join(map(str, prefix))}" if prefix else "no begin-of-text token"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _output_row(one: Evaluation, first: Evaluation) -> list[str]:
    difference, error = one.kl_difference(first)
    return [
        _number(one.bits_per_weight, ".4g"),
        f"{one.kl:.4f}",
        _number(one.kl_standard_error, ".4f"),
        "" if one is first else f"{difference:+.4f}",
        "" if one is first else _number(error, ".4f"),
        f"{one.perplexity:.3f}",
        f"{one.perplexity_ratio:.4f}",
        percent(one.top1_agreement),
    ]


def _weight_row(one: Evaluation) -> list[str]:
    return [str(len(one.layers)), f"{one.cosine_gap_ppm:.1f}", f"{one.relative_mse:.3e}"]


def _short_names(evaluations: list[Evaluation]) -> list[str]:
    """Names without folders, if they still differ."""
    names = [Path(one.name).name for one in evaluations]
    return names if len(set(names)) == len(names) else [one.name for one in evaluations]


def _print_report(evaluations: list[Evaluation], of_what: str, weighted: bool) -> None:
    first = evaluations[0]
    names = _short_names(evaluations)
    print_rows(
        f"{of_what}; reference perplexity {first.reference_perplexity:.3f}",
        ["bits", "KL", "±", "- first", "±", "PPL", "ratio", "top-1 %", "name"],
        [[*_output_row(one, first), name] for one, name in zip(evaluations, names, strict=True)],
    )
    out.print()
    print_rows(
        f"Weights; gap of the cosine {'by channel norms' if weighted else 'without channel norms'}",
        ["tensors", "gap ppm", "rel. MSE", "name"],
        [[*_weight_row(one), name] for one, name in zip(evaluations, names, strict=True)],
    )
    out.print()
    blocks = len(first.block_kl)
    out.print(f"KL in nats per token, ± its standard error over {blocks} blocks of positions")


def _recorded(one: Evaluation, first: Evaluation) -> RecordedEvaluation:
    difference, error = one.kl_difference(first)
    return RecordedEvaluation(
        name=one.name,
        activations=one.activations,
        bits_per_weight=one.bits_per_weight,
        kl=one.kl,
        kl_standard_error=one.kl_standard_error,
        kl_minus_first=difference,
        kl_minus_first_standard_error=error,
        perplexity=one.perplexity,
        reference_perplexity=one.reference_perplexity,
        perplexity_ratio=one.perplexity_ratio,
        top1_agreement=one.top1_agreement,
        gap_ppm=one.cosine_gap_ppm,
        relative_mse=_finite(one.relative_mse),
        layers=tuple(
            RecordedLayer(
                layer.name, layer.weights, layer.cosine_gap_ppm, _finite(layer.relative_mse)
            )
            for layer in one.layers
        ),
    )


def _finite(value: float) -> float | None:
    """None for the relative error of weights that are all zero: JSON has no infinity."""
    return value if math.isfinite(value) else None


def eval_command(
    model: Annotated[
        Path,
        typer.Argument(
            help="The reference: GGUF file, Hugging Face folder, hub name, or `embedded`."
        ),
    ],
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Checkpoints made from it.")
    ] = None,
    text: TextOption = None,
    tokens: Annotated[
        int, typer.Option(help="Use at most this many tokens of the text.")
    ] = DEFAULT_TOKENS,
    window: WindowOption = None,
    skip_tokens: SkipTokensOption = DEFAULT_SKIP_TOKENS,
    bos: BosOption = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(help="File of `sop calibrate`: weights the gap, and baselines that can."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help=f"Measure {', '.join(_USUAL_BASELINES)} too.")
    ] = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help=f"Measure this one too; repeatable. One of {', '.join(BASELINES)}."),
    ] = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(
            help="Also quantize activations, such as INT8^16sUE8M0, and compute in the kernel's "
            "arithmetic; repeatable. Without FILE: what that costs with the model's own weights."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how far a language model with quantized weights is from the reference.

    Needs the extra `llm`. Runs the model over a text, then again with the weights of every
    checkpoint and baseline, and compares the distributions over the next token.

    Example: `sop eval embedded quantized.safetensors --baselines`
    """
    names = _baseline_names(baselines, baseline or [])
    formats = _activation_formats(activations or [])
    if not files and not names and not formats:
        raise InputError(
            "nothing to evaluate: name a checkpoint, or use --baselines, --baseline or "
            "--activations"
        )
    prose = default_text() if text is None else read_text(text)
    statistics = None if calibration is None else Calibration(calibration)
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(path)) for path in files or []]
        progress.print(escape(f"loading {model}"), soft_wrap=True)
        loaded = open_torch_model(model)
        candidates = _candidates(loaded, checkpoints, formats, names, statistics)
        settings: dict[str, Any] = {
            "tokens": tokens, "window": window, "skip_tokens": skip_tokens, "bos": bos,
        }  # fmt: skip
        windows = cut_windows(loaded, prose, **settings, least_tokens=2)
        said = {str(one.path): one.calibration for one in checkpoints if one.calibration}
        if statistics is not None:
            said[str(statistics.path)] = statistics.run.to_json()
        runs = {path: CalibrationSummary.from_json(value) for path, value in said.items()}
        warnings = [
            *_other_models(checkpoints, loaded),
            *_warnings(candidates, runs, loaded, prose, skip_tokens, windows),
            *_unknown_norms(candidates, statistics, loaded),
            *_unused(checkpoints, loaded),
        ]
        for warning in warnings:
            warn(warning)
        evaluations = evaluate(
            loaded, candidates, prose, **settings,
            channel_norms=None if statistics is None else statistics.known_norms,
            on_step=stack.enter_context(shown_steps()),
        )  # fmt: skip
    first = evaluations[0]
    if as_json:
        file = EvaluationFile(
            model=str(model),
            model_sha256=loaded.sha256,
            text=prose.name,
            text_sha256=text_sha256(prose.content),
            skip_tokens=skip_tokens,
            tokens=windows.tokens,
            window=windows.window,
            prefix_tokens=windows.prefix,
            positions=first.positions,
            reference_perplexity=first.reference_perplexity,
            channel_norms=None if statistics is None else str(statistics.path),
            warnings=tuple(warnings),
            evaluations=tuple(_recorded(one, first) for one in evaluations),
        )
        print_json(file.to_json())
    else:
        last = skip_tokens + windows.tokens - 1
        of_what = f"Tokens {skip_tokens:,}..{last:,} of {prose.name}"
        _print_report(evaluations, of_what, statistics is not None)
        print(f"windows start with {_tokens(windows.prefix)}")
