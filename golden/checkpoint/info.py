"""What a checkpoint says about a quantized tensor, and what it holds of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.corrections import Corrections, corrected
from golden.errors import InputError
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor, decode

__all__ = ["QuantizedInfo", "SourceInfo", "StoredTensor", "located_corrections", "reconstruct"]


@dataclass(frozen=True)
class SourceInfo:
    """Which part of a tensor of the model a quantized matrix is.

    Attributes
    ----------
    tensor : str
        Name of the model's tensor.
    index : int or None
        Position of the matrix along the tensor's first axis; None if it is the whole tensor.
    count : int or None
        Length of that axis; None with `index`.
    transposed : bool
        Whether the model holds the matrix as [inputs, outputs].
    """

    tensor: str
    index: int | None
    count: int | None
    transposed: bool

    @property
    def name(self) -> str:
        """Name that the quantized matrix must have."""
        return self.tensor if self.index is None else f"{self.tensor}[{self.index}]"

    def model_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the model's tensor whose matrix has ``shape`` = (outputs, inputs)."""
        matrix = shape[::-1] if self.transposed else shape
        return matrix if self.count is None else (self.count, *matrix)


@dataclass(frozen=True)
class QuantizedInfo:
    """What the header says about a quantized tensor.

    Attributes
    ----------
    format : QuantFormat
    shape : tuple of int
        (rows, columns).
    layer_exponent : int
        f, in range(-128, 128).
    source_dtype : str
        Type of the weights before quantization, such as ``"BF16"`` or ``"Q4_1"``.
    source : SourceInfo or None
        None if the model's tensor of this name is the matrix as it is.
    """

    format: QuantFormat
    shape: tuple[int, int]
    layer_exponent: int
    source_dtype: str
    source: SourceInfo | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A quantized tensor as read.

    Attributes
    ----------
    tensor : QuantizedTensor
        The dense part.
    corrections : Corrections or None
        The sparse part.
    """

    tensor: QuantizedTensor
    corrections: Corrections | None


def reconstruct(stored: StoredTensor) -> NDArray[np.float32]:
    """Weights that the stored tensor stands for: exact dense values plus sparse corrections.

    Returns
    -------
    weights : float32 array, shape (rows, columns)

    Raises
    ------
    InputError
        If a value is outside float32's range (see :func:`golden.tensor.decode` and
        :meth:`golden.corrections.Corrections.add_to`).
    """
    dense = decode(stored.tensor)
    with located_corrections():
        return corrected(dense, stored.corrections)


@contextmanager
def located_corrections() -> Iterator[None]:
    """Name the stored field in every input error of the block, which begins with a part's name."""
    try:
        yield
    except InputError as error:
        part, _, problem = str(error).partition(": ")
        raise InputError(f"field 'corrections.{part}': {problem}") from error
