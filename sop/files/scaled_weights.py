"""Weights in 8-bit floating point with scales beside them, which is how large models ship.

A weight is its FP8 value times its scale. Scales lie in a tensor named after the weight's
(``x.weight_scale_inv`` or ``x.weight_scale``, both to be multiplied with) and are one for the
tensor, one per row or column, or one per block, whose size is in ``config.json``
(``weight_block_size``); blocks at the edges may be cut. Of a stacked tensor each slice has its own.

Source: ``quantizers/quantizer_finegrained_fp8.py`` and ``integrations/finegrained_fp8.py`` of
transformers, and the model card of DeepSeek-V3 (128 x 128 blocks).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from golden.errors import InputError
from sop.files.quantization_config import described_quantization
from sop.files.tensor_info import TensorInfo

__all__ = [
    "FP8_TYPES",
    "SCALE_SUFFIXES",
    "Scaling",
    "apply_scale",
    "find_scales",
    "has_own_scales",
    "is_fp8",
]

FP8_TYPES: Mapping[str, DTypeLike] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
"""Types of the safetensors format for weights that have scales."""

SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""What the name of a weight is followed by in that of its scales."""

_SCALE_TYPES = ("F32", "BF16", "F16", "F64", "F8_E8M0")
_COMPANIONS = (
    "input_scale", "input_scale_inv", "activation_scale", "activation_scale_inv", "output_scale",
)  # fmt: skip
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Scaling:
    """Where the scales of a weight are.

    Attributes
    ----------
    scale : str
        Name of their tensor.
    block : tuple of int
        Rows and columns under one scale, unless its shape says that it is one for more.
    companions : tuple of str
        Tensors of scales that the layer's inputs and outputs would be quantized with; the weights
        do not depend on them.
    """

    scale: str
    block: tuple[int, int]
    companions: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that are of no use without the FP8 weight."""
        return self.scale, *self.companions


def is_fp8(info: TensorInfo) -> bool:
    """Whether a tensor is of a type for weights that have scales."""
    return info.source_type in FP8_TYPES


def find_scales(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], path: object
) -> dict[str, Scaling]:
    """Return the scales of every FP8 tensor, by the name of the tensor.

    Parameters
    ----------
    tensors : mapping of str to TensorInfo
    config : mapping
        The content of ``config.json``; empty if there is none.
    path : object
        Names the model in errors.

    Raises
    ------
    InputError
        If an FP8 tensor has no scales, or scales of a shape or type that do not fit, or the size
        of blocks is none.
    """
    found: dict[str, Scaling] = {}
    scaled = {name: info for name, info in tensors.items() if info.source_type in FP8_TYPES}
    if not scaled:
        return found
    block = _block_size(config, path)
    for name, info in scaled.items():
        scale = next((name + end for end in SCALE_SUFFIXES if name + end in tensors), None)
        if scale is None:
            names = " or ".join(name.rpartition(".")[2] + end for end in SCALE_SUFFIXES)
            problem = f"field 'dtype': {info.source_type} without scales ({names})"
            raise InputError(f"{path}: tensor {name!r}: {problem}")
        if tensors[scale].source_type not in _SCALE_TYPES:
            problem = f"{tensors[scale].source_type}, expected one of {', '.join(_SCALE_TYPES)}"
            raise InputError(f"{path}: tensor {scale!r}: field 'dtype': {problem}")
        _check_shapes(info, tensors[scale], block, path)
        stem = name.removesuffix("weight")
        others = tuple(stem + end for end in _COMPANIONS if stem + end in tensors)
        found[name] = Scaling(scale, block, others)
    return found


def _block_size(config: Mapping[str, Any], path: object) -> tuple[int, int]:
    """Rows and columns of blocks, which must be the same in all parts of a configuration."""
    sizes = {}
    for field, described in described_quantization(config, path):
        for name, value in _block_fields(field, described):
            if value is not None:
                sizes[name] = _two_sizes(value, f"{path}: field {name[-200:]!r}")
    if len(set(sizes.values())) > 1:
        problem = "; ".join(f"field {name!r}: {list(size)}" for name, size in sizes.items())
        raise InputError(f"{path}: blocks of several sizes are not read: {problem[:300]}")
    return next(iter(sizes.values()), _DEFAULT_BLOCK)


def _block_fields(field: str, described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield f"{field}.weight_block_size", described.get("weight_block_size")
    groups = described.get("config_groups")
    for key, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            name = f"{field}.config_groups.{key}.weights.block_structure"
            yield name, weights.get("block_structure")


def _two_sizes(value: Any, where: str) -> tuple[int, int]:
    text = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value) if isinstance(value, str) else None
    if text:  # of older compressed-tensors
        value = [int(text[1]), int(text[2])]
    if isinstance(value, list) and len(value) == 2:
        rows, columns = value
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return rows, columns
    problem = f"{str(value)[:80]}, expected two positive integers, rows and columns of a block"
    raise InputError(f"{where}: {problem}")


def _check_shapes(
    info: TensorInfo, scale: TensorInfo, block: tuple[int, int], path: object
) -> None:
    if len(info.shape) not in (2, 3):
        problem = f"field 'shape': {list(info.shape)}, expected two or three axes"
        raise InputError(f"{path}: tensor {info.name!r}: {problem}")
    if _grid_of(info.shape, scale.shape, block) is None:
        expected = [*info.shape[:-2], *_blocks_of(info.shape, block)]
        problem = (
            f"field 'shape': {list(scale.shape)} for weights {list(info.shape)}, expected one "
            f"scale, one per row or column, or {expected} for blocks of {block[0]} x {block[1]}"
        )
        raise InputError(f"{path}: tensor {scale.name!r}: {problem}")


def _blocks_of(weights: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return -(-weights[-2] // block[0]), -(-weights[-1] // block[1])


def has_own_scales(weights: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether each slice of a stacked tensor has scales of its own; by the two shapes."""
    return len(weights) == 3 and scale[:1] == weights[:1]


