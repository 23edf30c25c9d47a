"""What a model's linear layers see: statistics of their inputs over a text, and their file.

For an input channel k of a layer, over the T tokens of the text, in float64:

* channel norm ``c[k] = sqrt(sum_t x[t, k]**2 / T)``, the root mean square;
* second moment ``H[j, k] = sum_t x[t, j] * x[t, k] / T``, whose diagonal is ``c**2``.

Experts of a layer see only the tokens that are sent to them, and T counts those. Layers that read
the same input (query, key and value; gate and up) share one copy. The file is described in
``docs/calibration.md``. Reading it needs NumPy only; :mod:`sop.llm.gathering` makes it.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError, located
from golden.strict_json import json_object, parse_json
from sop.files.calibration_description import CalibrationDescription, CalibrationRun
from sop.files.safetensors_reader import open_container
from sop.shared.marks import CALIBRATION_KEY

__all__ = [
    "FEW_TOKENS",
    "MOMENT",
    "NORMS",
    "Calibration",
    "CalibrationHeader",
]

NORMS = ".channel_norms"
MOMENT = ".second_moment"

FEW_TOKENS = 256
"""Fewer tokens than this are warned of.

The mean square of T independent normal values has a relative standard error of sqrt(2 / T): 9 % at
256. Neighbouring tokens of a text are not independent and activations have longer tails, so in
practice it is worse.
"""

# The second moment is rounded to float32: relative error of its diagonal against c**2.
_DIAGONAL_TOLERANCE = 2.0**-22

Float64 = NDArray[np.float64]


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
    layer_tokens : Mapping of str to int
        How many tokens each layer saw; experts see those that are sent to them.
    uncovered : Mapping of str to str
        Layers that have no statistics though ``sop quantize`` takes them, and why.

    Raises
    ------
    InputError
        If it is not such a file, or any part of its header breaks the format; the message names
        the file and the tensor or field.
    """

    run: CalibrationRun
    layers: Mapping[str, str]
    layer_tokens: Mapping[str, int]
    uncovered: Mapping[str, str]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = CalibrationHeader(self.path)
        description = header.description(CALIBRATION_KEY)
        self.run, layers = description.run, description.layers
        tokens = description.layer_tokens or {}
        self.layers = MappingProxyType(dict(layers))
        self.layer_tokens = MappingProxyType({name: tokens[layers[name]] for name in layers})
        self.uncovered = MappingProxyType(dict(description.uncovered or {}))
        header.check_tensors(
            {
                key: (dtype, rank)
                for leader in set(layers.values())
                for key, dtype, rank in _stored_tensors(leader, self.run.second_moment)
            }
        )
        self._columns = {
            leader: header.tensors[leader + NORMS].shape[0] for leader in set(layers.values())
        }

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
        key = self._leader(name) + NORMS
        norms: Float64 = _read_tensor(self.path, key)
        good = np.isfinite(norms) & (norms >= 0)
        if not good.all():
            position = int(np.argmin(good))
            problem = f"channel {position} is {norms[position]}, expected a finite number from 0"
            raise InputError(f"{self.path}: tensor {key!r}: {problem}")
        return norms

    def known_norms(self, name: str) -> Float64 | None:
        """As :meth:`channel_norms`, or None without statistics: all channels count alike."""
        return self.channel_norms(name) if name in self.layers else None

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
        key = self._leader(name) + MOMENT
        moment = _read_tensor(self.path, key).astype(np.float64)
        problem = _moment_problem(moment, norms)
        if problem:
            raise InputError(f"{self.path}: tensor {key!r}: {problem}")
        return moment

    def check_model(self, path: Path, sha256: str) -> None:
        """Refuse a model whose weights have another :meth:`sop.files.models.Model.fingerprint`.

        Raises
        ------
        InputError
            Naming both.
        """
        if self.run.model_sha256 != sha256:
            raise InputError(
                f"{self.path}: field 'model_sha256': statistics of other weights than {path}: of a "
                f"model called {self.run.model}, {self.run.model_sha256[:12]}, not {sha256[:12]}"
            )

    def warnings(self) -> Iterator[str]:
        """What makes the statistics less than they seem, a sentence each."""
        if self.run.tokens < FEW_TOKENS:
            yield f"only {self.run.tokens:,} tokens: the statistics are those of a few words"
        else:
            few = [name for name, count in self.layer_tokens.items() if count < FEW_TOKENS]
            if few:
                least = min(few, key=self.layer_tokens.__getitem__)
                yield (
                    f"{_layers(len(few))} saw fewer than {FEW_TOKENS} tokens; the fewest, "
                    f"{self.layer_tokens[least]:,}: {least}"
                )
        if self.run.second_moment:
            leaders = dict.fromkeys(self.layers.values())
            singular = [name for name in leaders if self.layer_tokens[name] < self._columns[name]]
            if singular:
                yield (
                    f"{len(singular)} of {len(leaders)} second moments have fewer tokens than "
                    "channels, so they are singular and know some directions not at all; the "
                    f"first: {singular[0]}"
                )
        for reason in dict.fromkeys(self.uncovered.values()):
            names = [name for name, why in self.uncovered.items() if why == reason]
            yield f"{_layers(len(names))} without statistics: {reason}; the first: {names[0]}"

    def _leader(self, name: str) -> str:
        if name not in self.layers:
            near = get_close_matches(name, self.layers, n=3) or list(self.layers)[:3]
            some = ", ".join(map(repr, near))
            raise InputError(f"{self.path}: tensor {name!r}: not calibrated here, but {some} are")
        return self.layers[name]


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count:,} layers"


