"""What a tensor is, which way round its file holds it, and stacked tensors from file to file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from golden.checkpoint import Checkpoint, SourceInfo
from golden.errors import InputError
from golden.formats import HIF8T
from golden.layer import parse_recipe, quantize_layer
from sop.files.choice import choose_tensors
from sop.files.matrices import list_matrices, orientation_of
from sop.files.models import open_model
from sop.files.roles import Role, tensor_role, tensor_roles
from sop.files.tensor_info import TensorInfo
from tests.support.commands import output_of

FORMAT = "BOF4-NF4sS1E5M5"

ROLES: list[tuple[str, tuple[int, ...], Role]] = [
    ("model.layers.3.self_attn.q_proj.weight", (64, 64), Role.LINEAR),
    ("model.layers.3.self_attn.qkv_proj.weight", (128, 64), Role.LINEAR),
    ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", (24, 64), Role.LINEAR),
    ("model.layers.3.mlp.shared_experts.gate_proj.weight", (96, 64), Role.LINEAR),
    ("model.layers.3.mlp.experts.7.gate_proj.weight", (96, 64), Role.LINEAR),
    ("model.layers.3.block_sparse_moe.experts.7.w1.weight", (96, 64), Role.LINEAR),
    ("model.decoder.layers.0.fc1.weight", (96, 64), Role.LINEAR),
    ("transformer.h.0.self_attention.query_key_value.weight", (192, 64), Role.LINEAR),
    ("transformer.h.0.mlp.dense_h_to_4h.weight", (256, 64), Role.LINEAR),
    ("transformer.blocks.0.attn.Wqkv.weight", (192, 64), Role.LINEAR),
    ("gpt_neox.layers.0.attention.dense.weight", (64, 64), Role.LINEAR),
    ("bert.encoder.layer.0.attention.output.dense.weight", (64, 64), Role.LINEAR),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", (64, 64), Role.LINEAR),
    ("h.0.attn.c_attn.weight", (64, 192), Role.LINEAR),
    ("backbone.layers.0.mixer.in_proj.weight", (256, 64), Role.LINEAR),
    ("blk.0.attn_output.weight", (64, 64), Role.LINEAR),
    ("blk.0.ffn_gate_shexp.weight", (96, 64), Role.LINEAR),
    ("blk.0.ssm_in.weight", (256, 64), Role.LINEAR),
    ("model.layers.3.mlp.gate.weight", (96, 64), Role.LINEAR),  # of a dense layer
    ("transformer.decoder_layer.0.moe.0.linear.weight", (96, 64), Role.LINEAR),
    ("visual.transformer.resblocks.0.mlp.c_fc.weight", (96, 64), Role.LINEAR),
    ("blk.0.time_mix_key.weight", (64, 64), Role.LINEAR),
    ("blk.0.channel_mix_value.weight", (64, 96), Role.LINEAR),
    ("blk.0.time_mix_w1.weight", (32, 64), Role.STATE),
    ("blk.0.time_mix_lerp_fused.weight", (5, 64), Role.STATE),
    ("model.layers.3.mlp.experts.gate_up_proj", (8, 192, 64), Role.EXPERTS),
    ("model.layers.3.feed_forward.experts.down_proj", (8, 96, 64), Role.EXPERTS),
    ("model.layers.3.block_sparse_moe.input_linear.weight", (8, 192, 64), Role.EXPERTS),
    ("blk.0.ffn_down_exps.weight", (8, 64, 96), Role.EXPERTS),
    ("blk.0.attn_k_b.weight", (4, 32, 16), Role.HEADS),
    ("model.layers.3.mlp.experts.7.gate.weight", (32, 64), Role.LINEAR),
    ("model.layers.3.mlp.experts.3.gate.linear.weight", (96, 64), Role.LINEAR),
    ("model.layers.3.mlp.gate.proj.weight", (96, 64), Role.LINEAR),
    ("model.layers.3.moe.shared_mlp.gate.weight", (96, 64), Role.LINEAR),
    ("model.layers.3.moe.gate_proj.weight", (8, 96, 64), Role.EXPERTS),
    ("model.layers.3.block_sparse_moe.experts_w1", (8, 96, 64), Role.EXPERTS),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (768, 64), Role.STACK),
    ("model.layers.3.mlp.mixture", (8, 96, 64), Role.STACK),
    ("model.layers.3.mlp.gate.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.block_sparse_moe.gate.weight", (128, 64), Role.ROUTER),
    ("model.layers.3.ffn.gating.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.gate_network.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.moe_gate.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.experts_gate.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.switch.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.gate.linear.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.coefficient.weight", (2, 64), Role.ROUTER),
    ("model.layers.3.block_sparse_moe.gate.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.router.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.feed_forward.router.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.block_sparse_moe.router.layer.weight", (8, 64), Role.ROUTER),
    ("model.layers.3.mlp.shared_expert_gate.weight", (1, 64), Role.ROUTER),
    ("blk.0.ffn_gate_inp.weight", (8, 64), Role.ROUTER),
    ("blk.0.ffn_gate_inp_shexp.weight", (1, 64), Role.ROUTER),
    ("model.layers.3.self_attn.q_norm.weight", (4, 16), Role.NORM),
    ("transformer.h.0.ln_1.weight", (64, 1), Role.NORM),
    ("blk.0.attn_norm_2.weight", (1, 64), Role.NORM),
    ("blk.0.attn_q_norm.weight", (8, 64), Role.NORM),
    ("backbone.layers.0.mixer.conv1d.weight", (128, 1, 4), Role.CONVOLUTION),
    ("blk.0.ssm_conv1d.weight", (128, 4), Role.CONVOLUTION),
    ("blk.0.shortconv.conv.weight", (64, 3), Role.CONVOLUTION),
    ("model.layers.3.mixer.short_filter.weight", (64, 4), Role.CONVOLUTION),
    ("model.layers.3.mixer.dw.weight", (64, 4), Role.CONVOLUTION),
    ("model.layers.3.rms_1.weight", (64, 64), Role.NORM),
    ("model.layers.3.self_attn.q_scale.weight", (64, 64), Role.SCALE),
    ("model.layers.3.ls_1.gamma.weight", (64, 64), Role.SCALE),
    ("model.layers.3.self_attn.sinks.weight", (64, 64), Role.SCALE),
    ("model.layers.3.self_attn.pos_enc.weight", (256, 64), Role.POSITION),
    ("model.layers.3.attn.relative_bias_table.weight", (256, 64), Role.POSITION),
    ("model.layers.3.self_attn.alibi_table.weight", (256, 64), Role.POSITION),
    ("transformer.wpe.weight", (256, 64), Role.POSITION),
    ("bert.embeddings.position_embeddings.weight", (256, 64), Role.POSITION),
    ("model.decoder.embed_positions.weight", (256, 64), Role.POSITION),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4),
     Role.POSITION),
    ("model.embed_tokens.weight", (320, 64), Role.EMBEDDING),
    ("model.layers.61.embed_tokens.weight", (320, 64), Role.EMBEDDING),
    ("transformer.wte.weight", (320, 64), Role.EMBEDDING),
    ("token_embd.weight", (320, 64), Role.EMBEDDING),
    ("lm_head.weight", (320, 64), Role.HEAD),
    ("output.weight", (320, 64), Role.HEAD),
    ("model.layers.61.shared_head.head.weight", (320, 64), Role.HEAD),
    ("blk.61.nextn.shared_head_head.weight", (320, 64), Role.HEAD),
    ("model.layers.3.mlp.experts.gate_up_proj_bias", (8, 192), Role.BIAS),
    ("blk.0.ffn_up_exps.bias", (8, 192), Role.BIAS),
    ("backbone.layers.0.mixer.A_log", (128, 4), Role.STATE),
    ("blk.0.ssm_a", (128, 16), Role.STATE),
    ("model.layers.3.self_attn.q_proj.lora_A.weight", (8, 64), Role.ADAPTER),
    ("model.layers.3.self_attn.q_proj.lora_A.default.weight", (8, 64), Role.ADAPTER),
    ("model.layers.3.unheard_of.weight", (1, 64), Role.VECTOR),
    ("model.norm.weight", (64,), Role.NORM),
    ("pooler.dense.weight", (64, 64), Role.OUTSIDE),
    ("model.layers.3.unheard_of", (64, 64), Role.UNKNOWN),
    ("model.layers.3.unheard_of.weight", (2, 64, 64), Role.STACK),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "role"), ROLES)
def test_a_tensor_is_known_by_name_and_shape(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert tensor_role(name, shape) is role


def test_a_gate_beside_experts_is_their_router_whatever_its_shape() -> None:
    names = ["mlp.gate.weight", "mlp.up_proj.weight", "mlp.experts.0.gate.weight"]
    shapes = {f"model.layers.{block}.{name}": (128, 64) for block in (0, 1) for name in names}
    inside = "model.layers.1.mlp.gate.linear.weight"
    shapes[inside] = (64, 64)
    dense = "model.layers.2.mlp.gate.weight"
    roles = tensor_roles({**shapes, dense: (128, 64), "model.layers.3.mlp.experts.w1": (8, 64, 64)})
    routers = [name for name, role in roles.items() if role is Role.ROUTER]
    assert routers == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight", inside]
    assert roles[dense] is Role.LINEAR


# ------------------------------------------------------------------------------------- orientation


def tensors(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """Tensors of block 0; ``__`` in a name stands for a dot."""
    names = {"model.layers.0." + name.replace("__", "."): shape for name, shape in shapes.items()}
    return {name: TensorInfo(name, shape, "F32") for name, shape in names.items()}


def orientation(config: Mapping[str, Any] | None = None, /, **shapes: tuple[int, ...]) -> set[Any]:
    """What is told of all tensors of experts and of Conv1D; [outputs, inputs] if nothing."""
    return set(orientation_of(tensors(**shapes), config or {}).values()) or {False}


GPT2 = {"attn__c_attn__weight": (64, 192), "attn__c_proj__weight": (64, 64)}
BIAS = {"attn__c_attn__bias": (192,)}
BIGCODE = {"attn__c_attn__weight": (192, 64), "attn__c_proj__weight": (64, 64)}


def test_a_bias_tells_outputs_from_inputs() -> None:
    assert orientation(**GPT2, **BIAS) == {True}  # the square one follows
    assert orientation(**BIGCODE, **BIAS) == {False}
    assert orientation({"model_type": "gpt2"}, **BIGCODE, **BIAS) == {False}
    # Under names that nobody knows too.
    assert orientation(x__weight=(64, 192), x__bias=(192,)) == {True}


def test_the_width_of_the_model_tells_where_no_bias_does() -> None:
    assert orientation({"n_embd": 64}, **GPT2) == {True}
    assert orientation({"n_embd": 64}, **BIGCODE) == {False}
    assert orientation(embed_tokens__weight=(320, 64), **GPT2) == {True}


def test_the_model_type_tells_where_shapes_do_not() -> None:
    square = {"attn__c_proj__weight": (64, 64)}
    assert orientation({"model_type": "gpt2"}, **square) == {True}
    assert orientation({"model_type": "gpt_bigcode"}, **square) == {False}
    assert orientation(**square) == {None}
    assert orientation(**GPT2) == {None}


def experts(up: str, into: tuple[int, int], out: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {f"mlp__experts__{up}": (8, *into), "mlp__experts__down_proj": (8, *out)}


@pytest.mark.parametrize("inner", [96, 64, 32])  # 64: down is square; 32: gate and up are
def test_both_projections_of_an_expert_tell_its_orientation(inner: int) -> None:
    fused = "gate_up_proj"
    assert orientation(**experts(fused, (2 * inner, 64), (64, inner))) == {False}
    assert orientation(**experts(fused, (64, 2 * inner), (inner, 64))) == {True}


def test_experts_that_are_not_fused_need_the_width_or_the_model_type() -> None:
    as_is = experts("up_proj", (96, 64), (64, 96))
    turned = experts("up_proj", (64, 96), (96, 64))
    assert orientation({"hidden_size": 64}, **as_is) == {False}
    assert orientation({"text_config": {"hidden_size": 64}}, **turned) == {True}
    assert orientation(mlp__gate__weight=(8, 64), **turned) == {True}
    assert orientation(**as_is) == {None}
    square = experts("up_proj", (64, 64), (64, 64))
    assert orientation({"hidden_size": 64, "model_type": "gpt_oss"}, **square) == {True}
    assert orientation({"hidden_size": 64, "model_type": "mixtral"}, **square) == {False}
    assert orientation({"hidden_size": 64}, **square) == {None}


def test_what_cannot_be_told_is_no_matrix() -> None:
    infos = tensors(**experts("up_proj", (64, 64), (64, 64)), q_proj__weight=(64, 64))
    assert list(list_matrices(infos, {}, always_as_is=False)) == ["model.layers.0.q_proj.weight"]
    assert len(list_matrices(infos, {}, always_as_is=True)) == 17


# ------------------------------------------------------------------------------ from file to file

STACK = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
CONV1D = "model.layers.0.attn.c_attn.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
SHAPES = {
    "model.embed_tokens.weight": (50, 64), STACK: (3, 64, 192), DOWN: (3, 96, 64),
    CONV1D: (64, 192), CONV1D.replace("weight", "bias"): (192,), ROUTER: (3, 64),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss's experts, [experts, inputs, outputs], beside GPT-2's attention."""
    rng = np.random.default_rng(8)
    values = {
        name: (0.05 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file(values, path)
    return path


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out.safetensors"
    output_of("quantize", source, "-o", output, "-f", FORMAT, "-j", 1)
    return output


def reconstructed(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix [outputs, inputs] in the format."""
    return quantize_layer(weights, parse_recipe(FORMAT, HIF8T)).reconstruct()


def test_each_slice_is_quantized_along_its_inputs(source: Path, quantized: Path) -> None:
    original = load_file(source)
    with Checkpoint(quantized) as checkpoint:
        slices = [f"{name}[{index}]" for name in (STACK, DOWN) for index in range(3)]
        assert sorted(checkpoint.names) == sorted([CONV1D, *slices])
        assert checkpoint.info(f"{STACK}[2]").source == SourceInfo(STACK, 2, 3, True)
        assert checkpoint.info(f"{STACK}[2]").shape == (192, 64)
        assert checkpoint.info(CONV1D).source == SourceInfo(CONV1D, None, None, True)
        assert checkpoint.model_tensors[DOWN] == tuple(f"{DOWN}[{index}]" for index in range(3))
        assert ROUTER in checkpoint.raw_names
    decoded = quantized.with_name("decoded.safetensors")
    output_of("decode", quantized, "-o", decoded)
    restored = load_file(decoded)
    assert {name: array.shape for name, array in restored.items()} == SHAPES
    np.testing.assert_array_equal(restored[CONV1D].T, reconstructed(original[CONV1D].T))
    for name in (STACK, DOWN):
        for index in range(3):
            expected = reconstructed(original[name][index].T)
            np.testing.assert_array_equal(restored[name][index].T, expected)


def test_a_matrix_is_read_as_outputs_by_inputs(source: Path) -> None:
    original = load_file(source)
    with open_model(source) as model:
        for matrix in choose_tensors(model).matrices:
            stored = original[matrix.tensor]
            part = stored if matrix.index is None else stored[matrix.index]
            np.testing.assert_array_equal(model.read_matrix(matrix), part.T)
            assert model.read_matrix(matrix).shape == matrix.shape


def test_commands_that_compare_know_slices(source: Path, quantized: Path) -> None:
    text = output_of("compare", source, quantized)
    assert STACK in text
    assert f"{STACK}[0]" not in text
    assert output_of("diff", quantized, quantized, "--model", source)
    assert f"{STACK}[1]" in output_of("inspect", quantized)


def test_slices_of_another_shape_are_refused(quantized: Path, tmp_path: Path) -> None:
    save_file({STACK: np.zeros((3, 192, 64), np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"shape \(3, 64, 192\), .* has \(3, 192, 64\)"):
        output_of("compare", tmp_path / "m.safetensors", quantized)