def _grid_of(
    weights: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, int] | None:
    """Rows and columns of the scales of one matrix, by the two shapes; None if they do not fit."""
    shape = scale
    if has_own_scales(weights, scale):
        shape = scale[1:]
    elif len(weights) == 3 and prod(scale) != 1:
        return None
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) > 2:
        return None
    grid = (*shape, 1, 1)[:2]
    rows, columns = weights[-2:]
    fits = ((1, 1), (rows, 1), (1, columns), _blocks_of(weights, block))
    return grid if grid in fits else None


def apply_scale(
    values: NDArray[Any],
    scale: NDArray[Any],
    block: tuple[int, int],
) -> NDArray[np.float32]:
    """Return weights: values times scales, each product rounded to float32.

    Parameters
    ----------
    values : FP8 array, shape (rows, columns) or (slices, rows, columns)
    scale : array
        Of a shape that :func:`find_scales` allows for them: with three axes for two of the
        weights only if the first is 1.
    block : tuple of int
        Rows and columns under one scale.

    Returns
    -------
    weights : float32 array, shape of `values`

    Raises
    ------
    ValueError
        If the scales are of another shape.
    """
    if values.ndim == 3:
        own = has_own_scales(values.shape, scale.shape)
        parts = [apply_scale(part, scale[i, ...] if own else scale, block)
                 for i, part in enumerate(values)]  # fmt: skip
        return np.stack(parts)
    rows, columns = values.shape
    shape = _grid_of(values.shape, scale.shape, block)
    if shape is None:
        raise ValueError(f"scales {scale.shape} do not fit weights {values.shape}")
    grid = scale.astype(np.float32).reshape(shape)
    if shape not in ((1, 1), (rows, 1), (1, columns)):
        grid = grid.repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]
    with np.errstate(over="ignore", invalid="ignore"):  # the caller judges what is not finite
        weights: NDArray[np.float32] = values.astype(np.float32) * grid
    return weights
