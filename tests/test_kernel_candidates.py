"""Models in the kernel's arithmetic: every product that of golden, and the option of `sop eval`.

Skipped where the extra ``llm`` is not installed.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

import sop.commands.eval
from golden.activations import (
    ActivationFormat,
    decode_activations,
    parse_activation_format,
    quantize_activations,
)
from golden.checkpoint import Checkpoint, CheckpointWriter
from golden.corrections import Corrections
from golden.errors import InputError
from golden.kernel import matmul
from golden.notation import parse_format
from golden.quantize import quantize
from golden.scaling import ScaleMode
from sop.candidates import checkpoint_candidate
from sop.commands.eval import eval_command
from sop.evaluation import evaluate
from sop.kernel_candidates import activation_candidate, kernel_candidate
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import require
from sop.llm.places import Place, to_half_split
from sop.llm.replacing import replacing
from sop.llm.windows import Text

Float32 = NDArray[np.float32]

QUERY, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
MODULES = {QUERY: "model.layers.0.self_attn.q_proj", DOWN: "model.layers.0.mlp.down_proj"}
SETTINGS: dict[str, Any] = {"tokens": 22, "window": 8, "skip_tokens": 3}
PROSE = Text("prose", "Windows of 8 letters or 7, then it ends: the quick brown fox.")
HEADS = 4


def activation_format(name: str = "INT8sUE8M0") -> ActivationFormat:
    fmt = parse_activation_format(name)
    assert fmt is not None
    return fmt


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    reason = "the extra llm is not installed"
    pytest.importorskip("transformers", reason=reason)
    module: ModuleType = pytest.importorskip("torch", reason=reason)
    return module


def randomize(module: Any) -> None:
    torch, rng = require("torch"), np.random.default_rng(31)
    with torch.no_grad():
        for parameter in module.parameters():
            values = rng.normal(0, 0.3, parameter.shape).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))


@pytest.fixture(scope="module")
def model(torch: ModuleType) -> TorchModel:
    """A model of one block, two of whose matrices have the names of a GGUF file."""
    transformers = require("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=64,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    randomize(module)
    places = {
        QUERY: Place(f"{MODULES[QUERY]}.weight", None, False, 0, 1, (32, 32), HEADS),
        DOWN: Place(f"{MODULES[DOWN]}.weight", None, False, 0, 1, (32, 48)),
    }
    tokenizer = Tokenizer(lambda text: list(text.encode()))
    return TorchModel(Path("tiny.gguf"), "ab" * 32, module, places, tokenizer)


def write_checkpoint(
    path: Path, model: TorchModel, *, name: str = "NF4sS1E4M3", gain: float = 1
) -> Path:
    with CheckpointWriter(path, {}) as writer:
        for tensor in model.places:
            weights = model.weight(tensor) * np.float32(gain)
            stored = quantize(weights, parse_format(name), mode=ScaleMode.ABSMAX)
            row = np.zeros(weights.shape[0] + 1, np.int64)
            row[1:] = 1  # one correction, 1.0 at the top left
            one = np.array([0x3F80], np.uint16)
            sparse = Corrections(weights.shape, row, np.zeros(1, np.uint16), one)
            writer.add(tensor, stored, sparse, "F32")
    return path


def products_of(model: TorchModel, modules: dict[str, str]) -> Any:
    """Inputs and outputs of modules, by the names of their matrices, and the handles."""
    seen: dict[str, tuple[Float32, Float32]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], result: Any) -> None:
            seen[name] = args[0].numpy()[0].copy(), result.numpy()[0].copy()

        return hook

    layers = dict(model.module.named_modules())
    handles = [layers[path].register_forward_hook(note(name)) for name, path in modules.items()]
    return seen, handles


def run(model: TorchModel) -> None:
    model.run(np.arange(40, 52, dtype=np.int64))


def test_every_product_is_that_of_the_kernel(model: TorchModel, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "q.safetensors", model)
    seen, handles = products_of(model, MODULES)
    with Checkpoint(path) as checkpoint:
        candidate = kernel_candidate(checkpoint, model, activation_format())
        with candidate.computing(model):
            run(model)
        for name, (x, result) in seen.items():
            stored = checkpoint.read(name)
            activations = quantize_activations(x, activation_format())
            wanted = matmul(stored.tensor, activations, stored.corrections).values
            if name == QUERY:
                wanted = to_half_split(np.ascontiguousarray(wanted.T), HEADS).T
            assert (result == wanted).all(), name
            assert (result != x @ model.weight(name).T).mean() > 0.9
    for handle in handles:
        handle.remove()
    assert seen.keys() == MODULES.keys()


def test_without_checkpoint_inputs_alone_are_quantized(model: TorchModel) -> None:
    fmt = activation_format("E2M1^0sBF16")
    seen, handles = products_of(model, {DOWN: MODULES[DOWN]})
    with activation_candidate(model, fmt).computing(model):
        run(model)
    for handle in handles:
        handle.remove()
    x, result = seen[DOWN]
    rounded = decode_activations(quantize_activations(x, fmt)).astype(np.float32)
    np.testing.assert_allclose(result, rounded @ model.weight(DOWN).T, rtol=1e-5, atol=1e-5)
    (found,) = evaluate(model, [activation_candidate(model, fmt)], PROSE, **SETTINGS)
    assert found.kl > 1e-4
    assert found.relative_mse == 0


def test_transposed_and_shared_parameters_keep_their_bias(torch: ModuleType) -> None:
    """GPT-2: weights are (inputs, outputs), multiplied by addmm, three matrices in one."""
    transformers = require("transformers")
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2, n_inner=12
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    randomize(module)
    path = "transformer.h.0.attn.c_attn"
    places = {
        "key": Place(f"{path}.weight", None, True, 8, 1, (8, 8)),
        "odd": Place(f"{path}.weight", None, True, 1, 2, (3, 8)),
    }
    model = TorchModel(Path("gpt2"), "", module, places, Tokenizer(lambda text: []))

    def compute(name: str, x: Any) -> Float32:
        rows = places[name].shape[0]
        return np.arange(x.reshape(-1, 8).shape[0] * rows, dtype=np.float32).reshape(-1, rows)

    seen, handles = products_of(model, {"all": path})
    model.run(np.arange(5, dtype=np.int64))
    usual = seen["all"][1]
    with replacing(model, ["key", "odd"], compute):
        model.run(np.arange(5, dtype=np.int64))
    x, result = seen["all"]
    for handle in handles:
        handle.remove()
    bias = dict(module.named_parameters())[f"{path}.bias"].detach().numpy()
    assert (result[:, 8:16] == compute("key", x) + bias[8:16]).all()
    assert (result[:, 1:7:2] == compute("odd", x) + bias[1:7:2]).all()
    assert (result[:, 0:8:2] == usual[:, 0:8:2]).all()
    assert (result[:, 16:] == usual[:, 16:]).all()


def test_layers_with_the_same_input_have_it_quantized_once(
    model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(values: Float32, fmt: ActivationFormat) -> Any:
        calls.append(values.shape)
        return quantize_activations(values, fmt)

    monkeypatch.setattr("sop.kernel_candidates.quantize_activations", count)
    candidate = activation_candidate(model, activation_format())
    with candidate.computing(model):
        run(model)
    assert calls == [(12, 32), (12, 48)]


def test_other_uses_of_a_matrix_are_refused(model: TorchModel, torch: ModuleType) -> None:
    weight = dict(model.module.named_parameters())[f"{MODULES[DOWN]}.weight"]
    with replacing(model, [DOWN], lambda name, x: np.zeros((1, 1), np.float32)):
        for use in (
            lambda: torch.einsum("oi,ti->to", weight, torch.zeros(3, 48)),
            lambda: torch.zeros(3, 48) @ weight.T,
        ):
            with pytest.raises(InputError, match=r"mlp\.down_proj\.weight' is used in another way"):
                use()


# --------------------------------------------------------------------------------------- refusals


def test_blocks_that_do_not_fit_name_file_and_tensor(model: TorchModel, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "q.safetensors", model, name="NF4^32sS1E4M3")
    with Checkpoint(path) as checkpoint:
        message = rf"q.safetensors: tensor '{QUERY}': activations INT8sUE8M0: blocks of 16 channels"
        with pytest.raises(InputError, match=message):
            kernel_candidate(checkpoint, model, activation_format())


def test_overflow_names_file_and_tensor(model: TorchModel, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "q.safetensors", model, name="NF4sBF16", gain=2.5e38)
    with Checkpoint(path) as checkpoint:
        candidate = kernel_candidate(checkpoint, model, activation_format())
        message = rf"q.safetensors, INT8sUE8M0: tensor '{QUERY}': \d+ of 384 outputs overflow"
        with pytest.raises(InputError, match=message), candidate.computing(model):
            run(model)


def test_activations_that_are_not_finite_name_the_tensor(model: TorchModel) -> None:
    layer = dict(model.module.named_modules())["model.layers.0.mlp"]
    handle = layer.act_fn.register_forward_hook(lambda module, args, result: result * np.inf)
    candidate = activation_candidate(model, activation_format())
    with pytest.raises(InputError, match=rf"tensor '{DOWN}': activation of token 0, channel 0 is"):
        with candidate.computing(model):
            run(model)
    handle.remove()


def test_a_process_that_flushes_subnormals_is_refused(
    model: TorchModel, torch: ModuleType, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "q.safetensors", model)
    with Checkpoint(path) as checkpoint:
        tensor = checkpoint.read(DOWN).tensor
    activations = quantize_activations(np.ones((1, 48), np.float32), activation_format())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        with pytest.raises(InputError, match="flushes subnormal float32 numbers to zero"):
            matmul(tensor, activations)
    finally:
        torch.set_flush_denormal(False)
    matmul(tensor, activations)


# ---------------------------------------------------------------------------------------- command


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(eval_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def opened(model: TorchModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The command opens the tiny model; its options for the small text."""
    monkeypatch.setattr(sop.commands.eval, "open_torch_model", lambda path: model)
    text = tmp_path / "prose.txt"
    text.write_text(PROSE.content)
    return ["--text", text, "--tokens", 22, "--window", 8, "--skip-tokens", 3, "--json"]


