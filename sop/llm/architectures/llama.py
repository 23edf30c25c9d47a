"""GGUF files of the architecture ``llama``: configuration and tensor names."""

from typing import Any

from sop.files.gguf_file import GgufFile
from sop.llm.gguf_layout import GgufFields, GgufLayout
from sop.llm.packages import require

__all__ = ["layout"]

# Linear layers and norms of one block: names in a GGUF file and in transformers.
_GGUF_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# Metadata that say what a llama model computes. Any other is refused, as it might change that.
_LLAMA_KEYS = {
    f"llama.{key}"
    for key in (
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    )
}
_DEFAULT_ROPE_BASE = 10000.0  # what llama.cpp takes where the file has none


def layout(fields: GgufFields, file: GgufFile) -> GgufLayout:
    """Read the configuration and tensor names of an open file.

    Raises
    ------
    InputError
        If it has metadata or tensors that are not known, or transformers is not installed.
    """
    config = _config(fields, file)
    parameters = _parameter_names(fields, config, file)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rotary = {name: heads[part] for name in parameters if (part := _block_part(name)) in heads}
    return GgufLayout("LlamaForCausalLM", config, parameters, rotary)


def _block_part(name: str) -> str:
    """What a tensor is in its block, such as ``attn_q``; empty if it is in none."""
    return name.split(".")[2] if name.startswith("blk.") else ""


def _config(fields: GgufFields, file: GgufFile) -> Any:
    for key in file.metadata:
        if key.startswith("llama.") and key not in _LLAMA_KEYS:
            raise fields.error(key, "not supported; it may change what the model computes")
    heads = fields.count("llama.attention.head_count")
    hidden = fields.count("llama.embedding_length")
    if hidden % (2 * heads):
        raise fields.error("llama.attention.head_count", f"{heads} heads in {hidden} channels")
    head_keys = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    for key in (f"llama.{key}" for key in head_keys):
        if fields.has(key) and fields.count(key) != hidden // heads:
            raise fields.error(key, f"expected {hidden // heads}, the channels of a head")
    kv_key = "llama.attention.head_count_kv"
    kv_heads = fields.count(kv_key) if fields.has(kv_key) else heads
    if heads % kv_heads:
        raise fields.error(kv_key, f"{kv_heads} does not divide {heads} heads")
    base_key = "llama.rope.freq_base"
    base = fields.positive(base_key) if fields.has(base_key) else _DEFAULT_ROPE_BASE
    if "token_embd.weight" not in file.tensors:
        raise fields.error("token_embd.weight", "no such tensor")
    return require("transformers").LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=fields.count("llama.feed_forward_length"),
        num_hidden_layers=fields.count("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=fields.count("llama.context_length"),
        rms_norm_eps=fields.positive("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _parameter_names(fields: GgufFields, config: Any, file: GgufFile) -> dict[str, str]:
    """Name in transformers of every tensor of the file; refuses a file with more or fewer."""
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for block in range(config.num_hidden_layers):
        for part, module in (_GGUF_LINEARS | _GGUF_NORMS).items():
            names[f"blk.{block}.{part}.weight"] = f"model.layers.{block}.{module}.weight"
    names["output_norm.weight"] = "model.norm.weight"
    if not config.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for name in names.keys() ^ file.tensors.keys():
        problem = "not in this file" if name in names else "not known in a llama model"
        raise fields.tensor_error(name, problem)
    return {name: names[name] for name in file.tensors}
