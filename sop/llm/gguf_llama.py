"""GGUF files of the architecture ``llama``: configuration, tensor names and tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from sop.files.choice import linear_matrices
from sop.files.gguf_file import GgufFile
from sop.files.models import open_model
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import one_line, require
from sop.llm.places import Place, to_half_split

__all__ = ["LlamaLayout", "gguf_tokenizer", "llama_layout", "open_gguf"]

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
_CONTROL_TOKEN = 3  # GGUF token type of <|endoftext|> and the like


class _Fields:
    """Metadata of a GGUF file, each value checked on reading."""

    def __init__(self, path: Path, file: GgufFile) -> None:
        self._path = path
        self._values = file.metadata

    def error(self, key: str, problem: str) -> InputError:
        """Return the error for the metadata entry `key`."""
        return InputError(f"{self._path}: field '{key}': {problem}")

    def has(self, key: str) -> bool:
        """Whether the file has a single value of this name."""
        return key in self._values

    def string(self, key: str, expected: str) -> None:
        """Refuse any value but `expected`."""
        value = self._values.get(key)
        if value != expected:
            raise self.error(key, f"{value!r} is not supported, expected {expected!r}")

    def count(self, key: str) -> int:
        """Positive integer."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, f"expected a positive integer, got {value!r}")
        return value

    def positive(self, key: str) -> float:
        """Positive, finite number."""
        value = self._values.get(key)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self.error(key, f"expected a positive number, got {value!r}")
        return value


@dataclass(frozen=True)
class LlamaLayout:
    """How a GGUF file of the llama architecture maps to transformers; from :func:`llama_layout`.

    Attributes
    ----------
    config : transformers.LlamaConfig
    parameters : Mapping of str to str
        Name in transformers of every tensor of the file, in file order.
    rotary_heads : Mapping of str to int
        Heads of each tensor whose rows are in another order in transformers.
    """

    config: Any
    parameters: Mapping[str, str]
    rotary_heads: Mapping[str, int]

    def to_parameter(self, name: str, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights of a tensor of the file, with the rows in the order of transformers."""
        if name in self.rotary_heads:
            return to_half_split(weights, self.rotary_heads[name])
        return weights


def llama_layout(path: Path, file: GgufFile) -> LlamaLayout:
    """Read the configuration and tensor names of an open GGUF file.

    Raises
    ------
    InputError
        If it is no llama, has metadata or tensors that are not known, or transformers is not
        installed.
    """
    config = _llama_config(_Fields(path, file), file)
    parameters = _parameter_names(path, config, file)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rotary = {name: heads[part] for name in parameters if (part := _block_part(name)) in heads}
    return LlamaLayout(config, parameters, rotary)


def _block_part(name: str) -> str:
    """What a tensor is in its block, such as ``attn_q``; empty if it is in none."""
    return name.split(".")[2] if name.startswith("blk.") else ""


def open_gguf(path: Path) -> TorchModel:
    """Load a model; see :func:`sop.llm.opening.open_torch_model`."""
    with open_model(path) as opened:
        sha256, layers = opened.fingerprint(), [one.name for one in linear_matrices(opened)]
    file = GgufFile(path)
    try:
        layout = llama_layout(path, file)
        module = require("transformers").LlamaForCausalLM(layout.config).eval()
        model = TorchModel(
            path, sha256, module, _places(layout, file), _tokenizer(path, file), layers=layers
        )
        _load_weights(model, file, layout.parameters)
    finally:
        file.close()
    return model


def _places(layout: LlamaLayout, file: GgufFile) -> dict[str, Place]:
    places = {}
    for name, parameter in layout.parameters.items():
        shape = file.tensors[name].shape
        if len(shape) == 2:
            heads = layout.rotary_heads.get(name, 0)
            places[name] = Place(parameter, None, False, 0, 1, (shape[0], shape[1]), heads)
    return places


def _tokenizer(path: Path, file: GgufFile) -> Tokenizer:
    tokenizer = gguf_tokenizer(path, file)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    if type(bos) is not int or not 0 <= bos < tokenizer.get_vocab_size():
        return Tokenizer(encode)
    # llama.cpp adds none for a tokenizer of this kind unless the file says so.
    adds = file.metadata.get("tokenizer.ggml.add_bos_token") is True
    return Tokenizer(encode, (bos,) if adds else (), bos)


def _llama_config(fields: _Fields, file: GgufFile) -> Any:
    fields.string("general.architecture", "llama")
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


def _parameter_names(path: Path, config: Any, file: GgufFile) -> dict[str, str]:
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
        raise InputError(f"{path}: tensor {name!r}: {problem}")
    return {name: names[name] for name in file.tensors}


def _load_weights(model: TorchModel, file: GgufFile, parameters: Mapping[str, str]) -> None:
    torch = require("torch")
    targets = dict(model.module.named_parameters())
    for name, parameter in parameters.items():
        target = targets[parameter]
        if tuple(target.shape) != file.tensors[name].shape:
            where = f"{model.path}: tensor {name!r}: field 'dims'"
            problem = f"shape {file.tensors[name].shape}, expected {tuple(target.shape)}"
            raise InputError(f"{where}: {problem}")
        weights = file.read_tensor(name)
        if name in model.places:
            model.set_weight(name, weights)
        else:
            with torch.no_grad():
                target.copy_(torch.from_numpy(weights))


def gguf_tokenizer(path: Path, file: GgufFile) -> Any:
    """Byte-level BPE tokenizer from the metadata of an open GGUF file.

    Returns
    -------
    tokenizer : tokenizers.Tokenizer
        Encodes and decodes text as llama.cpp does for this file.

    Raises
    ------
    InputError
        If it is of another kind or broken, or the extra ``llm`` is not installed.
    """
    from gguf import GGUFReader

    fields = _Fields(path, file)
    fields.string("tokenizer.ggml.model", "gpt2")
    fields.string("tokenizer.ggml.pre", "smollm")
    # GgufFile drops arrays. This reader trusts what it reads, but GgufFile has checked the header.
    reader = GGUFReader(path)

    def array(part: str, kind: type) -> list[Any]:
        key = f"tokenizer.ggml.{part}"
        field = reader.get_field(key)
        try:
            values = None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise fields.error(key, "not UTF-8") from error
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise fields.error(key, f"expected an array of {kind.__name__}")
        return values

    tokens, kinds, merges = array("tokens", str), array("token_type", int), array("merges", str)
    return _byte_level_bpe(fields, tokens, kinds, merges)


def _byte_level_bpe(
    fields: _Fields, tokens: list[str], token_type: list[int], merges: list[str]
) -> Any:
    tokenizers = require("tokenizers")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise fields.error("tokenizer.ggml.tokens", "a token is there twice")
    if len(token_type) != len(tokens):
        raise fields.error("tokenizer.ggml.token_type", f"not one for each of {len(tokens)} tokens")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # tokenizers raises no narrower class
        raise fields.error("tokenizer.ggml.merges", one_line(error)) from error
    split = tokenizers.pre_tokenizers  # as llama.cpp does for "smollm": every digit for itself
    tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, token_type, strict=True) if kind == _CONTROL_TOKEN]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
