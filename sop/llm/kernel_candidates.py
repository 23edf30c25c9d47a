"""Models whose activations are quantized as well, for :func:`sop.llm.evaluation.evaluate`.

With a checkpoint, every product with a quantized tensor is computed by
:func:`golden.kernel.matmul`, bit for bit as the hardware does. Without one, the layers have the
model's own weights and an ordinary product: that is the cost of the activation format alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.activations import (
    ActivationFormat,
    QuantizedActivations,
    decode_activations,
    quantize_activations,
)
from golden.checkpoint import Checkpoint
from golden.errors import InputError
from golden.kernel import kernel_block_size, matmul
from sop.llm.candidates import Candidate, checkpoint_candidate
from sop.llm.model import TorchModel
from sop.llm.replacing import replacing

__all__ = ["ActivationQuantizer", "activation_candidate", "kernel_candidate"]

_Product = Callable[[str, QuantizedActivations], NDArray[np.float32]]


def kernel_candidate(checkpoint: Checkpoint, model: TorchModel, fmt: ActivationFormat) -> Candidate:
    """The quantized tensors of a checkpoint in the kernel's arithmetic; it must stay open.

    Raises
    ------
    InputError
        If the checkpoint does not fit the model, or the blocks of a tensor do not fit those of the
        activations; the message names file and tensor.
    """
    candidate = checkpoint_candidate(checkpoint, model)
    for name in candidate.names(model):
        try:
            kernel_block_size(checkpoint.info(name).format, fmt)
        except InputError as error:
            raise InputError(f"{checkpoint.path}: tensor {name!r}: {error}") from error

    def product(name: str, activations: QuantizedActivations) -> NDArray[np.float32]:
        stored = checkpoint.read(name)
        found = matmul(stored.tensor, activations, stored.corrections)
        if found.overflow.any():
            count = int(found.overflow.sum())
            raise InputError(f"{count} of {found.overflow.size} outputs overflow float32")
        return found.values

    return _with_activations(candidate, fmt, product, f"{candidate.name}, {fmt.name}")


def activation_candidate(model: TorchModel, fmt: ActivationFormat) -> Candidate:
    """The model's own weights with the inputs of its layers quantized."""
    candidate = Candidate(fmt.name, model.weight)

    def product(name: str, activations: QuantizedActivations) -> NDArray[np.float32]:
        return decode_activations(activations).astype(np.float32) @ model.weight(name).T

    return _with_activations(candidate, fmt, product, fmt.name)


def _with_activations(
    candidate: Candidate, fmt: ActivationFormat, product: _Product, name: str
) -> Candidate:
    def computing(model: TorchModel) -> AbstractContextManager[None]:
        return replacing(model, candidate.names(model), _Quantized(fmt, product, name))

    return replace(candidate, name=name, activations=fmt.name, computing=computing)


class ActivationQuantizer:
    """Quantizes inputs of layers; those that share an input have it quantized once.

    Parameters
    ----------
    fmt : ActivationFormat
    """

    def __init__(self, fmt: ActivationFormat) -> None:
        self._format = fmt
        self._last: tuple[Any, QuantizedActivations] | None = None

    def __call__(self, x: Any) -> QuantizedActivations:
        """Quantize a float32 tensor whose last axis is that of the channels.

        Raises
        ------
        InputError
            If it has no tokens, or an activation is not finite.
        """
        # The tensor is kept, so that no other can have its identity.
        if self._last is None or self._last[0] is not x:
            values = x.detach().reshape(-1, x.shape[-1]).numpy()
            self._last = x, quantize_activations(values, self._format)
        return self._last[1]


class _Quantized:
    """Quantizes inputs before a product."""

    def __init__(self, fmt: ActivationFormat, product: _Product, candidate: str) -> None:
        self._quantize, self._product = ActivationQuantizer(fmt), product
        self._candidate = candidate

    def __call__(self, name: str, x: Any) -> NDArray[np.float32]:
        try:
            return self._product(name, self._quantize(x))
        except InputError as error:
            raise InputError(f"{self._candidate}: tensor {name!r}: {error}") from error
