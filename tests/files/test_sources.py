"""Models as they come: quantized before, of types that cannot be read, with names that clash."""

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from golden.checkpoint import Checkpoint, reconstruct
from golden.errors import InputError
from golden.formats import HIF8T
from golden.layer import parse_recipe, quantize_layer
from sop.cli import app
from sop.files.models import open_model
from sop.shared.marks import CALIBRATION_KEY

FORMAT = "NF4sUE4M4"
NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.mlp.down_proj.weight"
F8 = ml_dtypes.float8_e4m3fn

Arrays = dict[str, NDArray[Any]]


def normal(*shape: int, seed: int = 3) -> NDArray[np.float32]:
    return (0.05 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def folder(path: Path, tensors: Arrays, **config: object) -> Path:
    """A Hugging Face folder."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def quantize(source: Path, *options: object) -> dict[str, Any]:
    """Run ``sop quantize`` into out.safetensors beside the source; what it says as JSON."""
    output = source.parent / "out.safetensors"
    arguments = ["quantize", source, "-o", output, "-f", FORMAT, "-j", 1, "--json", *options]
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(source: Path, message: str, *options: object) -> None:
    """The run ends with this message, before anything is made."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError, match=message):
        quantize(source, *options)
    assert sorted(source.parent.iterdir()) == before


def test_a_checkpoint_and_a_calibration_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(GOOD, path)
    quantize(path)
    again = (tmp_path / "out.safetensors").rename(tmp_path / "again.safetensors")
    refused(again, r"again\.safetensors: is a checkpoint, whose weights are quantized already")
    save_file(GOOD, path, metadata={CALIBRATION_KEY: "{}"})
    refused(path, r"m\.safetensors: is a calibration file, not a model; give the model first")


# --------------------------------------------------------------------------------- other quantizers

GOOD: Arrays = {OTHER: normal(64, 64)}
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
    result = CliRunner().invoke(app, ["compare", str(source), str(output), "--json"])
    compared = json.loads(result.stdout)
    assert compared["only_in_a"] == compared["only_in_b"] == []
    errors = {one["name"]: one for one in compared["tensors"]}
    assert errors[OTHER]["relative_mse"] == 0
    assert set(errors) == {NAME, OTHER}
    exported = tmp_path / "exported"
    arguments = ["export", output, "-o", exported, "--model", source, "--dtype", "float32"]
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
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
    error = CliRunner().invoke(app, [*map(str, arguments)]).exception
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
E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP Microscaling Formats v1.0, table 5


def packed(experts: int, outputs: int, inputs: int, seed: int) -> tuple[Any, Any, Any]:
    """Blocks and scales, and the weights [experts, inputs, outputs] of them, one by one."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    scales = rng.integers(118, 126, (experts, outputs, inputs // 32)).astype(np.uint8)
    weights = np.zeros((experts, inputs, outputs), np.float32)
    for expert, row, column in np.ndindex(experts, outputs, inputs):
        group, place = divmod(column, 32)
        code = int(blocks[expert, row, group, place // 2]) >> 4 * (place % 2) & 15
        value = (-1) ** (code >> 3) * E2M1_VALUES[code & 7]
        weights[expert, column, row] = value * 2.0 ** (int(scales[expert, row, group]) - 127)
    return blocks, scales, weights


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
    arguments = ["export", output, "-o", exported, "--model", source, "--dtype", "float32"]
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
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
    monkeypatch.setattr("golden.checkpoint._MAX_HEADER_BYTES", length // 2)
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


def left_out(found: dict[str, Any]) -> dict[str, list[str]]:
    return {group["reason"]: group["tensors"] for group in found["left_out"]}


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
    result = CliRunner().invoke(app, ["quantize", str(path), *output, "-f", FORMAT, "-j", "1"])
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
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(result.exception, InputError)
    assert problem in str(result.exception)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_left_out_is_never_rounded_away(tmp_path: Path) -> None:
    path, output = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    linear = {"model.layers.0.self_attn.q_proj.weight": normal(256, 256)}
    save_file(linear | {"model.layers.0.layer_scalar": normal(1)}, path)
    arguments = ["quantize", path, "-o", output, "-f", FORMAT, "-j", 1]
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert "over 99.99 % of the weights quantized" in result.stdout


def test_a_router_that_is_asked_for_is_quantized_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(MIXED, path)
    output = tmp_path / "out.safetensors"
    arguments = ["quantize", path, "-o", output, "-f", FORMAT, "-j", 1, "--include", "*mlp.gate*"]
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
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
