"""Models that other programs have quantized, known by names, types and configuration.

Their weights are codes that mean nothing without the rules of their format, so such a model is
refused as soon as it is opened. Exceptions are FP8 with scales
(:mod:`sop.files.scaled_weights`) and the MXFP4 experts of gpt-oss (:mod:`sop.files.mxfp4`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from golden.errors import InputError
from sop.files.quantization_config import described_quantization
from sop.files.roles import block_number
from sop.files.scaled_weights import SCALE_SUFFIXES, is_fp8
from sop.files.tensor_info import TensorInfo

__all__ = ["check_foreign"]

# Last parts of names (without ".weight") that only these formats have.
_MARKS: tuple[tuple[str, str], ...] = (
    (r"qweight|qzeros|g_idx", "GPTQ or AWQ"),
    (r"absmax|nested_absmax|quant_map|nested_quant_map|quant_state.*|SCB", "bitsandbytes"),
    (r"bitsandbytes__\w+", "bitsandbytes"),
    (r"weight_packed", "compressed-tensors (packed)"),
    (r"compressed|bitmask", "compressed-tensors (sparse)"),
    (r"weight_scale_2|weight_global_scale", "NVFP4"),
    (r"_weight_\w+", "torchao"),
    (r"Qidxs\w*", "QuIP#"),
    (r"trellis|suh|svh", "EXL3 (ExLlamaV3)"),
    (r"(\w+_)?centroids", "VPTQ"),
    (r"weight_scales", "EETQ"),
    (r"_data|_scale", "Quanto"),
)
_CODE_MARKS = (  # of integers only
    (r"codes", "AQLM"),
    (r"W_q", "HQQ"),
    (r"q_(weight|scale|groups|group_map|perm|invperm)", "EXL2 (ExLlamaV2)"),
    (r"(\w+_)?indices", "VPTQ"),
    (r"(\w+_)?blocks", "MXFP4 in another layout than that of transformers"),
)
_CODES = (
    "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0",
)  # fmt: skip
# Integers of two or more axes that models have of their own: masks, positions and other indices of
# tokens, biases of attention that are masks (GPT-2), the experts of each token (DeepSeek).
_HARMLESS = r"\w*masks?|bias|masked_bias|\w*(position|token|relative)\w*|tid2eid|\w*_ids"
# Ends of names of what weights are computed from.
_PARTS_OF_WEIGHTS = (
    (r"weight_[gv]|parametrizations\.weight\.original[01]", "weight norm (length and direction)"),
    (r"weight_orig|parametrizations\.weight\.original", "what PyTorch computes weights from"),
)
_ADVICE = "take the model as it was before it was quantized"
_READ_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "finegrained_fp8", "mxfp4")


def check_foreign(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    path: Path,
    config_path: Path,
    *,
    readable: bool,
) -> None:
    """Refuse the model of another quantizer, and weights in parts.

    Any tensor of integers with two or more axes in a block is taken for codes, unless it is known
    to be something else (masks, indices of tokens).

    Parameters
    ----------
    tensors : mapping of str to TensorInfo
    config : mapping
        The content of ``config.json``; empty if there is none.
    path : Path
        Of the model, for errors.
    config_path : Path
        Of ``config.json``, for errors.
    readable : bool
        Whether the model has weights of a type that is read with its scales: FP8 or MXFP4.

    Raises
    ------
    InputError
        If it is one; the message names the format, and the tensor or the field that tells it.
        If a field of quantization is no object.
    """
    for field, described in described_quantization(config, config_path):
        default = "MLX" if field.rpartition(".")[2] == "quantization" else "unknown"
        method = str(described.get("quant_method", default))[:80]
        if not (readable and method.lower() in _READ_METHODS):
            problem = f"the weights were quantized by {method!r}, which is not read; {_ADVICE}"
            raise InputError(f"{config_path}: field {field[-200:]!r}: {problem}")
    for name, info in tensors.items():
        kind = _foreign_kind(name, info, tensors)
        if kind:
            problem = f"is of weights quantized by {kind}, which is not read; {_ADVICE}"
            raise InputError(f"{path}: tensor {name!r}: {problem}")
        _check_whole(name, info, path)


def _check_whole(name: str, info: TensorInfo, path: Path) -> None:
    """Refuse matrices that are stored as something that they are computed from."""
    if sum(size > 1 for size in info.shape) != 2:  # vectors and convolutions are only copied
        return
    for pattern, kind in _PARTS_OF_WEIGHTS:
        if re.search(rf"(^|\.)({pattern})$", name):
            problem = f"is a part of a weight: {kind}; merge the parts into one '.weight' first"
            raise InputError(f"{path}: tensor {name!r}: {problem}")


def _foreign_kind(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str:
    stem = name.removesuffix(".weight")
    last, last_of_stem = (text.rpartition(".")[2] for text in (name, stem))
    integers = info.source_type in _CODES
    for pattern, kind in (*_MARKS, *(_CODE_MARKS if integers else ())):
        if re.fullmatch(pattern, last) or re.fullmatch(pattern, last_of_stem):
            return kind
    if integers and f"{stem}.scales" in tensors:
        return "MLX" if f"{stem}.biases" in tensors else "GPTQ or AWQ"
    if info.source_type not in ("F8_E4M3", "F8_E5M2") and len(info.shape) > 1:
        for end in SCALE_SUFFIXES:
            if name + end in tensors:
                return f"an unknown program ({info.source_type} with {(last + end)!r})"
    if integers and _may_be_codes(name, last, info.shape) and not _is_scale(name, tensors):
        return f"an unknown program ({info.source_type} of shape {list(info.shape)})"
    return ""


def _may_be_codes(name: str, last: str, shape: tuple[int, ...]) -> bool:
    if last == "weight":
        return max(shape, default=1) > 1
    in_block = block_number(name) is not None and len(shape) > 1
    return in_block and not re.fullmatch(_HARMLESS, last)


def _is_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether it is named as the scales of FP8 weights, which are checked with these."""
    weights = (name.removesuffix(end) for end in SCALE_SUFFIXES if name.endswith(end))
    return any(one in tensors and is_fp8(tensors[one]) for one in weights)
