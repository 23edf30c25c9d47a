"""What a tensor of a language model is, told by its name and shape.

Known are the names of GGUF files (``blk.3.attn_q.weight``) and of Hugging Face models
(``model.layers.3.self_attn.q_proj.weight``, ``transformer.h.3.…``, ``encoder.layer.3.…``).
"""

import re
from collections.abc import Mapping
from enum import Enum

__all__ = ["Role", "block_number", "tensor_role", "tensor_roles"]


class Role(Enum):
    """What a tensor is; the value is its name in messages."""

    LINEAR = "linear weight of a block"
    EXPERTS = "stacked experts"
    HEADS = "stacked matrices of attention heads"
    STACK = "stacked matrices of a layout that is not known"
    ROUTER = "router or gate of experts"
    NORM = "norm"
    CONVOLUTION = "convolution"
    POSITION = "position table"
    EMBEDDING = "embedding"
    HEAD = "output head"
    BIAS = "bias"
    STATE = "parameter of a recurrence"
    SCALE = "scale or attention sink"
    ADAPTER = "adapter (LoRA)"
    VECTOR = "vector or scalar"
    OUTSIDE = "matrix outside the blocks"
    UNKNOWN = "tensor of unknown use"


# Words of the last part of a name (without ".weight"); the first row that matches decides.
_BY_LAST_PART: tuple[tuple[Role, str], ...] = (
    (Role.NORM, r".*norm.*|(.*_)?ln(_.*|\d*)|rms(_.*|\d*)"),
    (Role.CONVOLUTION, r".*conv\w*|(.*_)?filter|dw|depthwise\w*"),
    (Role.POSITION, r".*pos(ition)?_?(emb|enc|table).*|embed_positions|wpe|rel_pos.*|attn_rel_b"),
    (Role.POSITION, r"relative_.*(position|bias).*|.*alibi.*|rope_.*|rotary.*|inv_freq"),
    (Role.SCALE, r"(.*_)?(scales?|gamma|beta|sinks?)"),
    (Role.BIAS, r"(.*_)?bias(es)?"),
    (Role.EMBEDDING, r".*embed.*|.*embd.*|wte|embed_in|token_types|tok_embeddings"),
    (Role.ROUTER, r".*router.*|ffn_gate_inp.*|gate_inp|wg|exp_probs_b|gating|gate_network|switch"),
    (Role.ROUTER, r"(shared_)?(moe|experts?)_gate|coefficient"),
    (Role.HEAD, r"lm_head|embed_out|output|score|classifier|head|shared_head(_head)?"),
    (Role.STATE, r"A_log|ssm_[ad]|time_(decay|first|maa|faaaa).*|.*coefs?"),
    (Role.STATE, r"time_mix_(decay|first|lerp|w\d|[agv]\d|[kr]_[akr]).*"),  # RWKV of llama.cpp
)
# A name with this in any part.
_BY_ANY_PART: tuple[tuple[Role, str], ...] = (
    (Role.ADAPTER, r"lora_.*|.*\.lora_[ab]"),
    (Role.ROUTER, r".*router.*"),
)
_ATTENTION_STACKS = re.compile(r"blk\.\d+\.attn_[kv]_b")  # DeepSeek's, of llama.cpp
_GATES = ("gate", "gating", "switch")
_MIXTURE = re.compile(r"(\w*_)?moe(_\w*)?")
_EXPERTS = re.compile(r"(^|\.)((\w*_)?experts(_\w+)?(\.|$)|ffn_\w*exps$)|(^|\.)(in|out)put_linear$")
_BESIDE_EXPERTS = re.compile(r"(.*)\.(?:\w*_)?experts[._].*")
_BLOCK = re.compile(r"(?:^|\.)(?:blk|(?:\w+_)?layers?|h|(?:res)?blocks?)\.([0-9]{1,9})\.")
_MATRIX_AXES, _STACK_AXES = 2, 3


def block_number(name: str) -> int | None:
    """Number of the decoder block that a tensor is of; None if it is in none."""
    found = _BLOCK.search(name)
    return None if found is None else int(found[1])


def tensor_role(name: str, shape: tuple[int, ...]) -> Role:
    """Role of a tensor.

    What is in a block, has two axes longer than 1 and no name that says otherwise is a linear
    weight; experts that are stacked in one tensor have three axes.

    Parameters
    ----------
    name : str
        As in the file.
    shape : tuple of int
        As in the file.
    """
    stem = name.removesuffix(".weight")
    named = _named_role(stem, shape)
    if named is not None:
        return named
    if sum(size > 1 for size in shape) < _MATRIX_AXES:
        return Role.VECTOR
    if block_number(name) is None:
        return Role.OUTSIDE if len(shape) == _MATRIX_AXES else Role.UNKNOWN
    experts = _EXPERTS.search(stem) is not None
    if len(shape) == _STACK_AXES:
        if experts or any(_MIXTURE.fullmatch(part) for part in stem.split(".")):
            return Role.EXPERTS
        return Role.HEADS if _ATTENTION_STACKS.fullmatch(stem) else Role.STACK
    if len(shape) == _MATRIX_AXES and (name != stem):
        return Role.LINEAR
    return Role.STACK if experts else Role.UNKNOWN


def tensor_roles(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Role]:
    """Role of each tensor of a model.

    As :func:`tensor_role`, but a gate beside experts (``mlp.gate.weight`` beside
    ``mlp.experts.0.up_proj.weight``) is their router even if there are as many experts as channels.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Shapes by name, of all tensors.
    """
    with_experts = {found[1] for name in shapes if (found := _BESIDE_EXPERTS.fullmatch(name))}
    roles = {}
    for name, shape in shapes.items():
        role = tensor_role(name, shape)
        if role is Role.LINEAR and any(parent in with_experts for parent in _gated(name)):
            role = Role.ROUTER
        roles[name] = role
    return roles


def _gated(name: str) -> list[str]:
    """What a gate in a name is the gate of: ``mlp`` of ``mlp.gate`` and ``mlp.gate.linear``."""
    parts = name.removesuffix(".weight").split(".")
    return [".".join(parts[:place]) for place, part in enumerate(parts) if part in _GATES]


def _named_role(stem: str, shape: tuple[int, ...]) -> Role | None:
    parts = stem.split(".")
    for role, words in _BY_ANY_PART:
        if any(re.fullmatch(words, part) for part in parts):
            return role
    for role, words in _BY_LAST_PART:
        if re.fullmatch(words, parts[-1], re.IGNORECASE):
            # Blocks have outputs too: of attention in BERT, of experts in Granite.
            return None if role is Role.HEAD and parts[-1] == "output" and len(parts) > 1 else role
    return Role.ROUTER if _is_gate_of_experts(parts, shape) else None


def _is_gate_of_experts(parts: list[str], shape: tuple[int, ...]) -> bool:
    """Whether a tensor says which experts a token goes to.

    Such a gate has one row for each expert; that of a dense layer or of one expert is a full
    projection under the same name.
    """
    if parts[-1] != "gate" and not any(part in _GATES for part in parts[:-1]):
        return False
    if len(shape) != _MATRIX_AXES or any(re.fullmatch(r"(\w*_)?experts?", part) for part in parts):
        return False
    if any(part.startswith("shared") for part in parts):
        return shape[0] < shape[1]
    return shape[0] < shape[1] or any(_MIXTURE.fullmatch(part) for part in parts)
