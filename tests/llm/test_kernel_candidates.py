"""Models in the kernel's arithmetic: every product that of golden, by golden or by the RTL.

Skipped where the extra ``llm`` is not installed.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import Result

from golden.activations import (
    ActivationFormat,
    decode_activations,
    parse_activation_format,
    quantize_activations,
)
from golden.checkpoint import Checkpoint, StoredTensor
from golden.errors import InputError
from golden.kernel import KernelOutput, matmul
from rtl import lut_tile
from sim.installed import quickest_simulator
from sop.commands.eval import eval_command
from sop.commands.sim_matmul import sim_matmul
from sop.files.evaluation_file import EvaluationFile
from sop.hdl.matmul_simulation import MatmulSimulation, TileSettings, choose_layers, tiles_of
from sop.hdl.simulate import Fault
from sop.llm.candidates import checkpoint_candidate
from sop.llm.evaluation import evaluate
from sop.llm.kernel_candidates import activation_candidate, kernel_candidate
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import require
from sop.llm.places import Place, to_half_split
from sop.llm.replacing import replacing
from sop.llm.windows import Windows
from tests.support.commands import invoke_alone
from tests.support.tiny_model import (
    DOWN,
    HEADS,
    MODULES,
    PROSE,
    QUERY,
    SETTINGS,
    opened_by,
    randomize,
    tiny_model,
    write_checkpoint,
)

Float32 = NDArray[np.float32]


def activation_format(name: str = "INT8sUE8M0") -> ActivationFormat:
    fmt = parse_activation_format(name)
    assert fmt is not None
    return fmt


@pytest.fixture(scope="module")
def model(torch: ModuleType) -> TorchModel:
    return tiny_model(tied=False, matrices_only=False)


def write_kernel_checkpoint(
    path: Path,
    model: TorchModel,
    *,
    name: str = "NF4sS1E4M3",
    gain: float = 1,
    config: dict[str, Any] | None = None,
) -> Path:
    """The matrices of the model, `gain` times as large."""
    weights = {tensor: model.weight(tensor) * np.float32(gain) for tensor in model.places}
    return write_checkpoint(path, weights, name=name, config=config)


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


IDS = np.arange(40, 52, dtype=np.int64)


def run(model: TorchModel) -> None:
    model.run(IDS)


def product(stored: StoredTensor, x: Float32, **options: Any) -> KernelOutput:
    """What golden makes of a layer's input."""
    activations = quantize_activations(x, activation_format())
    return matmul(stored.tensor, activations, stored.corrections, **options)


def test_every_product_is_that_of_the_kernel(model: TorchModel, tmp_path: Path) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
    seen, handles = products_of(model, MODULES)
    with Checkpoint(path) as checkpoint:
        candidate = kernel_candidate(checkpoint, model, activation_format())
        with candidate.computing(model):
            run(model)
        for name, (x, result) in seen.items():
            wanted = product(checkpoint.read(name), x).values
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

    monkeypatch.setattr("sop.llm.kernel_candidates.quantize_activations", count)
    candidate = activation_candidate(model, activation_format())
    with candidate.computing(model):
        run(model)
    assert calls == [(12, 32), (12, 48)]


def test_other_uses_of_a_matrix_are_refused(model: TorchModel, torch: ModuleType) -> None:
    weight = dict(model.module.named_parameters())[f"{MODULES[DOWN]}.weight"]
    with replacing(model, [DOWN], lambda name, x: np.zeros((1, 1), np.float32)):
        uses: tuple[Callable[[], Any], ...] = (
            lambda: torch.einsum("oi,ti->to", weight, torch.zeros(3, 48)),
            lambda: torch.zeros(3, 48) @ weight.T,
        )
        for use in uses:
            with pytest.raises(InputError, match=r"mlp\.down_proj\.weight' is used in another way"):
                use()


# ----------------------------------------------------------------------------------------- by RTL


