"""Where the matrices of a model's file are in the module that transformers makes of it.

transformers renames weights on loading and fuses what a file holds one by one: the ``gate_proj``
and ``up_proj`` of all experts of a layer become one parameter, ``experts.gate_up_proj``. How
differs by architecture and version, so nothing is taken from names alone: a matrix is where its
values are, all of them, bit for bit.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sop.llm.packages import require

__all__ = ["UNUSED", "Place", "Site", "find_place", "to_alternating", "to_half_split"]

Site = tuple[str, int | None]
"""A parameter by name, and which slice of it along the first axis, if it has three axes."""

UNUSED = "the model that transformers loads has no such layer"
"""Why a matrix has no place, if the model computes without it."""

_COMPARED_FIRST = 8  # columns of a matrix's first row that are looked for
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


def find_place(
    parameters: Mapping[str, Any], name: str, index: int | None, weights: NDArray[np.float32]
) -> tuple[Place | None, str]:
    """Find a matrix by its values.

    Where several places hold the same values, one that fits the name is taken: the parameter of
    the same name, then the slice of the expert's number. If that leaves several, none is.

    Parameters
    ----------
    parameters : Mapping of str to torch.Tensor
        Of the module, in float32.
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
    wanted = require("torch").from_numpy(weights)
    layer = _first_number(name)
    if layer not in map(_first_number, parameters):
        return None, UNUSED
    found: dict[Place, tuple[bool, bool]] = {}
    for parameter, tensor in parameters.items():
        if _first_number(parameter) == layer:
            for place in _places_in(parameter, tensor.detach(), wanted):
                found[place] = _misfit(place, name, index)
    if not found:
        return None, "its values are nowhere in the model that transformers loads"
    least = min(found.values())
    best = [place for place, misfit in found.items() if misfit == least]
    if len(best) > 1:
        return None, f"its values are in {len(best)} places of the model that transformers loads"
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


def _places_in(parameter: str, tensor: Any, wanted: Any) -> Iterator[Place]:
    if tensor.ndim not in (2, 3) or tensor.dtype != wanted.dtype:
        return
    stacked = tensor if tensor.ndim == 3 else tensor[None]
    for transposed in (False, True):
        oriented = stacked.transpose(1, 2) if transposed else stacked
        if oriented.shape[2] != wanted.shape[1] or oriented.shape[1] < wanted.shape[0]:
            continue
        first = (oriented[:, :, :_COMPARED_FIRST] == wanted[0, :_COMPARED_FIRST]).all(dim=2)
        for index, start in first.nonzero().tolist():
            for step in _STEPS[: 1 if wanted.shape[0] == 1 else None]:
                rows = oriented[index, start::step][: wanted.shape[0]]
                if rows.shape == wanted.shape and bool((rows == wanted).all()):
                    slice_index = index if tensor.ndim == 3 else None
                    shape = (wanted.shape[0], wanted.shape[1])
                    yield Place(parameter, slice_index, transposed, start, step, shape)


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
