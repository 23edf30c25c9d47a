"""A language model that runs in PyTorch on the CPU, with the tensor names of its file.

Two sources: a GGUF file of the ``llama`` architecture, whose tensors come through the strict
reader :mod:`sop.gguf_file`, and a Hugging Face folder, which ``transformers`` loads from
safetensors files only, without the network and without code from the folder.

PyTorch and transformers are imported when they are needed (extra ``llm``), never before.
"""

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from sop.gguf_file import GgufFile
from sop.models import resolve_model

__all__ = [
    "LlamaLayout",
    "TorchModel",
    "gguf_tokenizer",
    "llama_layout",
    "open_torch_model",
    "require",
]

_INSTALL = "pip install -c constraints.txt 'scaled-outer-product[llm]'"
_MAX_REASON = 300  # characters of another program's message that an error quotes

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

_HF_BLOCK = re.compile(r"(?:^|\.)layers?\.\d+\.")
# The files of a Hugging Face folder that decide what the model computes.
_HF_SUFFIXES = (".json", ".model", ".safetensors", ".txt")


def require(package: str) -> ModuleType:
    """Import a package of the extra ``llm``.

    Raises
    ------
    InputError
        If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        problem = f"needs the Python package {error.name!r}; install the llm extra: {_INSTALL}"
        raise InputError(f"running a model {problem}") from error


class TorchModel:
    """A causal language model in float32 on the CPU; made by :func:`open_torch_model`.

    Attributes
    ----------
    path : Path
        The GGUF file or Hugging Face folder.
    sha256 : str
        Hash of everything in it that decides what the model computes, hexadecimal.
    module : transformers.PreTrainedModel
        In evaluation mode.
    linears : Mapping of str to torch.nn.Linear
        The linear layers of the decoder blocks by the name of their weight in the file, such as
        ``"blk.3.attn_q.weight"`` or ``"model.layers.3.self_attn.q_proj.weight"``.
    """

    def __init__(
        self,
        path: Path,
        sha256: str,
        module: Any,
        linears: Mapping[str, Any],
        encode: Callable[[str], list[int]],
        rotary_heads: Mapping[str, int],
    ) -> None:
        self.path = path
        self.sha256 = sha256
        self.module = module
        self.linears = MappingProxyType(dict(linears))
        self._encode = encode
        self._rotary_heads = rotary_heads

    @property
    def context_length(self) -> int:
        """Longest window the model was made for, in tokens."""
        return int(self.module.config.max_position_embeddings)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text, without any tokens added at its ends.

        Raises
        ------
        InputError
            If the tokenizer gives an id that the model has no embedding for.
        """
        ids = np.array(self._encode(text), dtype=np.int64)
        rows = self.module.get_input_embeddings().weight.shape[0]
        if ids.size and int(ids.max()) >= rows:
            problem = f"tokenizer gives token {ids.max()}, the model has {rows} embeddings"
            raise InputError(f"{self.path}: {problem}")
        return ids

    def weight(self, name: str) -> NDArray[np.float32]:
        """Weights of a linear layer as they are now, a copy.

        Parameters
        ----------
        name : str
            A key of `linears`.

        Returns
        -------
        weights : float32 array, shape (outputs, inputs)
            With the rows in the order of the file, as :meth:`set_weight` takes them.
        """
        weights: NDArray[np.float32] = self.linears[name].weight.detach().numpy()
        if name in self._rotary_heads:
            return _to_alternating(weights, self._rotary_heads[name])
        return weights.copy()

    def set_weight(self, name: str, weights: NDArray[np.float32]) -> None:
        """Replace the weights of a linear layer.

        Parameters
        ----------
        name : str
            A key of `linears`.
        weights : float32 array, shape (outputs, inputs)
            With the rows in the order of the file. (llama.cpp stores those of ``attn_q`` and
            ``attn_k`` in another order than transformers; this converts them.)
        """
        torch = require("torch")
        if name in self._rotary_heads:
            weights = _to_half_split(weights, self._rotary_heads[name])
        with torch.no_grad():
            self.linears[name].weight.copy_(torch.from_numpy(weights))

    def run(self, ids: NDArray[np.int64]) -> Any:
        """Run the decoder blocks over one window of tokens, at positions from 0 on.

        Returns
        -------
        states : torch.Tensor
            What the output layer would read: float32, shape (tokens, channels).
        """
        torch = require("torch")
        with torch.inference_mode():
            # The base model has no output layer; `logits` is that.
            output = self.module.base_model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
            return output.last_hidden_state[0]

    def logits(self, states: Any) -> Any:
        """Run the output layer.

        Parameters
        ----------
        states : torch.Tensor
            What :meth:`run` returned, or some of its rows.

        Returns
        -------
        logits : torch.Tensor
            float32, shape (tokens, vocabulary). Some architectures go on to scale or cap them;
            :func:`sop.evaluation.evaluate` refuses those.
        """
        with require("torch").inference_mode():
            return self.module.get_output_embeddings()(states)

    @contextmanager
    def watching(self, names: Sequence[str], observe: Callable[[str, Any], None]) -> Iterator[None]:
        """Within this context, call `observe` with the input of each layer before it runs.

        Parameters
        ----------
        names : sequence of str
            Keys of `linears`.
        observe : callable
            Gets the name and the input, a float32 tensor of shape (1, tokens, inputs). Layers that
            get one and the same input get the same tensor object.
        """

        def forward(name: str, module: Any, args: tuple[Any, ...]) -> None:
            observe(name, args[0])

        handles = [
            self.linears[name].register_forward_pre_hook(partial(forward, name)) for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def open_torch_model(path: str | Path) -> TorchModel:
    """Load a model with its tokenizer.

    Parameters
    ----------
    path : str or Path
        A ``.gguf`` file of the architecture ``llama``, a folder in the layout of Hugging Face, or
        a name (:func:`sop.models.resolve_model`).

    Raises
    ------
    InputError
        If it is neither, the model is of a kind that is not supported, it is broken, or the extra
        ``llm`` is not installed.
    OSError
        If a file cannot be read.
    """
    for package in ("torch", "transformers"):
        require(package)
    path = resolve_model(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path}: expected a .gguf file or a Hugging Face folder")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return _open_gguf(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON]


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------ Hugging Face folder


def _open_folder(path: Path) -> TorchModel:
    transformers = require("transformers")
    files = sorted(file for file in path.iterdir() if file.suffix in _HF_SUFFIXES)
    if not any(file.suffix == ".safetensors" for file in files):
        raise InputError(f"{path}: no .safetensors file in this folder")
    local = {"local_files_only": True, "trust_remote_code": False}
    transformers.utils.logging.disable_progress_bar()
    try:
        module, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype="float32", output_loading_info=True, **local
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
    except Exception as error:  # whatever transformers makes of a folder it cannot use
        raise InputError(f"{path}: transformers cannot load it: {_one_line(error)}") from error
    # transformers only warns about these, and puts random numbers where weights are missing.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise InputError(f"{path}: {problem.replace('_', ' ')}: {sorted(info[problem])[0]!r}")
    linear = require("torch").nn.Linear
    linears = {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, linear) and _HF_BLOCK.search(name)
    }
    if not linears:
        raise InputError(f"{path}: model has no linear layers in blocks called 'layers'")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_file_sha256(file)}\n".encode())

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return TorchModel(path, digest.hexdigest(), module.eval(), linears, encode, {})


