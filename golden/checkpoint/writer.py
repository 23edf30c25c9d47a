"""Writing a checkpoint, tensor by tensor, completely or not at all."""

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from golden.checkpoint.info import QuantizedInfo, SourceInfo
from golden.checkpoint.layout import check_codes, field_arrays, field_infos
from golden.checkpoint.metadata import METADATA_KEY, describe_tensor, new_metadata
from golden.checkpoint.names import (
    check_slices,
    check_source,
    check_source_dtype,
    check_tensor_name,
    claimed_names,
)
from golden.checkpoint.reader import Checkpoint
from golden.container import Entry, RawInfo, header_bytes
from golden.container_file import OutgoingTensor, read_chunks, start_container, write_chunks
from golden.corrections import Corrections
from golden.errors import InputError, located
from golden.new_file import new_file
from golden.strict_json import canonical_json, shown
from golden.tensor import QuantizedTensor

__all__ = ["CheckpointWriter", "check_header"]


def check_header(
    config: Mapping[str, object],
    calibration: Mapping[str, object] | None,
    matrices: Mapping[str, QuantizedInfo],
    raw: Mapping[str, RawInfo],
    *,
    sparse: bool,
) -> None:
    """Refuse a model whose header would be too long for a checkpoint, before it is quantized.

    Parameters
    ----------
    config, calibration
        As for :class:`CheckpointWriter`.
    matrices : mapping of str to QuantizedInfo
    raw : mapping of str to RawInfo
    sparse : bool
        Whether the matrices will have corrections.

    Raises
    ------
    InputError
        If the header has too many bytes or values.
    """
    metadata = new_metadata(config, calibration)
    infos = dict(raw)
    for name, info in matrices.items():
        metadata["tensors"][name] = describe_tensor(info)
        fields = field_infos(info, prod(info.shape) if sparse else None)
        infos |= {f"{name}.{field}": of for field, of in fields.items()}
    header_bytes({METADATA_KEY: canonical_json(metadata)}, infos)


