"""What a model's linear layers see: statistics of their inputs over a text, and their file.

For an input channel k of a layer, over the T tokens of the text, in float64:

* channel norm ``c[k] = sqrt(sum_t x[t, k]**2 / T)``, the root mean square;
* second moment ``H[j, k] = sum_t x[t, j] * x[t, k] / T``, whose diagonal is ``c**2``.

Layers that read the same input (query, key and value; gate and up) share one copy. The file is
described in ``docs/calibration.md``. Reading it needs NumPy only; gathering needs the extra
``llm``.
"""

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from golden.errors import InputError
from sop.torch_model import TorchModel, require

__all__ = [
    "Calibration",
    "CalibrationRun",
    "Text",
    "calibrate_model",
    "default_text",
    "read_text",
]

FORMAT_VERSION = 1
_METADATA_KEY = "sop_calibration"
_PARTIAL_KEY = "sop_calibration_partial"
_NORMS = ".channel_norms"
_MOMENT = ".second_moment"
_SQUARES = ".sum_of_squares"  # in partial files
_PRODUCTS = ".sum_of_products"
_SAVE_EVERY = 8  # windows between two saves of a partial file
_MAX_REASON = 300  # characters of another program's message that an error quotes
_COMPUTING_PACKAGES = ("numpy", "torch", "transformers")
# The second moment is rounded to float32: relative error of its diagonal against c**2.
_DIAGONAL_TOLERANCE = 2.0**-22

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class CalibrationRun:
    """What the statistics were gathered from; two equal runs give equal statistics.

    Attributes
    ----------
    model, text : str
        Names for people; not compared.
    model_sha256, text_sha256 : str
        Hashes of the model's files and of the UTF-8 text, hexadecimal.
    skip_tokens, tokens, window : int
        The tokens ``skip_tokens <= t < skip_tokens + tokens`` of the text, in windows of `window`
        tokens that start without context; the last may be shorter.
    second_moment : bool
        Whether second moments were gathered too.
    software : str
        Versions of what computes, and the number of threads, all of which sway the last bits.
    """

    model: str = field(compare=False)
    model_sha256: str
    text: str = field(compare=False)
    text_sha256: str
    skip_tokens: int
    tokens: int
    window: int
    second_moment: bool
    software: str


# ------------------------------------------------------------------------------------------ reader


class Calibration:
    """A calibration file, checked on opening; its arrays are read when asked for.

    Parameters
    ----------
    path : str or Path
        A file that `sop calibrate` wrote.

    Attributes
    ----------
    path : Path
        The file.
    run : CalibrationRun
        What the statistics were gathered from.
    layers : Mapping of str to str
        For the name of every layer's weight, the name of the layer whose statistics it shares,
        which may be its own.

    Raises
    ------
    InputError
        If it is not such a file, or any part of its header breaks the format; the message names
        the file and the tensor or field.
    """

    run: CalibrationRun
    layers: Mapping[str, str]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = _Header(self.path)
        self.run, layers = header.description(_METADATA_KEY)
        self.layers = MappingProxyType(layers)
        header.check_tensors(
            {
                key: (dtype, rank)
                for leader in set(layers.values())
                for key, dtype, rank in _stored_tensors(leader, self.run.second_moment)
            }
        )

    def channel_norms(self, name: str) -> Float64:
        """Root mean square of every input channel of a layer.

        Parameters
        ----------
        name : str
            Name of the layer's weight, such as ``"blk.3.attn_q.weight"``.

        Returns
        -------
        norms : float64 array, shape (columns,)
            At least 0, finite; in the unit of the activations.

        Raises
        ------
        InputError
            If the file has no such layer, or a value is negative or not finite.
        """
        key = self._leader(name) + _NORMS
        norms: Float64 = _read_tensor(self.path, key)
        good = np.isfinite(norms) & (norms >= 0)
        if not good.all():
            position = int(np.argmin(good))
            problem = f"channel {position} is {norms[position]}, expected a finite number from 0"
            raise InputError(f"{self.path}: tensor {key!r}: {problem}")
        return norms

    def second_moment(self, name: str) -> Float64 | None:
        """Mean over tokens of the outer product of the layer's input with itself.

        Parameters
        ----------
        name : str
            Name of the layer's weight.

        Returns
        -------
        moment : float64 array, shape (columns, columns), or None
            Symmetric, positive semidefinite but for its rounding to float32 in the file, diagonal
            ``channel_norms(name)**2``; None if second moments were not gathered.

        Raises
        ------
        InputError
            If the file has no such layer, or the matrix is not finite, not symmetric or does not
            fit the channel norms.
        """
        norms = self.channel_norms(name)
        if not self.run.second_moment:
            return None
        key = self._leader(name) + _MOMENT
        moment = _read_tensor(self.path, key).astype(np.float64)
        problem = _moment_problem(moment, norms)
        if problem:
            raise InputError(f"{self.path}: tensor {key!r}: {problem}")
        return moment

    def _leader(self, name: str) -> str:
        if name not in self.layers:
            near = get_close_matches(name, self.layers, n=3) or list(self.layers)[:3]
            some = ", ".join(map(repr, near))
            raise InputError(f"{self.path}: tensor {name!r}: not calibrated here, but {some} are")
        return self.layers[name]


