"""Models as they come: types that cannot be read, what is left out, and names that clash."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.checkpoint import Checkpoint
from golden.errors import InputError
from sop.files.models import open_model
from sop.shared.marks import CALIBRATION_KEY
from tests.support.commands import invoke, invoke_or_raise
from tests.support.quantize_source import (
    FORMAT,
    GOOD,
    NAME,
    OTHER,
    Arrays,
    left_out,
    normal,
    quantize,
    refused,
)


def test_a_checkpoint_and_a_calibration_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(GOOD, path)
    quantize(path)
    again = (tmp_path / "out.safetensors").rename(tmp_path / "again.safetensors")
    refused(again, r"again\.safetensors: is a checkpoint, whose weights are quantized already")
    save_file(GOOD, path, metadata={CALIBRATION_KEY: "{}"})
    refused(path, r"m\.safetensors: is a calibration file, not a model; give the model first")


# --------------------------------------------------------------------------------- before any work


def nan_last() -> NDArray[np.float32]:
    weights = normal(16, 16)
    weights[1, 3] = np.nan
    return weights


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: np.ones((64, 64), np.bool_)}, f"'{NAME}': field 'dtype': BOOL, expected one of"),
        ({NAME: np.ones((2, 16), np.bool_)}, f"'{NAME}': field 'dtype': BOOL, expected one of"),
        ({NAME: nan_last()}, f"tensor '{NAME}': .*row 1, column 3 is nan"),
        ({f"{OTHER}.scales": normal(4)}, rf"'{OTHER}': .* '{OTHER}\.scales' is also that of"),
        ({f"{OTHER}.corrections.values": normal(4)}, "is also that of tensor"),
        ({"x" * 1100: normal(4)}, "tensor 'xxx.*is reserved, empty or over 1024 bytes"),
        ({f"model.layers.1.{'x' * 1000}.weight": normal(64, 64)}, "over 1024 bytes"),
        ({"a\nb": normal(4)}, r"tensor 'a\\nb': .* control character"),
        ({"model.layers.0.\x1b[31m.weight": normal(64, 64)}, "control character"),
        ({"model.layers.0.mlp.experts.w1": normal(2, 48, 32), "x.mlp.gate.weight": normal(2, 32),
          "model.layers.0.mlp.experts.w1[1]": normal(4)}, "is also that of tensor"),
    ],
)  # fmt: skip
def test_what_headers_show_is_found_before_any_work(
    tmp_path: Path, tensors: Arrays, message: str
) -> None:
    path = tmp_path / "m.safetensors"
    save_file(GOOD | tensors, path)
    refused(path, message)


def test_nan_is_found_before_any_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file(GOOD | {NAME: nan_last()}, path)
    monkeypatch.setattr(
        "sop.quantizing.quantization._run_jobs", None
    )  # what tries formats and quantizes
    refused(path, f"tensor '{NAME}': .*row 1, column 3 is nan")
    refused(path, f"tensor '{NAME}': .*row 1, column 3 is nan", "--dry-run")


def test_a_header_that_would_be_too_long_is_found_before_quantizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({f"model.layers.{n}.mlp.up_proj.weight": normal(16, 16) for n in range(9)}, path)
    quantize(path)
    file = tmp_path / "out.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    file.unlink()
    monkeypatch.setattr("golden.container._MAX_HEADER_BYTES", length // 2)
    monkeypatch.setattr("sop.quantizing.quantization._quantize_jobs", None)
    message = r"m\.safetensors: too many tensors for one checkpoint: header of \d+ bytes, at most"
    refused(path, message)


def test_types_that_gguf_cannot_dequantize_are_found_in_the_header(tmp_path: Path) -> None:
    def write(name: str) -> Path:
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("blk.0.attn_q.weight", normal(64, 64))
        kind = gguf.GGMLQuantizationType.Q8_K
        size = gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor(name, np.zeros((2, size), np.uint8), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    problem = "Q8_K values cannot be converted to float32"
    refused(write("blk.0.ffn_up.weight"), f"'blk.0.ffn_up.weight': field 'dtype': {problem}")
    refused(write("token_embd.weight"), f"'token_embd.weight': field 'type': {problem}, and so not")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("counts", np.ones(3, np.uint16)),
        ("rope", np.ones(3, np.complex64)),
        ("logit_scale", np.array(2.0, np.float32)),
        ("unused", np.zeros(0, np.float32)),
        ("mask", np.ones(3, np.bool_)),
        ("kernel", normal(1, 2, 1, 2, 1)),
        ("model.layers.1.mlp.up_proj.weight", np.zeros((0, 16), np.float32)),
    ],
)
def test_what_is_only_copied_may_be_of_any_kind(
    tmp_path: Path, name: str, values: NDArray[Any]
) -> None:
    path = tmp_path / "m.safetensors"
    save_file(GOOD | {name: values}, path)
    found = quantize(path)
    assert [name] in [group["tensors"] for group in found["left_out"]]
    with Checkpoint(tmp_path / "out.safetensors") as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_raw(name), values)


# ------------------------------------------------------------------------------- what was left out


MIXED: Arrays = {
    "model.embed_tokens.weight": normal(50, 64),
    "model.layers.0.mlp.gate.weight": normal(8, 64),
    "model.layers.0.input_layernorm.weight": normal(64),
    "model.layers.1.input_layernorm.weight": normal(64),
    "model.layers.0.mixer.in_proj.weight": normal(64, 64),
    # Four columns fill a block of 16 weights: 18 bits for each of them.
    "model.layers.0.mixer.dt_proj.weight": normal(64, 4).astype(np.float16),
}


def test_what_is_left_out_is_named_with_its_share(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(MIXED, path)
    found = quantize(path)
    assert [layer["name"] for layer in found["layers"]] == ["model.layers.0.mixer.in_proj.weight"]
    assert left_out(found) == {
        "embedding": ["model.embed_tokens.weight"],
        "router or gate of experts": ["model.layers.0.mlp.gate.weight"],
        "norm": [f"model.layers.{n}.input_layernorm.weight" for n in range(2)],
        "fewer than 16 input channels": ["model.layers.0.mixer.dt_proj.weight"],
    }
    total = sum(array.size for array in MIXED.values())
    shares = {group["reason"]: group["share"] for group in found["left_out"]}
    assert shares["embedding"] == 50 * 64 / total
    assert sum(shares.values()) == pytest.approx(1 - 64 * 64 / total)
    with Checkpoint(tmp_path / "out.safetensors") as checkpoint:
        names = (*checkpoint.names, *checkpoint.raw_names)
        bits = sum(checkpoint.bits(name) for name in names)
        assert found["file_bits_per_weight"] == bits / total
        assert found["bits_per_weight"] == checkpoint.bits(names[0]) / 4096
    output = ["-o", str(tmp_path / "text.safetensors")]
    result = invoke("quantize", path, *output, "-f", FORMAT, "-j", 1)
    assert f"{100 * 4096 / total:.2f} % of the weights quantized; whole file" in result.stdout
    embedding = f"embedding {100 * 50 * 64 / total:.2f} % (model.embed_tokens.weight)"
    assert f"left as they came: {embedding}; " in result.stdout
    assert f"norm {100 * 128 / total:.2f} % (2 tensors)" in result.stdout


@pytest.mark.parametrize("options", [(), ("--include", "*")])
def test_no_tensor_is_stored_in_more_bits_than_it_came_with(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    tensors = {f"model.layers.{n}.conv.in_proj.weight": normal(64, n + 1) for n in range(1, 24)}
    tensors |= {f"{name}2.weight": array.astype(np.float16) for name, array in tensors.items()}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    found = quantize(path, *options)
    kept = [name for names in left_out(found).values() for name in names]
    assert kept
    assert found["layers"]
    with Checkpoint(tmp_path / "out.safetensors") as checkpoint:
        for name, array in tensors.items():
            assert checkpoint.bits(name) <= 8 * array.nbytes
            assert (name in checkpoint.raw_names) == (name in kept)


NARROW = {"model.layers.0.mixer.dt_proj.weight": normal(64, 4).astype(np.float16)}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "has fewer than 16 input channels"),
        (("--include", "*"), "no smaller in its format than as it came"),
    ],
)
def test_a_run_that_would_quantize_nothing_is_refused(
    tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    path, output = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    save_file(NARROW, path)
    arguments = ["quantize", path, "-o", output, "-f", FORMAT, "-j", 1, *options]
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError)
    assert problem in str(result.exception)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_left_out_is_never_rounded_away(tmp_path: Path) -> None:
    path, output = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    linear = {"model.layers.0.self_attn.q_proj.weight": normal(256, 256)}
    save_file(linear | {"model.layers.0.layer_scalar": normal(1)}, path)
    arguments = ["quantize", path, "-o", output, "-f", FORMAT, "-j", 1]
    result = invoke_or_raise(*arguments)
    assert "over 99.99 % of the weights quantized" in result.stdout


def test_a_router_that_is_asked_for_is_quantized_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(MIXED, path)
    output = tmp_path / "out.safetensors"
    arguments = ["quantize", path, "-o", output, "-f", FORMAT, "-j", 1, "--include", "*mlp.gate*"]
    result = invoke_or_raise(*arguments)
    assert "is a router or gate of experts, and quantized as asked" in result.stderr
    with Checkpoint(output) as checkpoint:
        assert checkpoint.names == ("model.layers.0.mlp.gate.weight",)
    assert "not included" in result.stdout


def test_formats_of_few_bits_that_grow_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    packed = gguf.quants.quantize(normal(64, 64), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert quantize(path)["larger_than_in_source"] == ["blk.0.attn_q.weight"]


# -------------------------------------------------------------------------------- names that clash


def test_one_part_of_a_split_model_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    paths = [tmp_path / f"{letter}.safetensors" for letter in "ab"]
    for path, name in zip(paths, (NAME, OTHER), strict=True):
        save_file({name: normal(64, 64)}, path)
    index.write_text(json.dumps({"weight_map": {NAME: paths[0].name, OTHER: paths[1].name}}))
    for path in paths:
        refused(path, rf"one file of several of a model, says {index.name}; give the folder")
    index.write_text(json.dumps({"weight_map": {NAME: paths[0].name}}))
    with open_model(paths[0]) as model:
        assert set(model.tensors) == {NAME}
    index.unlink()
    for suffix in ("safetensors", "gguf"):
        part = tmp_path / f"m-00002-of-00003.{suffix}"
        part.write_bytes(paths[0].read_bytes())
        names = " to ".join(f"m-0000{number}-of-00003.{suffix}" for number in (1, 3))
        refused(part, rf"by its name one of 3 parts of a model \({names}\); ")


def test_one_part_of_a_split_gguf_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for count in (1, 3):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", count)
        writer.add_tensor("blk.0.attn_q.weight", normal(64, 64))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if count == 1:
            open_model(path).close()
    refused(path, r"m\.gguf: field 'split\.count': one part of 3 \('split\.no' is 0\); merge")


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    save_file({NAME: normal(64, 64)}, tmp_path / "a.safetensors")
    save_file({NAME: normal(64, 64), OTHER: normal(64, 64)}, tmp_path / "b.safetensors")
    index = {"weight_map": {NAME: "a.safetensors", OTHER: "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"b\.safetensors: tensor '{NAME}': is not in the index"):
        open_model(tmp_path)
