"""A whole model through the golden quantizer: a plan, one job per tensor, one checkpoint file.

Jobs are plain functions of picklable arguments that return bytes, so they run in this process, in
worker processes (joblib) or on a Dask cluster, and the file comes out the same. Results are kept in
a folder beside the output until all are there; an interrupted run continues from it.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.blocks import check_weights
from golden.checkpoint import Checkpoint, CheckpointWriter, config_hash
from golden.errors import InputError
from golden.hashing import file_sha256
from golden.knapsack import Option, Plan
from golden.layer import quantize_layer
from golden.metrics import measure
from sop.files.calibration import Calibration
from sop.files.choice import LeftOut
from sop.files.models import Model, open_model, resolve_model
from sop.files.recorded_source import RecordedSource, recorded_name
from sop.files.stored_plan import TriedFormats, config_with_plan
from sop.files.tensor_info import Matrix
from sop.quantizing.engines import engine_named
from sop.quantizing.part_report import FeedbackErrors, PartReport
from sop.quantizing.parts import KeptParts, Parts, gathering
from sop.quantizing.planning import (
    Formats,
    allowed_formats,
    bits_at_most,
    solve_plan,
)
from sop.quantizing.preflight import check_file, check_finite, check_headers, check_types
from sop.quantizing.run_config import RunConfig
from sop.quantizing.run_result import LayerReport, Run, RunResult, layer_report, used_scales
from sop.quantizing.settings import EFFORTS, Settings
from sop.quantizing.workers import ClusterError, Job, Workers
from sop.shared.progress import Report, StepReport, silent

__all__ = ["quantize_model"]

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

    def weights(self, matrix: Matrix) -> NDArray[np.float32]:
        return _opened(self.model, self.model_sha256).read_matrix(matrix)

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


@contextmanager
def _closed_at_the_end(source: _Source) -> Iterator[None]:
    """Close the model that jobs of this process have opened, if any."""
    try:
        yield
    finally:
        if _opened.cache_info().currsize:
            _opened(source.model, source.model_sha256).close()
            _opened.cache_clear()


@lru_cache(maxsize=1)
def _calibrated(path: str, sha256: str) -> Calibration:
    return Calibration(path)


def _sample(weights: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Whole rows, evenly spaced, of about ``count`` weights."""
    rows = min(len(weights), max(1, -(-count // weights.shape[1])))
    return weights[np.arange(rows) * len(weights) // rows]


def _try_formats(
    source: _Source, matrix: Matrix, formats: Sequence[str], settings: Settings
) -> bytes:
    """Job: bits of a matrix in each format, and the gap measured on a sample of its rows."""
    name = matrix.name
    with source.errors_at(name):
        weights, statistics = source.weights(matrix), source.statistics(name)
        check_weights(weights)
        norms = None if statistics is None else statistics.channel_norms(name)
        sample = _sample(weights, EFFORTS[settings.effort].sampled_weights)
        tried = []
        for format_name in formats:
            recipe = settings.recipe(format_name, trial=True)
            gap = measure(
                sample, quantize_layer(sample, recipe, norms).reconstruct(), norms
            ).gap_ppm
            bits = bits_at_most(matrix, format_name, settings)
            tried.append(Option(format_name, bits, gap))
    return json.dumps(TriedFormats(tuple(tried)).to_json()).encode()


def _quantize(
    source: _Source, matrix: Matrix, format_name: str, settings: Settings, run: str
) -> bytes:
    """Job: a checkpoint file that holds one matrix, and how good it is in its configuration."""
    name = matrix.name
    with source.errors_at(name):
        weights, statistics = source.weights(matrix), source.statistics(name)
        norms = None if statistics is None else statistics.channel_norms(name)
        moment = None
        if statistics is not None and settings.feedback:
            moment = statistics.second_moment(name)
        layer = quantize_layer(weights, settings.recipe(format_name), norms, moment)
        fidelity = measure(weights, layer.reconstruct(), norms)
    feedback = None
    if layer.feedback is not None:
        found = layer.feedback
        feedback = FeedbackErrors(found.feedback_error, found.plain_error, found.used)
    content = io.BytesIO()
    with CheckpointWriter(content, PartReport(run, fidelity, feedback).to_json()) as writer:
        writer.add(name, layer.tensor, layer.corrections, matrix.source_type)
    return content.getvalue()


# -------------------------------------------------------------------------------------------- run


def _run_jobs(
    jobs: Mapping[str, Job],
    sizes: Mapping[str, int],
    parts: Parts,
    workers: Workers,
    report: Report,
) -> None:
    """Run the jobs whose result is not there yet, the largest first."""
    total = sum(sizes.values())
    missing = sorted((part for part in jobs if part not in parts), key=lambda part: -sizes[part])
    done = total - sum(sizes[part] for part in missing)
    report(done, total)
    # Closed at once when this fails, which ends the workers.
    with closing(workers.run([jobs[part] for part in missing])) as results:
        for position, content in results:
            parts.put(missing[position], content)
            done += sizes[missing[position]]
            report(done, total)


def _plan_model(
    source: _Source,
    formats: Mapping[Matrix, tuple[str, ...]],
    settings: Settings,
    parts: Parts,
    workers: Workers,
    progress: StepReport,
) -> tuple[dict[Matrix, str], Plan | None]:
    """Format of every matrix."""
    if settings.bits_per_weight is None or not formats:
        return {matrix: names[0] for matrix, names in formats.items()}, None
    jobs, sizes, files = {}, {}, {}
    for position, (matrix, names) in enumerate(formats.items()):
        part = f"options-{position:05d}.json"
        jobs[part] = Job(_try_formats, (source, matrix, names, settings))
        sizes[part] = matrix.weights
        files[matrix.name] = part
    _run_jobs(jobs, sizes, parts, workers, partial(progress, "trying formats, weights"))
    options = {
        name: TriedFormats.from_json(json.loads(parts.read(part)), part)
        for name, part in files.items()
    }
    plan = solve_plan(list(formats), options, settings.budget_per_weight())
    chosen = {choice.layer.name: choice.option.name for choice in plan.choices}
    return {matrix: chosen[matrix.name] for matrix in formats}, plan


def quantize_model(
    model_path: str | Path,
    names: Sequence[str],
    output: str | Path,
    settings: Settings,
    *,
    left_out: Sequence[LeftOut] = (),
    calibration_path: str | Path | None = None,
    other_calibration: bool = False,
    workers: Workers | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: StepReport = silent,
) -> Run:
    """Quantize tensors of a model into a checkpoint file; all others are stored as they are.

    Parameters
    ----------
    model_path : str or Path
        What :func:`sop.files.models.open_model` opens.
    names : sequence of str
        Tensors to quantize (:func:`sop.files.choice.choose_tensors`), stacked ones slice by slice.
    output : str or Path
        File to write. Results are gathered in a folder of that name with ``.parts`` behind.
    settings : Settings
    left_out : sequence of LeftOut
        The other tensors and why they are left out, for the result.
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
        See :data:`sop.shared.progress.StepReport`; counts weights.

    Raises
    ------
    InputError
        If weights, statistics or settings cannot be used, or do not belong to the run to resume.
    """
    workers, output = workers or Workers(), Path(output)
    source = _source(model_path, calibration_path)
    if not dry_run and not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    with open_model(source.model) as model, _closed_at_the_end(source):
        matrices = _matrices(model, names)
        formats = _checked_formats(model, matrices, settings)
        engine = engine_named(workers.engine)
        result = RunResult(model, formats, left_out, settings, engine.name)
        calibration = _checked_calibration(source, model, matrices, other_calibration)
        config = _config(model, source, matrices, settings)
        scan = partial(check_finite, model, list(formats.by_matrix))
        plan_with = partial(_plan_model, source, formats.by_matrix, settings)
        if dry_run:
            scan(partial(progress, "checking weights"))
            return result.planned(*plan_with(Parts(), workers, progress))
        with gathering(output, config, resume=resume) as parts:
            run_hash = config_hash(config.to_json())
            with _bad_input_drops(parts):
                scan(partial(progress, "checking weights"))
                chosen, plan = plan_with(parts, workers, progress)
                whole = config_with_plan(config.to_json(), plan)
                check_file(model, chosen, settings, whole, _summary(calibration))
                jobs, files = _quantize_jobs(source, chosen, settings, run_hash)
                sizes = {files[matrix.name]: matrix.weights for matrix in chosen}
                _run_jobs(jobs, sizes, parts, workers, partial(progress, "quantizing, weights"))
            paths = {name: parts.path(file) for name, file in files.items()}
            reports = _write(output, whole, calibration, model, chosen, paths, run_hash)
        return result.written(output, chosen, plan, reports)


def _checked_formats(model: Model, matrices: Sequence[Matrix], settings: Settings) -> Formats:
    """Formats of the matrices, if everything that headers tell allows to store them so."""
    check_types(model, matrices)
    formats = allowed_formats(model, matrices, settings)
    check_headers(model, list(formats.by_matrix), used_scales(model, formats.by_matrix))
    return formats


def _config(
    model: Model, source: _Source, matrices: Sequence[Matrix], settings: Settings
) -> RunConfig:
    return RunConfig(
        settings=settings.to_json(),
        source=_described(model, source.model_sha256),
        calibration=source.calibration_sha256,
        tensors=tuple(dict.fromkeys(matrix.tensor for matrix in matrices)),
    )


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
    source: _Source, chosen: Mapping[Matrix, str], settings: Settings, run_hash: str
) -> tuple[dict[str, Job], dict[str, str]]:
    """Jobs by the names of their results, and these names by those of the matrices."""
    jobs, files = {}, {}
    for position, (matrix, name) in enumerate(chosen.items()):
        files[matrix.name] = f"tensor-{position:05d}.safetensors"
        jobs[files[matrix.name]] = Job(_quantize, (source, matrix, name, settings, run_hash))
    return jobs, files


def _described(model: Model, sha256: str) -> RecordedSource:
    """What the configuration says about the source."""
    # Of the FP8 weights that are left as they came; all have blocks of one size.
    block = next((list(scaling.block) for scaling in model.scales.values()), None)
    return RecordedSource(recorded_name(model.path), sha256, block)


def _matrices(model: Model, names: Sequence[str]) -> list[Matrix]:
    """All matrices of the tensors of these names."""
    matrices: list[Matrix] = []
    for name in names:
        if not model.matrices_by_tensor.get(name):
            shape = model.tensors[name].shape
            raise InputError(f"{model.path}: tensor {name!r}: shape {shape}, must be a matrix")
        matrices += model.matrices_by_tensor[name]
    return matrices


def _checked_calibration(
    source: _Source, model: Model, matrices: Sequence[Matrix], other_calibration: bool
) -> Calibration | None:
    """The calibration, if there is one; of this model, and it must know one of the matrices."""
    if source.calibration is None or source.calibration_sha256 is None:
        return None
    calibration = _calibrated(source.calibration, source.calibration_sha256)
    if not other_calibration:
        calibration.check_model(model.path, source.model_sha256)
    if not any(matrix.name in calibration.layers for matrix in matrices):
        known = next(iter(calibration.layers), "none")
        raise InputError(
            f"{source.calibration}: knows none of these tensors of {source.model}; "
            f"it has layers such as {known!r}"
        )
    return calibration


def _source(model_path: str | Path, calibration_path: str | Path | None) -> _Source:
    path = str(resolve_model(model_path))
    with open_model(path) as model:
        sha256 = model.fingerprint()
    if calibration_path is None:
        return _Source(path, sha256, None, None)
    return _Source(path, sha256, str(calibration_path), file_sha256(Path(calibration_path)))


def _summary(calibration: Calibration | None) -> dict[str, Any] | None:
    """What the checkpoint says about the calibration."""
    return None if calibration is None else calibration.run.to_json()


def _write(
    output: Path,
    config: Mapping[str, object],
    calibration: Calibration | None,
    model: Model,
    chosen: Mapping[Matrix, str],
    paths: Mapping[str, Path],
    run_hash: str,
) -> tuple[LayerReport, ...]:
    """Join the files of the quantized tensors, and all other tensors, into the output."""
    reports = []
    with CheckpointWriter(output, config, _summary(calibration)) as writer:
        stored_otherwise = {matrix.tensor for matrix in chosen} | used_scales(model, chosen)
        for name in model.tensors:
            if name not in stored_otherwise:
                writer.add_raw(name, *model.raw(name))
        for matrix in chosen:
            name = matrix.name
            with Checkpoint(paths[name]) as part:
                report = PartReport.of_part(part, run_hash)
                writer.copy(part, name, matrix.source)
                known = calibration is not None and name in calibration.layers
                reports.append(layer_report(part, name, report, known))
    return tuple(reports)
