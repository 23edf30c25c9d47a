"""``sop sim``: quantize tensors of a model and compare the RTL with the golden model."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.errors import InputError
from golden.metrics import cosine_gap_ppm, relative_mse
from golden.notation import QuantFormat
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor, decode
from sim.decoder import Decoder, Difference, Result
from sim.tensor_run import (
    FAULT_KINDS,
    Stimulus,
    flip_bit,
    run_tensors,
    stimulus_of,
)
from sop.files.models import Model
from sop.files.tensor_info import Matrix

__all__ = [
    "Fault",
    "SimulationReport",
    "TensorReport",
    "explain_mismatch",
    "parse_fault",
    "shown_float",
    "simulate_model",
]

WAVES_BEATS_AFTER = 8


@dataclass(frozen=True)
class Fault:
    """One bit to change between the golden model and the hardware (see :func:`flip_bit`)."""

    kind: str
    position: int
    bit: int


def parse_fault(text: str, kinds: Sequence[str] = FAULT_KINDS) -> Fault:
    """Parse ``KIND:POSITION:BIT``, such as ``index:12345:2``, with one of these kinds.

    Raises
    ------
    InputError
        If the text is not of that form.
    """
    match = re.fullmatch(r"(\w+):([0-9]{1,18}):([0-9]{1,9})", text, re.ASCII)
    if match is None:
        raise InputError(f"fault {text!r} is not of the form KIND:POSITION:BIT, like index:12345:2")
    if match[1] not in kinds:
        raise InputError(f"unknown kind of fault {match[1]!r}: expected {', '.join(kinds)}")
    return Fault(match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True)
class TensorReport:
    """One row of the table.

    ``second_lut_share`` is the share of blocks whose metabit is 1; ``gap_ppm`` the cosine gap
    without activation weights.
    """

    name: str
    rows: int
    columns: int
    result: Result
    second_lut_share: float
    relative_mse: float
    gap_ppm: float

    @property
    def weights(self) -> int:
        """Weights of the tensor, padding not counted."""
        return self.rows * self.columns

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        first = self.result.first_difference
        return {
            "name": self.name,
            "shape": [self.rows, self.columns],
            "weights": self.weights,
            "clocks": self.result.clocks,
            "weights_per_clock": self.weights / self.result.clocks,
            "mismatches": self.result.mismatches,
            "flags": list(self.result.flags),
            "misplaced_last": self.result.misplaced_last,
            "first_mismatch": None if first is None else vars(first),
            "lut_shares": [1 - self.second_lut_share, self.second_lut_share],
            "relative_mse": self.relative_mse,
            "cosine_gap_ppm": self.gap_ppm,
        }


@dataclass(frozen=True)
class SimulationReport:
    """Everything that ``sop sim`` found out; times in seconds, memory of nothing but the run."""

    model: str
    source_note: str
    decoder: Decoder
    tensors: list[TensorReport]
    quantize_seconds: float
    simulate_seconds: float
    waveform: Path | None

    def mean(self, value: Callable[["TensorReport"], float]) -> float:
        """Mean over the tensors, weighted by their number of weights, as the paper does."""
        total = sum(tensor.weights for tensor in self.tensors)
        return sum(tensor.weights * value(tensor) for tensor in self.tensors) / total

    @property
    def passed(self) -> bool:
        """Whether every bit of every tensor was right."""
        return all(tensor.result.passed for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        decoder = self.decoder
        return {
            "passed": self.passed,
            "model": self.model,
            "source_note": self.source_note,
            "format": decoder.format.name,
            "lut_entry_format": decoder.format.hif.name,
            "bits_per_weight": float(decoder.format.bits_per_weight),
            "lanes": decoder.lanes,
            "output": decoder.output,
            "simulator": decoder.simulator,
            "weights": sum(tensor.weights for tensor in self.tensors),
            "clocks": sum(tensor.result.clocks for tensor in self.tensors),
            "mismatches": sum(tensor.result.mismatches for tensor in self.tensors),
            "mean_relative_mse": self.mean(lambda tensor: tensor.relative_mse),
            "mean_cosine_gap_ppm": self.mean(lambda tensor: tensor.gap_ppm),
            "quantize_seconds": round(self.quantize_seconds, 3),
            "simulate_seconds": round(self.simulate_seconds, 3),
            "waveform": None if self.waveform is None else str(self.waveform),
            "tensors": [tensor.as_dict() for tensor in self.tensors],
        }


def shown_float(bits: int, output: str = "float32") -> str:
    """Bits of a number in hex, and its value."""
    digits = 4 if output == "bfloat16" else 8
    # bfloat16 is the upper half of float32.
    pattern = bits << 16 if output == "bfloat16" else bits
    value = np.array(pattern, dtype=np.uint32).view(np.float32)
    return f"0x{bits:0{digits}x} ({float(value):.9g})"


def explain_mismatch(tensor: str, mismatch: Difference, output: str) -> str:
    """One line that locates a mismatch and shows both values in hex and decoded."""
    actual, expected = (shown_float(bits, output) for bits in (mismatch.actual, mismatch.expected))
    return (
        f"{tensor}: row {mismatch.row}, block {mismatch.block}, element {mismatch.element} "
        f"(beat {mismatch.beat}, lane {mismatch.lane}): RTL {actual}, golden {expected}"
    )


def _record_waveform(
    decoder: Decoder, tensor: QuantizedTensor, stimulus: Stimulus, beat: int, **options: Any
) -> Path | None:
    """Run the failing tensor again up to the failing beat, recording; path of the waveform."""
    _, folder = run_tensors(
        decoder, [tensor], [stimulus], waves=True, beat_limit=beat + WAVES_BEATS_AFTER, **options
    )
    waveforms = [*folder.glob("*.fst"), *folder.glob("*.vcd")]
    return waveforms[0] if waveforms else None


def _quantize_all(
    model: Model,
    matrices: Sequence[Matrix],
    fmt: QuantFormat,
    mode: ScaleMode,
    report: Callable[[str], None],
) -> tuple[list[QuantizedTensor], list[tuple[float, float]]]:
    tensors, errors = [], []
    for number, matrix in enumerate(matrices):
        name = matrix.name
        report(f"quantizing {name} ({number + 1} of {len(matrices)})")
        weights = model.read_matrix(matrix)
        try:
            tensor = quantize(weights, fmt, mode=mode)
        except InputError as error:
            raise InputError(f"{model.path}: tensor {name!r}: {error}") from None
        dense = decode(tensor)
        tensors.append(tensor)
        errors.append((relative_mse(weights, dense), cosine_gap_ppm(weights, dense)))
    return tensors, errors


def simulate_model(
    model: Model,
    matrices: Sequence[Matrix],
    decoder: Decoder,
    *,
    mode: ScaleMode = ScaleMode.SEARCH,
    stalls: str = "none",
    seed: int = 1,
    fault: Fault | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> SimulationReport:
    """Quantize tensors, stream them through the RTL and compare every bit with the golden model.

    Parameters
    ----------
    model : Model
        Open model.
    matrices : sequence of Matrix
        Of this model.
    decoder : Decoder
        Configuration and simulator.
    mode : ScaleMode
        How block scales are chosen.
    stalls, seed
        As :func:`sim.tensor_run.run_tensors`.
    fault : Fault, optional
        One bit of the first tensor to change on its way to the hardware.
    report : callable, optional
        Called with a line of text at each step.

    Raises
    ------
    InputError
        If a tensor cannot be quantized; the message names file and tensor.
    SimulationError
        If the simulation could not be built, or hung.
    """
    start = time.perf_counter()
    tensors, errors = _quantize_all(model, matrices, decoder.format, mode, report)
    quantized = time.perf_counter()
    stimuli = [stimulus_of(tensor, decoder.modes) for tensor in tensors]
    if fault is not None:
        stimuli[0] = flip_bit(stimuli[0], decoder.format, fault.kind, fault.position, fault.bit)
    report(f"simulating {sum(t.indices.size for t in tensors):,} weights on {decoder.simulator}")
    results, _ = run_tensors(decoder, tensors, stimuli, stalls=stalls, seed=seed)
    simulated = time.perf_counter()

    reports, waveform = [], None
    for position, (matrix, tensor, result, (mse, gap)) in enumerate(
        zip(matrices, tensors, results, errors, strict=True)
    ):
        name = matrix.name
        rows, columns = tensor.shape
        share = float(tensor.metabits.mean())
        reports.append(TensorReport(name, rows, columns, result, share, mse, gap))
        if result.first_difference is not None and waveform is None:
            report(f"recording a waveform of {name}")
            beat = result.first_difference.beat
            waveform = _record_waveform(
                decoder, tensor, stimuli[position], beat, stalls=stalls, seed=seed
            )
    return SimulationReport(
        str(model.path),
        model.source_note,
        decoder,
        reports,
        quantized - start,
        simulated - quantized,
        waveform,
    )
