"""Where the matrices of a model's file are in the module that transformers makes of it.

transformers renames weights on loading and fuses what a file holds one by one: the ``gate_proj``
and ``up_proj`` of all experts of a layer become one parameter, ``experts.gate_up_proj``. How
differs by architecture and version, so nothing is taken from names alone: a matrix is where its
values are, all of them, bit for bit.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sop.llm.packages import require

__all__ = ["UNUSED", "Place", "PlaceFinder", "Site", "to_alternating", "to_half_split"]

Site = tuple[str, int | None]
"""A parameter by name, and which slice of it along the first axis, if it has three axes."""

UNUSED = "the model that transformers loads has no such layer"
"""Why a matrix has no place, if the model computes without it."""

_COMPARED_FIRST = 8  # columns of a matrix's first row that are looked for
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits are well mixed; any such will do
_STEPS = (1, 2)  # rows of two matrices may alternate in one parameter
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Place:
    """A matrix inside a module.

    Attributes
    ----------
    parameter : str
        Name of the parameter in the module.
    index : int or None
        Which slice along the first axis, of a parameter with three axes.
    transposed : bool
        The parameter, or the slice, has the shape (inputs, outputs).
    start, step : int
        Of the outputs of the parameter, or of the slice, the matrix has ``start``,
        ``start + step`` and so on.
    shape : tuple of int
        (outputs, inputs) of the matrix.
    rotary_heads : int
        Heads of a query or key projection of llama.cpp, whose rows are in another order in the
        file; 0 if the order is the same.
    """

    parameter: str
    index: int | None
    transposed: bool
    start: int
    step: int
    shape: tuple[int, int]
    rotary_heads: int = 0

    @property
    def site(self) -> Site:
        """What is multiplied by one input: a parameter, or a slice of it."""
        return self.parameter, self.index

    def _view(self, parameters: Mapping[str, Any]) -> Any:
        tensor = parameters[self.parameter].detach()
        if self.index is not None:
            tensor = tensor[self.index]
        if self.transposed:
            tensor = tensor.T
        return tensor[self.start :: self.step][: self.shape[0]]

    def read(self, parameters: Mapping[str, Any]) -> NDArray[np.float32]:
        """Weights as they are now, a copy: float32, (outputs, inputs), rows as in the file."""
        weights: NDArray[np.float32] = self._view(parameters).numpy()
        if self.rotary_heads:
            return to_alternating(weights, self.rotary_heads)
        return np.array(weights, order="C")

    def write(self, parameters: Mapping[str, Any], weights: NDArray[np.float32]) -> None:
        """Replace the weights: float32, (outputs, inputs), rows as in the file."""
        torch = require("torch")
        if self.rotary_heads:
            weights = to_half_split(weights, self.rotary_heads)
        with torch.no_grad():
            self._view(parameters).copy_(torch.from_numpy(weights))


class PlaceFinder:
    """Finds matrices among the parameters of a module by their values.

    Where several places hold the same values, one that fits the name is taken: the parameter of
    the same name, then the slice of the expert's number. If that leaves several, none is.

    Parameters
    ----------
    parameters : Mapping of str to torch.Tensor
        Of the module, in float32; must not change meanwhile.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._by_layer: dict[int | None, list[tuple[str, Any]]] = {}
        for parameter, tensor in parameters.items():
            self._by_layer.setdefault(_first_number(parameter), []).append(
                (parameter, tensor.detach())
            )
        # Of one layer at a time, by number of inputs: files hold layers one after the other.
        self._rows: dict[int, _Rows] = {}
        self._indexed: int | None = None

    def find(
        self, name: str, index: int | None, weights: NDArray[np.float32]
    ) -> tuple[Place | None, str]:
        """Find a matrix.

        Parameters
        ----------
        name : str
            Of the tensor in the file.
        index : int or None
            Which slice of that tensor.
        weights : float32 array, shape (outputs, inputs)

        Returns
        -------
        place : Place or None
        problem : str
            Why there is none.
        """
        layer = _first_number(name)
        if layer not in self._by_layer:
            return None, UNUSED
        if self._indexed != layer:
            self._rows, self._indexed = {}, layer
        inputs = weights.shape[1]
        if inputs not in self._rows:
            self._rows[inputs] = _Rows(self._by_layer[layer], inputs)
        found = {place: _misfit(place, name, index) for place in self._rows[inputs].places(weights)}
        if not found:
            return None, "its values are nowhere in the model that transformers loads"
        least = min(found.values())
        best = [place for place, misfit in found.items() if misfit == least]
        if len(best) > 1:
            problem = f"its values are in {len(best)} places of the model that transformers loads"
            return None, problem
        return best[0], ""


