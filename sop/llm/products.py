"""The inputs that weights are multiplied by, seen while a model runs.

A weight may belong to an ``nn.Linear``, to a transposed layer (GPT-2), to a parameter that holds
all experts of a layer, or be used by hand. What these have in common is the product itself, so it
is the products that are watched: PyTorch tells of each function that is called
(``torch.overrides.TorchFunctionMode``), and a weight is known by its place in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sop.llm.packages import require
from sop.llm.places import Site

__all__ = ["watching"]

Observe = Callable[[Site, Any], None]


def watching(
    parameters: Mapping[str, tuple[Any, int]], observe: Observe, misuse: Callable[[str], None]
) -> Any:
    """Return a context in which products with some parameters are reported.

    Parameters
    ----------
    parameters : Mapping of str to tuple of torch.Tensor and int
        Weights to watch, with two axes, or three of which the first counts experts; and which of
        the last two axes, 0 or 1, is that of the inputs.
    observe : callable
        Gets the site and the input of each product before it is computed: a tensor whose last axis
        is that of the inputs. Products with one and the same input get the same tensor object.
        A product with all experts at once is reported once per expert, without rows that are zero
        throughout: tokens that were not sent there.
    misuse : callable
        Gets the name of a parameter that is used in a way that is not known.
    """
    torch = require("torch")
    watched = _Watched(parameters, observe, misuse)
    linear, factors, unknown = torch.nn.functional.linear, _factors(torch), _unknown(torch)

    def run(
        mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is linear:
            x, weight = _arguments(args, given, ((0, "input"), (1, "weight")))
            watched.report(weight, x, 1)
        elif func in factors:
            first, second = _arguments(args, given, factors[func])
            watched.report(second, first, 0)
            if watched.name(first) is not None:
                watched.report(first, second.transpose(-1, -2), 1)
        elif func in unknown:
            for name in watched.names((args, given)):
                misuse(name)
        return func(*args, **given)

    mode = type("Products", (torch.overrides.TorchFunctionMode,), {"__torch_function__": run})
    return mode()


_Argument = tuple[int, str]  # position and name


def _factors(torch: Any) -> dict[Any, tuple[_Argument, _Argument]]:
    """Functions that multiply matrices, and where the two are among the arguments."""
    tensor = torch.Tensor
    factors = {
        tensor.__matmul__: ((0, "self"), (1, "other")),
        tensor.__rmatmul__: ((1, "other"), (0, "self")),
    }
    for name, second in (("matmul", "other"), ("mm", "mat2"), ("bmm", "mat2")):
        for owner in (torch, tensor):
            factors[getattr(owner, name)] = ((0, "input"), (1, second))
    for name, part in (("addmm", "mat"), ("baddbmm", "batch")):
        for owner in (torch, tensor):
            factors[getattr(owner, name)] = ((1, f"{part}1"), (2, f"{part}2"))
    return factors


def _unknown(torch: Any) -> set[Any]:
    """Functions that multiply in other ways, so that the input of a weight is not understood."""
    functional = torch.nn.functional
    return {
        torch.einsum, torch.tensordot, torch.mv, torch.Tensor.mv, functional.bilinear,
        getattr(functional, "grouped_mm", None),  # new in PyTorch 2.10
    }  # fmt: skip


def _arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: tuple[_Argument, _Argument]
) -> list[Any]:
    """Two arguments, each by position or by name."""
    return [args[at] if at < len(args) else kwargs[name] for at, name in wanted]


class _Watched:
    """Parameters by their place in memory."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[Any, int]],
        observe: Observe,
        misuse: Callable[[str], None],
    ) -> None:
        self._observe, self._misuse = observe, misuse
        self._parameters = dict(parameters)
        self._by_storage = {
            tensor.untyped_storage().data_ptr(): name for name, (tensor, _) in parameters.items()
        }

    def name(self, tensor: Any) -> str | None:
        """Name of the parameter that a tensor is part of."""
        if not isinstance(tensor, require("torch").Tensor):
            return None
        return self._by_storage.get(tensor.untyped_storage().data_ptr())

    def names(self, value: Any) -> Iterator[str]:
        """Parameters that are anywhere in nested arguments."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            for part in value:
                yield from self.names(part)
        elif (name := self.name(value)) is not None:
            yield name

    def report(self, weight: Any, x: Any, axis: int) -> None:
        """Report a product of `x` with a weight, over this axis of the last two of the weight."""
        name = self.name(weight)
        if name is None:
            return
        whole, inputs_axis = self._parameters[name]
        stacked = whole.ndim == 3
        first = (weight.data_ptr() - whole.data_ptr()) // whole.element_size()
        index, rest = divmod(first, whole[0].numel()) if stacked else (0, first)
        inner = whole[0] if stacked else whole
        # The axes as they are stored, or transposed: strides tell, of a square too.
        axes = list(zip(weight.stride()[-2:], weight.shape[-2:], strict=True))
        stored = list(zip(inner.stride(), inner.shape, strict=True))
        expected = stored if axis == inputs_axis else stored[::-1]
        if rest or axes != expected or x.ndim < 2:
            self._misuse(name)
        elif weight.ndim == 2:
            self._observe((name, index if stacked else None), x)
        elif stacked and weight.shape[0] == whole.shape[0] and x.ndim == 3 and not index:
            for expert, rows in enumerate(x):
                self._observe((name, expert), rows[rows.ne(0).any(dim=-1)])
        else:
            self._misuse(name)
