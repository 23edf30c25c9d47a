"""Reading and writing files in the safetensors container, one tensor at a time.

The package ``safetensors`` writes only files all of whose tensors are in memory, and gives no
bytes of types that NumPy lacks; so files are read and written here, all of them, also models that
other programs made. :mod:`golden.container` says what a valid file is.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from golden.container import (
    Header,
    RawInfo,
    check_header_length,
    header_bytes,
    numpy_dtype,
    parse_header,
    storage_order,
)
from golden.errors import InputError

__all__ = [
    "ContainerFile",
    "OutgoingTensor",
    "array_bytes",
    "read_chunks",
    "start_container",
    "write_chunks",
]

_CHUNK_BYTES = 1 << 20


def read_chunks(file: BinaryIO, start: int, nbytes: int) -> Iterator[bytes]:
    """Bytes of a part of a file, at most 1 MiB at a time.

    Raises
    ------
    InputError
        If the file ends before.
    """
    stop = start + nbytes
    for position in range(start, stop, _CHUNK_BYTES):
        wanted = min(_CHUNK_BYTES, stop - position)
        file.seek(position)  # each time: the consumer may read elsewhere in between
        chunk = file.read(wanted)
        if len(chunk) != wanted:
            raise InputError(f"the file ends at byte {position + len(chunk)}, before byte {stop}")
        yield chunk


# --------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written.

    Attributes
    ----------
    name : str
    info : RawInfo
    chunks : callable
        Makes the bytes, little-endian, row-major, cut anywhere; called once, in its turn.
    """

    name: str
    info: RawInfo
    chunks: Callable[[], Iterable[bytes | memoryview]]

    def write_to(self, file: BinaryIO) -> None:
        """Write the bytes.

        Raises
        ------
        InputError
            If there can be no such tensor, or they are too many or too few.
        """
        write_chunks(file, self.info, self.chunks())


def write_chunks(file: BinaryIO, info: RawInfo, chunks: Iterable[bytes | memoryview]) -> None:
    """Write the bytes of one tensor, which must be as many as its type and shape say.

    Raises
    ------
    InputError
        If there can be no such tensor, or the bytes are too many or too few.
    """
    expected, nbytes = info.nbytes, 0
    for chunk in chunks:
        nbytes += memoryview(chunk).nbytes
        if nbytes > expected:
            break
        file.write(chunk)
    if nbytes != expected:
        size = f"{'more than ' * (nbytes > expected)}{min(nbytes, expected)}"
        raise InputError(f"field 'data': {size} bytes, {info.dtype} {info.shape} has {expected}")


def array_bytes(array: NDArray[Any]) -> memoryview:
    """Bytes of an array in row-major order and in its own byte order; no copy where possible."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def start_container(
    file: BinaryIO, metadata: Mapping[str, str], tensors: Iterable[OutgoingTensor]
) -> list[OutgoingTensor]:
    """Write the header of a file.

    Parameters
    ----------
    file : binary file, open for writing
    metadata : mapping of str to str
    tensors : iterable of OutgoingTensor
        Names differ.

    Returns
    -------
    order : list of OutgoingTensor
        As their bytes must follow now.

    Raises
    ------
    InputError
        See :func:`golden.container.header_bytes`.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    infos = {name: tensor.info for name, tensor in by_name.items()}
    order = storage_order(infos)
    file.write(header_bytes(metadata, {name: infos[name] for name in order}))
    return [by_name[name] for name in order]


# --------------------------------------------------------------------------------------- reading


class ContainerFile:
    """An open safetensors file whose header was checked; a context manager.

    Its errors do not name the file: whoever opens it knows what it should have been.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    metadata : dict of str to str
    entries : dict of str to Entry
        In the order of the header.

    Raises
    ------
    InputError
        If it is no regular file, or not valid.
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # anything else may block, such as a pipe
            raise InputError("not a regular file")
        self._file = path.open("rb")
        try:
            header, self._data_start = _read_header(self._file)
        except BaseException:
            self._file.close()
            raise
        self.metadata = header.metadata
        self.entries = header.entries

    def __enter__(self) -> "ContainerFile":
        """Return the open file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays valid."""
        self._file.close()

    def info(self, name: str) -> RawInfo:
        """Type and shape of a tensor."""
        return self.entries[name].info

    def read_bytes(self, name: str, index: int | None = None) -> NDArray[np.uint8]:
        """Bytes of a tensor, or of the part of it at ``index`` of its first axis, flat.

        Raises
        ------
        InputError
            If the file has become shorter.
        """
        start, nbytes = self._place(name, index)
        data = np.empty(nbytes, dtype=np.uint8)
        self._file.seek(start)
        filled = self._file.readinto(data.data)
        if filled != nbytes:
            raise InputError(f"the file ends after {filled} of {nbytes} bytes")
        return data

    def read_array(self, name: str, index: int | None = None) -> NDArray[Any]:
        """Tensor, or the part of it at ``index`` of its first axis, in its own NumPy type.

        Returns
        -------
        array : array of the tensor's shape, without the first axis if ``index`` is given
            In the byte order of this machine.

        Raises
        ------
        InputError
            If NumPy has no such type or shape, a BOOL is neither 0 nor 1, or the file has become
            shorter.
        """
        info = self.info(name)
        dtype = numpy_dtype(info.dtype)
        data = self.read_bytes(name, index)
        if info.dtype == "BOOL" and data.any() and int(data.max()) > 1:
            raise InputError("field 'data': a BOOL is neither 0 nor 1")
        values = data.view(dtype).astype(dtype.newbyteorder("="), copy=False)
        try:
            return values.reshape(info.shape if index is None else info.shape[1:])
        except ValueError as error:  # an empty tensor may be longer along an axis than NumPy allows
            raise InputError(f"field 'shape': {error}") from error

    def chunks(self, name: str) -> Iterator[bytes]:
        """Bytes of a tensor, at most 1 MiB at a time.

        Raises
        ------
        InputError
            If the file has become shorter.
        """
        return read_chunks(self._file, *self._place(name, None))

    def _place(self, name: str, index: int | None) -> tuple[int, int]:
        """First byte in the file, and number of bytes."""
        entry = self.entries[name]
        if index is None:
            return self._data_start + entry.start, entry.nbytes
        nbytes = entry.nbytes // entry.info.shape[0]
        return self._data_start + entry.start + index * nbytes, nbytes


def _read_header(file: BinaryIO) -> tuple[Header, int]:
    """Header of a file, and the position of its first data byte."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise InputError(f"header: the file has {size} bytes, the header length alone takes 8")
    length = int.from_bytes(file.read(8), "little")
    check_header_length(length, size - 8)
    start = 8 + length
    return parse_header(file.read(length), size - start), start
