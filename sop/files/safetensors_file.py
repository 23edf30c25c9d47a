"""Writing safetensors files tensor by tensor, completely or not at all.

The ``safetensors`` package takes all tensors of a file at once; here memory holds one
(:mod:`golden.container_file`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from golden.container import RawInfo
from golden.container_file import OutgoingTensor, array_bytes, start_container
from golden.convert import round_bfloat16
from golden.errors import InputError
from golden.formats import BF16
from golden.new_file import new_file
from sop.shared.console import choice
from sop.shared.progress import Report, silent

__all__ = ["DTYPES", "FOR_TRANSFORMERS", "float_tensor", "write_safetensors"]

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What weights can be written as, with the name in the safetensors format."""

FOR_TRANSFORMERS = MappingProxyType({"format": "pt"})
"""Metadata: transformers refuses a file that does not say which framework's layout it has."""


def float_tensor(
    name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], NDArray[np.float32]]
) -> OutgoingTensor:
    """Tensor of weights that are read when their turn comes.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : str
        A key of :data:`DTYPES`. To bfloat16: nearest, ties to even; a finite weight that would
        become infinite is an InputError.
    read : callable
        Gives a float32 array of that shape.
    """
    stored = DTYPES[choice("dtype", dtype, tuple(DTYPES))]

    def chunks() -> Iterable[memoryview]:
        weights = read()
        if stored == "F32":
            yield array_bytes(weights.astype("<f4", copy=False))
            return
        codes = round_bfloat16(weights)
        if (BF16.has_top_exponent(codes) & np.isfinite(weights)).any():
            raise InputError(f"tensor {name!r}: a weight is too large for bfloat16")
        yield array_bytes(codes.astype("<u2", copy=False))

    return OutgoingTensor(name, RawInfo(stored, shape), chunks)


def write_safetensors(
    path: Path,
    tensors: Sequence[OutgoingTensor],
    report: Report = silent,
    *,
    metadata: Mapping[str, str] = FOR_TRANSFORMERS,
) -> None:
    """Write a file; it takes its name when it is complete, and nothing is left of it otherwise.

    Parameters
    ----------
    path : Path
        File to write or replace; its folder must exist.
    tensors : sequence of OutgoingTensor
        Names differ. Stored as :func:`golden.container.storage_order` says.
    report : callable, optional
        Called with the numbers of tensors done and in total.
    metadata : mapping of str to str, optional
        Of the file.

    Raises
    ------
    InputError
        If the header would be too long, or what makes the bytes of a tensor raises it.
    """
    with new_file(path) as file:
        order = start_container(file, metadata, tensors)
        for done, tensor in enumerate(order):
            report(done, len(order))
            tensor.write_to(file)
        report(len(order), len(order))
