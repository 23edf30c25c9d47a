"""What is known of a model's tensors before a weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from golden.checkpoint import QuantizedInfo, SourceInfo

__all__ = ["Matrix", "RawTensor", "TensorInfo"]


@dataclass(frozen=True)
class TensorInfo:
    """What the header of the file says about one tensor.

    Attributes
    ----------
    name : str
        Name of the tensor, unique in its file.
    shape : tuple of int
        NumPy order: ``(N, K)`` for a matrix of N rows (outputs) and K columns (inputs).
    source_type : str
        How the file stores the values, such as ``"Q4_1"``, ``"F32"`` or ``"BF16"``.
    bits : int
        Bits that the file takes for it, with the scales of its blocks.
    raw_bits : int
        Bits that a checkpoint takes for it if it is left as it came.
    raw_type : str or None
        Type of the safetensors format that it has there; None if it cannot be stored so.
    unreadable : str
        Why its values cannot become float32; empty if they can.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    bits: int = field(default=0, compare=False)
    raw_bits: int = field(default=0, compare=False)
    raw_type: str | None = field(default=None, compare=False)
    unreadable: str = field(default="", compare=False)

    @property
    def weights(self) -> int:
        """Number of its values."""
        return prod(self.shape)


class RawTensor(NamedTuple):
    """A tensor as a file stores it.

    Attributes
    ----------
    dtype : str
        Type name of the safetensors format, such as ``"BF16"``.
    shape : tuple of int
    chunks : iterator of bytes
        Its bytes, little-endian, row-major, in one or more parts; to be used once.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: Iterator[bytes | memoryview]


@dataclass(frozen=True)
class Matrix:
    """A matrix to quantize: a tensor, a slice of a stacked tensor, or the transpose of either.

    Attributes
    ----------
    name : str
        Name in the checkpoint and in a calibration: that of the tensor, or ``"tensor[3]"``.
    tensor : str
        Tensor of the file.
    index : int or None
        Position along the tensor's first axis; None if the matrix is the whole tensor.
    count : int or None
        Length of that axis; None with `index`.
    transposed : bool
        Whether the file holds [inputs, outputs].
    shape : tuple of int
        (outputs, inputs): that of W in y = W x.
    source_type : str
        As that of the tensor.
    """

    name: str
    tensor: str
    index: int | None
    count: int | None
    transposed: bool
    shape: tuple[int, int]
    source_type: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def source(self) -> SourceInfo | None:
        """What the checkpoint says about where the matrix lies in the model."""
        if self.index is None and not self.transposed:
            return None
        return SourceInfo(self.tensor, self.index, self.count, self.transposed)

    @staticmethod
    def of_tensor(info: TensorInfo, *, transposed: bool) -> tuple["Matrix", ...]:
        """Matrices of a tensor of two axes, or of three of which the first counts them."""
        outputs, inputs = info.shape[-2:]
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        kind = info.source_type
        if len(info.shape) == 2:
            return (Matrix(info.name, info.name, None, None, transposed, shape, kind),)
        count = info.shape[0]
        return tuple(
            Matrix(f"{info.name}[{index}]", info.name, index, count, transposed, shape, kind)
            for index in range(count)
        )

    @staticmethod
    def of_checkpoint(name: str, info: QuantizedInfo) -> "Matrix":
        """Matrix of the model that an entry of a checkpoint was made of."""
        if info.source is None:
            return Matrix(name, name, None, None, False, info.shape, info.source_dtype)
        source = info.source
        place = (source.tensor, source.index, source.count, source.transposed)
        return Matrix(name, *place, info.shape, info.source_dtype)