def test_command_measures_activations_beside_the_weights_alone(
    model: TorchModel, opened: list[Any], tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "q.safetensors", model)
    names = ("INT8^16sUE8M0", "none", "E2M1sBF16", "INT8sUE8M0")
    options = [option for name in names for option in ("--activations", name)]
    done = command("m.gguf", path, *options, "--baseline", "NF4", *opened)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["evaluations"]
    quantized = [f"{path}, INT8sUE8M0", f"{path}, E2M1sBF16"]
    assert [one["name"] for one in found] == [str(path), *quantized, "NF4"]
    assert [one["activations"] for one in found] == [None, "INT8sUE8M0", "E2M1sBF16", None]
    with Checkpoint(path) as checkpoint:
        candidates = [
            checkpoint_candidate(checkpoint, model),
            kernel_candidate(checkpoint, model, activation_format("E2M1sBF16")),
        ]
        wanted = evaluate(model, candidates, PROSE, **SETTINGS)
    assert [found[0]["kl"], found[2]["kl"]] == [one.kl for one in wanted]
    assert len({one["kl"] for one in found}) == 4
    assert found[1]["bits_per_weight"] == found[0]["bits_per_weight"]


def test_command_measures_activations_alone(model: TorchModel, opened: list[Any]) -> None:
    done = command("m.gguf", "--activations", "INT4sUE8M0", *opened)
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["evaluations"]
    assert (found["name"], found["activations"]) == ("INT4sUE8M0", "INT4sUE8M0")
    assert found["kl"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "INT9sUE8M0"], "activations: format 'INT9sUE8M0': unknown element"),
        (["--activations", "none"], "nothing to evaluate: name a checkpoint, or use --baselines"),
    ],
)
def test_command_refuses(arguments: list[str], message: str) -> None:
    assert message in str(command("m.gguf", *arguments).exception)
