"""Weights that others quantized: what is refused by name; FP8 and MXFP4 read with their scales."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from golden.checkpoint import Checkpoint, reconstruct
from golden.formats import HIF8T
from golden.layer import parse_recipe, quantize_layer
from sop.files.models import open_model
from tests.support.commands import invoke, json_of, output_of
from tests.support.quantize_source import (
    F8,
    FORMAT,
    GOOD,
    NAME,
    OTHER,
    Arrays,
    folder,
    left_out,
    normal,
    packed,
    quantize,
    refused,
)

# --------------------------------------------------------------------------------- other quantizers


CODES = np.ones((8, 64), np.int32)
STEM = NAME.removesuffix(".weight")


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({f"{STEM}.qweight": CODES, f"{STEM}.scales": normal(1, 64)}, "GPTQ or AWQ"),
        ({f"{STEM}.g_idx": CODES}, "GPTQ or AWQ"),
        ({NAME: CODES.astype(np.uint8), f"{NAME}.absmax": normal(64)}, "bitsandbytes"),
        ({NAME: CODES.astype(np.int8), f"{STEM}.SCB": normal(8)}, "bitsandbytes"),
        ({f"{NAME}.quant_state.bitsandbytes__nf4": CODES}, "bitsandbytes"),
        ({f"{STEM}.weight_packed": CODES, f"{STEM}.weight_scale": normal(8, 1)}, "compressed-t"),
        ({NAME: CODES.astype(np.uint8), f"{NAME}_scale_2": normal(1)}, "NVFP4"),
        ({NAME: CODES.astype(np.uint32), f"{STEM}.scales": normal(8), f"{STEM}.biases": normal(8)},
         "MLX"),
        ({f"{STEM}.codes": CODES}, "AQLM"),
        ({f"{STEM}.W_q": CODES}, "HQQ"),
        ({"model.layers.0.mlp.experts.down_proj_blocks": CODES.astype(np.uint8)}, "MXFP4"),
        ({"block.0.mlp.mlp1_weight.blocks": np.ones((2, 8, 2, 16), np.uint8),
          "block.0.mlp.mlp1_weight.scales": np.ones((2, 8, 2), np.uint8)},
         "MXFP4 in another layout"),
        ({f"{STEM}._weight_qdata": CODES, f"{STEM}._weight_scale": normal(8, 1)}, "torchao"),
        ({f"{STEM}._weight_qdata": CODES.astype(F8), f"{STEM}._weight_scale": normal(8)},
         "torchao"),
        ({f"{STEM}.q_weight": CODES, f"{STEM}.q_groups": CODES[0]}, "EXL2"),
        ({f"{STEM}.trellis": CODES.astype(np.int16), f"{STEM}.suh": normal(64)}, "EXL3"),
        ({f"{STEM}.weight.compressed": normal(64), f"{STEM}.weight.bitmask": CODES},
         r"compressed-tensors \(sparse"),
        ({f"{STEM}.indices": CODES, f"{STEM}.centroids.weight": normal(8, 64)}, "VPTQ"),
        ({f"{STEM}.res_centroids.weight": normal(8, 64)}, "VPTQ"),
        ({f"{STEM}.B": CODES}, r"an unknown program \(I32 of shape \[8, 64\]\)"),
        ({"lm_head.weight": CODES.astype(np.uint8)}, r"an unknown program \(U8 of shape"),
        ({NAME: CODES[0]}, "an unknown program"),
        ({NAME: normal(64, 64).astype(ml_dtypes.bfloat16), f"{NAME}_scale": normal(64, 1)},
         "an unknown program .BF16 with 'weight_scale'"),
    ],
)  # fmt: skip
def test_what_others_quantized_is_refused_by_name(
    tmp_path: Path, tensors: Arrays, kind: str
) -> None:
    path = tmp_path / "m.safetensors"
    save_file(tensors | GOOD, path)
    refused(path, rf"m\.safetensors: tensor '.*': is of weights quantized by {kind}")


@pytest.mark.parametrize(
    ("config", "field", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}},
         "text_config.quantization_config", "awq"),
        ({"a": {"b": [{"quantization_config": {"quant_method": "awq"}}]}},
         "a.b.0.quantization_config", "awq"),
        ({"compression_config": {"format": "x"}}, "compression_config", "unknown"),
        ({"quantization": {"bits": 4}}, "quantization", "MLX"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "fp8"),
    ],
)  # fmt: skip
def test_what_the_configuration_calls_quantized_is_refused(
    tmp_path: Path, config: dict[str, Any], field: str, method: str
) -> None:
    source = folder(tmp_path / "m", GOOD, **config)
    refused(source, rf"m/config\.json: field '{field}': .* quantized by '{method}'")
    refused(source / "model.safetensors", rf"m/config\.json: field '{field}': .*'{method}'")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": "gptq"}, "field 'quantization_config': 'gptq', expected an obj"),
        ({"a": {"quantization_config": [8]}}, r"field 'a\.quantization_config': '\[8\]', expected"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64]}},
         r"field 'quantization_config\.weight_block_size': \[64\], expected two positive integers"),
        ({name: {"quantization_config": {"quant_method": "fp8", "weight_block_size": [size, size]}}
          for name, size in (("text", 64), ("vision", 128))}, "several sizes .*text.*vision"),
    ],
)  # fmt: skip
def test_descriptions_of_another_kind_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    refused(folder(tmp_path / "m", FP8_SCALED, **config), message)


def test_a_configuration_without_quantization_may_say_so(tmp_path: Path) -> None:
    config = {"quantization_config": None, "audio": {"quantization": False}}
    with open_model(folder(tmp_path / "m", GOOD, **config)) as model:
        assert set(model.tensors) == set(GOOD)


@pytest.mark.parametrize(
    "name",
    ["h.0.attn.bias", "h.0.attn.mask", "layers.3.attn.relative_position_index",
     "layers.3.ffn.gate.tid2eid", "layers.3.position_ids", "lookup"],
)  # fmt: skip
def test_integers_that_are_no_codes_are_copied(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file(GOOD | {name: CODES}, path)
    with open_model(path) as model:
        assert name in model.tensors


@pytest.mark.parametrize(
    "names",
    [("weight_g", "weight_v"), ("weight_orig", "weight_u"),
     ("parametrizations.weight.original0", "parametrizations.weight.original1")],
)  # fmt: skip
def test_weights_in_parts_are_refused_unless_of_convolutions(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    path = tmp_path / "m.safetensors"
    shapes = ((64,), (64, 64))
    parts = {f"{STEM}.{name}": normal(*shape) for name, shape in zip(names, shapes, strict=True)}
    if names[0] == "weight_orig":
        parts = {f"{STEM}.{names[0]}": normal(64, 64), f"{STEM}.{names[1]}": normal(64)}
    save_file(GOOD | parts, path)
    refused(path, f"tensor '{STEM}.*': is a part of a weight: .*; merge the parts")
    save_file(GOOD | {f"pos_conv.{name}": normal(4, 8, 3) for name in names}, path)
    with open_model(path) as model:
        assert len(model.tensors) == 3


# --------------------------------------------------------------------------------------------- FP8

SHAPE = (200, 320)  # blocks at both edges are cut


def block_scales(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(9).uniform(0.01, 0.1, (rows, columns)).astype(np.float32)


def by_hand(
    values: NDArray[Any], scale: NDArray[Any], height: int, width: int
) -> NDArray[np.float32]:
    """Weight by weight, as the format is described."""
    weights = np.empty(values.shape, np.float32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            factor = np.float32(scale[row // height, column // width])
            weights[row, column] = np.float32(values[row, column]) * factor
    return weights


@pytest.mark.parametrize(
    ("suffix", "scale", "height", "width", "config"),
    [
        ("_scale_inv", block_scales(2, 3), 128, 128, {}),
        ("_scale_inv", block_scales(4, 5), 64, 64,
         {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}),
        ("_scale", block_scales(4, 5), 64, 64,
         {"quantization_config": {"quant_method": "compressed-tensors", "config_groups":
          {"group_0": {"weights": {"block_structure": [64, 64]}}}}}),
        ("_scale", block_scales(1, 1).reshape(()), 200, 320, {}),
        ("_scale", block_scales(1, 1).reshape(1), 200, 320, {}),
        ("_scale", block_scales(200, 1), 1, 320, {}),
        ("_scale", block_scales(200, 1).reshape(200), 1, 320, {}),
        ("_scale", block_scales(200, 1).reshape(1, 200, 1), 1, 320, {}),
        ("_scale", block_scales(1, 320).reshape(1, 1, 320), 200, 1, {}),
        ("_scale_inv", block_scales(2, 3).reshape(1, 2, 3), 128, 128, {}),
        ("_scale", block_scales(1, 1).reshape(1, 1, 1), 200, 320, {}),
        ("_scale_inv", block_scales(4, 5), 64, 64,
         {"text": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}}),
        ("_scale", block_scales(200, 1).astype(ml_dtypes.bfloat16), 1, 320, {}),
        ("_scale_inv", np.ldexp(1.0, -np.arange(6).reshape(2, 3)).astype(ml_dtypes.float8_e8m0fnu),
         128, 128, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [F8, ml_dtypes.float8_e5m2])
def test_fp8_weights_are_read_with_their_scales(
    tmp_path: Path,
    kind: Any,
    suffix: str,
    scale: NDArray[Any],
    height: int,
    width: int,
    config: dict[str, Any],
) -> None:
    values = (20 * normal(*SHAPE)).astype(kind)
    source = folder(tmp_path / "m", {NAME: values, NAME + suffix: scale}, **config)
    grid = scale.reshape(-(-SHAPE[0] // height), -(-SHAPE[1] // width))
    expected = by_hand(values, grid, height, width)
    for path in (source, source / "model.safetensors"):  # both with the configuration
        with open_model(path) as model:
            np.testing.assert_array_equal(model.read(NAME), expected)
            assert "F8_E" in model.source_note


def test_stacked_fp8_experts_have_scales_of_their_own(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    values = (20 * normal(2, 64, 130)).astype(F8)
    scale = np.stack([block_scales(1, 2), 2 * block_scales(1, 2)])
    up = {name.replace("down", "gate_up"): normal(2, 260, 64)}
    source = folder(tmp_path / "m", {name: values, f"{name}_scale_inv": scale} | up)
    with open_model(source) as model:
        expected = [by_hand(values[i], scale[i], 128, 128) for i in range(2)]
        np.testing.assert_array_equal(model.read(name), expected)
        matrix = model.matrices[f"{name}[1]"]
        np.testing.assert_array_equal(model.read_matrix(matrix), expected[1])


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (2, 8), (2, 8, 1), (2, 1, 6), (1, 1, 1), ()])
def test_slices_of_a_stack_have_scales_by_position(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.mlp.experts.w1"
    values = (20 * normal(2, 8, 6)).astype(F8)
    scale = np.random.default_rng(4).uniform(0.1, 1, shape).astype(np.float32)
    path = tmp_path / "m.safetensors"
    save_file({name: values, f"{name}_scale": np.asarray(scale)}, path)
    broadcast = scale.reshape((*shape, 1, 1, 1)[:3])
    expected = values.astype(np.float32) * broadcast
    with open_model(path) as model:
        np.testing.assert_array_equal(model.read(name), expected)
        for matrix in model.matrices.values():
            part = expected[matrix.index or 0]
            read = model.read_matrix(matrix)
            np.testing.assert_array_equal(read, part.T if matrix.transposed else part)


FP8_SCALED: Arrays = {
    NAME: (20 * normal(*SHAPE)).astype(F8),
    f"{NAME}_scale_inv": block_scales(2, 3),
}
FP8_KEPT: Arrays = {
    OTHER: (20 * normal(320, 64)).astype(F8),
    f"{OTHER}_scale_inv": block_scales(3, 1),
}


@pytest.mark.parametrize("part", ["", "text_config"])
def test_scales_go_with_the_weights_that_they_belong_to(tmp_path: Path, part: str) -> None:
    method = {"quantization_config": {"quant_method": "fp8"}}
    config: dict[str, Any] = {part: method} if part else method
    source = folder(tmp_path / "m", FP8_SCALED | FP8_KEPT, **config)
    found = quantize(source, "--exclude", OTHER)
    output = tmp_path / "out.safetensors"
    with open_model(source) as model, Checkpoint(output) as checkpoint:
        assert set(checkpoint.raw_names) == {*FP8_KEPT}
        assert checkpoint.info(NAME).source_dtype == "F8_E4M3"
        weights = quantize_layer(model.read(NAME), parse_recipe(FORMAT, HIF8T)).reconstruct()
        np.testing.assert_array_equal(reconstruct(checkpoint.read(NAME)), weights)
        assert found["model_weights"] == 200 * 320 + 320 * 64
        bits = sum(checkpoint.bits(name) for name in (NAME, *FP8_KEPT))
        assert found["file_bits_per_weight"] == bits / found["model_weights"]
        kept = model.read(OTHER)
    compared = json_of("compare", source, output)
    assert compared["only_in_a"] == compared["only_in_b"] == []
    errors = {one["name"]: one for one in compared["tensors"]}
    assert errors[OTHER]["relative_mse"] == 0
    assert set(errors) == {NAME, OTHER}
    exported = tmp_path / "exported"
    output_of("export", output, "-o", exported, "--model", source, "--dtype", "float32")
    written = load_file(exported / "model.safetensors")
    assert set(written) == {NAME, OTHER}
    np.testing.assert_array_equal(written[NAME], weights)
    np.testing.assert_array_equal(written[OTHER], kept)
    assert "quantization_config" not in (exported / "config.json").read_text()


def test_a_configuration_nested_too_deeply_is_named_on_export(tmp_path: Path) -> None:
    source = folder(tmp_path / "m", FP8_SCALED)
    method, deep = '"quantization_config": {"quant_method": "fp8"}', "[" * 700 + "]" * 700
    (source / "config.json").write_text(f'{{{method}, "a": {deep}}}')
    quantize(source)
    arguments = ["export", tmp_path / "out.safetensors", "-o", tmp_path / "x", "--model", source]
    error = invoke(*arguments).exception
    # How deep Python goes depends on its version.
    assert error is None or "config.json: nested too deeply" in str(error)


def test_scales_of_inputs_go_with_the_weights_too(tmp_path: Path) -> None:
    names = {f"{stem}.input_scale" for stem in (STEM, OTHER.removesuffix(".weight"))}
    tensors = FP8_SCALED | FP8_KEPT | {name: np.ones(1, np.float32) for name in names}
    source = folder(tmp_path / "m", tensors, quantization_config={"quant_method": "fp8"})
    found = quantize(source, "--exclude", OTHER)
    assert left_out(found) == {"excluded": [OTHER]}
    with Checkpoint(tmp_path / "out.safetensors") as checkpoint:
        kept = {*FP8_KEPT, OTHER.replace("weight", "input_scale")}
        assert set(checkpoint.raw_names) == kept


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: np.ones((64, 64), F8)}, rf"tensor '{NAME}': field 'dtype': F8_E4M3 without scales"),
        (FP8_SCALED | {f"{NAME}_scale_inv": block_scales(3, 3)},
         rf"tensor '{NAME}_scale_inv': field 'shape': \[3, 3\] for .* \[2, 3\] for blocks of 128"),
        *((FP8_SCALED | {f"{NAME}_scale_inv": np.ones(shape, np.float32)},
           rf"tensor '{NAME}_scale_inv': field 'shape': .* for weights \[200, 320\]")
          for shape in ((200, 1, 1), (2, 1, 3), (2, 3, 1), (200, 1, 3, 2), (320,), (1, 1, 2, 2))),
        (FP8_SCALED | {f"{NAME}_scale_inv": np.ones((2, 3), np.uint8)},
         rf"tensor '{NAME}_scale_inv': field 'dtype': U8, expected one of F32"),
        (FP8_SCALED | {f"{NAME}_scale_inv": np.full((2, 3), np.nan, np.float32)},
         rf"tensor '{NAME}': .*row 0, column 0 is nan"),
    ],
)  # fmt: skip
def test_fp8_with_scales_that_do_not_fit_is_refused(
    tmp_path: Path, tensors: Arrays, message: str
) -> None:
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    refused(path, message)


# ------------------------------------------------------------------------------------------- MXFP4

GPT_OSS = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    """A folder with experts in MXFP4, and their weights."""
    up, down = packed(2, 128, 64, 1), packed(2, 64, 64, 2)
    tensors: Arrays = {}
    for name, (blocks, scales, _) in (("gate_up_proj", up), ("down_proj", down)):
        tensors |= {f"{GPT_OSS}{name}_blocks": blocks, f"{GPT_OSS}{name}_scales": scales}
    path = tmp_path_factory.mktemp("gpt-oss") / "m"
    source = folder(path, tensors, quantization_config={"quant_method": "mxfp4"})
    return source, {GPT_OSS + "gate_up_proj": up[2], GPT_OSS + "down_proj": down[2]}


def test_mxfp4_experts_are_read_as_what_they_stand_for(gpt_oss: tuple[Path, Arrays]) -> None:
    source, expected = gpt_oss
    with open_model(source) as model:
        assert set(model.tensors) == set(expected)
        assert model.source_note.startswith("weights were already MXFP4 (4-bit, with scales)")
        for name, weights in expected.items():
            np.testing.assert_array_equal(model.read(name), weights)
            matrix = model.matrices[f"{name}[1]"]
            np.testing.assert_array_equal(model.read_matrix(matrix), weights[1].T)


def test_mxfp4_experts_are_quantized_or_left_as_bfloat16(gpt_oss: tuple[Path, Arrays]) -> None:
    source, expected = gpt_oss
    up, down = expected
    found = quantize(source, "--exclude", down, "--force")
    assert found["larger_than_in_source"] == [up]
    with Checkpoint(source.parent / "out.safetensors") as checkpoint:
        assert checkpoint.model_tensors == {up: (f"{up}[0]", f"{up}[1]")}
        assert checkpoint.info(f"{up}[1]").source_dtype == "MXFP4"
        kept = checkpoint.read_raw(down)
    assert kept.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kept.astype(np.float32), expected[down])
    exported = source.parent / "exported"
    output = source.parent / "out.safetensors"
    output_of("export", output, "-o", exported, "--model", source, "--dtype", "float32")
    np.testing.assert_array_equal(load_file(exported / "model.safetensors")[down], expected[down])
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())


def test_mxfp4_of_another_layout_is_refused(tmp_path: Path) -> None:
    blocks, scales, _ = packed(2, 64, 64, 3)
    path = tmp_path / "m.safetensors"
    save_file({f"{GPT_OSS}x_blocks": blocks, f"{GPT_OSS}x_scales": scales[:, :, :1].copy()}, path)
    refused(path, "x_blocks': is of weights quantized by MXFP4")
    scales[1, 5, 1] = 255  # NaN of E8M0
    down = f"{GPT_OSS}down_proj"
    save_file({f"{down}_blocks": blocks, f"{down}_scales": scales}, path)
    refused(path, r"down_proj\[1\]': weight at row 5, column 32 is nan", "--include", down)
