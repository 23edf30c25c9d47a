"""``sop export`` with PyTorch: the folder, loaded by transformers, computes as it should.

Skipped where the extra ``llm`` is not installed; what needs no PyTorch is in
``tests/cli/test_decode_and_export.py``.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from typer.testing import Result

from golden.checkpoint import CheckpointWriter
from golden.errors import InputError
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tensor import decode
from sop.commands.export import export
from sop.files.gguf_file import GgufFile
from tests.support.commands import invoke_alone
from tests.support.imports import imported_by
from tests.support.tiny_llama import (
    ROPE_BASE,
    byte_tokens,
    gguf_arrays,
    gguf_metadata,
    gguf_names,
    heads_of,
    llama_cpp_rows,
    save_tiny_llama,
    write_gguf_file,
)

Arrays = dict[str, NDArray[Any]]

FORMAT = parse_format("BOF4-NF4sS1E5M5")


def run(*arguments: object) -> Result:
    return invoke_alone(export, *arguments)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(
    request: pytest.FixtureRequest,
    transformers: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny Llama with random weights, as a Hugging Face folder with a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    return save_tiny_llama(path, tied=request.param, norm_spread=0.1)


def write_checkpoint(path: Path, tensors: Arrays) -> Arrays:
    """Quantize the linear layers of the blocks; the weights that the checkpoint stands for."""
    meant = {}
    with CheckpointWriter(path, {}) as writer:
        for name, weights in tensors.items():
            if weights.ndim == 2 and ("layers." in name or "blk." in name):
                tensor = quantize(weights, FORMAT)
                writer.add(name, tensor, None, "F32")
                meant[name] = decode(tensor)
            else:
                writer.add_raw(name, "F32", weights.shape, [weights.tobytes()])
                meant[name] = weights
    return meant


def logits(transformers: ModuleType, path: Path, replaced: Arrays | None = None) -> Any:
    """Logits of a model in a folder, with its weights replaced by others."""
    import torch

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if replaced is not None:
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(replaced[name])))
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def test_folder_computes_with_the_decoded_weights(
    transformers: ModuleType, folder: Path, tmp_path: Path
) -> None:
    import torch

    meant = write_checkpoint(tmp_path / "q.safetensors", load_file(folder / "model.safetensors"))
    target = tmp_path / "out"
    assert run(tmp_path / "q.safetensors", "-o", target, "--model", folder).exit_code == 0
    found = logits(transformers, target)
    assert torch.equal(found, logits(transformers, folder, meant))
    assert not torch.allclose(found, logits(transformers, folder), atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target, local_files_only=True)
    assert tokenizer("abc")["input_ids"] == [byte_tokens().index(letter) for letter in "abc"]


def test_folder_in_bfloat16(transformers: ModuleType, folder: Path, tmp_path: Path) -> None:
    import torch

    meant = write_checkpoint(tmp_path / "q.safetensors", load_file(folder / "model.safetensors"))
    target = tmp_path / "out"
    done = run(
        tmp_path / "q.safetensors", "-o", target, "--model", folder, "--dtype", "bfloat16", "--json"
    )
    assert json.loads(done.stdout) == {"output": str(target), "notes": []}
    model = transformers.AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        expected = meant[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(parameter.detach().float().numpy(), expected)


# --------------------------------------------------------------------------------------- GGUF file


def half_split_rows(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    order = llama_cpp_rows(np.arange(len(weights), dtype=np.float32)[:, None], heads)[:, 0]
    result = np.empty_like(weights)
    result[order.astype(int)] = weights
    return result


def write_gguf(path: Path, folder: Path, **changes: object) -> dict[str, str]:
    """The tiny model as a GGUF file; its names by those of transformers."""
    weights = load_file(folder / "model.safetensors")
    names = gguf_names()
    if "lm_head.weight" in weights:
        names["lm_head.weight"] = "output.weight"
    metadata = gguf_metadata() | {
        "tokenizer.ggml.tokens": [*byte_tokens()[:254], "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * 254 + [3] * 2,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 254,
        "tokenizer.ggml.eos_token_id": 255,
        "tokenizer.chat_template": "{{ messages }}",
        **changes,
    }
    metadata["tokenizer.ggml.tokens"][0] = "th"
    write_gguf_file(path, metadata, gguf_arrays(weights, names))
    return names


def gguf_tensors(path: Path) -> Arrays:
    file = GgufFile(path)
    try:
        return {name: file.read_tensor(name) for name in file.tensors}
    finally:
        file.close()


def test_gguf_computes_with_the_decoded_weights(
    transformers: ModuleType, folder: Path, tmp_path: Path
) -> None:
    import torch

    names = write_gguf(tmp_path / "m.gguf", folder)
    stored = write_checkpoint(tmp_path / "q.safetensors", gguf_tensors(tmp_path / "m.gguf"))
    meant = {}
    for name, ours in names.items():
        values = stored[ours]
        meant[name] = half_split_rows(values, heads_of(ours)) if heads_of(ours) else values
    target = tmp_path / "out"
    done = run(tmp_path / "q.safetensors", "-o", target, "--model", tmp_path / "m.gguf")
    assert done.exit_code == 0
    assert "warning" not in done.stderr.lower()
    assert torch.equal(logits(transformers, target), logits(transformers, folder, meant))
    config = json.loads((target / "config.json").read_text())
    assert (config["dtype"], config["bos_token_id"], config["eos_token_id"]) == (
        "float32", 254, 255,
    )  # fmt: skip
    assert config["rope_theta"] == ROPE_BASE  # where transformers 4 looks for it


def test_gguf_gives_a_tokenizer(transformers: ModuleType, folder: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", folder)
    write_checkpoint(tmp_path / "q.safetensors", gguf_tensors(tmp_path / "m.gguf"))
    target = tmp_path / "out"
    assert (
        run(tmp_path / "q.safetensors", "-o", target, "--model", tmp_path / "m.gguf").exit_code == 0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(target, local_files_only=True)
    ids = tokenizer("the 12</s>")["input_ids"]
    letters = [byte_tokens().index(letter) for letter in "eĠ12"]
    assert ids == [0, *letters, 255]
    assert tokenizer.decode(ids) == "the 12</s>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template == "{{ messages }}"


def test_gguf_with_another_tokenizer(
    transformers: ModuleType, folder: Path, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", folder, **{"tokenizer.ggml.pre": "qwen2"})
    write_checkpoint(tmp_path / "q.safetensors", gguf_tensors(tmp_path / "m.gguf"))
    target = tmp_path / "out"
    done = run(tmp_path / "q.safetensors", "-o", target, "--model", tmp_path / "m.gguf", "--json")
    (note,) = json.loads(done.stdout)["notes"]
    assert "no tokenizer was written: " in note
    assert "'qwen2' is not supported" in note
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    logits(transformers, target)


def test_gguf_that_does_not_fit(transformers: ModuleType, folder: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", folder)
    tensors = gguf_tensors(tmp_path / "m.gguf")
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].T.copy()
    write_checkpoint(tmp_path / "q.safetensors", tensors)
    done = run(tmp_path / "q.safetensors", "-o", tmp_path / "out", "--model", tmp_path / "m.gguf")
    assert isinstance(done.exception, InputError)
    message = "tensor 'blk.0.ffn_up.weight': (32, 48) in this checkpoint, (48, 32) in "
    assert message in str(done.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "q.safetensors"}


def test_importing_the_command_does_not_import_torch() -> None:
    assert not {"torch", "transformers"} & imported_by("sop.commands.export")