@pytest.mark.parametrize(("output", "first_rows"), [("float32", None), ("bfloat16", 5)])
def test_the_model_goes_on_with_what_the_rtl_computes(
    model: TorchModel, tmp_path: Path, build_root: Path, output: str, first_rows: int | None
) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
    settings = TileSettings(4, 3, activation_format(), quickest_simulator(), build_root, output)
    steps: list[tuple[str, int, int]] = []
    seen, handles = products_of(model, MODULES)
    with Checkpoint(path) as checkpoint:
        names = choose_layers(checkpoint, model, None)
        simulation = MatmulSimulation(
            checkpoint, model, names, settings, tiles_of(checkpoint, names, settings),
            first_rows=first_rows, on_step=lambda *step: steps.append(step),
        )  # fmt: skip
        simulation.run(Windows((IDS, IDS[:5]), (), 17, 12))
        for name, (x, result) in seen.items():
            assert len(x) == 5
            wanted = product(checkpoint.read(name), x, output=output).values
            if name == QUERY:
                wanted = to_half_split(np.ascontiguousarray(wanted.T), HEADS).T
            assert (result == wanted).all(), name
    for handle in handles:
        handle.remove()
    assert steps == [(QUERY, 0, 4), (DOWN, 1, 4), (QUERY, 2, 4), (DOWN, 3, 4)]
    for name, channels in ((QUERY, 32), (DOWN, 48)):
        layer = simulation.layers[name]
        assert layer.passed
        rows = first_rows or 32
        assert (layer.shape, layer.tokens, layer.corrections) == ((rows, channels), 17, 1)
        assert layer.products == rows * channels * 17
        # Tiles of rows times those of tokens of both windows; a block ends a beat and leaves more.
        least = -(-rows // 4) * (4 + 2) * channels + 2 * layer_tail()
        assert layer.in_time  # as expected, the epilogue of the last tile included
        assert least <= layer.clocks <= least + 100
        assert 0 < layer.relative_mse < 0.1


def test_a_wrong_bit_of_the_rtl_reaches_the_model(
    model: TorchModel, tmp_path: Path, build_root: Path
) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
    settings = TileSettings(4, 3, activation_format(), quickest_simulator(), build_root)
    seen, handles = products_of(model, {DOWN: MODULES[DOWN]})
    with Checkpoint(path) as checkpoint:
        stored = checkpoint.read(DOWN)
        simulation = MatmulSimulation(
            checkpoint, model, [DOWN], settings, tiles_of(checkpoint, [DOWN], settings),
            fault=Fault("scale", 6 * 3 + 1, 2),
        )  # fmt: skip
        simulation.run(Windows((IDS,), (), 12, 12))
    handles[0].remove()
    x, result = seen[DOWN]
    wrong = (result != product(stored, x).values).any(axis=0)
    assert wrong.nonzero()[0].tolist() == [6]
    layer = simulation.layers[DOWN]
    assert not layer.passed
    assert layer.mismatch is not None
    assert (layer.mismatch.row, layer.mismatch.token) == (6, 0)


def layer_tail() -> int:
    """Clocks beyond one a beat: the latency, and the outputs of a 4 x 3 tile in turn."""
    return lut_tile.LATENCY + 4 * 3 - 1


# --------------------------------------------------------------------------------------- refusals


def test_blocks_that_do_not_fit_name_file_and_tensor(model: TorchModel, tmp_path: Path) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model, name="NF4^32sS1E4M3")
    with Checkpoint(path) as checkpoint:
        message = rf"q.safetensors: tensor '{QUERY}': activations INT8sUE8M0: blocks of 16 channels"
        with pytest.raises(InputError, match=message):
            kernel_candidate(checkpoint, model, activation_format())


def test_overflow_names_file_and_tensor(model: TorchModel, tmp_path: Path) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model, name="NF4sBF16", gain=2.5e38)
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
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
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


def command(*arguments: object) -> Result:
    return invoke_alone(eval_command, *arguments)