# --------------------------------------------------------------------------------------- GGUF file


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
            return _to_half_split(weights, self.rotary_heads[name])
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


def _open_gguf(path: Path) -> TorchModel:
    file = GgufFile(path)
    try:
        layout = llama_layout(path, file)
        module = require("transformers").LlamaForCausalLM(layout.config).eval()
        layers = dict(module.named_modules())
        linears = {
            name: layers[parameter.removesuffix(".weight")]
            for name, parameter in layout.parameters.items()
            if _block_part(name) in _GGUF_LINEARS
        }
        tokenizer = gguf_tokenizer(path, file)

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return ids

        sha256 = _file_sha256(path)
        model = TorchModel(path, sha256, module, linears, encode, layout.rotary_heads)
        _load_weights(model, file, layout.parameters)
    finally:
        file.close()
    return model


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
        if name in model.linears:
            model.set_weight(name, weights)
        else:
            with torch.no_grad():
                target.copy_(torch.from_numpy(weights))


def _to_half_split(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection: order of llama.cpp to that of transformers.

    Rotary embedding turns pairs of channels. Of a head with d channels, llama.cpp pairs channels
    (2i, 2i + 1), transformers (i, i + d/2). Source: ``LlamaModel.permute`` in llama.cpp's
    ``convert_hf_to_gguf.py`` is the inverse of this.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _to_alternating(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Inverse of :func:`_to_half_split`."""
    rows, columns = weights.shape
    halves = weights.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


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
        raise fields.error("tokenizer.ggml.merges", _one_line(error)) from error
    split = tokenizers.pre_tokenizers  # as llama.cpp does for "smollm": every digit for itself
    tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, token_type, strict=True) if kind == _CONTROL_TOKEN]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
