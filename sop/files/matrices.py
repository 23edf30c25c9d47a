"""The matrices of a model, each as [outputs, inputs], whichever way round its file holds it.

GPT-2 and its relatives hold linear weights as [inputs, outputs] (``Conv1D`` of transformers), and
so do the stacked experts of gpt-oss and Llama 4. Nothing in a file says so. It follows from the
shapes that must fit together: of a weight and its bias, of an expert's two projections, of both and
the width of the model; only where those are square, from ``model_type`` in ``config.json``.
"""

from collections.abc import Mapping
from typing import Any

from sop.files.mxfp4 import TYPE_NAME
from sop.files.roles import Role, tensor_role
from sop.files.tensor_info import Matrix, TensorInfo

__all__ = ["list_matrices", "orientation_of"]

_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
# What transformers builds of its Conv1D, and experts as [experts, inputs, outputs].
_CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_TRANSPOSED_EXPERTS = (
    "aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter",
    "qwen3_vl_moe", "qwen3_vl_moe_text",
)  # fmt: skip
_INTO_EXPERT = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "input_linear", "fc1")
_OUT_OF_EXPERT = ("down_proj", "w2", "output_linear", "fc2")
_STACKS = (Role.EXPERTS, Role.HEADS)


def list_matrices(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], *, always_as_is: bool
) -> dict[str, Matrix]:
    """Return all matrices by name, in the order of the tensors.

    Those are the tensors of two axes, and the slices of the stacked ones of three, unless it cannot
    be told which way round they are held (:func:`orientation_of`).

    Parameters
    ----------
    tensors : mapping of str to TensorInfo
    config : mapping
        The content of ``config.json``; empty if there is none.
    always_as_is : bool
        Whether every tensor is known to be [outputs, inputs], as in GGUF files.
    """
    orientation = {} if always_as_is else orientation_of(tensors, config)
    found = {}
    for name, info in tensors.items():
        role = tensor_role(name, info.shape)
        stacked = len(info.shape) == 3 and role in (*_STACKS, Role.UNKNOWN)
        if not (stacked or len(info.shape) == 2) or not info.weights:
            continue
        transposed = orientation.get(name, False)
        if transposed is not None:
            for matrix in Matrix.of_tensor(info, transposed=transposed):
                found[matrix.name] = matrix
    return found


def orientation_of(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> dict[str, bool | None]:
    """Return whether tensors are held as [inputs, outputs]; None where that cannot be told.

    Tensors that are not in the result are [outputs, inputs], as nearly all are.
    """
    width = _model_width(tensors, config)
    model_types = _model_types(config)
    return _of_linears(tensors, width, model_types) | _of_experts(tensors, width, model_types)


def _model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """Every ``model_type`` of a configuration, which may have parts for text and images."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return frozenset(
        part["model_type"] for part in parts if isinstance(part.get("model_type"), str)
    )


def _model_width(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> int | None:
    """Channels between the blocks."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("hidden_size", "n_embd", "d_model"):
                if type(part.get(key)) is int:
                    return int(part[key])
    for name, info in tensors.items():
        if len(info.shape) == 2 and tensor_role(name, info.shape) in (Role.EMBEDDING, Role.ROUTER):
            return info.shape[1]
    return None


def _last_part(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


# ----------------------------------------------------------------------------------- linear weights


def _of_linears(
    tensors: Mapping[str, TensorInfo], width: int | None, model_types: frozenset[str]
) -> dict[str, bool | None]:
    linears = [
        info
        for name, info in tensors.items()
        if len(info.shape) == 2 and tensor_role(name, info.shape) is Role.LINEAR
    ]
    found = {info.name: _by_bias(info, tensors) for info in linears}
    named = [info for info in linears if _last_part(info.name) in _CONV1D_NAMES]
    for info in named:
        if found[info.name] is None and _last_part(info.name) in ("c_attn", "c_fc"):
            found[info.name] = _by_input(info.shape, width)
    told = {found[info.name] for info in named} - {None}
    if len(told) == 1:
        rest = told.pop()
    else:  # nothing tells, or some are held one way and some the other
        rest = bool(model_types & {*_CONV1D_MODELS}) if model_types else None
    for info in named:
        if found[info.name] is None:
            found[info.name] = rest
    return {name: found[name] for name in found if found[name] is not None} | {
        info.name: found[info.name] for info in named
    }


def _by_bias(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool | None:
    """A bias is as long as there are outputs."""
    bias = tensors.get(f"{info.name.removesuffix('.weight')}.bias")
    if bias is None or len(bias.shape) != 1:
        return None
    rows, columns = (bias.shape[0] == size for size in info.shape)
    return columns if rows != columns else None


def _by_input(shape: tuple[int, ...], width: int | None) -> bool | None:
    """Of a matrix whose inputs are the channels between blocks."""
    first, second = (size == width for size in shape[-2:])
    return first if first != second else None


# ------------------------------------------------------------------------------------------ experts


def _of_experts(
    tensors: Mapping[str, TensorInfo], width: int | None, model_types: frozenset[str]
) -> dict[str, bool | None]:
    found: dict[str, bool | None] = {}
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        if len(info.shape) == 3 and tensor_role(name, info.shape) is Role.EXPERTS:
            groups.setdefault(name.removesuffix(".weight").rpartition(".")[0], []).append(info)
    for group in groups.values():
        answers = {_of_expert(info, group, width) for info in group} - {None}
        if len(answers) == 1:
            answer = answers.pop()
        else:
            answer = bool(model_types & {*_TRANSPOSED_EXPERTS}) if model_types else None
        found |= dict.fromkeys((info.name for info in group), answer)
    return found


def _of_expert(info: TensorInfo, group: list[TensorInfo], width: int | None) -> bool | None:
    if info.source_type == TYPE_NAME:
        return True
    part = _last_part(info.name)
    if part in _OUT_OF_EXPERT:
        by_input = _by_input(info.shape, width)  # here the outputs are the channels
        return None if by_input is None else not by_input
    if part not in _INTO_EXPERT:
        return None
    fused = part in ("gate_up_proj", "input_linear")
    for other in group:
        if fused and _last_part(other.name) in _OUT_OF_EXPERT:
            return _by_pair(info.shape, other.shape)
    return _by_input(info.shape, width)


def _by_pair(into: tuple[int, ...], out: tuple[int, ...]) -> bool | None:
    """An expert has twice as many outputs of gate and up together as inputs of down."""
    as_is = into[1] == 2 * out[2] and into[2] == out[1]
    turned = into[2] == 2 * out[1] and into[1] == out[2]
    return turned if as_is != turned else None