@pytest.fixture
def opened(model: TorchModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The command opens the tiny model; its options for the small text."""
    text = opened_by("sop.commands.eval", model, monkeypatch, tmp_path)
    return [*text, "--tokens", 22, "--window", 8, "--skip-tokens", 3, "--json"]


def test_command_measures_activations_beside_the_weights_alone(
    model: TorchModel, opened: list[Any], tmp_path: Path
) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
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
    report = json.loads(done.stdout)
    (found,) = report["evaluations"]
    assert (found["name"], found["activations"]) == ("INT4sUE8M0", "INT4sUE8M0")
    (read,) = EvaluationFile.from_json(report, "eval").evaluations
    assert (read.name, read.bits_per_weight, read.kl) == ("INT4sUE8M0", None, found["kl"])
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


@pytest.fixture
def small(
    model: TorchModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build_root: Path
) -> list[Any]:
    """`sop sim-matmul` opens the tiny model; its options for the small text and tile."""
    text = opened_by("sop.commands.sim_matmul", model, monkeypatch, tmp_path)
    options = [*text, "--tokens", 7, "--skip-tokens", 3, "--rows", 4, "--columns", 3]
    return [*options, "--sim", quickest_simulator(), "--build", build_root]


def test_command_computes_layers_by_rtl(
    model: TorchModel, small: list[Any], tmp_path: Path
) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
    done = invoke_alone(sim_matmul, path, *small, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [layer["name"] for layer in report["layers"]] == [QUERY, DOWN]
    totals = report["totals"]
    assert totals["products"] == 7 * (32 * 32 + 32 * 48)
    # Of so short rows the epilogue takes longer than the products of the next tile.
    assert totals["clocks"] >= totals["expected_clocks"] > 8 * 3 * (32 + 48)
    assert totals["share_of_ideal"] == totals["products"] / totals["clocks"] / 12
    assert totals["mismatches"] == 0
    assert "2 corrections are applied by the RTL" in report["notes"][0]
    assert report["tokens"] == 7


def test_command_locates_a_wrong_bit(model: TorchModel, small: list[Any], tmp_path: Path) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
    # Row 2, channel 17 of the first layer that is computed.
    fault = ["--inject-fault", f"index:{2 * 48 + 17}:3", "-t", "blk.0.ffn_*"]
    done = invoke_alone(sim_matmul, path, *small, *fault)
    assert done.exit_code == 1, done.output
    text = done.stdout
    assert "MISMATCH blk.0.ffn_down.weight: row 2, token 0: RTL 0x" in text
    assert "first wrong in block 1 (channels 16 to 31), step T, the product of the block" in text
    assert re.search(r"waveform of the block alone, .*: /.*\.(vcd|fst)", text)
    assert text.rstrip().endswith("FAIL")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "none"], "--activations none: a tile multiplies quantized ones"),
        (["--first-rows", "0"], "--first-rows must be at least 1, not 0"),
        (["--inject-fault", "lut:1:1"], "unknown kind of fault 'lut': expected index, scale, act"),
        (["--inject-fault", "index"], "is not of the form KIND:POSITION:BIT"),
        (["--rows", "0"], f"q.safetensors: tensor '{QUERY}': tile for NF4sS1E4M3 and INT8sUE8M0: "
                          "rows and columns must be at least 1"),
        (["-t", "blk.7.*"], "pattern 'blk.7.*': matches none of 2 quantized tensors"),
        (["--activations", "INT8^8sUE8M0"], "blocks of 8 channels are not whole blocks of 16"),
    ],
)  # fmt: skip
def test_command_by_rtl_refuses(
    model: TorchModel, small: list[Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model)
    assert message in str(invoke_alone(sim_matmul, path, *small, *arguments).exception)


def test_command_by_rtl_warns_of_other_weights(
    model: TorchModel, small: list[Any], tmp_path: Path
) -> None:
    config = {"source": {"file": "huge.gguf", "sha256": "ef" * 32}}
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model, config=config)
    done = invoke_alone(sim_matmul, path, *small, "-t", "blk.7.*")  # refused after that
    assert f"warning: {path}: field 'source': quantized from other weights than" in done.stderr


def test_weights_without_blocks_are_refused(
    model: TorchModel, small: list[Any], tmp_path: Path
) -> None:
    path = write_kernel_checkpoint(tmp_path / "q.safetensors", model, name="E4M3^0sBF16")
    message = f"tensor '{QUERY}': E4M3^0sBF16 has no blocks; the hardware takes block scales"
    assert message in str(invoke_alone(sim_matmul, path, *small).exception)


def test_command_by_rtl_says_what_to_install(
    small: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    problem = str(invoke_alone(sim_matmul, tmp_path / "none", *small).exception)
    assert "needs the Python package 'torch'; install the llm extra: pip install" in problem
