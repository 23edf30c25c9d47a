"""Families of models by transformers: through calibrate, quantize, eval, export and back.

Tiny models with random weights. Skipped where the extra ``llm`` is not installed.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import Result

from golden.checkpoint import Checkpoint, reconstruct
from sop.files.calibration import Calibration
from sop.files.models import open_model
from sop.llm.model import TorchModel
from sop.llm.opening import open_torch_model
from sop.llm.places import UNUSED
from sop.llm.windows import Text, cut_windows
from tests.support.commands import invoke

Float32 = NDArray[np.float32]

HIDDEN, INNER, EXPERT_INNER, VOCABULARY = 32, 48, 32, 256
TEXT = Text("prose.txt", "The quick brown fox jumps over the lazy dog, 12 times; then it rests. ")
SETTINGS: dict[str, Any] = {"tokens": 60, "window": 32}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
ABSENT = "absent"


@dataclass(frozen=True)
class Family:
    """A family: the name of its classes in transformers, and a tiny configuration.

    `matrices` are those that are quantized in both layers together, as docs/models.md says it of
    one; `others` are other names of the fields of `BASE`.
    """

    prefix: str
    matrices: int
    changes: dict[str, Any]
    config: str = ""
    model: str = ""

    def make(self, transformers: ModuleType) -> Any:
        """The model, with random weights."""
        config = getattr(transformers, self.config or f"{self.prefix}Config")
        model = getattr(transformers, self.model or f"{self.prefix}ForCausalLM")
        settings = BASE | self.changes
        return model(config(**{key: settings[key] for key in settings if settings[key] != ABSENT}))


EXPERTS = 4
HEADS = {"head_dim": 8}
GPT2 = {
    "n_positions": 64, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": 4,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "moe_intermediate_size": EXPERT_INNER, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
QWEN_MOE = HEADS | {
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_INNER,
}  # fmt: skip
GPT_OSS = HEADS | {
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip

FAMILIES = {
    "Llama": Family("Llama", 2 * 7, {}),
    "Mistral": Family("Mistral", 2 * 7, {}),
    "Qwen3": Family("Qwen3", 2 * 7, HEADS),
    "Gemma 2": Family("Gemma2", 2 * 7, HEADS),
    "Gemma 3": Family("Gemma3", 2 * 7, HEADS, config="Gemma3TextConfig"),
    "Phi-3": Family("Phi3", 2 * 4, {}),
    "GPT-2": Family("GPT2", 2 * 4, GPT2, model="GPT2LMHeadModel"),
    "OPT": Family("OPT", 2 * 6, {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}),
    "Mixtral": Family(
        "Mixtral", 2 * (4 + 3 * EXPERTS), {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    ),
    "Qwen3-MoE": Family("Qwen3Moe", 2 * (4 + 3 * EXPERTS), QWEN_MOE),
    "gpt-oss": Family("GptOss", 2 * (4 + 2 * EXPERTS), GPT_OSS),
    "DeepSeek-V3": Family("DeepseekV3", 2 * 5 + 3 + 3 * EXPERTS + 3, DEEPSEEK),
    "Mamba": Family(
        "Mamba", 2 * 4, {"state_size": 4, "time_step_rank": 16, "max_position_embeddings": ABSENT}
    ),
}


def sop(*arguments: object) -> Result:
    done = invoke(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="session")
def tokenizer(torch: ModuleType) -> Any:
    """Bytes as tokens, and a begin-of-text token before every text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # Two letters that are not in TEXT make room.
    vocabulary = dict(zip(["<bos>", "<eos>", *letters[2:]], range(VOCABULARY), strict=True))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")


def save(torch: ModuleType, tokenizer: Any, family: str, folder: Path) -> Path:
    """Write the model of a family, with random weights, into a folder `model`."""
    import transformers

    rng = np.random.default_rng(51)
    module = FAMILIES[family].make(transformers)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                values = rng.normal(0, 0.15, parameter.shape).astype(np.float32)
                parameter.copy_(torch.from_numpy(values))
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@dataclass(frozen=True)
class Tried:
    """A family's model and what the commands made of it."""

    name: str
    folder: Path
    model: TorchModel
    statistics: Path
    checkpoint: Path
    exported: Path


