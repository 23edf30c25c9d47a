"""What ``sop quantize`` says about its result."""

from dataclasses import asdict, dataclass
from typing import Any

from sop.files.choice import LeftOut
from sop.quantizing.run_result import Run
from sop.shared.console import out, print_rows
from sop.shared.shares import percent

__all__ = ["print_nothing", "print_plan", "print_result", "run_as_json"]

_WORST = 8  # layers shown with the largest gaps


@dataclass(frozen=True)
class _Group:
    """Tensors that were left as they came for one reason."""

    reason: str
    tensors: tuple[str, ...]
    weights: int
    share: float


def _left_out(run: Run) -> list[_Group]:
    """What was left as it came, by reason, the largest share first."""
    by_reason: dict[str, list[LeftOut]] = {}
    for one in run.left_out:
        by_reason.setdefault(one.reason, []).append(one)
    groups = []
    for reason, some in by_reason.items():
        weights = sum(one.weights for one in some)
        names = tuple(one.tensor for one in some)
        groups.append(_Group(reason, names, weights, weights / max(run.weights, 1)))
    return sorted(groups, key=lambda group: (-group.weights, group.reason))


def _print_left_out(run: Run) -> None:
    """Print what share of the weights was quantized, and what was left out and why."""
    groups = _left_out(run)
    quantized_weights = run.weights - sum(group.weights for group in groups)
    per_weight = float(run.file_bits_per_weight)
    share = percent(quantized_weights / max(run.weights, 1))
    quantized = f"{share} % of the weights quantized"
    print(f"{quantized}; whole file {per_weight:.4f} bits/weight; engine {run.engine}")
    if groups:
        print("left as they came: " + "; ".join(map(_group_text, groups)))
    if run.grown:
        print(f"{len(run.grown)} tensors take more bits than in the source, in its own types")


def _group_text(group: _Group) -> str:
    number = len(group.tensors)
    some = group.tensors[0] if number == 1 else f"{number} tensors"
    return f"{group.reason} {percent(group.share)} % ({some})"


def run_as_json(run: Run) -> dict[str, Any]:
    """Everything that a run says about its result, as JSON values."""
    layers = []
    for layer in run.layers:
        layers.append(
            {
                "name": layer.name,
                "format": layer.format,
                "bits_per_weight": layer.bits / layer.weights,
                **asdict(layer.fidelity),
                "relative_mse": layer.fidelity.relative_mse,
                "feedback": None if layer.feedback is None else asdict(layer.feedback),
                "calibrated": layer.calibrated,
            }
        )
    totals = {}
    if layers:
        totals = {**asdict(run.fidelity), "relative_mse": run.fidelity.relative_mse}
    return {
        "output": None if run.output is None else str(run.output),
        "bits_per_weight": float(run.bits_per_weight),
        "file_bits_per_weight": float(run.file_bits_per_weight),
        "model_weights": run.weights,
        "engine": run.engine,
        "larger_than_in_source": list(run.grown),
        "left_out": [asdict(group) for group in _left_out(run)],
        **totals,
        "plan": [asdict(assignment) for assignment in run.assignments],
        "layers": layers,
    }


def print_plan(run: Run) -> None:
    """Print what a dry run has planned."""
    rows = []
    for one in run.assignments:
        size = one.shape[0] * one.shape[1]
        bits = "" if one.bits is None else f"{one.bits / size:.3f}"
        rows.append([one.name, f"{one.shape[0]} x {one.shape[1]}", one.format, bits])
    print_rows("Plan", ["tensor", "shape", "format", "bits/weight"], rows)
    print()
    if run.plan is not None:
        spent = float(run.plan.bits_per_weight)
        print(f"{spent:.4f} bits/weight, mean gap of the samples {run.plan.mean_gap_ppm:.0f} ppm")
    elif run.bits_per_weight:
        print(f"{float(run.bits_per_weight):.4f} bits/weight")
    _print_left_out(run)


def print_result(run: Run) -> None:
    """Print what was quantized to what, how far off it is, and what was left as it came."""
    counts: dict[str, list[int]] = {}
    for layer in run.layers:
        entry = counts.setdefault(layer.format, [0, 0, 0])
        for position, amount in enumerate((1, layer.weights, layer.bits)):
            entry[position] += amount
    rows = [
        [name, str(number), f"{weights:,}", f"{bits / weights:.3f}"]
        for name, (number, weights, bits) in sorted(counts.items())
    ]
    print_rows("Formats", ["format", "tensors", "weights", "bits/weight"], rows)
    out.print()
    worst = sorted(run.layers, key=lambda layer: -layer.fidelity.gap_ppm)[:_WORST]
    rows = [
        [layer.name, layer.format, f"{layer.fidelity.gap_ppm:.0f}",
         f"{layer.fidelity.relative_mse:.3e}"]
        for layer in worst
    ]  # fmt: skip
    print_rows("Largest gaps", ["tensor", "format", "gap ppm", "rel. MSE"], rows)
    out.print()
    total = run.fidelity
    print(
        f"{float(run.bits_per_weight):.4f} bits/weight, gap {total.gap_ppm:.0f} ppm "
        f"(all channels alike: {total.plain_gap_ppm:.0f}), relative MSE {total.relative_mse:.3e}"
    )
    _print_left_out(run)
    tried = [layer.feedback for layer in run.layers if layer.feedback is not None]
    if tried:
        used = sum(feedback.used for feedback in tried)
        ratios = [
            min(feedback.plain_error, feedback.feedback_error) / feedback.plain_error
            for feedback in tried
            if feedback.plain_error
        ]
        mean = sum(ratios) / max(len(ratios), 1)
        print(f"error feedback in {used} of {len(run.layers)} tensors, output error x {mean:.3f}")
    unknown = sum(not layer.calibrated for layer in run.layers)
    if 0 < unknown < len(run.layers):
        print(f"{unknown} tensors are not in the calibration: all their channels counted alike")
    if total.replaced_norms:
        print(f"{total.replaced_norms} channels without statistics counted with norm 1")
    print(run.output)


def print_nothing(run: Run) -> None:
    """Print that no tensor was quantized, and why."""
    print("no tensor was quantized")
    _print_left_out(run)
    print(run.output)
