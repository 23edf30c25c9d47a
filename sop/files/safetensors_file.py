"""Writing safetensors files tensor by tensor, completely or not at all.

The ``safetensors`` package takes all tensors of a file at once; here memory holds one. Container:
huggingface/safetensors, README, "Format".
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.convert import round_bfloat16
from golden.errors import InputError
from golden.new_file import new_file
from sop.shared.console import choice

__all__ = ["DTYPES", "FOR_TRANSFORMERS", "OutgoingTensor", "float_tensor", "write_safetensors"]

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
"""What weights can be written as: name in the safetensors format, bytes of a weight."""

FOR_TRANSFORMERS = MappingProxyType({"format": "pt"})
"""Metadata: transformers refuses a file that does not say which framework's layout it has."""

_LARGEST_BFLOAT16 = 0x7F7F


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written.

    Attributes
    ----------
    name : str
    dtype : str
        Type name of the safetensors format.
    shape : tuple of int
    nbytes : int
    chunks : callable
        Makes the bytes, little-endian, row-major, cut anywhere; called once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def element_bits(self) -> int:
        """Bits of an element; 0 if there is none."""
        return 8 * self.nbytes // max(1, prod(self.shape))


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
    stored, width = DTYPES[choice("dtype", dtype, tuple(DTYPES))]

    def chunks() -> Iterable[memoryview]:
        weights = read()
        if stored == "F32":
            yield _bytes(weights.astype("<f4", copy=False))
            return
        codes = round_bfloat16(weights)
        if (((codes & 0x7FFF) > _LARGEST_BFLOAT16) & np.isfinite(weights)).any():
            raise InputError(f"tensor {name!r}: a weight is too large for bfloat16")
        yield _bytes(codes.astype("<u2", copy=False))

    return OutgoingTensor(name, stored, shape, width * prod(shape), chunks)


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def write_safetensors(
    path: Path,
    tensors: Sequence[OutgoingTensor],
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    metadata: Mapping[str, str] = FOR_TRANSFORMERS,
) -> None:
    """Write a file; it takes its name when it is complete, and nothing is left of it otherwise.

    Parameters
    ----------
    path : Path
        File to write or replace; its folder must exist.
    tensors : sequence of OutgoingTensor
        Names differ. Stored in order of descending element size, then by name, so that each is
        aligned to its elements.
    report : callable, optional
        Called with the numbers of tensors done and in total.
    metadata : mapping of str to str, optional
        Of the file.

    Raises
    ------
    InputError
        If what makes the bytes of a tensor raises it.
    """
    order = sorted(tensors, key=lambda tensor: (-tensor.element_bits, tensor.name))
    with new_file(path) as file:
        file.write(_header(order, metadata))
        for done, tensor in enumerate(order):
            report(done, len(order))
            start = file.tell()
            file.writelines(tensor.chunks())
            if file.tell() - start != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {file.tell() - start} bytes were made")
        report(len(order), len(order))


def _header(order: Sequence[OutgoingTensor], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in order:
        stop = position + tensor.nbytes
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