def _stored_tensors(leader: str, second_moment: bool) -> list[tuple[str, str, int]]:
    norms = (leader + NORMS, "F64", 1)
    return [norms, (leader + MOMENT, "F32", 2)] if second_moment else [norms]


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


def _read_tensor(path: Path, key: str) -> NDArray[Any]:
    with open_container(path) as file, located(f"{path}: tensor {key!r}"):
        return file.read_array(key)


class CalibrationHeader:
    """Metadata and tensor table of a calibration file or partial file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_container(path) as file:
            self.metadata = file.metadata
            self.tensors = {key: entry.info for key, entry in file.entries.items()}

    def read_arrays(self) -> dict[str, NDArray[Any]]:
        """All tensors, in their own types."""
        return {key: _read_tensor(self.path, key) for key in self.tensors}

    def error(self, name: str, problem: str) -> InputError:
        """Return the error for a field of the description."""
        return InputError(f"{self.path}: field {name!r}: {problem}")

    def description(self, key: str) -> CalibrationDescription:
        """What the JSON under `key` says; it is of a partial file unless it is a calibration."""
        if key not in self.metadata:
            raise self.error(key, "not in the metadata; this is not such a calibration file")
        with located(f"{self.path}: field {key!r}"):
            value = json_object(parse_json(self.metadata[key]))
        partial = key != CALIBRATION_KEY
        return CalibrationDescription.from_json(value, str(self.path), partial=partial)

    def check_tensors(self, expected: Mapping[str, tuple[str, int]]) -> None:
        """Refuse other tensors than `expected`: keys with dtype and rank; matrices are square."""
        for key in sorted(self.tensors.keys() ^ expected.keys()):
            problem = "missing" if key in expected else "unknown"
            raise InputError(f"{self.path}: tensor {key!r}: {problem}")
        for key, (dtype, rank) in expected.items():
            found, shape = self.tensors[key].dtype, self.tensors[key].shape
            if found != dtype:
                problem = f"field 'dtype': {found}, expected {dtype}"
                raise InputError(f"{self.path}: tensor {key!r}: {problem}")
            if len(shape) != rank or len(set(shape)) != 1 or not shape[0]:
                kind = "(columns,)" if rank == 1 else "(columns, columns)"
                problem = f"field 'shape': {shape}, expected {kind}"
                raise InputError(f"{self.path}: tensor {key!r}: {problem}")
