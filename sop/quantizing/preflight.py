"""What can be found out about a run before it starts, so that it is not found hours later."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from golden.blocks import check_weights
from golden.checkpoint import QuantizedInfo, RawInfo, check_header, check_names
from golden.errors import InputError
from sop.files.models import Model
from sop.files.tensor_info import Matrix
from sop.quantizing.settings import Settings
from sop.shared.progress import Report

__all__ = ["check_file", "check_finite", "check_headers", "check_types"]

_EXPONENT = 128  # of the layer exponents, the one that is longest in a header


def check_types(model: Model, matrices: Sequence[Matrix]) -> None:
    """Refuse matrices whose values cannot become float32.

    Raises
    ------
    InputError
        The message names file, tensor and type.
    """
    for matrix in matrices:
        problem = model.tensors[matrix.tensor].unreadable
        if problem:
            where = f"{model.path}: tensor {matrix.tensor!r}"
            raise InputError(f"{where}: field 'dtype': {problem}")


def check_headers(model: Model, matrices: Sequence[Matrix], dropped: Collection[str]) -> None:
    """Refuse what the headers show cannot be stored, as it came or under its name.

    Parameters
    ----------
    model : Model
    matrices : sequence of Matrix
        Those to quantize.
    dropped : collection of str
        Tensors of the model that are not stored.

    Raises
    ------
    InputError
        The message names file, tensor and field.
    """
    quantized = {matrix.tensor for matrix in matrices}
    for name, info in model.tensors.items():
        if name not in quantized and info.raw_type is None:
            problem = f"field 'type': {info.unreadable}, and so not be copied"
            raise InputError(f"{model.path}: tensor {name!r}: {problem}")
    kept = model.tensors.keys() - quantized - {*dropped}
    raw = {name: RawInfo(info.raw_type or "", info.shape) for name, info in model.tensors.items()
           if name in kept}  # fmt: skip
    try:
        check_names({matrix.name: matrix.source for matrix in matrices}, raw)
    except InputError as error:
        raise InputError(f"{model.path}: {error}") from error


def check_file(
    model: Model,
    chosen: Mapping[Matrix, str],
    settings: Settings,
    config: Mapping[str, object],
    calibration: Mapping[str, object] | None,
) -> None:
    """Refuse a model whose checkpoint would have too long a header.

    Parameters
    ----------
    model : Model
    chosen : mapping of Matrix to str
        Format of every matrix.
    settings : Settings
    config, calibration
        As the checkpoint will hold them.

    Raises
    ------
    InputError
        The message names the model.
    """
    infos = {
        one.name: QuantizedInfo(
            settings.recipe(name).format, one.shape, -_EXPONENT, one.source_type, one.source
        )
        for one, name in chosen.items()
    }
    quantized = {matrix.tensor for matrix in chosen}
    raw = {
        name: RawInfo(info.raw_type or "", info.shape)
        for name, info in model.tensors.items()
        if name not in quantized
    }
    sparse = bool(settings.outliers or settings.residuals)
    try:
        check_header(config, calibration, infos, raw, sparse=sparse)
    except InputError as error:
        problem = f"too many tensors for one checkpoint: {error}"
        raise InputError(f"{model.path}: {problem}; quantize fewer with --exclude") from error


def check_finite(model: Model, matrices: Sequence[Matrix], report: Report) -> None:
    """Read all matrices once and refuse NaN and infinity; memory holds one.

    Parameters
    ----------
    model : Model
    matrices : sequence of Matrix
    report : callable
        Called with the number of weights that were read and of all.

    Raises
    ------
    InputError
        The message names file, tensor, row and column.
    """
    done, total = 0, sum(matrix.weights for matrix in matrices)
    for matrix in matrices:
        report(done, total)
        weights = model.read_matrix(matrix)
        if not np.isfinite(weights).all():
            try:
                check_weights(weights)
            except InputError as error:
                raise InputError(f"{model.path}: tensor {matrix.name!r}: {error}") from error
        done += matrix.weights
    report(done, total)