def _first_number(name: str) -> int | None:
    """Number of the layer, which renaming does not change."""
    match = _NUMBER.search(name)
    return int(match[0]) if match else None


def _misfit(place: Place, name: str, index: int | None) -> tuple[bool, bool]:
    same_name = name.endswith(place.parameter) or place.parameter.endswith(name)
    if index is None and place.index is not None:
        numbers = _NUMBER.findall(name)
        index = int(numbers[1]) if len(numbers) > 1 else None
    return not same_name, place.index != index


class _Rows:
    """The rows of some parameters, either way round, to be looked up by their first values.

    Parameters
    ----------
    parameters : sequence of (name, tensor)
    inputs : int
        Only rows of this many values.
    """

    def __init__(self, parameters: Sequence[tuple[str, Any]], inputs: int) -> None:
        self._sources: list[tuple[str, bool, bool, NDArray[np.float32]]] = []
        hashes, origins = [], []
        for parameter, tensor in parameters:
            if tensor.ndim not in (2, 3) or tensor.dtype != require("torch").float32:
                continue
            values = tensor.numpy()  # whose comparisons are faster than PyTorch's threads here
            stacked = values if tensor.ndim == 3 else values[None]
            for transposed in (False, True):
                oriented = stacked.transpose(0, 2, 1) if transposed else stacked
                if oriented.shape[2] == inputs:
                    found = _hashes(oriented[:, :, :_COMPARED_FIRST])
                    hashes.append(found)
                    origins.append(np.full(found.size, len(self._sources)))
                    self._sources.append((parameter, tensor.ndim == 3, transposed, oriented))
        every = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._order = np.argsort(every, kind="stable")
        self._hashes = every[self._order]
        self._origins = np.concatenate(origins) if origins else np.empty(0, np.int64)
        sizes = [found.size for found in hashes]
        self._starts = np.cumsum([0, *sizes])

    def places(self, weights: NDArray[np.float32]) -> Iterator[Place]:
        """Places that hold exactly these weights, shape (outputs, inputs)."""
        rows = weights.shape[0]
        key = _hashes(weights[None, :1, :_COMPARED_FIRST])
        first, stop = (int(np.searchsorted(self._hashes, key, side)[0]) for side in _SIDES)
        for position in self._order[first:stop].tolist():
            source = int(self._origins[position])
            parameter, stacked, transposed, oriented = self._sources[source]
            index, start = divmod(position - int(self._starts[source]), oriented.shape[1])
            for step in _STEPS[: 1 if rows == 1 else None]:
                part = oriented[index, start::step][:rows]
                if np.array_equal(part, weights):
                    shape = (rows, weights.shape[1])
                    slice_index = index if stacked else None
                    yield Place(parameter, slice_index, transposed, start, step, shape)


def _hashes(values: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Hash of each row, of the bits of its values; of shape (rows of all slices,)."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    factors = np.cumprod(np.full(bits.shape[-1], _HASH_FACTOR, np.uint64))
    hashes: NDArray[np.uint64] = (bits * factors).sum(axis=-1, dtype=np.uint64).reshape(-1)
    return hashes


def to_half_split(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection: order of llama.cpp to that of transformers.

    Rotary embedding turns pairs of channels. Of a head with d channels, llama.cpp pairs channels
    (2i, 2i + 1), transformers (i, i + d/2). Source: ``LlamaModel.permute`` in llama.cpp's
    ``convert_hf_to_gguf.py`` is the inverse of this.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def to_alternating(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Inverse of :func:`to_half_split`."""
    rows, columns = weights.shape
    halves = weights.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
