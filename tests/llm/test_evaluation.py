"""Evaluation: figures against the definitions in NumPy, candidates, and the command.

What runs a model is skipped where the extra ``llm`` is not installed.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from safetensors.numpy import save_file
from typer.testing import CliRunner

import sop.commands.eval
import sop.llm.evaluation
import sop.shared.progress
from golden.checkpoint import Checkpoint, CheckpointWriter, reconstruct
from golden.corrections import Corrections
from golden.errors import InputError
from golden.metrics import cosine_gap_ppm, relative_mse
from golden.notation import parse_format
from golden.quantize import quantize
from golden.scaling import ScaleMode
from sop.baselines.others import BASELINES
from sop.commands.eval import eval_command
from sop.llm.candidates import Candidate, baseline_candidate, checkpoint_candidate
from sop.llm.evaluation import (
    Evaluation,
    LayerError,
    evaluate,
    overlapping_tokens,
)
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import require
from sop.llm.places import Place
from sop.llm.windows import Text, cut_windows

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Weights = dict[str, Float32]

HIDDEN, INNER, HEADS, VOCABULARY, CONTEXT = 32, 48, 4, 128, 64
QUERY, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
SETTINGS: dict[str, Any] = {"tokens": 22, "window": 8, "skip_tokens": 3}
PROSE = Text("prose", "Windows of 8 letters or 7, then it ends: the quick brown fox.")

# ------------------------------------------------------------------------ figures, without a model


def sha256(text: Text) -> str:
    return hashlib.sha256(text.content.encode()).hexdigest()


def evaluation(**changes: Any) -> Evaluation:
    return replace(
        Evaluation(
            name="a",
            bits_per_weight=4.5,
            kl=0.5,
            kl_standard_error=0.1,
            perplexity=12.0,
            reference_perplexity=8.0,
            top1_agreement=0.75,
            layers=(LayerError("x", 30, 10.0, 0.5), LayerError("y", 10, 50.0, 0.1)),
            block_positions=(256, 256, 256),
            block_kl=(0.4, 0.5, 0.6),
        ),
        **changes,
    )


def test_means_over_layers_count_weights() -> None:
    one = evaluation()
    assert one.cosine_gap_ppm == pytest.approx(20.0)
    assert one.relative_mse == pytest.approx(0.4)
    assert one.perplexity_ratio == 1.5
    assert one.positions == 768


def test_error_of_a_difference_is_that_of_paired_blocks() -> None:
    # Both vary by 0.1 from block to block, together: the difference hardly does.
    first, second = evaluation(), evaluation(block_kl=(0.71, 0.79, 0.90))
    difference, error = first.kl_difference(second)
    values = np.array([0.4 - 0.71, 0.5 - 0.79, 0.6 - 0.90])
    assert difference == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(3))


def test_blocks_count_by_their_positions() -> None:
    sizes = (256, 256, 128)
    first = evaluation(block_positions=sizes, block_kl=(0.1, 0.3, 0.9))
    difference, error = first.kl_difference(evaluation(block_positions=sizes, block_kl=(0, 0, 0)))
    assert difference == pytest.approx((2 * 0.1 + 2 * 0.3 + 0.9) / 5)
    deviations = np.array([2 / 5, 2 / 5, 1 / 5]) * (np.array([0.1, 0.3, 0.9]) - difference)
    assert error == pytest.approx(np.sqrt(3 / 2 * np.sum(deviations**2)))


def test_one_block_has_no_error() -> None:
    one = evaluation(block_positions=(99,), block_kl=(0.5,))
    assert one.kl_difference(one) == (0.0, None)


def test_difference_needs_the_same_positions() -> None:
    with pytest.raises(ValueError, match="a and b were evaluated on other tokens"):
        evaluation().kl_difference(evaluation(name="b", block_positions=(256, 256, 255)))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({}, 10),  # 10..29 of 20..39
        ({"tokens": 10}, 0),
        ({"tokens": 11}, 1),
        ({"skip_tokens": 0, "tokens": 100}, 20),
        ({"skip_tokens": 39, "tokens": 100}, 1),
        ({"skip_tokens": 40}, 0),
        ({"text_sha256": "0" * 64}, 0),
        ({"tokens": "20"}, 0),
        ({"skip_tokens": None}, 0),
    ],
)
def test_overlap_with_a_calibration(change: dict[str, Any], seen: int) -> None:
    run = {"text_sha256": sha256(PROSE), "skip_tokens": 10, "tokens": 20} | change
    assert overlapping_tokens(run, PROSE, 20, 20) == seen


def test_a_calibration_that_says_nothing_overlaps_nothing() -> None:
    assert overlapping_tokens({}, PROSE, 0, 100) == 0


def test_importing_the_command_does_not_import_torch() -> None:
    code = "import sys, sop.commands.eval; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------ a tiny model


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    reason = "the extra llm is not installed"
    pytest.importorskip("transformers", reason=reason)
    module: ModuleType = pytest.importorskip("torch", reason=reason)
    return module


def tiny_model(torch: ModuleType, family: str, **changes: Any) -> TorchModel:
    """A model of one block with random weights, under the names of a GGUF file."""
    transformers = require("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, **changes,
    )  # fmt: skip
    module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rng = np.random.default_rng(31)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                values = rng.normal(0, 0.3, parameter.shape).astype(np.float32)
                parameter.copy_(torch.from_numpy(values))
    block = "model.layers.0."
    places = {
        QUERY: Place(f"{block}self_attn.q_proj.weight", None, False, 0, 1, (HIDDEN, HIDDEN), 4),
        DOWN: Place(f"{block}mlp.down_proj.weight", None, False, 0, 1, (HIDDEN, INNER)),
    }
    tokenizer = Tokenizer(lambda text: list(text.encode()))
    return TorchModel(Path("tiny.gguf"), "ab" * 32, module, places, tokenizer)


@pytest.fixture(scope="module")
def model(torch: ModuleType) -> TorchModel:
    return tiny_model(torch, "Llama")


def noisy(model: TorchModel, scale: float = 0.1) -> Weights:
    """Weights some way off those of the model."""
    rng = np.random.default_rng(7)
    return {
        name: (w + scale * rng.normal(size=w.shape)).astype(np.float32)
        for name in model.places
        for w in [model.weight(name)]
    }


def log_probabilities(model: TorchModel, ids: NDArray[np.int64]) -> Float64:
    """The whole model, by its own forward, in float64 from its logits."""
    torch = require("torch")
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture
def own(model: TorchModel) -> Any:
    """Fail if a test leaves the model with other weights than it had."""
    before = {name: values.detach().clone() for name, values in model.module.named_parameters()}
    yield before
    for name, values in model.module.named_parameters():
        assert (values == before[name]).all(), name


def test_weights_are_in_the_order_of_the_file(model: TorchModel, own: Weights) -> None:
    for name in model.places:
        shape = model.places[name].shape
        weights = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        before = model.weight(name)
        model.set_weight(name, weights)
        np.testing.assert_array_equal(model.weight(name), weights, strict=True)
        parameter = model.module.get_parameter(model.places[name].parameter)
        same = (parameter.detach().numpy() == weights).all()
        assert same == (name != QUERY)  # llama.cpp has the rows of queries in another order
        copy = model.weight(name)
        copy[:] = 0
        np.testing.assert_array_equal(model.weight(name), weights)
        model.set_weight(name, before)


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, 1 << 23])
def test_figures_equal_their_definitions(
    model: TorchModel, own: Weights, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(sop.llm.evaluation, "_LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(sop.llm.evaluation, "_BLOCK_POSITIONS", 3)
    ids = np.array(list(PROSE.content.encode()))
    windows = [ids[3:11], ids[11:19], ids[19:25]]
    changed = noisy(model)
    before = {name: model.weight(name) for name in model.places}
    first = [log_probabilities(model, part) for part in windows]
    for name, weights in changed.items():
        model.set_weight(name, weights)
    second = [log_probabilities(model, part) for part in windows]
    for name, weights in before.items():
        model.set_weight(name, weights)

    got = evaluate(model, [Candidate("noisy", changed, 5.5)], PROSE, **SETTINGS)[0]
    kl: list[float] = []
    losses: tuple[list[float], list[float]] = ([], [])
    agrees: list[bool] = []
    for part, p, q in zip(windows, first, second, strict=True):
        for t in range(len(part) - 1):
            kl.append(np.sum(np.exp(p[t]) * (p[t] - q[t])))
            losses[0].append(-p[t, part[t + 1]])
            losses[1].append(-q[t, part[t + 1]])
            agrees.append(p[t].argmax() == q[t].argmax())
    assert 0.05 < np.mean(kl) < 5  # the two differ
    assert 0.1 < np.mean(agrees) < 0.95
    assert (got.name, got.bits_per_weight, got.positions) == ("noisy", 5.5, 19)
    assert got.kl == pytest.approx(np.mean(kl), rel=1e-5)
    assert got.reference_perplexity == pytest.approx(np.exp(np.mean(losses[0])), rel=1e-5)
    assert got.perplexity == pytest.approx(np.exp(np.mean(losses[1])), rel=1e-5)
    assert got.top1_agreement == np.mean(agrees)
    # Blocks of 3 positions that stay within a window.
    cuts = [0, 3, 6, 7, 10, 13, 14, 17, 19]
    blocks = [kl[a:b] for a, b in pairwise(cuts)]
    assert got.block_positions == tuple(map(len, blocks))
    assert got.block_kl == pytest.approx([np.mean(block) for block in blocks], rel=1e-5)
    shares = np.array(got.block_positions) / 19
    error = np.sqrt(8 / 7 * np.sum((shares * (np.array(got.block_kl) - got.kl)) ** 2))
    assert got.kl_standard_error == pytest.approx(error)


def test_errors_of_layers(model: TorchModel, own: Weights) -> None:
    changed = noisy(model)
    norms = {name: np.linspace(0, 2, w.shape[1]) for name, w in changed.items()}
    plain = evaluate(model, [Candidate("a", changed)], PROSE, **SETTINGS)[0]
    weighted = evaluate(
        model, [Candidate("a", changed)], PROSE, **SETTINGS, channel_norms=norms.__getitem__
    )[0]
    for layer, by_norms in zip(plain.layers, weighted.layers, strict=True):
        pair = (model.weight(layer.name), changed[layer.name])
        assert layer.weights == pair[0].size
        assert layer.relative_mse == by_norms.relative_mse == relative_mse(*pair)
        assert layer.cosine_gap_ppm == cosine_gap_ppm(*pair)
        assert by_norms.cosine_gap_ppm == cosine_gap_ppm(*pair, norms[layer.name])
    assert [layer.name for layer in plain.layers] == list(model.places)


def test_the_same_weights_differ_by_nothing(model: TorchModel, own: Weights) -> None:
    same = Candidate("same", model.weight)
    for one in evaluate(model, [same, Candidate("noisy", noisy(model)), same], PROSE, **SETTINGS)[
        ::2
    ]:
        assert (one.kl, one.kl_standard_error, one.top1_agreement) == (0.0, 0.0, 1.0)
        assert one.perplexity == one.reference_perplexity
        assert one.cosine_gap_ppm == one.relative_mse == 0.0


def test_only_the_tensors_named_are_replaced(model: TorchModel, own: Weights) -> None:
    changed = noisy(model)
    candidates = [
        Candidate("mapping", {DOWN: changed[DOWN]}),
        Candidate("callable", changed.__getitem__, tensors=(DOWN,)),
        Candidate("rest as it was", changed | {QUERY: model.weight(QUERY)}),
    ]
    results = evaluate(model, candidates, PROSE, **SETTINGS)
    assert len({(one.kl, one.perplexity) for one in results}) == 1
    assert results[0].kl > 0
    assert [len(one.layers) for one in results] == [1, 1, 2]


def test_steps_are_reported(model: TorchModel, own: Weights) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(
        model, [Candidate("a", model.weight)], PROSE, **SETTINGS,
        on_step=lambda *step: seen.append(step),
    )  # fmt: skip
    assert seen == [
        ("reference", 0, 6), ("reference", 1, 6), ("reference", 2, 6), ("a: weights", 3, 6),
        ("a", 3, 6), ("a", 4, 6), ("a", 5, 6), ("done", 6, 6),
    ]  # fmt: skip


def test_windows(model: TorchModel) -> None:
    def sizes(**changes: Any) -> list[int]:
        settings = SETTINGS | changes
        return [part.size for part in cut_windows(model, PROSE, **settings, least_tokens=2).parts]

    assert sizes() == [8, 8, 6]
    assert sizes(tokens=17) == [8, 8]  # one token has no next one
    assert sizes(tokens=10**9, skip_tokens=40) == [8, 8, len(PROSE.content) - 56]
    ids = np.concatenate(cut_windows(model, PROSE, **SETTINGS).parts)
    assert bytes(ids.tolist()).decode() == PROSE.content[3:25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 1}, "--tokens must be at least 2, not 1"),
        ({"window": 1}, "--window must be at least 2, not 1"),
        ({"window": 65}, "--window 65 is too long: tiny.gguf was made for 64 tokens"),
        ({"skip_tokens": -1}, "--skip-tokens must be at least 0, not -1"),
        ({"skip_tokens": 60}, "prose: has 61 tokens, so 1 are left after skipping 60; at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(
    model: TorchModel, change: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(model, [Candidate("a", model.weight)], PROSE, **(SETTINGS | change))


def bad(name: str, value: float) -> Float32:
    shape = (HIDDEN, HIDDEN) if name == QUERY else (HIDDEN, INNER)
    return np.full(shape, value, np.float32)


@pytest.mark.parametrize(
    ("weights", "tensors", "message"),
    [
        ({}, None, "c: replaces no tensor"),
        ({"embd": bad(QUERY, 0)}, None, "c: tensor 'embd': tiny.gguf: the file has no such matrix"),
        ({DOWN: bad(QUERY, 0)}, None, r"ffn_down.weight': shape \(32, 32\), the model has \(32, 4"),
        ({DOWN: bad(DOWN, 0).astype(float)}, None, "ffn_down.weight': float64, expected float32"),
        ({QUERY: bad(QUERY, 0), DOWN: bad(DOWN, np.nan)}, None, "ffn_down.weight': a weight is n"),
        ({DOWN: bad(DOWN, 3e38)}, None, "c: logits of the model are not finite"),
    ],
)
def test_bad_candidates_are_refused(
    model: TorchModel, own: Weights, weights: Weights, tensors: None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(model, [Candidate("c", weights, None, tensors)], PROSE, **SETTINGS)


def test_bad_channel_norms_are_refused_at_once(model: TorchModel) -> None:
    def fail(name: str, done: int, total: int) -> None:
        raise AssertionError("started")

    with pytest.raises(InputError, match=r"3 channel norms, tiny.gguf has 32 channels"):
        evaluate(
            model, [Candidate("a", model.weight)], PROSE, **SETTINGS,
            channel_norms=lambda name: np.ones(3), on_step=fail,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    ],
)
def test_scaled_and_capped_logits_are_the_models_own(
    torch: ModuleType, family: str, changes: dict[str, Any]
) -> None:
    scaled = tiny_model(torch, family, **changes)
    ids = np.arange(12)
    states = scaled.run(ids)
    with torch.inference_mode():
        whole = scaled.module(torch.from_numpy(ids)[None]).logits[0]
        plain = scaled.module.get_output_embeddings()(states)
    assert not torch.allclose(whole, plain, rtol=0.1)
    torch.testing.assert_close(scaled.logits(states), whole)
    same, other = evaluate(
        scaled, [Candidate("a", scaled.weight), Candidate("b", noisy(scaled))], PROSE, **SETTINGS
    )
    assert same.kl == 0 < other.kl


def test_the_output_layer_may_be_replaced(torch: ModuleType) -> None:
    tied = tiny_model(torch, "Llama")
    head = Place("model.embed_tokens.weight", None, False, 0, 1, (VOCABULARY, HIDDEN))
    model = TorchModel(tied.path, "", tied.module, {"head": head}, tied.tokenizer)
    weights = noisy(model)["head"]
    got = evaluate(model, [Candidate("noisy", {"head": weights})], PROSE, **SETTINGS)[0]
    ids = np.array(list(PROSE.content.encode()))
    windows = [ids[3:11], ids[11:19], ids[19:25]]
    first = [log_probabilities(model, part)[:-1] for part in windows]
    model.set_weight("head", weights)
    second = [log_probabilities(model, part)[:-1] for part in windows]
    p, q = np.concatenate(first), np.concatenate(second)
    assert got.kl == pytest.approx(np.sum(np.exp(p) * (p - q), axis=1).mean(), rel=1e-5)


def test_windows_begin_with_the_prefix(model: TorchModel, own: Weights) -> None:
    bos = Tokenizer(model.tokenizer.encode, (1, 2), 2)
    prefixed = TorchModel(model.path, "", model.module, model.places, bos)
    windows = cut_windows(prefixed, PROSE, **SETTINGS)
    assert [part.size for part in windows.parts] == [8, 8, 8, 6]
    assert all(part[:2].tolist() == [1, 2] for part in windows.parts)
    text = np.concatenate([part[2:] for part in windows.parts])
    assert bytes(text.tolist()).decode() == PROSE.content[3:25]
    got = evaluate(prefixed, [Candidate("noisy", noisy(model))], PROSE, **SETTINGS)[0]
    assert got.positions == 22  # every token of the text, also the first of a window
    losses = [
        -log_probabilities(model, part)[at - 1, part[at]]
        for part in windows.parts
        for at in range(2, part.size)
    ]
    assert got.reference_perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    plain = cut_windows(prefixed, PROSE, **SETTINGS, bos="no")
    assert [part.size for part in plain.parts] == [8, 8, 6]


def test_bos_option(model: TorchModel) -> None:
    def prefix(tokenizer: Tokenizer, bos: str) -> tuple[int, ...]:
        return TorchModel(model.path, "", model.module, model.places, tokenizer).prefix(bos)

    encode = model.tokenizer.encode
    quiet, eager = Tokenizer(encode, (), 7), Tokenizer(encode, (5, 7), 7)
    assert [prefix(quiet, bos) for bos in ("auto", "yes", "no")] == [(), (7,), ()]
    assert [prefix(eager, bos) for bos in ("auto", "yes", "no")] == [(5, 7), (5, 7), ()]
    with pytest.raises(InputError, match=r"--bos yes: .*: its tokenizer has no begin-of-tex"):
        prefix(Tokenizer(encode), "yes")
    with pytest.raises(InputError, match="--bos must be auto, yes or no, not 'maybe'"):
        prefix(quiet, "maybe")


# --------------------------------------------------------------------------- checkpoints, baselines


def write_checkpoint(
    path: Path,
    tensors: Weights,
    calibration: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    with CheckpointWriter(path, config or {}, calibration) as writer:
        writer.add_raw("output_norm.weight", "F32", (1,), [bytes(4)])  # no linear layer: ignored
        for name, weights in tensors.items():
            stored = quantize(weights, parse_format("NF4sS1E4M3"), mode=ScaleMode.ABSMAX)
            row = np.zeros(weights.shape[0] + 1, np.int64)
            row[1:] = 1  # one correction, 1.0 at the top left
            sparse = Corrections(
                weights.shape, row, np.zeros(1, np.uint16), np.array([0x3F80], np.uint16)
            )
            writer.add(name, stored, sparse, "F32")
    return path


def test_checkpoint_is_evaluated_with_its_corrections(
    model: TorchModel, own: Weights, tmp_path: Path
) -> None:
    tensors = {name: model.weight(name) for name in model.places}
    path = write_checkpoint(tmp_path / "q.safetensors", tensors)
    with Checkpoint(path) as checkpoint:
        whole = {name: reconstruct(checkpoint.read(name)) for name in tensors}
        assert whole[DOWN][0, 0] == pytest.approx(1 + tensors[DOWN][0, 0], abs=0.5)
        bits = float(checkpoint.stored_bits_per_weight)
        candidates = [checkpoint_candidate(checkpoint, model), Candidate("x", whole)]
        results = evaluate(model, candidates, PROSE, **SETTINGS)
    assert results[0] == replace(results[1], name=str(path), bits_per_weight=bits)
    assert results[0].kl > 0
    assert bits > 4.5


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.7.attn_q.weight", (32, 32), "tiny.gguf: the file has no such matrix"),
        (DOWN, (32, 32), r"shape \(32, 32\), tiny.gguf has \(32, 48\)"),
    ],
)
def test_checkpoint_of_another_model_is_refused(
    model: TorchModel, tmp_path: Path, name: str, shape: tuple[int, int], message: str
) -> None:
    path = write_checkpoint(tmp_path / "q.safetensors", {name: np.ones(shape, np.float32)})
    with (
        Checkpoint(path) as checkpoint,
        pytest.raises(InputError, match=f"q.safetensors: tensor '{name}': {message}"),
    ):
        checkpoint_candidate(checkpoint, model)


@pytest.mark.parametrize("uses_norms", [False, True])
def test_baseline_gets_the_models_own_weights_and_norms(
    model: TorchModel, own: Weights, uses_norms: bool
) -> None:
    before = {name: model.weight(name) for name in model.places}
    norms = {name: np.full(w.shape[1], 2.0) for name, w in before.items()}
    seen = []

    def record(weights: Float32, channel_norms: Float64 | None) -> Float32:
        name = next(name for name in before if np.array_equal(before[name], weights))
        assert (channel_norms is not None) == uses_norms
        seen.append(name)
        return weights * np.float32(0.5)

    baseline = replace(BASELINES["NF4"], uses_channel_norms=uses_norms, _reconstruct=record)
    for tensors in (None, (DOWN,)):
        candidate = baseline_candidate(baseline, model, tensors, norms.__getitem__)
        one = evaluate(model, [candidate], PROSE, **SETTINGS)[0]
        assert (one.name, one.bits_per_weight) == ("NF4", 4.5)
        assert one.relative_mse == 0.25
    assert seen == [QUERY, DOWN, DOWN]


def test_baseline_error_names_the_tensor(model: TorchModel, own: Weights) -> None:
    def refuse(weights: Float32, channel_norms: Float64 | None) -> Float32:
        raise InputError("not whole blocks")

    baseline = replace(BASELINES["NF4"], _reconstruct=refuse)
    with pytest.raises(InputError, match=f"tensor '{QUERY}': NF4: not whole blocks"):
        evaluate(model, [baseline_candidate(baseline, model)], PROSE, **SETTINGS)


# -------------------------------------------------------------------------------------- the command


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
    return ["--text", text, "--tokens", 22, "--window", 8, "--skip-tokens", 3]


def calibrated(model: TorchModel, text: Text, **changes: Any) -> dict[str, Any]:
    return {
        "model": "tiny.gguf",
        "model_sha256": model.sha256,
        "config_sha256": "",
        "text": text.name,
        "text_sha256": sha256(text),
        "skip_tokens": 0,
        "tokens": 5,
        "window": 5,
        "prefix_tokens": [],
        "second_moment": False,
        "software": "",
    } | changes


def test_command_measures_checkpoints_and_baselines_alike(
    model: TorchModel,
    own: Weights,
    opened: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sop.shared.progress, "_LINE_SECONDS", 0.0)
    tensors = {DOWN: model.weight(DOWN)}
    seen = write_checkpoint(tmp_path / "seen.safetensors", tensors, calibrated(model, PROSE))
    done = command("m.gguf", seen, "--baseline", "MXFP4", "--baselines", *opened, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["tokens"] == 22
    assert report["positions"] == 19
    assert (report["skip_tokens"], report["window"], report["text"]) == (3, 8, "prose.txt")
    names = [one["name"] for one in report["evaluations"]]
    assert names == [str(seen), "FP8", "MXFP6", "NVFP4", "NF4", "MXFP4"]
    candidates = {one["name"]: one for one in report["evaluations"]}
    for one in candidates.values():
        assert [layer["name"] for layer in one["layers"]] == [DOWN]
        first = report["evaluations"][0]
        assert one["kl_minus_first"] == pytest.approx(one["kl"] - first["kl"], abs=1e-12)
    nf4 = baseline_candidate(BASELINES["NF4"], model, (DOWN,))
    expected = evaluate(model, [nf4], PROSE, **SETTINGS)[0]
    assert candidates["NF4"]["kl"] == expected.kl
    assert candidates["NF4"]["perplexity_ratio"] == expected.perplexity_ratio
    assert report["reference_perplexity"] == expected.reference_perplexity
    warning = f"{seen}: its calibration has seen 2 of the 22 tokens evaluated"
    assert report["warnings"] == [warning]
    assert f"warning: {warning}" in done.stderr
    assert "reference: 0 of 21" in done.stderr
    assert "MXFP4: 18 of 21" in done.stderr


def test_command_prints_a_table(
    model: TorchModel, own: Weights, opened: list[Any], tmp_path: Path
) -> None:
    norms = {
        f"{name}.channel_norms": np.linspace(0, 3, w.shape[1]) for name, w in noisy(model).items()
    }
    run = calibrated(model, PROSE, skip_tokens=24, model_sha256="cd" * 32)
    run |= {"version": 2, "layers": {name: name for name in model.places}}
    run |= {"layer_tokens": dict.fromkeys(model.places, 5), "uncovered": {}, "prefix_tokens": [3]}
    save_file(norms, tmp_path / "c.safetensors", {"sop_calibration": json.dumps(run)})
    source = {"source": {"file": "huge.gguf", "sha256": "ef" * 32}}
    down = write_checkpoint(
        tmp_path / "down.safetensors", {DOWN: model.weight(DOWN)}, config=source
    )
    query = write_checkpoint(tmp_path / "query.safetensors", {QUERY: model.weight(QUERY)})
    arguments = [*opened, "--calibration", tmp_path / "c.safetensors", "--baseline", "FP8"]
    done = command("m.gguf", down, query, *arguments)
    assert done.exit_code == 0, done.output
    assert "Tokens 3..24 of prose.txt; reference perplexity" in done.stdout
    assert "windows start with no begin-of-text token" in done.stdout
    assert "Weights; gap of the cosine by channel norms" in done.stdout
    assert "± its standard error over 3 blocks of positions" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    for name, tensors in (("down.safetensors", "1"), ("query.safetensors", "1"), ("FP8", "2")):
        outputs, weights = (row for row in rows if row[-1:] == [name])
        assert len(outputs) == (7 if name.startswith("down") else 9)  # no difference from itself
        assert weights[0] == tensors
    with Checkpoint(query) as checkpoint:
        whole = reconstruct(checkpoint.read(QUERY))
    gap = cosine_gap_ppm(model.weight(QUERY), whole, norms[f"{QUERY}.channel_norms"])
    assert [f"{gap:.1f}" in row for row in rows if row[-1:] == ["query.safetensors"]] == [
        False,
        True,
    ]
    for warning in (
        f"{down}: field 'source': quantized from other weights than tiny.gguf: from a file or "
        f"folder called huge.gguf, efefefefefef, not {model.sha256[:12]}\n",
        "c.safetensors: its calibration has seen 1 of the 22 tokens evaluated",
        "c.safetensors: its calibration was run on another model than tiny.gguf",
        "c.safetensors: its calibration began windows with token 3, this evaluation with no begin-",
        f"query.safetensors replaces other tensors than {down}",
        f"FP8 replaces other tensors than {down}",
    ):
        assert warning in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: name a checkpoint, or use --baselines, --baseline or"),
        (["--baseline", "NF3"], "--baseline 'NF3' is none of Q8_0, FP8,"),
        (["missing.safetensors"], "missing.safetensors: no such file"),
        (["--baselines", "--text", __file__ + "c"], "No such file"),
        (["--baselines"], "m.gguf: no such file"),
    ],
)
def test_command_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sop.llm.opening.require", lambda package: None)
    assert message in str(command("m.gguf", *arguments).exception)


def test_command_refuses_other_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"ab\xff")
    done = command("m.gguf", "--baselines", "--text", tmp_path / "t.txt")
    assert "t.txt: not UTF-8: invalid start byte at byte 2" in str(done.exception)


def test_command_refuses_a_baseline_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise InputError("not installed; run `pip install x`")

    missing = replace(BASELINES["NF4"], _check=refuse)
    monkeypatch.setattr(sop.commands.eval, "BASELINES", {"NF4": missing})
    done = command("m.gguf", "--baseline", "NF4")
    assert "--baseline NF4: not installed; run `pip install x`" in str(done.exception)
