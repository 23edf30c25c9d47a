"""A model some of whose products are computed by other means than PyTorch's.

Products are found as :mod:`sop.llm.products` finds them. The model's own product is computed too,
so that outputs of the same parameter which belong to no replaced matrix are there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from sop.llm.model import TorchModel
from sop.llm.packages import require
from sop.llm.places import Site, to_half_split

__all__ = ["Compute", "replacing"]

Compute = Callable[[str, Any], NDArray[np.float32]]


@contextmanager
def replacing(model: TorchModel, names: Sequence[str], compute: Compute) -> Iterator[None]:
    """Within this context the products with some matrices are what `compute` makes of them.

    Parameters
    ----------
    model : TorchModel
    names : sequence of str
        Keys of :attr:`TorchModel.places`.
    compute : callable
        Gets the name of a matrix and the input, a float32 tensor whose last axis is that of the
        matrix's inputs (matrices with the same input get the same object one after the other);
        returns the product, shape (tokens, outputs), outputs as in the file, without bias.

    Raises
    ------
    InputError
        While the model runs, if a matrix is used otherwise than in a product with one input.
    """
    products = _Products(model, names, compute)

    # PyTorch wants a plain function here, not a bound method.
    def run(
        mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return products.run(func, args, kwargs or {})

    mode = type(
        "Replacing",
        (require("torch").overrides.TorchFunctionMode,),
        {"__torch_function__": run},
    )
    with model.watching(names, products.observe, products.misuse), mode():
        yield


class _Products:
    """Takes note of the products that PyTorch is about to compute, and changes their results."""

    def __init__(self, model: TorchModel, names: Sequence[str], compute: Compute) -> None:
        self._model, self._compute = model, compute
        self._matrices: dict[Site, list[str]] = {}
        for name in names:
            self._matrices.setdefault(model.places[name].site, []).append(name)
        self._seen: list[tuple[Site, Any]] = []

    def observe(self, site: Site, x: Any) -> None:
        self._seen.append((site, x))

    def misuse(self, parameter: str) -> None:
        problem = "is used in another way than as a matrix that one input is multiplied by"
        raise InputError(f"{self._model.path}: parameter {parameter!r} {problem}: not supported")

    def run(self, func: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
        """Call a function of PyTorch; the products in it tell `observe` first."""
        self._seen.clear()
        result = func(*args, **given)
        seen, self._seen = self._seen, []
        for site, x in seen:
            if len(seen) == 1 and self._is_known(func, args, given, x):
                self._write(site, x, result, _bias(args, given, func))
            elif site in self._matrices:
                self.misuse(site[0])
        return result

    def _is_known(self, func: Any, args: tuple[Any, ...], given: Mapping[str, Any], x: Any) -> bool:
        torch = require("torch")
        if func is torch.nn.functional.linear:
            return True
        return func is torch.addmm and not given and args[1] is x

    def _write(self, site: Site, x: Any, result: Any, bias: Any) -> None:
        """Put the products of all matrices at a site into the result of PyTorch's."""
        torch = require("torch")
        for name in self._matrices.get(site, ()):
            place = self._model.places[name]
            product = self._compute(name, x)
            if place.rotary_heads:
                product = to_half_split(np.ascontiguousarray(product.T), place.rotary_heads).T
            outputs = slice(place.start, place.start + place.step * place.shape[0], place.step)
            values = torch.from_numpy(np.ascontiguousarray(product))
            if bias is not None:
                values = values + bias[outputs]
            result[..., outputs] = values.reshape(*x.shape[:-1], place.shape[0])


def _bias(args: tuple[Any, ...], given: Mapping[str, Any], func: Any) -> Any:
    if func is require("torch").addmm:
        return args[0]
    return args[2] if len(args) > 2 else given.get("bias")