class CheckpointWriter:
    """Writes a checkpoint file; a context manager.

    Tensors may be added in any order: the bytes of the file depend on the content only. They are
    gathered in an unnamed file in the same folder and put into place at the end of the ``with``
    block, so the folder needs twice the size for a moment. If the block ends with an exception,
    nothing is left of it, and a file that was there before stays as it was.

    Parameters
    ----------
    path : str, Path or binary file
        File to write or replace, whose folder must exist; or an open file, to be written from where
        it stands and left open.
    config : mapping of str to JSON values
        How the model was quantized: at most 16 levels deep, finite numbers, integers of at most
        20 digits.
    calibration : mapping of str to JSON values, or None
        Summary of the calibration; None if there was none.

    Raises
    ------
    InputError
        If the path is a folder, or ``config`` or ``calibration`` is not JSON.
    """

    def __init__(
        self,
        path: str | Path | BinaryIO,
        config: Mapping[str, object],
        calibration: Mapping[str, object] | None = None,
    ) -> None:
        self._open_file = None if isinstance(path, (str, Path)) else path
        self.path = Path(path if isinstance(path, (str, Path)) else "(open file)")
        if self.path.is_dir():
            raise InputError(f"{self.path}: is a directory")
        with located(str(self.path)):
            self._metadata = new_metadata(config, calibration)
        self._entries: dict[str, Entry] = {}
        self._claimed: set[str] = set()
        self._infos: dict[str, QuantizedInfo] = {}
        self._gathered: BinaryIO | None = None

    def __enter__(self) -> "CheckpointWriter":
        """Start gathering tensors."""
        if self._open_file is None:
            self._gathered = tempfile.TemporaryFile(dir=self.path.parent)
        else:
            self._gathered = io.BytesIO()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the file into place, or drop everything if the block failed."""
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return
        with gathered:
            if kind is None:
                with located(str(self.path)):
                    check_slices(self._infos, self._claimed)
                self._assemble(gathered)

    def add(
        self,
        name: str,
        tensor: QuantizedTensor,
        corrections: Corrections | None,
        source_dtype: str,
        source: SourceInfo | None = None,
    ) -> None:
        """Add a quantized tensor.

        Parameters
        ----------
        name : str
            Name of the tensor in the model.
        tensor : QuantizedTensor
        corrections : Corrections or None
            An empty one is stored and read back as an empty one.
        source_dtype : str
            Type of the weights before quantization: letters, digits and ``_``.
        source : SourceInfo or None
            Where the matrix lies in the model, if not as it is under its own name.

        Raises
        ------
        InputError
            If the name or that of a field is taken, the corrections have another shape, or a code
            is NaN or reserved; nothing is added then.
        """
        info = QuantizedInfo(
            tensor.format, tensor.shape, tensor.layer_exponent, source_dtype, source
        )
        with self._errors_at(name):
            self._check_new(name, info)
            check_codes(tensor)
            if corrections is not None and corrections.shape != tensor.shape:
                raise InputError(
                    f"corrections: shape {corrections.shape}, the tensor has {tensor.shape}"
                )
        layout = field_infos(info, None if corrections is None else corrections.entries)
        arrays = field_arrays(tensor, corrections)
        self._add_fields(name, info, ((at, layout[at], [array.data]) for at, array in arrays))

    def copy(self, checkpoint: Checkpoint, name: str, source: SourceInfo | None = None) -> None:
        """Add a quantized tensor of another checkpoint as the bytes that are stored there.

        Codes are not looked at: those of a damaged file are found by who reads the new one.

        Parameters
        ----------
        checkpoint : Checkpoint
            Open.
        name : str
            Name of the tensor there and here.
        source : SourceInfo or None
            As for :meth:`add`; that of the other checkpoint is not kept.

        Raises
        ------
        InputError
            If the name or that of a field is taken, there is no such tensor, or the other file has
            become shorter; nothing is added then.
        """
        info = replace(checkpoint.info(name), source=source)
        with self._errors_at(name):
            self._check_new(name, info)
        fields = checkpoint.fields(name).items()
        self._add_fields(
            name, info, ((at, of, checkpoint.field_chunks(name, at)) for at, of in fields)
        )

    def _check_new(self, name: str, info: QuantizedInfo) -> None:
        """Refuse a tensor whose names are taken, or whose facts a file cannot hold."""
        self._check_free(claimed_names(name))
        check_source_dtype(info.source_dtype)
        check_source(name, info.source)

    def _add_fields(
        self,
        name: str,
        info: QuantizedInfo,
        fields: Iterable[tuple[str, RawInfo, Iterable[bytes | memoryview]]],
    ) -> None:
        """Gather the bytes of all fields of a tensor, and then note that it is there."""
        added = {f"{name}.{field}": self._gather(of, chunks) for field, of, chunks in fields}
        self._entries |= added
        self._claimed.update(claimed_names(name))
        self._metadata["tensors"][name] = describe_tensor(info)
        self._infos[name] = info

    def add_raw(
        self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[bytes | memoryview]
    ) -> None:
        """Add a tensor that is stored as it came.

        Parameters
        ----------
        name : str
            Name of the tensor in the model.
        dtype : str
            Type name of the safetensors format.
        shape : tuple of int
        chunks : iterable of bytes
            The values, little-endian, row-major; cut anywhere.

        Raises
        ------
        InputError
            If the name is taken, there is no such type or shape, or the chunks have another length
            in total; nothing is added then.
        """
        with self._errors_at(name):
            self._check_free((name,))
            self._entries[name] = self._gather(RawInfo(dtype, tuple(shape)), chunks)
        self._claimed.add(name)

    @contextmanager
    def _errors_at(self, name: str) -> Iterator[None]:
        with located(f"{self.path}: tensor {shown(name)}"):
            yield

    def _check_free(self, names: tuple[str, ...]) -> None:
        for name in names:
            check_tensor_name(name)
            if name in self._claimed:
                raise InputError(f"name {shown(name)} is taken by another tensor or its fields")

    def _gather(self, info: RawInfo, chunks: Iterable[bytes | memoryview]) -> Entry:
        if self._gathered is None:
            raise ValueError(f"{self.path}: tensors can be added inside the `with` block only")
        start = self._gathered.tell()
        write_chunks(self._gathered, info, chunks)
        return Entry(info, start, info.nbytes)

    def _assemble(self, gathered: BinaryIO) -> None:
        metadata = {METADATA_KEY: canonical_json(self._metadata)}
        tensors = [
            OutgoingTensor(name, one.info, partial(read_chunks, gathered, one.start, one.nbytes))
            for name, one in self._entries.items()
        ]
        opened = new_file(self.path) if self._open_file is None else nullcontext(self._open_file)
        with opened as file, located(str(self.path)):
            for tensor in start_container(file, metadata, tensors):
                tensor.write_to(file)
