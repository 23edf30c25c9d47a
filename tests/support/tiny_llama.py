"""A tiny Llama with random weights, as a Hugging Face folder and as a GGUF file.

For tests that have the extra ``llm``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from sop.llm.packages import require

Float32 = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]

Change = Callable[[dict[str, Any], Arrays], None]

HIDDEN, INNER, HEADS, KV_HEADS, BLOCKS, VOCABULARY = 32, 48, 4, 2, 2, 256
EPSILON, ROPE_BASE = 1e-5, 500.0

# Parts of a block in the order in which transformers registers them.
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def byte_tokens() -> list[str]:
    """One token for every byte, in the alphabet of byte-level BPE."""
    tokens: list[str] = sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    return tokens


def save_tiny_llama(
    path: Path,
    *,
    tied: bool,
    norm_spread: float,
    change: Callable[[str, Float32], None] = lambda name, values: None,
) -> Path:
    """Write the folder, with a tokenizer; `change` edits the weights of each parameter.

    Matrices are normal with deviation 0.3, norms with `norm_spread` around 1.
    """
    torch, transformers, tokenizers = map(require, ("torch", "transformers", "tokenizers"))
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 2 else norm_spread
            values = rng.normal(parameter.ndim == 1, scale, parameter.shape).astype(np.float32)
            change(name, values)
            parameter.copy_(torch.from_numpy(values))
    model.save_pretrained(path)
    vocabulary = {token: index for index, token in enumerate(byte_tokens())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def llama_cpp_rows(weights: Float32, heads: int) -> Float32:
    """Rows in llama.cpp's order: those of the two halves of a head alternate."""
    rows = weights.shape[0] // heads
    order = [
        head * rows + half * rows // 2 + index
        for head in range(heads)
        for index in range(rows // 2)
        for half in (0, 1)
    ]
    return weights[order]


def heads_of(name: str) -> int:
    """Heads whose rows stand in llama.cpp's order in a matrix of a GGUF file; 0: in none."""
    return {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2], 0)


def gguf_names() -> dict[str, str]:
    """Names in a GGUF file by those in the folder, without an output layer of its own."""
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    names |= {
        f"model.layers.{block}.{part}.weight": f"blk.{block}.{ours}.weight"
        for block in range(BLOCKS)
        for part, ours in PARTS.items()
    }
    return names | {"model.norm.weight": "output_norm.weight"}


def gguf_metadata() -> dict[str, Any]:
    """What a GGUF file says of the model, but for its tokens."""
    return {
        "llama.block_count": BLOCKS,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": ROPE_BASE,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }


def gguf_arrays(weights: Arrays, names: dict[str, str]) -> Arrays:
    """The weights of a folder under their names in a GGUF file, rows in llama.cpp's order."""
    return {
        ours: llama_cpp_rows(weights[name], heads) if (heads := heads_of(ours)) else weights[name]
        for name, ours in names.items()
    }


def write_gguf_file(path: Path, metadata: dict[str, Any], tensors: Arrays) -> Path:
    """Write a GGUF file by the gguf package."""
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    add: dict[type, Callable[..., Any]] = {
        str: writer.add_string, float: writer.add_float32, int: writer.add_uint32,
    }  # fmt: skip
    for key, value in metadata.items():
        method: Callable[..., Any] = add.get(type(value), writer.add_array)
        method(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf(path: Path, folder: Path, change: Change) -> Path:
    """The model of a folder as a GGUF file; `change` edits metadata and tensors before."""
    metadata = gguf_metadata() | {
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "tokenizer.ggml.tokens": byte_tokens(),
        "tokenizer.ggml.token_type": [1] * VOCABULARY,
        "tokenizer.ggml.merges": ["t h", "th e"],
    }
    # Instead of two letters that no text of the tests has.
    metadata["tokenizer.ggml.tokens"][0:2] = ["the", "th"]
    tensors = gguf_arrays(load_file(folder / "model.safetensors"), gguf_names())
    change(metadata, tensors)
    return write_gguf_file(path, metadata, tensors)


def no_merges(metadata: dict[str, Any], tensors: Arrays) -> None:
    """A change: letters alone, whatever the text."""
    metadata["tokenizer.ggml.tokens"] = byte_tokens()
    metadata["tokenizer.ggml.merges"] = ["! !"]
    metadata["tokenizer.ggml.tokens"][200] = "!!"  # merges must give tokens
