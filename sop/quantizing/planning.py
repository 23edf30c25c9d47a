"""Which format every matrix gets: what fits, what the budget buys, and what is left as it came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from golden.corrections import stored_bits
from golden.errors import InputError
from golden.knapsack import Layer, Plan, solve_mckp
from sop.files.choice import LeftOut
from sop.files.models import Model
from sop.files.stored_plan import TriedFormats
from sop.files.tensor_info import Matrix
from sop.quantizing.settings import KEEP, Settings

__all__ = [
    "Assignment",
    "Formats",
    "allowed_formats",
    "assignments_of",
    "bits_at_most",
    "planned_bits",
    "solve_plan",
]

_KEPT = f"format {KEEP!r}"
_NOT_SMALLER = "no smaller in its format than as it came"


@dataclass(frozen=True)
class Assignment:
    """A matrix, and the format chosen for it."""

    name: str
    shape: tuple[int, int]
    format: str
    bits: int | None
    """Stored bits; None where sparse corrections make them depend on the weights."""


@dataclass(frozen=True)
class Formats:
    """What each matrix may be stored in; made by :func:`allowed_formats`.

    Attributes
    ----------
    by_matrix : Mapping of Matrix to tuple of str
        Names of formats, at least one; exactly one where nothing is left to be planned.
    left_out : tuple of LeftOut
        Tensors that are stored as they came.
    """

    by_matrix: Mapping[Matrix, tuple[str, ...]]
    left_out: tuple[LeftOut, ...]


def allowed_formats(model: Model, matrices: Sequence[Matrix], settings: Settings) -> Formats:
    """Return the formats that overrides and size leave to each matrix.

    A format that does not make a tensor smaller than it is as it came is not used: such formats
    are taken off the ladder of a budget, and a tensor that has no other is left as it came.

    Parameters
    ----------
    model : Model
    matrices : sequence of Matrix
        Of this model; of a stacked tensor all or none.
    settings : Settings

    Raises
    ------
    InputError
        If no format makes any of the tensors smaller. (The user may keep them all.)
    """
    by_matrix: dict[Matrix, tuple[str, ...]] = {}
    left_out: dict[str, LeftOut] = {}
    for matrix in matrices:
        info = model.tensors[matrix.tensor]
        given = settings.overridden(matrix.tensor) or settings.format
        names = settings.ladder if given is None else (given,)
        if given == KEEP:
            left_out[info.name] = LeftOut(info.name, _KEPT, info.weights)
            continue
        limit = info.raw_bits // (matrix.count or 1)
        fitting = tuple(name for name in names if bits_at_most(matrix, name, settings) < limit)
        if fitting:
            by_matrix[matrix] = fitting
        else:
            left_out[info.name] = LeftOut(info.name, _NOT_SMALLER, info.weights)
    large = next((one for one in left_out.values() if one.reason == _NOT_SMALLER), None)
    if not by_matrix and large is not None:
        problem = f"nothing would be quantized: tensor {large.tensor!r} {_NOT_SMALLER}"
        raise InputError(f"{model.path}: {problem}")
    return Formats(by_matrix, tuple(left_out.values()))


def bits_at_most(matrix: Matrix, format_name: str, settings: Settings) -> int:
    """Bits of a matrix in a format, with as many sparse corrections as there can be.

    OPQ and Wr may choose the same weights; then there are fewer.
    """
    densities = settings.outliers, settings.residuals
    entries = [int(density * matrix.weights) for density in densities]
    sparse = stored_bits(matrix.shape, sum(entries)) if any(entries) else 0
    return settings.recipe(format_name).format.stored_bits(*matrix.shape) + sparse


def solve_plan(
    matrices: Sequence[Matrix], options: Mapping[str, TriedFormats], budget: Fraction
) -> Plan:
    """Return the best plan within a budget of bits per weight.

    Parameters
    ----------
    matrices : sequence of Matrix
    options : mapping of str to TriedFormats
        What was tried, by name of the matrix.
    budget : Fraction
    """
    layers = [
        Layer(matrix.name, matrix.weights, options[matrix.name].options) for matrix in matrices
    ]
    return solve_mckp(layers, int(budget * sum(layer.params for layer in layers)))


def assignments_of(chosen: Mapping[Matrix, str], settings: Settings) -> tuple[Assignment, ...]:
    """Return the formats of all matrices, with their bits where those are known."""
    sparse = settings.outliers or settings.residuals
    assignments = []
    for matrix, name in chosen.items():
        bits = None if sparse else settings.recipe(name).format.stored_bits(*matrix.shape)
        assignments.append(Assignment(matrix.name, matrix.shape, name, bits))
    return tuple(assignments)


def planned_bits(assignments: Sequence[Assignment]) -> Fraction:
    """Bits per weight as far as they are known before the work."""
    known = [one for one in assignments if one.bits is not None]
    if not known:
        return Fraction(0)
    weights = sum(one.shape[0] * one.shape[1] for one in known)
    return Fraction(sum(one.bits or 0 for one in known), weights)
