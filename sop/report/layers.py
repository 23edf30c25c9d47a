"""What a report says of every layer of a checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import Checkpoint, StoredTensor, reconstruct
from golden.convert import decode_array
from golden.errors import InputError
from golden.formats import BF16, HIF7
from golden.metrics import cosine_gap_ppm, relative_mse
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor
from sop.files.calibration import Calibration
from sop.files.evaluation_file import RecordedEvaluation
from sop.files.models import Model
from sop.files.recorded_source import other_model
from sop.files.stored_plan import StoredPlan, plan_of_config
from sop.files.tensor_info import Matrix
from sop.shared.progress import Report

__all__ = [
    "HISTOGRAM_BINS",
    "HISTOGRAM_LIMIT",
    "CheckpointFacts",
    "CodebookFacts",
    "LayerError",
    "LayerFacts",
    "natural_key",
    "read_checkpoint",
]

HISTOGRAM_BINS = 64
HISTOGRAM_LIMIT = 1.125
"""Histograms go from minus to plus this many full scales of the LUT entries."""


@dataclass(frozen=True)
class LayerError:
    """How far one layer is from its weights.

    Attributes
    ----------
    gap_ppm : float
        ``(1 - ACos) * 1e6``, 0 to 2e6.
    relative_mse : float or None
        At least 0.
    """

    gap_ppm: float
    relative_mse: float | None


@dataclass(frozen=True, eq=False)
class CodebookFacts:
    """One LUT of a layer and the weights that are stored through it.

    Attributes
    ----------
    levels : int array, shape (entries,)
        Values of the entries, ascending.
    full_scale : int
        Value that a level of 1 stands for.
    uses : int array, shape (entries,)
        How many weights take each entry; padding is not counted.
    histogram : int array, shape (HISTOGRAM_BINS,), or None
        Weights divided by scale, in equal bins; those beyond the limits are left out. None if the
        weights are not known.
    """

    levels: NDArray[np.int64]
    full_scale: int
    uses: NDArray[np.int64]
    histogram: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """One quantized tensor.

    Attributes
    ----------
    name : str
    format : str
        Format name, with the format of LUT entries where that is not HIF7.
    shape : tuple of int
    bits : int
        All that is stored.
    corrections : int or None
        Entries of the sparse part; None if there is none.
    second_lut_share : float or None
        Share of blocks with metabit 1; None where there is no metabit.
    error : LayerError or None
    codebooks : tuple of CodebookFacts
        Empty for atoms.
    """

    name: str
    format: str
    shape: tuple[int, int]
    bits: int
    corrections: int | None
    second_lut_share: float | None
    error: LayerError | None
    codebooks: tuple[CodebookFacts, ...]

    @property
    def params(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return self.bits / self.params


@dataclass(frozen=True, eq=False)
class CheckpointFacts:
    """One checkpoint.

    Attributes
    ----------
    label : str
        Name in figures; unique in the report.
    path : Path
    config_hash : str
    bits_per_weight : float
    layers : tuple of LayerFacts
        Numbers in names count as numbers in their order.
    evaluation : RecordedEvaluation or None
    error_source : str
        Where the layers' errors come from; a sentence that says why there are none, if so.
    plan : StoredPlan or None
    other_model : str or None
        That the errors are against other weights than those that were quantized; None if not.
    """

    label: str
    path: Path
    config_hash: str
    bits_per_weight: float
    layers: tuple[LayerFacts, ...]
    evaluation: RecordedEvaluation | None
    error_source: str
    plan: StoredPlan | None
    other_model: str | None

    @property
    def has_errors(self) -> bool:
        """Whether any layer has an error."""
        return any(layer.error for layer in self.layers)

    @property
    def gap_ppm(self) -> float | None:
        """Mean over all weights if every layer has a gap, else what the evaluation says."""
        gaps = [layer.params * layer.error.gap_ppm for layer in self.layers if layer.error]
        if len(gaps) == len(self.layers):
            return sum(gaps) / sum(layer.params for layer in self.layers)
        return None if self.evaluation is None else self.evaluation.gap_ppm


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorting key by which ``blk.10`` comes after ``blk.9``."""
    return [
        (int(part), "") if part.isdecimal() and part.isascii() else (-1, part)
        for part in re.split(r"([0-9]{1,18})", name)
    ]


def read_checkpoint(
    path: Path,
    label: str,
    *,
    model: Model | None,
    calibration: Calibration | None,
    evaluation: RecordedEvaluation | None,
    on_tensor: Report,
) -> CheckpointFacts:
    """Gather what a report needs, one tensor in memory at a time.

    Parameters
    ----------
    path, label
        The file and its name in the report.
    model : Model or None
        The weights before quantization.
    calibration : Calibration or None
        Weights the errors; without it they are unweighted.
    evaluation : RecordedEvaluation or None
        That of this checkpoint.
    on_tensor : callable
        Called with the tensors done and their number.

    Raises
    ------
    InputError
        If the checkpoint or its plan is not valid, or the model does not have its tensors.
    """
    layers = []
    with Checkpoint(path) as checkpoint:
        plan = plan_of_config(checkpoint.config, str(path))
        errors, source = _known_errors(evaluation, plan)
        names = sorted(checkpoint.names, key=natural_key)
        unknown = 0
        for done, name in enumerate(names):
            on_tensor(done, len(names))
            stored = checkpoint.read(name)
            bits = checkpoint.bits(name)
            matrix = Matrix.of_checkpoint(name, checkpoint.info(name))
            weights = None if model is None else _weights(model, matrix)
            norms = None if calibration is None else calibration.known_norms(name)
            unknown += norms is None
            error = errors.get(name)
            if weights is not None:
                error = _measure(weights, stored, norms, f"{path}: tensor {name!r}")
            layers.append(_layer(name, stored, bits, weights, error))
        on_tensor(len(names), len(names))
        other = None
        if model is not None:
            other = other_model(checkpoint, model.path, model.fingerprint)
            whose = ", which are not those that were quantized" if other else ""
            weighted = _weighting(model, calibration, len(names), unknown)
            source = f"measured against the weights of {model.path.name}{whose}, {weighted}"
        return CheckpointFacts(
            label, path, checkpoint.config_hash, float(checkpoint.stored_bits_per_weight),
            tuple(layers), evaluation, source, plan, other,
        )  # fmt: skip


