"""From a checkpoint to an ordinary safetensors file."""

from functools import partial
from pathlib import Path

from golden.checkpoint import Checkpoint
from golden.container_file import OutgoingTensor
from sop.files.safetensors_file import (
    FOR_TRANSFORMERS,
    float_tensor,
    write_safetensors,
)
from sop.files.weights import checkpoint_weights
from sop.shared.marks import DECODED_KEY
from sop.shared.progress import Report

__all__ = ["decode_checkpoint", "decoded_tensor", "raw_tensor"]


def decode_checkpoint(checkpoint: Checkpoint, path: Path, dtype: str, report: Report) -> None:
    """Write the weights that a checkpoint stands for; memory holds one tensor.

    Parameters
    ----------
    checkpoint : Checkpoint
    path : Path
        File to write or replace.
    dtype : str
        Type of the tensors that are quantized in the checkpoint, a key of
        :data:`sop.files.safetensors_file.DTYPES`; the others are copied byte by byte.
    report : callable
        See :data:`sop.shared.progress.Report`; counts tensors.

    Raises
    ------
    InputError
        If a tensor is broken, or a weight does not fit `dtype`.
    """
    tensors = [decoded_tensor(checkpoint, name, dtype) for name in checkpoint.model_tensors]
    tensors += [raw_tensor(checkpoint, name) for name in checkpoint.raw_names]
    write_safetensors(path, tensors, report, metadata={**FOR_TRANSFORMERS, DECODED_KEY: "1"})


def decoded_tensor(checkpoint: Checkpoint, name: str, dtype: str) -> OutgoingTensor:
    """Weights of a tensor of the model, quantized or of floats, as a key of `DTYPES`."""
    if name in checkpoint.model_tensors:
        info = checkpoint.info(checkpoint.model_tensors[name][0])
        shape = info.shape if info.source is None else info.source.model_shape(info.shape)
    else:
        shape = checkpoint.raw_info(name).shape
    return float_tensor(name, shape, dtype, partial(checkpoint_weights, checkpoint, name))


def raw_tensor(checkpoint: Checkpoint, name: str) -> OutgoingTensor:
    """Tensor that is stored as it came, byte by byte."""
    chunks = partial(checkpoint.raw_chunks, name)
    return OutgoingTensor(name, checkpoint.raw_info(name), chunks)
