"""One way to read the weights of a checkpoint and of a model file: name to float32 array."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import METADATA_KEY, Checkpoint, reconstruct
from golden.errors import InputError, located
from sop.files.models import Model, open_model
from sop.files.recorded_source import RecordedSource
from sop.files.safetensors_reader import FLOAT_TYPES, as_float32, metadata_keys
from sop.files.scaled_weights import FP8_TYPES, SCALE_SUFFIXES, apply_scale, find_scales, is_fp8
from sop.files.tensor_info import Matrix, TensorInfo

__all__ = [
    "Weights",
    "checkpoint_weights",
    "matrix_weights",
    "open_weights",
    "restored_tensors",
]


@dataclass(frozen=True)
class Weights:
    """The tensors of an open checkpoint or model file; made by :func:`open_weights`.

    Attributes
    ----------
    path : Path
    tensors : Mapping of str to TensorInfo
        All tensors of the model by name, but the scales of FP8 weights. The source type of a
        quantized tensor of a checkpoint is the name of its format; of a stack of several formats,
        of all of them.
    read : callable
        Gives the weights of a name as a float32 array of the shape in `tensors`; raises InputError
        if they are broken or cannot become float32.
    read_matrix : callable
        Gives one matrix as [outputs, inputs]; raises InputError as `read`, and if there is no such
        matrix of that shape.
    matrices : Mapping of str to tuple of Matrix
        Those of each tensor that has some.
    origin : Checkpoint or Model
        What is open.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], NDArray[np.float32]]
    read_matrix: Callable[[Matrix], NDArray[np.float32]]
    matrices: Mapping[str, tuple[Matrix, ...]]
    origin: Checkpoint | Model


@contextmanager
def open_weights(path: str | Path) -> Iterator[Weights]:
    """Open a checkpoint, or whatever :func:`sop.files.models.open_model` opens.

    Parameters
    ----------
    path : str or Path
        A file with the metadata of a checkpoint is read as one, under any name.

    Raises
    ------
    InputError
        If it is neither, or its header is broken.
    OSError
        If the file cannot be opened.
    """
    path = Path(path)
    if _may_be_checkpoint(path):
        with Checkpoint(path) as checkpoint:
            yield _of_checkpoint(checkpoint)
    else:
        with open_model(path) as model:
            scales = model.scale_tensors
            tensors = {name: info for name, info in model.tensors.items() if name not in scales}
            matrices = model.matrices_by_tensor
            yield Weights(path, tensors, model.read, model.read_matrix, matrices, model)


def _may_be_checkpoint(path: Path) -> bool:
    """Whether a file has the metadata of a checkpoint, or is too broken to say."""
    if not path.is_file():
        return False
    keys = metadata_keys(path)
    if keys is None:
        return path.suffix == ".safetensors"  # Checkpoint says where it is broken
    return METADATA_KEY in keys


def _of_checkpoint(checkpoint: Checkpoint) -> Weights:
    infos = restored_tensors(checkpoint)
    for name in [name for name, info in infos.items() if is_fp8(info)]:
        for end in SCALE_SUFFIXES:
            infos.pop(name + end, None)

    def read(name: str) -> NDArray[np.float32]:
        return checkpoint_weights(checkpoint, name)

    def read_matrix(matrix: Matrix) -> NDArray[np.float32]:
        if matrix.name not in checkpoint.names:
            raise InputError(f"{checkpoint.path}: has no quantized tensor {matrix.name!r}")
        return matrix_weights(checkpoint, matrix.name)

    matrices = {
        tensor: tuple(Matrix.of_checkpoint(name, checkpoint.info(name)) for name in names)
        for tensor, names in checkpoint.model_tensors.items()
    }
    tensors = MappingProxyType(infos)
    return Weights(checkpoint.path, tensors, read, read_matrix, matrices, checkpoint)


def restored_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Tensors of the model that a checkpoint stands for, with the shapes that they had there.

    The source type of a quantized one is the name of its format, or of its formats.
    """
    infos = {}
    for tensor, names in checkpoint.model_tensors.items():
        info = checkpoint.info(names[0])
        shape = info.shape if info.source is None else info.source.model_shape(info.shape)
        formats = sorted({checkpoint.info(name).format.name for name in names})
        bits = sum(checkpoint.bits(name) for name in names)
        infos[tensor] = TensorInfo(tensor, shape, ", ".join(formats), bits, bits)
    for name in checkpoint.raw_names:
        raw = checkpoint.raw_info(name)
        bits = checkpoint.bits(name)
        infos[name] = TensorInfo(name, raw.shape, raw.dtype, bits, bits)
    return infos


def checkpoint_weights(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Weights of one tensor of the model that a checkpoint stands for, quantized or raw.

    Parameters
    ----------
    name : str
        One of :func:`restored_tensors`.

    Returns
    -------
    weights : float32 array
        Of the shape in the model, C-contiguous: slices are stacked, transposed ones turned back.

    Raises
    ------
    InputError
        If the tensor is broken, or a raw one is not of a type in
        :data:`sop.files.safetensors_reader.FLOAT_TYPES` nor FP8 with scales, or holds a float64
        value too large for float32.
    """
    if name not in checkpoint.model_tensors:
        return _raw_weights(checkpoint, name, f"{checkpoint.path}: tensor {name!r}")
    names = checkpoint.model_tensors[name]
    source = checkpoint.info(names[0]).source
    if source is None:
        return matrix_weights(checkpoint, name)
    weights = np.empty(source.model_shape(checkpoint.info(names[0]).shape), np.float32)
    parts = weights[None] if source.index is None else weights
    for part, matrix in zip(parts, names, strict=True):
        values = matrix_weights(checkpoint, matrix)
        part[...] = values.T if source.transposed else values
    return weights


def matrix_weights(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Weights of one quantized matrix as [outputs, inputs], C-contiguous.

    Raises
    ------
    InputError
        If it is broken, or a value is out of float32's range.
    """
    stored = checkpoint.read(name)
    with located(f"{checkpoint.path}: tensor {name!r}"):
        return np.ascontiguousarray(reconstruct(stored))


def _scaled_weights(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Weights of an FP8 tensor that was left as it came, with its scales."""
    infos = {}
    for one in (name, *(name + end for end in SCALE_SUFFIXES)):
        if one in checkpoint.raw_names:
            raw = checkpoint.raw_info(one)
            infos[one] = TensorInfo(one, raw.shape, raw.dtype)
    blocks = RecordedSource.of_config(checkpoint.config).weight_block_size
    described = {"quantization_config": {"weight_block_size": blocks}}
    scaling = find_scales(infos, described, checkpoint.path)[name]
    scale = checkpoint.read_raw(scaling.scale)
    return apply_scale(checkpoint.read_raw(name), scale, scaling.block)


def _raw_weights(checkpoint: Checkpoint, name: str, where: str) -> NDArray[np.float32]:
    dtype = checkpoint.raw_info(name).dtype
    if dtype in FP8_TYPES:
        return _scaled_weights(checkpoint, name)
    if dtype not in FLOAT_TYPES:
        expected = ", ".join(FLOAT_TYPES)
        raise InputError(f"{where}: field 'dtype': {dtype}, expected one of {expected}")
    values = checkpoint.read_raw(name)
    with located(where):
        return as_float32(values)