def _known_errors(
    evaluation: RecordedEvaluation | None, plan: StoredPlan | None
) -> tuple[Mapping[str, LayerError], str]:
    """Errors by tensor name that need no weights, and where they come from."""
    if evaluation is not None and evaluation.layers:
        found = {one.name: LayerError(one.gap_ppm, one.relative_mse) for one in evaluation.layers}
        return found, "taken from the evaluation"
    if plan is not None:
        planned = {p.layer.name: LayerError(p.chosen.gap_ppm, None) for p in plan.layers}
        return planned, "taken from the plan in the checkpoint"
    return {}, (
        "unknown: they need the weights (--model), or an evaluation of this checkpoint with values "
        "of its layers (--evaluation)"
    )


def _weights(model: Model, matrix: Matrix) -> NDArray[np.float32]:
    weights = model.read_matrix(matrix)
    if not np.isfinite(weights).all():
        raise InputError(f"{model.path}: tensor {matrix.name!r}: holds NaN or infinity")
    return weights


def _measure(
    weights: NDArray[np.float32],
    stored: StoredTensor,
    norms: NDArray[np.float64] | None,
    where: str,
) -> LayerError:
    if norms is not None and len(norms) != weights.shape[1]:
        problem = f"{weights.shape[1]} columns, the calibration has {len(norms)} channels"
        raise InputError(f"{where}: {problem}")
    try:
        reconstruction = reconstruct(stored)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    mse = relative_mse(weights, reconstruction)
    return LayerError(
        cosine_gap_ppm(weights, reconstruction, norms), mse if np.isfinite(mse) else None
    )


def _weighting(model: Model, calibration: Calibration | None, layers: int, unknown: int) -> str:
    """What the errors of layers are weighted by, `unknown` of which have no statistics."""
    if calibration is None:
        return "unweighted"
    weighted = "weighted by the calibration"
    if calibration.run.model_sha256 != model.fingerprint():
        weighted += f" of other weights (a model called {calibration.run.model})"
    return weighted + (f", {unknown} of {layers} layers unweighted" if unknown else "")


def _layer(
    name: str,
    stored: StoredTensor,
    bits: int,
    weights: NDArray[np.float32] | None,
    error: LayerError | None,
) -> LayerFacts:
    tensor, corrections = stored.tensor, stored.corrections
    fmt = tensor.format
    return LayerFacts(
        name,
        _format_name(fmt),
        tensor.shape,
        bits,
        None if corrections is None else corrections.entries,
        float(tensor.metabits.mean()) if fmt.word.metabit_bits else None,
        error,
        _codebooks(tensor, weights) if fmt.codebooks else (),
    )


def _format_name(fmt: QuantFormat) -> str:
    return fmt.name if fmt.atom or fmt.hif == HIF7 else f"{fmt.name} ({fmt.hif.name})"


def _codebooks(
    tensor: QuantizedTensor, weights: NDArray[np.float32] | None
) -> tuple[CodebookFacts, ...]:
    columns = tensor.shape[1]
    metabits = tensor.metabits
    used = np.ones(tensor.indices.shape[1:], dtype=np.bool_)
    used.reshape(-1)[columns:] = False  # padding of a row's last block
    scaled = None if weights is None else _scaled(tensor, weights)
    facts = []
    for position, lut in enumerate(tensor.luts):
        members = (metabits == position)[..., None] & used
        uses = np.bincount(tensor.indices[members], minlength=len(lut.codes))
        full_scale = int(lut.hif.full_scale)
        histogram = None
        if scaled is not None:
            limit = HISTOGRAM_LIMIT * full_scale
            # Blocks with a scale of zero have no scaled weights: NaN, which no bin takes.
            values = scaled[members & ~np.isnan(scaled)]
            histogram, _ = np.histogram(values, HISTOGRAM_BINS, (-limit, limit))
        facts.append(CodebookFacts(lut.values, full_scale, uses, histogram))
    return tuple(facts)


def _scaled(tensor: QuantizedTensor, weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Weights over scale, in units of LUT values; shape (rows, blocks, block_size)."""
    rows, blocks, size = tensor.indices.shape
    scales = decode_array(tensor.scale_codes, tensor.format.word.scale)
    scales = np.ldexp(scales, tensor.layer_exponent)
    if tensor.row_scales is not None:
        scales = scales * decode_array(tensor.row_scales, BF16)[:, None]
    padded = np.zeros((rows, blocks * size), dtype=np.float64)
    padded[:, : weights.shape[1]] = weights
    divisors = np.where(scales == 0, np.nan, scales)[..., None]
    scaled: NDArray[np.float64] = padded.reshape(rows, blocks, size) / divisors
    return scaled
