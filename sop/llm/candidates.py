"""Weights to evaluate in place of a model's own: from a checkpoint, a baseline, or anything."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import Checkpoint
from golden.errors import InputError
from sop.baselines.others import Baseline
from sop.files.weights import matrix_weights
from sop.llm.model import TorchModel
from sop.llm.places import UNUSED

__all__ = ["Candidate", "baseline_candidate", "checkpoint_candidate", "unused_tensors"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """Weights to put into the model in place of its own.

    Attributes
    ----------
    name : str
        For people.
    weights : Mapping of str to float32 array, or callable
        For the name of a tensor (a key of :attr:`TorchModel.places`) the weights, shape
        (outputs, inputs), rows as in the model file. A callable is called once per tensor, while
        the model still has its own weights in that tensor, so that it may start from
        ``model.weight(name)``.
    bits_per_weight : float, optional
        Stored bits per replaced weight.
    tensors : tuple of str, optional
        Which tensors to replace; without it, all keys of a mapping, or all linear layers.
    activations : str, optional
        Format of the activations where they are quantized too.
    computing : callable, optional
        Gets the model and gives the context in which it is run with these weights, such as one
        that computes products by other means (:mod:`sop.llm.kernel_candidates`).
    """

    name: str
    weights: Mapping[str, Float32] | Callable[[str], Float32]
    bits_per_weight: float | None = None
    tensors: tuple[str, ...] | None = None
    activations: str | None = None
    computing: Callable[[TorchModel], AbstractContextManager[None]] = lambda model: nullcontext()

    def names(self, model: TorchModel) -> tuple[str, ...]:
        """Names of the tensors that are replaced in `model`, in its order.

        Raises
        ------
        InputError
            If there are none, or the model has no such linear layer.
        """
        names = self.tensors
        if names is None:
            names = tuple(self.weights if isinstance(self.weights, Mapping) else model.layers)
        for name in names:
            if name not in model.places:
                problem = model.unplaced.get(name, "the file has no such matrix")
                raise InputError(f"{self.name}: tensor {name!r}: {model.path}: {problem}")
        if not names:
            raise InputError(f"{self.name}: replaces no tensor")
        wanted = set(names)
        return tuple(name for name in model.places if name in wanted)

    def read(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Weights of one tensor.

        Raises
        ------
        InputError
            If they are not finite float32 of this shape.
        """
        get = self.weights.__getitem__ if isinstance(self.weights, Mapping) else self.weights
        weights = get(name)
        problem = ""
        if weights.dtype != np.float32:
            problem = f"{weights.dtype}, expected float32"
        elif weights.shape != shape:
            problem = f"shape {weights.shape}, the model has {shape}"
        elif not np.isfinite(weights).all():
            problem = "a weight is not finite"
        if problem:
            raise InputError(f"{self.name}: tensor {name!r}: {problem}")
        return weights


def checkpoint_candidate(checkpoint: Checkpoint, model: TorchModel) -> Candidate:
    """The quantized tensors of a checkpoint, named as its file; it must stay open.

    Tensors that are stored as they came are left out, because they equal the model's, and so are
    those that transformers does not use (:func:`unused_tensors`).

    Raises
    ------
    InputError
        If the model has no matrix of such a name or not of this shape; the message names file and
        tensor.
    """
    path = checkpoint.path
    candidate = Candidate(
        name=str(path),
        weights=partial(matrix_weights, checkpoint),
        bits_per_weight=float(checkpoint.stored_bits_per_weight),
        tensors=tuple(n for n in checkpoint.names if model.unplaced.get(n) != UNUSED),
    )
    for name in candidate.names(model):
        found, shape = checkpoint.info(name).shape, model.places[name].shape
        if found != shape:
            raise InputError(f"{path}: tensor {name!r}: shape {found}, {model.path} has {shape}")
    return candidate


def unused_tensors(checkpoint: Checkpoint, model: TorchModel) -> list[str]:
    """Quantized tensors of layers that the model computes without, such as those that predict more.

    DeepSeek-V3 has a layer that predicts a second token, which transformers leaves out.
    """
    return [name for name in checkpoint.names if model.unplaced.get(name) == UNUSED]


def baseline_candidate(
    baseline: Baseline,
    model: TorchModel,
    tensors: tuple[str, ...] | None = None,
    channel_norms: Callable[[str], Float64 | None] | None = None,
) -> Candidate:
    """A baseline applied to some tensors of the model, without them to all layers.

    Parameters
    ----------
    baseline : Baseline
    model : TorchModel
    tensors : tuple of str, optional
    channel_norms : callable, optional
        Maps the name of a tensor to the root mean square of its input channels, or to None if they
        are not known; used where the baseline can.
    """
    use_norms = channel_norms is not None and baseline.uses_channel_norms

    def read(name: str) -> Float32:
        norms = channel_norms(name) if use_norms and channel_norms else None
        try:
            return baseline.reconstruct(model.weight(name), norms)
        except InputError as error:
            raise InputError(f"tensor {name!r}: {error}") from error

    return Candidate(baseline.name, read, float(baseline.bits_per_weight), tensors)
