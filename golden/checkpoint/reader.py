"""Reading a checkpoint: the whole header on opening, then one tensor at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from golden.checkpoint.info import QuantizedInfo, StoredTensor
from golden.checkpoint.layout import CORRECTION_FIELDS, FIELDS, field_infos, tensor_of_fields
from golden.checkpoint.metadata import read_metadata, read_tensor_info
from golden.checkpoint.names import (
    check_slices,
    check_tensor_name,
    claimed_names,
    matrices_of_tensors,
)
from golden.container import RawInfo
from golden.container_file import ContainerFile
from golden.errors import InputError, located
from golden.strict_json import shown

__all__ = ["Checkpoint"]


def _claim_fields(
    name: str, info: QuantizedInfo, infos: Mapping[str, RawInfo], claimed: set[str]
) -> dict[str, RawInfo]:
    """Fields of one tensor, each of the type and shape that it must have."""
    names = claimed_names(name)
    for other in names:
        if other in claimed:
            raise InputError(f"name {shown(other)} is also of another quantized tensor")
    claimed.update(names)
    if name in infos:
        raise InputError(f"name {shown(name)} is stored quantized and as it came")
    present = {field: infos[f"{name}.{field}"] for field in FIELDS if f"{name}.{field}" in infos}
    values = next(
        (present[field] for field in reversed(CORRECTION_FIELDS) if field in present), None
    )
    layout = field_infos(info, None if values is None else prod(values.shape))
    for field in FIELDS:
        if (field in layout) != (field in present):
            problem = "is missing" if field in layout else f"{info.format.name} has no such field"
            raise InputError(f"field {field!r}: {problem}")
        if field in layout and present[field] != layout[field]:
            has, needs = present[field], layout[field]
            raise InputError(
                f"field {field!r}: {has.dtype} {list(has.shape)}, expected {needs.dtype} "
                f"{list(needs.shape)}"
            )
    return present


class Checkpoint:
    """An open checkpoint file; use it as a context manager, or call :meth:`close`.

    Opening checks the whole header; each read checks the tensor that it reads, and reads no other.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    path : Path
    config : dict
        How the model was quantized.
    config_hash : str
        :func:`config_hash` of it.
    calibration : dict or None

    Raises
    ------
    InputError
        If the file is not a valid checkpoint; the message names file, tensor and field.
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            problem = "no such file" + " (not a regular file)" * self.path.exists()
            raise InputError(f"{self.path}: {problem}")
        with located(str(self.path)):
            self._file = ContainerFile(self.path)
            try:
                self._check()
            except BaseException:
                self._file.close()
                raise

    def _check(self) -> None:
        metadata = read_metadata(self._file.metadata)
        stored = {name: entry.info for name, entry in self._file.entries.items()}
        for name in stored:
            with located(f"tensor {shown(name)}"):
                check_tensor_name(name)
        claimed: set[str] = set()
        self._infos: dict[str, QuantizedInfo] = {}
        self._fields: dict[str, dict[str, RawInfo]] = {}
        for name, value in sorted(metadata["tensors"].items()):
            with located(f"tensor {shown(name)}"):
                self._infos[name] = read_tensor_info(name, value)
                self._fields[name] = _claim_fields(name, self._infos[name], stored, claimed)
        check_slices(self._infos, stored.keys() | claimed)
        self._model_tensors = matrices_of_tensors(self._infos)
        self._raw = {name: stored[name] for name in sorted(stored.keys() - claimed)}
        self.config: dict[str, Any] = metadata["config"]
        self.config_hash: str = metadata["config_hash"]
        self.calibration: dict[str, Any] | None = metadata["calibration"]

    def __enter__(self) -> "Checkpoint":
        """Return the open checkpoint."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays valid."""
        self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantized tensors, sorted."""
        return tuple(self._infos)

    @property
    def model_tensors(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the model's tensors that are quantized, sorted, and of the matrices of each.

        A tensor has one matrix, or one for each index of its first axis, in this order.
        """
        return self._model_tensors

    @property
    def raw_names(self) -> tuple[str, ...]:
        """Names of the tensors that are stored as they came, sorted."""
        return tuple(self._raw)

    def info(self, name: str) -> QuantizedInfo:
        """Format, shape and source of a quantized tensor, without reading it."""
        return self._infos[self._known(name, self._infos)]

    def raw_info(self, name: str) -> RawInfo:
        """Type and shape of a raw tensor, without reading it."""
        return self._raw[self._known(name, self._raw)]

    def read(self, name: str) -> StoredTensor:
        """Read one quantized tensor.

        Raises
        ------
        InputError
            If there is no such tensor, a code is NaN or reserved, a LUT is not one, or corrections
            are not valid; the message names the field.
        """
        info, fields = self.info(name), self._fields[name]
        with self._errors_at(name):
            return tensor_of_fields(
                info, fields, lambda field: self._file.read_bytes(f"{name}.{field}")
            )

    def read_raw(self, name: str) -> NDArray[Any]:
        """Read one raw tensor as an array of its own type (bfloat16 is that of ``ml_dtypes``).

        Raises
        ------
        InputError
            If there is no such tensor, or NumPy has no such type (4-bit and 6-bit floats); use
            :meth:`raw_chunks` then.
        """
        self._known(name, self._raw)
        with self._errors_at(name):
            return self._file.read_array(name)

    def raw_chunks(self, name: str) -> Iterator[bytes]:
        """Bytes of one raw tensor, at most 1 MiB at a time."""
        self._known(name, self._raw)
        with self._errors_at(name):
            yield from self._file.chunks(name)

    def fields(self, name: str) -> Mapping[str, RawInfo]:
        """Type and shape of each stored field of a quantized tensor (docs/checkpoint.md)."""
        return self._fields[self._known(name, self._fields)]

    def field_chunks(self, name: str, field: str) -> Iterator[bytes]:
        """Bytes of one field of a quantized tensor as stored, at most 1 MiB at a time."""
        self._known(name, self._fields)
        with self._errors_at(name), located(f"field {field!r}"):
            yield from self._file.chunks(f"{name}.{field}")

    def bits(self, name: str) -> int:
        """Bits that a tensor, quantized or raw, takes in the file (its data, not the header)."""
        if name in self._fields:
            return 8 * sum(field.nbytes for field in self._fields[name].values())
        return 8 * self._raw[self._known(name, self._raw)].nbytes

    @property
    def stored_bits_per_weight(self) -> Fraction:
        """Bits of all quantized tensors over their weights; corrections, LUTs, padding included.

        Raises
        ------
        InputError
            If no tensor is quantized.
        """
        weights = sum(prod(info.shape) for info in self._infos.values())
        if not weights:
            raise InputError(f"{self.path}: no tensor is quantized")
        return Fraction(sum(self.bits(name) for name in self._infos), weights)

    def _known(self, name: str, names: Mapping[str, object]) -> str:
        if name not in names:
            kind = "raw" if names is self._raw else "quantized"
            raise InputError(f"{self.path}: tensor {shown(name)}: no such {kind} tensor")
        return name

    @contextmanager
    def _errors_at(self, name: str) -> Iterator[None]:
        with located(f"{self.path}: tensor {shown(name)}"):
            yield
