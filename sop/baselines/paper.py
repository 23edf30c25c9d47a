"""The paper's tables, measured on a model's weights, and what other formats reach on the same ones.

Each *measurement* turns a weight matrix into a reconstruction and a number of stored bits. All of
them run on one tensor while it is in memory; the sums over tensors are taken in the order of the
file, so the figures do not depend on the number of workers.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from golden.formats import HIF7, HIF8T, HifFormat
from golden.layer import parse_recipe, quantize_layer
from golden.metrics import cosine_gap_ppm
from golden.notation import parse_format
from golden.pair_search import fixed_candidates, search_codebooks
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor, decode
from sop.baselines.others import BASELINES
from sop.files.choice import linear_matrices, select_matrices
from sop.files.models import open_model
from sop.quantizing.workers import Job, Workers
from sop.shared.progress import Report, silent

__all__ = ["MEASUREMENTS", "Fidelity", "Measurement", "PaperTable", "measure_model", "paper_tables"]

Float32 = NDArray[np.float32]
Reconstruction = tuple[Float32, int]  # weights and stored bits


@dataclass(frozen=True)
class Measurement:
    """A way to quantize: its name, and the function from weights to weights and stored bits."""

    name: str
    run: Callable[[Float32], Reconstruction]


@dataclass(frozen=True)
class Fidelity:
    """What a measurement reached over all tensors.

    Attributes
    ----------
    relative_mse : float
        Squared error over squared weights, sums over all tensors.
    gap_ppm : float
        Gap of the cosine (without activation weights), mean weighted by parameters.
    bits_per_weight : float
        Everything stored, LUTs, row scales and corrections included.
    """

    relative_mse: float
    gap_ppm: float
    bits_per_weight: float


def _stored(tensor: QuantizedTensor) -> Reconstruction:
    return decode(tensor), tensor.format.stored_bits(*tensor.shape)


def _by_format(name: str, mode: ScaleMode, hif: HifFormat = HIF7) -> Measurement:
    def run(weights: Float32) -> Reconstruction:
        return _stored(quantize(weights, parse_format(name, hif), mode=mode))

    label = name if mode is ScaleMode.ABSMAX else f"{name}, {mode.value}"
    return Measurement(label, run)


def _by_recipe(
    name: str, hif: HifFormat, *, outliers: float = 0.0, residuals: float = 0.0
) -> Measurement:
    """Trained or searched codebooks, with sparse corrections at two densities."""
    recipe = parse_recipe(name, hif, outliers=outliers, residuals=residuals)

    def run(weights: Float32) -> Reconstruction:
        layer = quantize_layer(weights, recipe)
        return layer.reconstruct(), layer.stored_bits

    label = f"{name}, {hif.name}"
    if outliers or residuals:
        label += f", OPQ {outliers:.1%}, Wr {residuals:.1%}"
    return Measurement(label, run)


def _best_fixed_pair(weights: Float32) -> Reconstruction:
    fmt = parse_format(_PAIR)
    return _stored(search_codebooks(weights, fmt, candidates=fixed_candidates(16, HIF7)).tensor)


def _baseline(name: str) -> Measurement:
    baseline = BASELINES[name]

    def run(weights: Float32) -> Reconstruction:
        return baseline.reconstruct(weights), round(baseline.bits_per_weight * weights.size)

    return Measurement(name, run)


LADDER = ("UE4M4", "UE4M3", "UE5M3", "UE5M5", "UE5M7", "S1E5M5", "BF16")
_PAIR = "DD4-DD4sS1E5M5"
_ANY_PAIR = "Any4-Any4sS1E5M5"
_FIXED_PAIR = "best fixed pair, S1E5M5, HIF7"
_DENSITIES = ((0.001, 0.0), (0.0, 0.001), (0.001, 0.001))
# What this project makes of 4.25 to 6.75 bits.
_BY_BITS = (
    "Any4-Any4^32sRS1E2M4", "Any4-Any4sRS1E2M4", "Any4-Any4sS1E5M5", "DD5sS1E4M3",
    "DD5-DD5sRS1E2M4", "DD6sS1E4M3", "DD6-DD6sRS1E2M4", "DD6-DD6sS1E5M5",
)  # fmt: skip


def _measurements() -> dict[str, Measurement]:
    absmax, search = ScaleMode.ABSMAX, ScaleMode.SEARCH
    simple = ["E4M3^0sUE8M0", "E2M3^32sUE8M0"]
    simple += [f"{atom}s{scale}" for atom in ("E2M3", "HIF7") for scale in LADDER]
    listed = [_by_format(name, absmax) for name in simple]
    listed += [
        _by_format(name, search)
        for name in (
            "E2M3sUE4M4", "NF4sUE4M4", "BOF4sUE4M4", "BOF4sS1E4M3", "BOF4-NF4sUE4M3",
            "NF4sS1E5M5", "BOF4sS1E5M5", "Split87sS1E5M5", "SH4sS1E5M5", "NF4TsS1E5M5",
            "BOF4TsS1E5M5", "Split87TsS1E5M5", "SH4TsS1E5M5", "BOF4-NF4sS1E5M5",
        )
    ]  # fmt: skip
    listed.append(Measurement(_FIXED_PAIR, _best_fixed_pair))
    listed += [_by_recipe(name, HIF7) for name in ("DD4sS1E5M5", _PAIR, _ANY_PAIR)]
    listed += [_by_recipe(_ANY_PAIR, HIF7, outliers=opq, residuals=wr) for opq, wr in _DENSITIES]
    listed += [_by_recipe(name, HIF8T) for name in _BY_BITS]
    listed += [_baseline(name) for name in BASELINES]
    return {measurement.name: measurement for measurement in listed}


MEASUREMENTS = _measurements()
"""All measurements by name, also those that need a package that is not installed."""


def _usable() -> list[str]:
    return [name for name in MEASUREMENTS if name not in BASELINES or BASELINES[name].available]


@dataclass(frozen=True)
class _Part:
    """What one measurement gives for one tensor."""

    error: float
    power: float
    gap_ppm: float
    bits: int
    weights: int


def _measure_tensor(path: Path, tensor: str, names: Sequence[str]) -> bytes:
    """Job: JSON of a list of :class:`_Part`, one for each name."""
    with open_model(path) as model:
        weights = model.read_matrix(model.matrices[tensor])
    exact = weights.astype(np.float64)
    power = float(np.sum(exact**2))
    parts = []
    for name in names:
        try:
            reconstruction, bits = MEASUREMENTS[name].run(weights)
        except InputError as problem:
            raise InputError(f"{path}: tensor {tensor!r}: {problem}") from problem
        error = float(np.sum((exact - reconstruction) ** 2))
        gap = cosine_gap_ppm(weights, reconstruction)
        parts.append(asdict(_Part(error, power, gap, bits, weights.size)))
    return json.dumps(parts).encode()


def measure_model(
    path: Path,
    tensors: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    jobs: int = 1,
    report: Report = silent,
) -> dict[str, Fidelity]:
    """Measure on every tensor named.

    Parameters
    ----------
    path : Path
        Model file (:func:`sop.files.models.open_model`).
    tensors : sequence of str, optional
        Shell patterns of tensor names; the linear tensors of all blocks if none is given.
    names : sequence of str, optional
        Names in :data:`MEASUREMENTS`; all whose package is installed if none is given.
    jobs : int
        Worker processes; the figures do not depend on it.
    report : callable, optional
        Called with the number of tensors done and of all.

    Raises
    ------
    InputError
        If the model cannot be read, or a tensor cannot be quantized.
    """
    with open_model(path) as model:
        matrices = select_matrices(model, tensors) if tensors else linear_matrices(model)
    chosen = [matrix.name for matrix in matrices]
    wanted = list(names) or _usable()
    report(0, len(chosen))
    by_tensor: dict[int, list[_Part]] = {}
    work = [Job(_measure_tensor, (path, tensor, wanted)) for tensor in chosen]
    # Closed at once when this fails, which ends the workers.
    with closing(Workers(jobs).run(work)) as results:
        for done, (position, content) in enumerate(results, start=1):
            by_tensor[position] = [_Part(**part) for part in json.loads(content)]
            report(done, len(chosen))
    return {
        name: _sum([by_tensor[position][number] for position in range(len(chosen))])
        for number, name in enumerate(wanted)
    }


def _sum(parts: Sequence[_Part]) -> Fidelity:
    weights = sum(part.weights for part in parts)
    power = sum(part.power for part in parts)
    return Fidelity(
        sum(part.error for part in parts) / power if power else 0.0,
        sum(part.gap_ppm * part.weights for part in parts) / weights,
        sum(part.bits for part in parts) / weights,
    )


@dataclass(frozen=True)
class PaperTable:
    """A table of figures: a title, what the paper states, column names and rows of text."""

    title: str
    paper: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _listing(
    title: str, paper: str, names: Sequence[str], found: dict[str, Fidelity]
) -> PaperTable:
    present = [name for name in names if name in found]
    rows = [
        (name, f"{found[name].bits_per_weight:.3f}", f"{found[name].relative_mse:.3e}",
         f"{found[name].gap_ppm:.0f}")
        for name in present
    ]  # fmt: skip
    return PaperTable(title, paper, ("format", "bits/weight", "rel. MSE", "gap ppm"), tuple(rows))


def _ratio(label: str, first: str, second: str, found: dict[str, Fidelity]) -> tuple[str, str]:
    above, below = found[first].relative_mse, found[second].relative_mse
    # Weights that a format holds exactly have no error; zeros, for example.
    return label, f"{above / below:.4f}" if below else "undefined"


def paper_tables(found: dict[str, Fidelity]) -> list[PaperTable]:
    """Arrange the figures of all measurements beside what the paper states [paper]."""
    ratios = PaperTable(
        "Ratios of MSE, scales by absmax",
        "E2M3/E4M3^0 0.770 (SmolLM3-3B), 0.776 (Llama-3.2-3B), 0.778 (Mistral-7B); E2M3/HIF7 "
        "1.038 to 1.041; UE4M4/UE4M3 0.80 to 0.83; UE5M7/BF16 1.00",
        ("ratio", "measured"),
        (
            _ratio("E2M3sUE4M4 / E4M3^0sUE8M0", "E2M3sUE4M4", "E4M3^0sUE8M0", found),
            _ratio("E2M3sUE4M4 / HIF7sUE4M4", "E2M3sUE4M4", "HIF7sUE4M4", found),
            _ratio("HIF7sUE4M4 / HIF7sUE4M3", "HIF7sUE4M4", "HIF7sUE4M3", found),
            _ratio("E2M3sUE5M7 / E2M3sBF16", "E2M3sUE5M7", "E2M3sBF16", found),
            _ratio("HIF7sUE5M7 / HIF7sBF16", "HIF7sUE5M7", "HIF7sBF16", found),
        ),
    )
    ladder = [f"{atom}s{scale}" for atom in ("HIF7", "E2M3") for scale in LADDER]
    singles = [name for name in found if name.endswith("sS1E5M5, search")]
    own = [*(f"{name}, HIF8T" for name in _BY_BITS), "E2M3sUE4M4, search"]
    equal_bits = sorted([*own, *(name for name in BASELINES if name in found)],
                        key=lambda name: (found[name].bits_per_weight, name))  # fmt: skip
    return [
        ratios,
        _listing("Scale formats, scales by absmax", "12 bits (UE5M7) equal BF16 scales to three "
                 "digits", ladder, found),
        _listing("Sign or metabit in 8 bits, both in 12", "sign and metabit "
                 "together are worth about 25 ppm of activation-weighted cosine",
                 ["BOF4sUE4M4, search", "BOF4sS1E4M3, search", "BOF4-NF4sUE4M3, search",
                  "BOF4sS1E5M5, search", "BOF4-NF4sS1E5M5, search"], found),
        _listing("Single codebooks and pairs, S1E5M5", "no figures at hand",
                 [*singles, "DD4sS1E5M5, HIF7", _FIXED_PAIR, f"{_PAIR}, HIF7",
                  f"{_ANY_PAIR}, HIF7"], found),
        _listing("Sparse corrections", "OPQ and Wr together are worth 5 to 15 ppm",
                 [f"{_ANY_PAIR}, HIF7", *(name for name in found if "OPQ" in name)], found),
        _listing("Against other formats, by bits", "no figures at hand", equal_bits, found),
    ]  # fmt: skip
