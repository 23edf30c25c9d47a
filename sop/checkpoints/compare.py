"""How far the weights of one file are from those of another, tensor by tensor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from golden.metrics import cosine_gap_ppm, relative_mse
from sop.files.calibration import Calibration
from sop.files.tensor_info import Matrix
from sop.files.weights import Weights
from sop.shared.progress import Report

__all__ = ["Comparison", "TensorError", "compare_weights"]

_NO_FLOATS = ("BOOL", "C64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


@dataclass(frozen=True)
class TensorError:
    """How far B is from A in one tensor.

    Attributes
    ----------
    name : str
    shape : tuple of int
    relative_mse : float
        ``sum((A - B)**2) / sum(A**2)``; infinite if only A is zero.
    gap_ppm : float or None
        Gap of the cosine in parts per million; activation-weighted if a calibration is used, and
        None for a tensor that it does not have.
    max_difference : float
        Largest ``|A - B|``.
    """

    name: str
    shape: tuple[int, ...]
    relative_mse: float
    gap_ppm: float | None
    max_difference: float

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class Comparison:
    """All tensors of two files.

    Attributes
    ----------
    tensors : tuple of TensorError
        Those of floats that are in both files.
    only_in_a, only_in_b : tuple of str
        Names that the other file does not have.
    no_floats : tuple of str
        Names in both whose values are no floats in one of them; they are not compared.
    """

    tensors: tuple[TensorError, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    no_floats: tuple[str, ...]

    @property
    def mean_relative_mse(self) -> float | None:
        """Mean by weights; None if no tensor was compared."""
        return _mean(self.tensors, lambda tensor: tensor.relative_mse)

    @property
    def mean_gap_ppm(self) -> float | None:
        """Mean by weights over the tensors that have a gap; None if none has."""
        having = [tensor for tensor in self.tensors if tensor.gap_ppm is not None]
        return _mean(having, lambda tensor: tensor.gap_ppm or 0.0)

    @property
    def max_difference(self) -> float:
        """Largest difference in any tensor."""
        return max((tensor.max_difference for tensor in self.tensors), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; an infinite relative error is null."""
        return {
            "weights": sum(tensor.weights for tensor in self.tensors),
            "mean_relative_mse": _finite(self.mean_relative_mse),
            "mean_cosine_gap_ppm": self.mean_gap_ppm,
            "max_difference": self.max_difference,
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "not_compared": list(self.no_floats),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "relative_mse": _finite(tensor.relative_mse),
                    "cosine_gap_ppm": tensor.gap_ppm,
                    "max_difference": tensor.max_difference,
                }
                for tensor in self.tensors
            ],
        }


def _mean(tensors: Sequence[TensorError], value: Callable[[TensorError], float]) -> float | None:
    weights = sum(tensor.weights for tensor in tensors)
    if not weights:
        return None
    return sum(tensor.weights * value(tensor) for tensor in tensors if tensor.weights) / weights


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def compare_weights(
    a: Weights, b: Weights, calibration: Calibration | None, report: Report
) -> Comparison:
    """Compare all tensors of the same name; memory holds one pair.

    Parameters
    ----------
    a, b : Weights
        The errors are those of `b` against `a`.
    calibration : Calibration or None
        Its channel norms weight the cosine.
    report : callable
        See :data:`sop.shared.progress.Report`; counts tensors.

    Raises
    ------
    InputError
        If the files have no tensor in common or the calibration has none of them, two tensors of
        one name differ in shape, or a weight is broken or not finite.
    """
    both = [name for name in a.tensors if name in b.tensors]
    floats = [name for name in both if _is_float(a, name) and _is_float(b, name)]
    if not floats:
        raise InputError(f"{b.path}: has no tensor of floats in common with {a.path}")
    layers = [matrix.name for name in floats for matrix in _matrices(a, b, name)]
    if calibration is not None and not calibration.layers.keys() & {*floats, *layers}:
        raise InputError(f"{calibration.path}: has none of the tensors that are compared")
    return Comparison(
        tuple(_errors(a, b, floats, calibration, report)),
        tuple(name for name in a.tensors if name not in b.tensors),
        tuple(name for name in b.tensors if name not in a.tensors),
        tuple(name for name in both if name not in floats),
    )


def _is_float(weights: Weights, name: str) -> bool:
    return weights.tensors[name].source_type not in _NO_FLOATS


def _errors(
    a: Weights, b: Weights, names: list[str], calibration: Calibration | None, report: Report
) -> Iterator[TensorError]:
    for done, name in enumerate(names):
        report(done, len(names))
        shapes = a.tensors[name].shape, b.tensors[name].shape
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{b.path}: tensor {name!r}: shape {shapes[1]}, {a.path} has {shapes[0]}"
            )
        norms = None
        if calibration is not None:
            norms = _channel_norms(calibration, name, shapes[0], _matrices(a, b, name))
        first, second = (_read_finite(weights, name) for weights in (a, b))
        gap = None
        if calibration is None or norms is not None:
            gap = cosine_gap_ppm(first, second, norms)
        difference = np.abs(first.astype(np.float64) - second).max(initial=0.0)
        yield TensorError(name, shapes[0], relative_mse(first, second), gap, float(difference))


def _matrices(a: Weights, b: Weights, name: str) -> tuple[Matrix, ...]:
    """How a tensor was quantized, where one of the files says so, else how it would be."""
    for weights in (b, a):
        if name in weights.matrices:
            return weights.matrices[name]
    return ()


def _channel_norms(
    calibration: Calibration, name: str, shape: tuple[int, ...], matrices: tuple[Matrix, ...]
) -> NDArray[np.float64] | None:
    """Norm of the input of each weight, in a shape that broadcasts to that of the tensor.

    None if the calibration has no statistics of the tensor, or of one of its slices.
    """
    known = [matrix for matrix in matrices if matrix.name in calibration.layers]
    if not known:
        if name in calibration.layers:
            norms = calibration.channel_norms(name)
            problem = f"{norms.size} channel norms, the tensor has shape {shape}"
            raise InputError(f"{calibration.path}: tensor {name!r}: {problem}")
        return None
    if len(known) < len(matrices):
        return None
    found = []
    for matrix in matrices:
        norms = calibration.channel_norms(matrix.name)
        if norms.size != matrix.shape[1]:
            problem = f"{norms.size} channel norms, the tensor has shape {shape}"
            raise InputError(f"{calibration.path}: tensor {matrix.name!r}: {problem}")
        found.append(norms[:, None] if matrix.transposed else norms[None, :])
    return np.array(found) if matrices[0].index is not None else found[0]


def _read_finite(weights: Weights, name: str) -> NDArray[np.float32]:
    values = weights.read(name)
    finite = np.isfinite(values)
    if not finite.all():
        position = tuple(int(i) for i in np.unravel_index(int(finite.argmin()), values.shape))
        raise InputError(
            f"{weights.path}: tensor {name!r}: the weight at {position} is {values[position]}"
        )
    return values
