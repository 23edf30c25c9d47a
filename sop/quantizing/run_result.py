"""What a run gives back: formats, errors, bits, and what was left as it came."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from golden.checkpoint import Checkpoint
from golden.knapsack import Plan
from golden.metrics import Fidelity, model_fidelity
from sop.files.choice import LeftOut
from sop.files.models import Model
from sop.files.tensor_info import Matrix
from sop.quantizing.part_report import FeedbackErrors, PartReport
from sop.quantizing.planning import Assignment, Formats, assignments_of, bits_at_most, planned_bits
from sop.quantizing.settings import Settings

__all__ = ["LayerReport", "Run", "RunResult", "layer_report", "used_scales"]


@dataclass(frozen=True)
class LayerReport:
    """A quantized matrix, as stored.

    ``feedback`` holds the errors of both modes and whether feedback was used, or is None;
    ``calibrated`` says whether there were statistics of its inputs.
    """

    name: str
    format: str
    weights: int
    bits: int
    fidelity: Fidelity
    feedback: FeedbackErrors | None
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
        Of what was quantized; counted from the file, or from the plan.
    file_bits_per_weight : Fraction
        Of all tensors of the model, those that were left as they came too.
    left_out : tuple of LeftOut
        Tensors that were left as they came.
    grown : tuple of str
        Quantized tensors that take more bits than in the source, which holds them in a type of few
        bits that a checkpoint does not have; as they came they would take more still.
    weights : int
        Of the whole model.
    engine : str
        What ran the inner loops in this process; it changes no byte of the file.
    """

    output: Path | None
    assignments: tuple[Assignment, ...]
    plan: Plan | None
    layers: tuple[LayerReport, ...]
    bits_per_weight: Fraction
    file_bits_per_weight: Fraction
    left_out: tuple[LeftOut, ...]
    grown: tuple[str, ...]
    weights: int
    engine: str

    @property
    def fidelity(self) -> Fidelity:
        """Of all quantized tensors together."""
        return model_fidelity([layer.fidelity for layer in self.layers])


def used_scales(model: Model, matrices: Iterable[Matrix]) -> frozenset[str]:
    """Tensors of scales that are part of quantized weights, and so of no further use."""
    scaled = {matrix.tensor for matrix in matrices} & model.scales.keys()
    return frozenset(name for tensor in scaled for name in model.scales[tensor].tensors)


def layer_report(part: Checkpoint, name: str, report: PartReport, calibrated: bool) -> LayerReport:
    """Return what a finished part and its report say about its matrix."""
    return LayerReport(
        name,
        part.info(name).format.name,
        report.fidelity.weights,
        part.bits(name),
        report.fidelity,
        report.feedback,
        calibrated,
    )


@dataclass(frozen=True)
class RunResult:
    """What a run says about the model as a whole."""

    model: Model
    formats: Formats
    left_out: Sequence[LeftOut]
    settings: Settings
    engine: str

    def planned(self, chosen: Mapping[Matrix, str], plan: Plan | None) -> Run:
        """After a dry run: bits as far as they are known."""
        per_weight = planned_bits(assignments_of(chosen, self.settings))
        bits = {one.name: bits_at_most(one, name, self.settings) for one, name in chosen.items()}
        gone = {matrix.tensor for matrix in chosen} | used_scales(self.model, chosen)
        tensors = self.model.tensors.items()
        raw = sum(info.raw_bits for name, info in tensors if name not in gone)
        return self._run(None, chosen, plan, (), per_weight, bits, raw)

    def written(
        self,
        output: Path,
        chosen: Mapping[Matrix, str],
        plan: Plan | None,
        reports: tuple[LayerReport, ...],
    ) -> Run:
        """After the file was written: bits counted from it."""
        with Checkpoint(output) as checkpoint:
            per_weight = checkpoint.stored_bits_per_weight if reports else Fraction(0)
            bits = {name: checkpoint.bits(name) for name in checkpoint.names}
            raw = sum(checkpoint.bits(name) for name in checkpoint.raw_names)
        return self._run(output, chosen, plan, reports, per_weight, bits, raw)

    def _run(
        self,
        output: Path | None,
        chosen: Mapping[Matrix, str],
        plan: Plan | None,
        reports: tuple[LayerReport, ...],
        per_weight: Fraction,
        bits: Mapping[str, int],
        raw_bits: int,
    ) -> Run:
        """Put together what is known; ``bits`` are those of the matrices by name."""
        weights = self.model.weights
        left_out = (*self.left_out, *self.formats.left_out)
        by_tensor: dict[str, int] = {}
        for matrix in chosen:
            by_tensor[matrix.tensor] = by_tensor.get(matrix.tensor, 0) + bits[matrix.name]
        tensors = self.model.tensors
        grown = tuple(name for name, size in by_tensor.items() if size > tensors[name].bits)
        whole = Fraction(sum(bits.values()) + raw_bits, weights)
        assignments = assignments_of(chosen, self.settings)
        return Run(
            output, assignments, plan, reports, per_weight, whole, left_out, grown, weights,
            self.engine,
        )  # fmt: skip