@pytest.fixture(scope="module", params=FAMILIES, ids=[name.replace(" ", "") for name in FAMILIES])
def tried(
    request: pytest.FixtureRequest,
    torch: ModuleType,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tried:
    """The model of a family, calibrated, quantized and exported."""
    root = tmp_path_factory.mktemp("family")
    folder, text = save(torch, tokenizer, request.param, root), root / TEXT.name
    text.write_text(TEXT.content)
    statistics, checkpoint = root / "stats.safetensors", root / "q.safetensors"
    options = ["--text", text, "--tokens", SETTINGS["tokens"], "--window", SETTINGS["window"]]
    sop("calibrate", folder, "-o", statistics, "--second-moment", *options)
    sop(
        "quantize", folder, "-c", statistics, "-f", "NF4sUE4M4", "--effort", "fast", "-j", 1,
        "-o", checkpoint,
    )  # fmt: skip
    sop("export", checkpoint, "-o", root / "out", "--model", folder)
    model = open_torch_model(folder)
    return Tried(request.param, folder, model, statistics, checkpoint, root / "out")


# -------------------------------------------------------------------------------- inputs of layers


def expert_inputs(
    name: str, weights: dict[str, Float32], expert: int, x: Any, torch: ModuleType
) -> dict[str, Any]:
    """Inputs of the matrices of one expert, from those of the expert, by their names in the file.

    The equations are those of the models' papers: down(silu(gate(x)) * up(x)); gpt-oss clamps at 7,
    has silu(1.702 x) and up + 1, and its even outputs are the gate.
    """

    def product(matrix: str) -> Any:
        return x @ torch.from_numpy(weights[matrix]).T

    if f"{name}.gate_up_proj" in weights:
        inner = x @ torch.from_numpy(weights[f"{name}.gate_up_proj"][expert])
        inner = inner + torch.from_numpy(weights[f"{name}.gate_up_proj_bias"][expert])
        gate, up = inner[:, ::2].clamp(max=7.0), inner[:, 1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return {f"{name}.gate_up_proj[{expert}]": x, f"{name}.down_proj[{expert}]": inner}
    own = f"{name}.{expert}"
    parts = ("gate_proj", "up_proj", "down_proj")
    if f"{own}.w1.weight" in weights:
        parts = ("w1", "w3", "w2")
    gate, up, down = (f"{own}.{part}.weight" for part in parts)
    inner = torch.nn.functional.silu(product(gate)) * product(up)
    return {gate: x, up: x, down: inner}


def recomputed_inputs(tried: Tried, torch: ModuleType) -> dict[str, Float32]:
    """Inputs of all matrices, by hooks on modules, not by what is tested."""
    from transformers.pytorch_utils import Conv1D

    weights = load_file(tried.folder / "model.safetensors")
    rows: dict[str, list[Any]] = defaultdict(list)

    def in_file(module: str) -> str:
        return module.replace(".mlp.", ".block_sparse_moe.") if tried.name == "Mixtral" else module

    def see_linear(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            rows[f"{in_file(name)}.weight"].append(args[0].flatten(0, -2))

        return hook

    def see_experts(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            states, chosen = args[:2]
            for expert in range(EXPERTS):
                x = states.flatten(0, -2)[(chosen == expert).any(dim=1)]
                for matrix, inputs in expert_inputs(
                    in_file(name), weights, expert, x, torch
                ).items():
                    rows[matrix].append(inputs)

        return hook

    for name, module in tried.model.module.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(see_linear(name))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(see_experts(name))
        elif name.endswith(".mixer"):  # its dt_proj multiplies by the weight itself
            module.x_proj.register_forward_hook(
                lambda _, args, result, name=name, rank=module.time_step_rank: rows[
                    f"{name}.dt_proj.weight"
                ].append(result[..., :rank].flatten(0, -2))
            )
    with torch.inference_mode():
        for ids in cut_windows(tried.model, TEXT, **SETTINGS).parts:
            tried.model.module(torch.from_numpy(ids)[None], use_cache=False)
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


def test_statistics_are_those_of_the_inputs(tried: Tried, torch: ModuleType) -> None:
    expected = recomputed_inputs(tried, torch)
    calibration = Calibration(tried.statistics)
    with Checkpoint(tried.checkpoint) as checkpoint:
        quantized = set(checkpoint.names)
    assert len(quantized) == FAMILIES[tried.name].matrices
    assert calibration.layers.keys() | calibration.uncovered.keys() == quantized
    assert calibration.run.prefix_tokens == (0,)
    for name in calibration.layers:
        x = expected[name].astype(np.float64)
        assert calibration.layer_tokens[name] == len(x)
        np.testing.assert_allclose(
            calibration.channel_norms(name), np.sqrt(np.mean(x**2, axis=0)), rtol=1e-4, atol=1e-7
        )
        moment = calibration.second_moment(name)
        assert moment is not None
        wanted = x.T @ x / len(x)
        np.testing.assert_allclose(moment, wanted, rtol=1e-4, atol=1e-5 * wanted.max())
    for name, reason in calibration.uncovered.items():
        assert not len(expected[name])
        assert reason == "no token was sent there"


# ----------------------------------------------------------------------------------- eval, export


def test_checkpoint_is_evaluated(tried: Tried) -> None:
    options = ["--text", tried.folder.with_name(TEXT.name), "--tokens", 40, "--skip-tokens", 10]
    done = sop("eval", tried.folder, tried.checkpoint, *options, "--json")
    (one,) = json.loads(done.stdout)["evaluations"]
    assert 0 < one["kl"] < 1
    with Checkpoint(tried.checkpoint) as checkpoint:
        assert {layer["name"] for layer in one["layers"]} == set(checkpoint.names)
    assert all(0 < layer["relative_mse"] < 0.1 for layer in one["layers"])


def test_exported_folder_is_the_decoded_model(tried: Tried, torch: ModuleType) -> None:
    # Not `tried.model`, which other tests use, in any order.
    exported, decoded = open_torch_model(tried.exported), open_torch_model(tried.folder)
    with Checkpoint(tried.checkpoint) as checkpoint:
        for name in checkpoint.names:
            weights = reconstruct(checkpoint.read(name))
            np.testing.assert_array_equal(exported.weight(name), weights, err_msg=name)
            assert not np.array_equal(weights, decoded.weight(name)), name
            decoded.set_weight(name, weights)
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        found, expected = (
            model.module(ids, use_cache=False).logits for model in (exported, decoded)
        )
    assert torch.equal(found, expected)
    assert exported.tokenizer.prefix == (0,)


# -------------------------------------------------------------------------------------------- FP8


def to_fp8(folder: Path, block: int = 16) -> dict[str, Float32]:
    """Store the matrices of layers as FP8 with block scales; the weights that they stand for."""
    stored, meant = {}, {}
    for name, weights in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weights
            continue
        rows, columns = (size // block for size in weights.shape)
        blocks = weights.reshape(rows, block, columns, block)
        scales = np.abs(blocks).max(axis=(1, 3)).astype(np.float32) / np.float32(448)
        each = scales[:, None, :, None]
        codes = (blocks / each).astype(ml_dtypes.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = codes.reshape(weights.shape), scales
        meant[name] = (codes.astype(np.float32) * each).reshape(weights.shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def test_fp8_with_block_scales(torch: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """As large models ship: run with the weights that the codes and scales stand for."""
    folder, text = save(torch, tokenizer, "Qwen3-MoE", tmp_path), tmp_path / TEXT.name
    text.write_text(TEXT.content)
    meant = to_fp8(folder)
    model = open_torch_model(folder)
    assert meant.keys() == set(model.layers)
    for name, weights in meant.items():
        np.testing.assert_array_equal(model.weight(name), weights, err_msg=name)
    statistics, checkpoint = tmp_path / "stats.safetensors", tmp_path / "q.safetensors"
    sop("calibrate", folder, "-o", statistics, "--text", text)
    sop(
        "quantize", folder, "-c", statistics, "-f", "NF4sUE4M4", "--effort", "fast", "-j", 1,
        "-o", checkpoint,
    )  # fmt: skip
    done = sop("eval", folder, checkpoint, "--text", text, "--skip-tokens", 0, "--json")
    (one,) = json.loads(done.stdout)["evaluations"]
    assert len(one["layers"]) == len(meant)
    assert 0 < one["kl"] < 1
    sop("export", checkpoint, "-o", tmp_path / "out", "--model", folder)
    exported = open_torch_model(tmp_path / "out")
    with Checkpoint(checkpoint) as opened:
        for name in meant:
            decoded = reconstruct(opened.read(name))
            np.testing.assert_array_equal(exported.weight(name), decoded, err_msg=name)


def test_fp8_that_a_part_of_the_configuration_describes(
    torch: ModuleType, tokenizer: Any, tmp_path: Path
) -> None:
    import transformers

    vision = {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=BASE | HEADS, vision_config=vision, mm_tokens_per_image=4
    )
    folder = tmp_path / "model"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    meant, path = to_fp8(folder), folder / "config.json"
    described = json.loads(path.read_text())
    described["text_config"]["quantization_config"] = described.pop("quantization_config")
    path.write_text(json.dumps(described))
    model = open_torch_model(folder)
    for name in meant.keys() & model.places.keys():
        np.testing.assert_array_equal(model.weight(name), meant[name], err_msg=name)
    assert meant.keys() & model.places.keys()


# ------------------------------------------------------------------------------ experts by chance


def test_experts_that_no_token_is_sent_to(
    torch: ModuleType, tokenizer: Any, tmp_path: Path
) -> None:
    """They have no statistics, and everything says so; the others count their own tokens."""
    folder, text = save(torch, tokenizer, "Mixtral", tmp_path), tmp_path / TEXT.name
    text.write_text("aaaaaaaaaaaaaaaa")  # equal tokens go to the same experts
    statistics = tmp_path / "stats.safetensors"
    done = sop("calibrate", folder, "-o", statistics, "--text", text, "--bos", "no", "--json")
    report = json.loads(done.stdout)
    lost = report["uncovered"]
    assert lost
    assert set(lost.values()) == {"no token was sent there"}
    assert all(".experts." in name for name in lost)
    assert len(report["layers"]) + len(lost) == FAMILIES["Mixtral"].matrices
    warning = f"{len(lost)} layers without statistics: no token was sent there; the first: "
    assert f"warning: {warning}" in done.stderr
    assert any(one.startswith(warning) for one in report["warnings"])

    checkpoint = tmp_path / "q.safetensors"
    done = sop(
        "quantize", folder, "-c", statistics, "-f", "NF4sUE4M4", "--effort", "fast", "-j", 1,
        "-o", checkpoint,
    )  # fmt: skip
    assert warning in done.stderr
    assert f"{len(lost)} tensors are not in the calibration" in done.stdout
    options = ["--text", text, "--bos", "no", "--calibration", statistics, "--json"]
    done = sop("eval", folder, checkpoint, *options, "--skip-tokens", 0, "--tokens", 16)
    unknown = f"no statistics of {len(lost)} of {FAMILIES['Mixtral'].matrices} tensors"
    assert any(unknown in one for one in json.loads(done.stdout)["warnings"])


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("family", "limit"), [("Llama", 64), ("GPT-2", 64), ("OPT", 64), ("Mamba", None)]
)
def test_windows_are_as_long_as_the_model_allows(
    torch: ModuleType, tokenizer: Any, tmp_path: Path, family: str, limit: int | None
) -> None:
    model = open_torch_model(save(torch, tokenizer, family, tmp_path))
    assert model.context_length == limit
    assert cut_windows(model, TEXT, tokens=10).window == (limit or 1024)


def test_statistics_belong_to_the_weights_however_they_are_opened(
    torch: ModuleType, tokenizer: Any, tmp_path: Path
) -> None:
    folder = save(torch, tokenizer, "Llama", tmp_path)
    sha256 = open_torch_model(folder).sha256
    for path in (folder, folder / "model.safetensors"):
        with open_model(path) as opened:
            assert opened.fingerprint() == sha256
    config = folder / "config.json"
    before = open_torch_model(folder)
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-04'))
    after = open_torch_model(folder)
    assert after.sha256 == before.sha256
    assert after.config_sha256 != before.config_sha256


# ------------------------------------------------------------------- layers that are not computed


def test_a_layer_that_transformers_leaves_out(
    torch: ModuleType, tokenizer: Any, tmp_path: Path
) -> None:
    """DeepSeek-V3's files have one more layer, for a second token: named wherever it matters."""
    folder, text = save(torch, tokenizer, "Llama", tmp_path), tmp_path / TEXT.name
    text.write_text(TEXT.content)
    weights = load_file(folder / "model.safetensors")
    extra = "model.layers.2.mlp.up_proj.weight"
    weights[extra] = np.ones_like(weights["model.layers.1.mlp.up_proj.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    statistics, checkpoint = tmp_path / "stats.safetensors", tmp_path / "q.safetensors"
    done = sop("calibrate", folder, "-o", statistics, "--text", text)
    lost = f"1 layer without statistics: {UNUSED}; the first: {extra}"
    assert f"warning: {lost}" in done.stderr
    assert "14 of 15 layers" in done.stdout
    sop("quantize", folder, "-f", "NF4sUE4M4", "--effort", "fast", "-j", 1, "-o", checkpoint)
    options = ["--text", text, "--skip-tokens", 0, "--json"]
    done = sop("eval", folder, checkpoint, *options)
    (warning,) = json.loads(done.stdout)["warnings"]
    assert f"1 of 15 tensors are not evaluated: {UNUSED}; the first: {extra}" in warning


def test_table_in_the_docs() -> None:
    page = Path(__file__).parents[2].joinpath("docs/models.md").read_text(encoding="utf-8")
    for name in FAMILIES:
        assert re.search(rf"^\| {re.escape(name)} \|", page, re.MULTILINE), name
