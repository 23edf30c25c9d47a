"""A whole model through the golden quantizer: a plan, one job per tensor, one checkpoint file.

Jobs are plain functions of picklable arguments that return bytes, so they run in this process, in
worker processes (joblib) or on a Dask cluster, and the file comes out the same. Results are kept in
a folder beside the output until all are there; an interrupted run continues from it.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.blocks import check_weights
from golden.checkpoint import Checkpoint, CheckpointWriter, config_hash
from golden.corrections import stored_bits
from golden.errors import InputError
from golden.knapsack import Layer, Option, Plan, solve_mckp
from golden.layer import quantize_layer
from golden.metrics import Fidelity, measure, model_fidelity
from sop.calibration import Calibration
from sop.models import Model, open_model, resolve_model
from sop.parts import KeptParts, Parts, gathering
from sop.settings import EFFORTS, KEEP, Settings
from sop.workers import ClusterError, Job, Workers

__all__ = ["Assignment", "LayerReport", "Run", "quantize_model"]

# ------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class _Source:
    """Where a job finds weights and statistics, and the SHA-256 of these files.

    The hashes keep an open file from being taken for another one under the same path.
    """

    model: str
    model_sha256: str
    calibration: str | None
    calibration_sha256: str | None

    def weights(self, name: str) -> NDArray[np.float32]:
        return _opened(self.model, self.model_sha256).read(name)

    def statistics(self, name: str) -> Calibration | None:
        """The calibration, if it knows the layer."""
        if self.calibration is None or self.calibration_sha256 is None:
            return None
        calibration = _calibrated(self.calibration, self.calibration_sha256)
        return calibration if name in calibration.layers else None

    @contextmanager
    def errors_at(self, name: str) -> Iterator[None]:
        """Name file and tensor in errors that do not."""
        try:
            yield
        except InputError as error:
            where = f"{self.model}: tensor {name!r}: "
            named = str(error).startswith((self.model, str(self.calibration)))
            raise InputError(str(error) if named else where + str(error)) from error


@lru_cache(maxsize=1)
def _opened(path: str, sha256: str) -> Model:
    return open_model(path)


@lru_cache(maxsize=1)
def _calibrated(path: str, sha256: str) -> Calibration:
    return Calibration(path)


def _sample(weights: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Whole rows, evenly spaced, of about ``count`` weights."""
    rows = min(len(weights), max(1, -(-count // weights.shape[1])))
    return weights[np.arange(rows) * len(weights) // rows]


def _try_formats(source: _Source, name: str, formats: Sequence[str], settings: Settings) -> bytes:
    """Job: bits of a tensor in each format, and the gap measured on a sample of its rows."""
    with source.errors_at(name):
        weights, statistics = source.weights(name), source.statistics(name)
        check_weights(weights)
        norms = None if statistics is None else statistics.channel_norms(name)
        sample = _sample(weights, EFFORTS[settings.effort].sampled_weights)
        sparse = _most_corrections(weights.shape, settings)
        tried = []
        for format_name in formats:
            recipe = settings.recipe(format_name, trial=True)
            gap = measure(
                sample, quantize_layer(sample, recipe, norms).reconstruct(), norms
            ).gap_ppm
            bits = recipe.format.stored_bits(*weights.shape) + sparse
            tried.append({"name": format_name, "bits": bits, "gap_ppm": gap})
    return json.dumps(tried).encode()


def _most_corrections(shape: tuple[int, ...], settings: Settings) -> int:
    """Bits that sparse corrections take at most: OPQ and Wr may choose the same weights."""
    entries = [int(density * prod(shape)) for density in (settings.outliers, settings.residuals)]
    return stored_bits((shape[0], shape[1]), sum(entries)) if any(entries) else 0


def _quantize(
    source: _Source, name: str, format_name: str, settings: Settings, source_type: str, run: str
) -> bytes:
    """Job: a checkpoint file that holds one tensor, and how good it is in its configuration."""
    with source.errors_at(name):
        weights, statistics = source.weights(name), source.statistics(name)
        norms = None if statistics is None else statistics.channel_norms(name)
        moment = None
        if statistics is not None and settings.feedback:
            moment = statistics.second_moment(name)
        layer = quantize_layer(weights, settings.recipe(format_name), norms, moment)
        report: dict[str, Any] = {"fidelity": asdict(measure(weights, layer.reconstruct(), norms))}
    if layer.feedback is not None:
        report["feedback"] = {
            "used": layer.feedback.used,
            "plain_error": layer.feedback.plain_error,
            "feedback_error": layer.feedback.feedback_error,
        }
    content = io.BytesIO()
    with CheckpointWriter(content, {"run": run, **report}) as writer:
        writer.add(name, layer.tensor, layer.corrections, source_type)
    return content.getvalue()


# -------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Assignment:
    """A tensor, and the format chosen for it."""

    name: str
    shape: tuple[int, int]
    format: str
    bits: int | None
    """Stored bits; None where sparse corrections make them depend on the weights."""


@dataclass(frozen=True)
class LayerReport:
    """A quantized tensor, as stored.

    ``feedback`` holds the errors of both modes and whether feedback was used, or is None;
    ``calibrated`` says whether there were statistics of its inputs.
    """

    name: str
    format: str
    weights: int
    bits: int
    fidelity: Fidelity
    feedback: dict[str, Any] | None
    calibrated: bool


@dataclass(frozen=True)
class Run:
    """Result of :func:`quantize_model`.

    Attributes
    ----------
    output : Path or None
        The checkpoint file; None if nothing was to be written.
    assignments : tuple of Assignment
    plan : Plan or None
        Of the knapsack, where there was a budget.
    layers : tuple of LayerReport
        Empty if nothing was quantized.
    bits_per_weight : Fraction
        Counted from the file, or from the plan.
    """

    output: Path | None
    assignments: tuple[Assignment, ...]
    plan: Plan | None
    layers: tuple[LayerReport, ...]
    bits_per_weight: Fraction

    @property
    def fidelity(self) -> Fidelity:
        """Of all quantized tensors together."""
        return model_fidelity([layer.fidelity for layer in self.layers])


Progress = Callable[[str, int, int], None]
"""Called with what is done, and how many of how many weights of that."""


def _shape(model: Model, name: str) -> tuple[int, int]:
    shape = model.tensors[name].shape
    if len(shape) != 2 or not prod(shape):
        raise InputError(f"{model.path}: tensor {name!r}: shape {shape}, must be a matrix")
    return shape[0], shape[1]


def _run_jobs(
    jobs: Mapping[str, Job],
    sizes: Mapping[str, int],
    parts: Parts,
    workers: Workers,
    report: Callable[[int, int], None],
) -> None:
    """Run the jobs whose result is not there yet, the largest first."""
    total = sum(sizes.values())
    missing = sorted((part for part in jobs if part not in parts), key=lambda part: -sizes[part])
    done = total - sum(sizes[part] for part in missing)
    report(done, total)
    for position, content in workers.run([jobs[part] for part in missing]):
        parts.put(missing[position], content)
        done += sizes[missing[position]]
        report(done, total)


def _solve(
    tensors: Mapping[str, tuple[int, int]],
    options: Mapping[str, list[dict[str, Any]]],
    budget: Fraction,
) -> Plan:
    layers = [
        Layer(
            name,
            prod(shape),
            tuple(
                Option(tried["name"], tried["bits"], tried["gap_ppm"]) for tried in options[name]
            ),
        )
        for name, shape in tensors.items()
    ]
    return solve_mckp(layers, int(budget * sum(layer.params for layer in layers)))


def _plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as the file keeps it: of each layer the chosen option and those of the hull.

    All others would only make the header longer, and so would saying of those that they are on it.
    """
    return {
        "budget_bits": plan.budget_bits,
        "bits": plan.bits,
        "layers": [
            {
                "name": choice.layer.name,
                "params": choice.layer.params,
                "chosen": choice.option.name,
                "options": [
                    {
                        "name": row.option.name,
                        "bits": row.option.bits,
                        "gap_ppm": round(row.option.gap_ppm, 4),
                    }
                    | ({} if row.on_hull else {"on_hull": False})
                    for row in choice.rows
                    if row.on_hull or row.option is choice.option
                ],
            }
            for choice in plan.choices
        ],
    }


def _plan_model(
    source: _Source,
    tensors: Mapping[str, tuple[int, int]],
    settings: Settings,
    parts: Parts,
    workers: Workers,
    progress: Progress,
) -> tuple[dict[str, str], Plan | None]:
    """Format of every tensor."""
    fixed = {name: settings.overridden(name) or settings.format for name in tensors}
    open_names = [name for name, chosen in fixed.items() if chosen is None]
    chosen = {name: given for name, given in fixed.items() if given is not None}
    if settings.bits_per_weight is None:
        return chosen, None
    jobs, sizes, files = {}, {}, {}
    for position, name in enumerate(tensors):
        if chosen.get(name) == KEEP:
            continue
        part = f"options-{position:05d}.json"
        formats = settings.ladder if name in open_names else (chosen[name],)
        jobs[part] = Job(_try_formats, (source, name, formats, settings))
        sizes[part] = prod(tensors[name])
        files[name] = part
    if not files:
        return chosen, None
    _run_jobs(jobs, sizes, parts, workers, partial(progress, "trying formats, weights"))
    options = {name: json.loads(parts.read(part)) for name, part in files.items()}
    planned = {name: tensors[name] for name in files}
    plan = _solve(planned, options, settings.budget_per_weight())
    return chosen | {choice.layer.name: choice.option.name for choice in plan.choices}, plan


def quantize_model(
    model_path: str | Path,
    names: Sequence[str],
    output: str | Path,
    settings: Settings,
    *,
    calibration_path: str | Path | None = None,
    other_calibration: bool = False,
    workers: Workers | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Run:
    """Quantize tensors of a model into a checkpoint file; all others are stored as they are.

    Parameters
    ----------
    model_path : str or Path
        What :func:`sop.models.open_model` opens.
    names : sequence of str
        Tensors to quantize (:func:`sop.models.choose_tensors`).
    output : str or Path
        File to write. Results are gathered in a folder of that name with ``.parts`` behind.
    settings : Settings
    calibration_path : str or Path, optional
        Written by ``sop calibrate``. Layers that it does not know count all channels alike.
    other_calibration : bool
        Whether statistics of other weights are allowed.
    workers : Workers, optional
        This process alone if not given.
    resume : bool
        Continue an interrupted run of the same weights and settings.
    dry_run : bool
        Stop after planning; nothing is written.
    progress : callable
        See :data:`Progress`.

    Raises
    ------
    InputError
        If weights, statistics or settings cannot be used, or do not belong to the run to resume.
    """
    workers, output = workers or Workers(), Path(output)
    source = _source(model_path, calibration_path)
    model = _opened(source.model, source.model_sha256)
    tensors = {name: _shape(model, name) for name in names}
    calibration = None
    if source.calibration is not None and source.calibration_sha256 is not None:
        calibration = _calibrated(source.calibration, source.calibration_sha256)
        if not other_calibration:
            calibration.check_model(model.path, source.model_sha256)
        if not any(name in calibration.layers for name in tensors):
            known = next(iter(calibration.layers), "none")
            raise InputError(
                f"{source.calibration}: knows none of these tensors of {source.model}; "
                f"it has layers such as {known!r}"
            )
    config: dict[str, Any] = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "source": {"file": model.path.name, "sha256": source.model_sha256},
        "calibration": source.calibration_sha256,
        "tensors": list(tensors),
    }
    plan_with = partial(_plan_model, source, tensors, settings)
    if dry_run:
        chosen, plan = plan_with(Parts(), workers, progress)
        assignments = _assignments(tensors, chosen, settings)
        return Run(None, assignments, plan, (), _planned_bits(assignments))
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    with gathering(output, config, resume=resume) as parts:
        run_hash = config_hash(config)
        with _bad_input_drops(parts):
            chosen, plan = plan_with(parts, workers, progress)
            jobs, files = _quantize_jobs(source, model, tensors, chosen, settings, run_hash)
            sizes = {files[name]: prod(tensors[name]) for name in files}
            _run_jobs(jobs, sizes, parts, workers, partial(progress, "quantizing, weights"))
        config["plan"] = None if plan is None else _plan_json(plan)
        paths = {name: parts.path(file) for name, file in files.items()}
        reports = _write(output, config, calibration, model, paths, run_hash)
    with Checkpoint(output) as checkpoint:
        bits = checkpoint.stored_bits_per_weight if paths else Fraction(0)
    return Run(output, _assignments(tensors, chosen, settings), plan, reports, bits)


@contextmanager
def _bad_input_drops(parts: KeptParts) -> Iterator[None]:
    """Drop all results if weights cannot be quantized: no run could go on from them."""
    try:
        yield
    except ClusterError:
        raise
    except InputError:
        parts.remove()
        raise


def _quantize_jobs(
    source: _Source,
    model: Model,
    tensors: Mapping[str, tuple[int, int]],
    chosen: Mapping[str, str],
    settings: Settings,
    run_hash: str,
) -> tuple[dict[str, Job], dict[str, str]]:
    """Jobs by the names of their results, and these names by those of the tensors."""
    jobs, files = {}, {}
    for position, name in enumerate(tensors):
        if chosen[name] != KEEP:
            files[name] = f"tensor-{position:05d}.safetensors"
            arguments = (source, name, chosen[name], settings)
            jobs[files[name]] = Job(
                _quantize, (*arguments, model.tensors[name].source_type, run_hash)
            )
    return jobs, files


def _source(model_path: str | Path, calibration_path: str | Path | None) -> _Source:
    path = str(resolve_model(model_path))
    with open_model(path) as model:
        sha256 = model.fingerprint()
    if calibration_path is None:
        return _Source(path, sha256, None, None)
    return _Source(path, sha256, str(calibration_path), _file_sha256(Path(calibration_path)))


def _write(
    output: Path,
    config: Mapping[str, object],
    calibration: Calibration | None,
    model: Model,
    paths: Mapping[str, Path],
    run_hash: str,
) -> tuple[LayerReport, ...]:
    """Join the files of the quantized tensors, and all other tensors, into the output."""
    reports = []
    summary = None if calibration is None else asdict(calibration.run)
    with CheckpointWriter(output, config, summary) as writer:
        for name in model.tensors:
            if name not in paths:
                writer.add_raw(name, *model.raw(name))
                continue
            with Checkpoint(paths[name]) as part:
                if part.config.get("run") != run_hash:
                    raise InputError(f"{part.path}: of another run; remove {part.path.parent}")
                stored = part.read(name)
                writer.add(name, stored.tensor, stored.corrections, part.info(name).source_dtype)
                known = calibration is not None and name in calibration.layers
                reports.append(_layer_report(part, name, known))
    return tuple(reports)


def _assignments(
    tensors: Mapping[str, tuple[int, int]], chosen: Mapping[str, str], settings: Settings
) -> tuple[Assignment, ...]:
    assignments = []
    sparse = settings.outliers or settings.residuals
    for name, shape in tensors.items():
        bits = None
        if chosen[name] != KEEP and not sparse:
            bits = settings.recipe(chosen[name]).format.stored_bits(*shape)
        assignments.append(Assignment(name, shape, chosen[name], bits))
    return tuple(assignments)


def _planned_bits(assignments: Sequence[Assignment]) -> Fraction:
    """Bits per weight as far as they are known before the work."""
    known = [one for one in assignments if one.bits is not None]
    if not known:
        return Fraction(0)
    return Fraction(sum(one.bits or 0 for one in known), sum(prod(one.shape) for one in known))


def _layer_report(part: Checkpoint, name: str, calibrated: bool) -> LayerReport:
    fidelity = Fidelity(**part.config["fidelity"])
    return LayerReport(
        name,
        part.info(name).format.name,
        fidelity.weights,
        part.bits(name),
        fidelity,
        part.config.get("feedback"),
        calibrated,
    )


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
