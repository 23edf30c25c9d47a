"""Models that other programs have quantized, known by their names and configuration.

Their weights are codes that mean nothing without the rules of their format, so such a model is
refused as soon as it is opened. Exceptions are FP8 with scales (:mod:`sop.scaled_weights`) and the
MXFP4 experts of gpt-oss (:mod:`sop.mxfp4`).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from golden.errors import InputError
from sop.scaled_weights import SCALE_SUFFIXES
from sop.tensor_info import TensorInfo

__all__ = ["check_foreign"]

# Last parts of names that only these formats have.
_MARKS: tuple[tuple[str, str], ...] = (
    (r"qweight|qzeros|g_idx", "GPTQ or AWQ"),
    (r"absmax|nested_absmax|quant_map|nested_quant_map|quant_state.*|SCB", "bitsandbytes"),
    (r"bitsandbytes__\w+", "bitsandbytes"),
    (r"weight_packed", "compressed-tensors (packed)"),
    (r"weight_scale_2|weight_global_scale", "NVFP4"),
    (r"Qidxs", "QuIP#"),
    (r"weight_scales", "EETQ"),
    (r"_data|_scale", "Quanto"),
)
_CODE_MARKS = ((r"codes", "AQLM"), (r"W_q", "HQQ"), (r"\w+_blocks", "MXFP4"))  # of integers only
_CODES = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4")
_ADVICE = "take the model as it was before it was quantized"
_READ_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "finegrained_fp8", "mxfp4")


def check_foreign(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], path: Path, *, readable: bool
) -> None:
    """Refuse the model of another quantizer.

    Parameters
    ----------
    tensors : mapping of str to TensorInfo
    config : mapping
        The content of ``config.json``; empty if there is none.
    path : Path
        Of the model, for errors.
    readable : bool
        Whether the model has weights of a type that is read with its scales: FP8 or MXFP4.

    Raises
    ------
    InputError
        If it is one; the message names the format, and the tensor or the field that tells it.
    """
    for field, method in _declared(config):
        if not (readable and method.lower() in _READ_METHODS):
            problem = f"the weights were quantized by {method!r}, which is not read; {_ADVICE}"
            raise InputError(f"{path / 'config.json'}: field {field!r}: {problem}")
    for name, info in tensors.items():
        kind = _foreign_kind(name, info, tensors)
        if kind:
            problem = f"is of weights quantized by {kind}, which is not read; {_ADVICE}"
            raise InputError(f"{path}: tensor {name!r}: {problem}")


def _declared(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields of a configuration that describe quantized weights, and the method that they name."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for field in ("quantization_config", "compression_config", "quantization"):
            value = part.get(field)
            if isinstance(value, Mapping):
                method = value.get("quant_method", "MLX" if field == "quantization" else "unknown")
                yield field, str(method)[:80]


def _foreign_kind(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str:
    last = name.rpartition(".")[2]
    integers = info.source_type in _CODES
    for pattern, kind in (*_MARKS, *(_CODE_MARKS if integers else ())):
        if re.fullmatch(pattern, last):
            return kind
    stem = name.removesuffix(".weight")
    if integers and f"{stem}.scales" in tensors:
        return "MLX" if f"{stem}.biases" in tensors else "GPTQ or AWQ"
    if info.source_type not in ("F8_E4M3", "F8_E5M2") and len(info.shape) > 1:
        for end in SCALE_SUFFIXES:
            if name + end in tensors:
                return f"an unknown program ({info.source_type} with {(last + end)!r})"
    return ""
