"""Evaluation: figures of a tiny model against their definitions in NumPy, and candidates.

Skipped where the extra ``llm`` is not installed.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sop.commands.eval
import sop.llm.evaluation
import sop.shared.progress
from golden.checkpoint import Checkpoint, reconstruct
from golden.errors import InputError
from golden.metrics import cosine_gap_ppm, relative_mse
from sop.baselines.others import BASELINES
from sop.llm.candidates import Candidate, baseline_candidate, checkpoint_candidate
from sop.llm.evaluation import evaluate
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import require
from sop.llm.places import Place
from sop.llm.windows import cut_windows
from tests.support.tiny_model import (
    DOWN,
    HIDDEN,
    INNER,
    PROSE,
    QUERY,
    SETTINGS,
    VOCABULARY,
    Weights,
    noisy,
    tiny_model,
    write_checkpoint,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def model(torch: ModuleType) -> TorchModel:
    return tiny_model(tied=True, matrices_only=True)


def log_probabilities(model: TorchModel, ids: NDArray[np.int64]) -> Float64:
    """The whole model, by its own forward, in float64 from its logits."""
    torch = require("torch")
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


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
    scaled = tiny_model(family, tied=True, matrices_only=True, **changes)
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
    tied = tiny_model(tied=True, matrices_only=True)
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