def _stored_tensors(leader: str, second_moment: bool) -> list[tuple[str, str, int]]:
    norms = (leader + _NORMS, "F64", 1)
    return [norms, (leader + _MOMENT, "F32", 2)] if second_moment else [norms]


def _moment_problem(moment: Float64, norms: Float64) -> str:
    if moment.shape != (norms.size, norms.size):
        return f"shape {moment.shape}, but there are {norms.size} channel norms"
    if not np.isfinite(moment).all():
        return "a value is not finite"
    if not np.array_equal(moment, moment.T):
        return "not symmetric"
    expected = norms * norms
    # A square below float32's normal range is rounded more coarsely.
    allowed = _DIAGONAL_TOLERANCE * expected + float(np.finfo(np.float32).tiny)
    if (np.abs(np.diagonal(moment) - expected) > allowed).any():
        return "the diagonal differs from the squared channel norms"
    return ""


def _open(path: Path) -> Any:
    opener: Any = safetensors.safe_open  # its stubs are not annotated
    try:
        return opener(str(path), framework="numpy")
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise InputError(f"{path}: not a valid safetensors file: {reason}") from error


def _read_tensor(path: Path, key: str) -> NDArray[Any]:
    with _open(path) as file:
        return file.get_tensor(key)


class _Header:
    """Metadata and tensor table of a calibration file or partial file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open(path) as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
            for key in file.offset_keys():
                part = file.get_slice(key)
                self.tensors[key] = (part.get_dtype(), tuple(part.get_shape()))

    def error(self, name: str, problem: str) -> InputError:
        """Return the error for a field of the description."""
        return InputError(f"{self.path}: field {name!r}: {problem}")

    def description(self, key: str) -> tuple[CalibrationRun, dict[str, str]]:
        """Parse the JSON under `key`: the run, and `layers` as in :class:`Calibration`."""
        if key not in self.metadata:
            raise self.error(key, "not in the metadata; this is not such a calibration file")
        try:
            values = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise self.error(key, "not valid JSON") from error
        if not isinstance(values, dict):
            raise self.error(key, "not a JSON object")
        version = values.pop("version", None)
        if version != FORMAT_VERSION or isinstance(version, bool):
            problem = f"{version!r} is not supported, expected {FORMAT_VERSION}"
            raise self.error("version", problem)
        layers = self._layers(values.pop("layers", None))
        return self._run(values), layers

    def _run(self, values: dict[str, Any]) -> CalibrationRun:
        types: dict[str, Any] = {entry.name: entry.type for entry in fields(CalibrationRun)}
        for name in values.keys() ^ types.keys():
            raise self.error(name, "missing" if name in types else "unknown")
        for name, value in values.items():
            if type(value) is not types[name]:
                raise self.error(name, f"expected {types[name].__name__}, got {value!r:.80}")
        run = CalibrationRun(**values)
        for name, least in (("skip_tokens", 0), ("tokens", 1), ("window", 1)):
            if values[name] < least:
                raise self.error(name, f"must be at least {least}, not {values[name]}")
        return run

    def _layers(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not value:
            raise self.error("layers", "expected a JSON object with at least one layer")
        for name, leader in value.items():
            if not isinstance(leader, str) or value.get(leader) != leader:
                problem = f"layer {name[:80]!r} refers to {leader!r:.80}, which has no statistics"
                raise self.error("layers", problem)
        return value

    def check_tensors(self, expected: Mapping[str, tuple[str, int]]) -> None:
        """Refuse other tensors than `expected`: keys with dtype and rank; matrices are square."""
        for key in sorted(self.tensors.keys() ^ expected.keys()):
            problem = "missing" if key in expected else "unknown"
            raise InputError(f"{self.path}: tensor {key!r}: {problem}")
        for key, (dtype, rank) in expected.items():
            found, shape = self.tensors[key]
            if found != dtype:
                problem = f"field 'dtype': {found}, expected {dtype}"
                raise InputError(f"{self.path}: tensor {key!r}: {problem}")
            if len(shape) != rank or len(set(shape)) != 1 or not shape[0]:
                kind = "(columns,)" if rank == 1 else "(columns, columns)"
                problem = f"field 'shape': {shape}, expected {kind}"
                raise InputError(f"{self.path}: tensor {key!r}: {problem}")


# ------------------------------------------------------------------------------------------ writer


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        safetensors.numpy.save_file(dict(arrays), temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _description(run: CalibrationRun, layers: Mapping[str, str]) -> str:
    return json.dumps({"version": FORMAT_VERSION, **asdict(run), "layers": dict(layers)})


class _Sums:
    """Sums over the tokens so far, in float64, per layer whose statistics are stored.

    Parameters
    ----------
    columns : Mapping of str to int
        Input channels of each of these layers.
    second_moment : bool
        Whether to sum products too.
    """

    def __init__(self, columns: Mapping[str, int], second_moment: bool) -> None:
        self.windows = 0
        self.arrays: dict[str, Float64] = {}
        self.second_moment = second_moment
        for name, count in columns.items():
            self.arrays[name + _SQUARES] = np.zeros(count)
            if second_moment:
                self.arrays[name + _PRODUCTS] = np.zeros((count, count))

    def add(self, name: str, x: Float64) -> None:
        """Add the inputs of one window, shape (tokens, columns)."""
        squares = np.square(x).sum(axis=0)
        if not np.isfinite(squares).all():
            raise InputError(f"tensor {name!r}: its input is not finite in window {self.windows}")
        self.arrays[name + _SQUARES] += squares
        if self.second_moment:
            # NumPy computes a matrix times its transpose as a symmetric product (BLAS syrk).
            self.arrays[name + _PRODUCTS] += x.T @ x

    def statistics(self, name: str, tokens: int) -> dict[str, NDArray[Any]]:
        """What the calibration file stores for one layer."""
        stored: dict[str, NDArray[Any]] = {
            name + _NORMS: np.sqrt(self.arrays[name + _SQUARES] / tokens)
        }
        if self.second_moment:
            moment = self.arrays[name + _PRODUCTS] / tokens
            # Exactly symmetric whatever BLAS does.
            stored[name + _MOMENT] = ((moment + moment.T) / 2).astype(np.float32)
        return stored

    def save(self, path: Path, description: str) -> None:
        """Write a partial file."""
        metadata = {_PARTIAL_KEY: description, "windows": str(self.windows)}
        _write(path, self.arrays, metadata)

    def resume(self, path: Path, run: CalibrationRun, layers: Mapping[str, str]) -> None:
        """Go on from a partial file of an equal run; refuse any other."""
        header = _Header(path)
        found, found_layers = header.description(_PARTIAL_KEY)
        for entry in fields(CalibrationRun):
            then, now = getattr(found, entry.name), getattr(run, entry.name)
            if entry.compare and then != now:
                problem = f"was {then!r} when this run was interrupted, is {now!r} now"
                raise header.error(entry.name, f"{problem}; delete the file to start afresh")
        if found_layers != layers:
            raise header.error("layers", "not those of the model")
        header.check_tensors({key: ("F64", array.ndim) for key, array in self.arrays.items()})
        for key, array in self.arrays.items():
            if header.tensors[key][1] != array.shape:
                problem = f"field 'shape': {header.tensors[key][1]}, expected {array.shape}"
                raise InputError(f"{path}: tensor {key!r}: {problem}")
        windows, total = header.metadata.get("windows", ""), _window_count(run)
        if windows not in map(str, range(1, total)):
            raise header.error("windows", f"{windows!r:.80} is not in 1..{total - 1}")
        self.windows = int(windows)
        self.arrays = safetensors.numpy.load_file(path)


# --------------------------------------------------------------------------------------- gathering


@dataclass(frozen=True)
class Text:
    """A text to run a model over, with a name for people."""

    name: str
    content: str


def read_text(path: Path) -> Text:
    """Text of a UTF-8 file, under the name of the file.

    Raises
    ------
    InputError
        If it is not UTF-8.
    OSError
        If it cannot be read.
    """
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error


def default_text() -> Text:
    """English prose that comes with every CPython: the topics of its `help`.

    The topics are sorted by key and joined by blank lines. Other versions of Python have other
    prose, hence another hash.
    """
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[key] for key in sorted(topics))
    return Text("pydoc_data.topics", prose)


def _window_count(run: CalibrationRun) -> int:
    return -(-run.tokens // run.window)


def _software() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _COMPUTING_PACKAGES]
    return ", ".join([*versions, f"{require('torch').get_num_threads()} threads"])


def _shared_inputs(model: TorchModel) -> dict[str, str]:
    """For every layer, the first one that gets the same input; found by running one token."""
    leaders: dict[str, str] = {}
    last: tuple[str, Any] = ("", None)

    def observe(name: str, x: Any) -> None:
        nonlocal last
        if x is not last[1]:
            last = (name, x)
        leaders[name] = last[0]

    with model.watching(list(model.linears), observe):
        model.run(np.zeros(1, dtype=np.int64))
    for name in model.linears:
        if name not in leaders:
            raise InputError(f"{model.path}: tensor {name!r}: the model does not use this layer")
    return {name: leaders[name] for name in model.linears}


def calibrate_model(
    model: TorchModel,
    text: Text,
    path: Path,
    *,
    tokens: int,
    window: int,
    skip_tokens: int,
    second_moment: bool,
    on_window: Callable[[int, int], None] = lambda done, total: None,
    save_every: int = _SAVE_EVERY,
) -> Calibration:
    """Run a model over a text and write statistics of the inputs of its linear layers.

    Every `save_every` windows the sums so far go to the file `path` with ``.partial`` appended. If
    that file exists at the start and is of an equal run, this one continues from it, with the same
    result as an unbroken run.

    Parameters
    ----------
    model : TorchModel
    text : Text
    path : Path
        The file to write, whole or not at all; an older file is replaced.
    tokens : int
        Use at most this many tokens, fewer if the text ends.
    window : int
        Tokens that the model sees together.
    skip_tokens : int
        Leave out this many tokens at the start of the text.
    second_moment : bool
        Gather second moments too, which takes 8 bytes of memory per square of input channels.
    on_window : callable
        Gets the numbers of windows done and in all: at the start and after each window.
    save_every : int
        Windows between two saves.

    Returns
    -------
    Calibration
        The file just written, opened.

    Raises
    ------
    InputError
        If a setting is out of range, the text is too short, a window is longer than the model
        allows, an input is not finite, a partial file is of another run, or `path` is a file of
        another kind.
    OSError
        If a file cannot be written.
    """
    _check_settings(model, path, tokens=tokens, window=window, skip_tokens=skip_tokens)
    every = model.encode(text.content)
    ids = every[skip_tokens : skip_tokens + tokens]
    if not ids.size:
        problem = f"has {every.size} tokens, so none are left after skipping {skip_tokens}"
        raise InputError(f"{text.name}: {problem}")
    run = CalibrationRun(
        model=model.path.resolve().name,
        model_sha256=model.sha256,
        text=text.name,
        text_sha256=hashlib.sha256(text.content.encode()).hexdigest(),
        skip_tokens=skip_tokens,
        tokens=int(ids.size),
        window=window,
        second_moment=second_moment,
        software=_software(),
    )
    layers = _shared_inputs(model)
    leaders = [name for name, leader in layers.items() if name == leader]
    sums = _Sums({name: model.linears[name].in_features for name in leaders}, second_moment)
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        sums.resume(partial, run, layers)
    description = _description(run, layers)
    total = _window_count(run)
    on_window(sums.windows, total)
    while sums.windows < total:
        _add_window(model, leaders, ids[sums.windows * window :][:window], sums)
        if sums.windows % save_every == 0 and sums.windows < total:
            sums.save(partial, description)
        on_window(sums.windows, total)
    stored: dict[str, NDArray[Any]] = {}
    for name in leaders:
        stored |= sums.statistics(name, run.tokens)
    _write(path, stored, {_METADATA_KEY: description})
    partial.unlink(missing_ok=True)
    return Calibration(path)


def _check_settings(
    model: TorchModel, path: Path, *, tokens: int, window: int, skip_tokens: int
) -> None:
    settings = (("tokens", tokens, 1), ("window", window, 1), ("skip-tokens", skip_tokens, 0))
    for name, value, least in settings:
        if value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
    if window > model.context_length:
        limit = f"{model.path} was made for {model.context_length} tokens"
        raise InputError(f"--window {window} is too long: {limit}")
    # A slip of the hand must not cost the weights of a model, which have the same suffix.
    if path.exists() and _METADATA_KEY not in _Header(path).metadata:
        raise InputError(f"{path}: exists and is not a calibration file, so it is not replaced")


def _add_window(model: TorchModel, leaders: list[str], ids: NDArray[np.int64], sums: _Sums) -> None:
    def observe(name: str, x: Any) -> None:
        inputs = x.double().numpy().reshape(-1, x.shape[-1])
        if inputs.shape[0] != ids.size:
            problem = f"sees {inputs.shape[0]} of {ids.size} tokens, which is not supported"
            raise InputError(f"{model.path}: tensor {name!r}: {problem}")
        sums.add(name, inputs)

    with model.watching(leaders, observe):
        model.run(ids)
    sums.windows += 1
