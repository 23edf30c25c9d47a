"""Opening models for PyTorch: from GGUF files and from folders, and what is refused.

Skipped where the extra ``llm`` is not installed.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from golden.errors import InputError
from sop.files.gguf_file import GgufFile
from sop.llm import architectures
from sop.llm.opening import open_torch_model
from tests.support.tiny_llama import (
    HIDDEN,
    VOCABULARY,
    Change,
    byte_tokens,
    no_merges,
    save_tiny_llama,
    write_gguf,
)

Float32 = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def folder(torch: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as a Hugging Face folder."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), tied=True, norm_spread=1.0)


def test_missing_extra_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(InputError, match=r"package 'torch'; install the llm extra: pip install"):
        open_torch_model(tmp_path)


def test_set_weight_takes_rows_as_in_the_file(
    torch: ModuleType, folder: Path, tmp_path: Path
) -> None:
    loaded = open_torch_model(write_gguf(tmp_path / "tiny.gguf", folder, no_merges))
    modules = dict(loaded.module.named_parameters())
    before = {name: modules[place.parameter].clone() for name, place in loaded.places.items()}
    file = GgufFile(tmp_path / "tiny.gguf")
    for name, values in before.items():
        loaded.set_weight(name, np.zeros(values.shape, np.float32))
        loaded.set_weight(name, file.read_tensor(name))
        assert torch.equal(modules[loaded.places[name].parameter], values), name
    file.close()


def set_entry(key: str, value: object) -> Change:
    return lambda metadata, tensors: metadata.update({key: value})


def drop_tensor(name: str) -> Change:
    def change(metadata: dict[str, Any], tensors: Arrays) -> None:
        del tensors[name]

    return change


def set_tensor(name: str, *shape: int) -> Change:
    return lambda metadata, tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry("architecture", "qwen2"), "'general.architecture': 'qwen2' is not supported"),
        (set_entry("llama.rope.scaling.type", "yarn"), "'llama.rope.scaling.type': not supported"),
        (set_entry("llama.rope.dimension_count", 4), "expected 8, the channels of a head"),
        (set_entry("llama.attention.head_count", 5), "5 heads in 32 channels"),
        (set_entry("llama.attention.head_count_kv", 3), "3 does not divide 4 heads"),
        (set_entry("llama.block_count", 0), "'llama.block_count': expected a positive integer"),
        (set_entry("llama.block_count", 3), "tensor 'blk.2.*': not in this file"),
        (set_entry("llama.rope.freq_base", -1.0), "expected a positive number, got -1.0"),
        (set_entry("llama.rope.freq_base", 10), "expected a positive number, got 10"),
        (drop_tensor("blk.1.ffn_up.weight"), "tensor 'blk.1.ffn_up.weight': not in this file"),
        (drop_tensor("token_embd.weight"), "'token_embd.weight': no such tensor"),
        (set_tensor("rope_freqs.weight", 4), "tensor 'rope_freqs.weight': not known in a llama"),
        (set_tensor("blk.0.ffn_up.weight", 48, 31), r"shape \(48, 31\), expected \(48, 32\)"),
        (set_entry("tokenizer.ggml.model", "llama"), "model': 'llama' is not supported"),
        (set_entry("tokenizer.ggml.pre", "qwen2"), "pre': 'qwen2' is not supported"),
        (set_entry("tokenizer.ggml.tokens", ["a", "a"]), "tokens': a token is there twice"),
        (set_entry("tokenizer.ggml.tokens", "a"), "tokens': expected an array of str"),
        (set_entry("tokenizer.ggml.token_type", [1]), "token_type': not one for each of 256"),
        (set_entry("tokenizer.ggml.merges", [1]), "merges': expected an array of str"),
        (set_entry("tokenizer.ggml.merges", ["é q x"]), "field 'tokenizer.ggml.merges': "),
    ],
)
def test_gguf_that_would_run_wrongly_is_refused(
    folder: Path,
    tmp_path: Path,
    change: Change,
    message: str,
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", folder, change)
    with pytest.raises(InputError, match=f"bad.gguf: .*{message}"):
        open_torch_model(path)


def test_an_architecture_is_added_in_one_file(
    torch: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its name in the file, ``-`` apart; here one that computes what llama does."""
    path = write_gguf(tmp_path / "m.gguf", folder, set_entry("architecture", "toy-2"))
    with pytest.raises(InputError, match="'toy-2' is not supported, expected 'llama'"):
        open_torch_model(path)
    text = "from sop.llm.architectures.llama import layout\n"
    (tmp_path / "toy_2.py").write_text(text, encoding="utf-8")
    places = [*architectures.__path__, str(tmp_path)]
    monkeypatch.setattr(architectures, "__path__", places)
    tokens = torch.tensor([[1, 2, 3]])
    plain = open_torch_model(write_gguf(tmp_path / "plain.gguf", folder, lambda *_: None))
    with torch.no_grad():
        logits = [model.module(tokens).logits for model in (open_torch_model(path), plain)]
    assert torch.equal(*logits)
    monkeypatch.delitem(sys.modules, "sop.llm.architectures.toy_2")


def test_gguf_without_optional_entries(folder: Path, tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: Arrays) -> None:
        for key in ("rope.freq_base", "rope.dimension_count"):
            del metadata[f"llama.{key}"]
        tensors["output.weight"] = np.ones((VOCABULARY, HIDDEN), np.float32)

    loaded = open_torch_model(write_gguf(tmp_path / "tiny.gguf", folder, change))
    assert loaded.module.config.rope_parameters["rope_theta"] == 10000.0  # llama.cpp's default
    assert loaded.module.lm_head.weight.min() == 1


def test_gguf_tokenizer(folder: Path, tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: Arrays) -> None:
        metadata["tokenizer.ggml.tokens"][2:4] = ["<|end|>", "12"]
        metadata["tokenizer.ggml.token_type"][2] = 3
        metadata["tokenizer.ggml.merges"].append("1 2")  # never done: digits stay alone

    loaded = open_torch_model(write_gguf(tmp_path / "tiny.gguf", folder, change))
    tokens = byte_tokens()
    letters = [tokens.index(letter) for letter in "aĠ12"]
    assert loaded.encode("athe 12<|end|>").tolist() == [letters[0], 0, *letters[1:], 2]


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys: 'model.layers.1.mlp.up_proj.weight'"):
        open_torch_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="transformers cannot load it: "):
        open_torch_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled files are never opened"):
        open_torch_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("m.bin", "expected a .gguf file or a Hugging Face folder"), ("m.gguf", "no such file")],
)
def test_other_paths_are_refused(
    torch: ModuleType, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_torch_model(tmp_path / name)
