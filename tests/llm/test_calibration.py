"""Calibration: the file and its reader, and gathering against a model written in NumPy.

What runs a model is skipped where the extra ``llm`` is not installed.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import sop.shared.progress
from golden.errors import InputError
from sop.commands.calibrate import calibrate
from sop.files.calibration import FEW_TOKENS, Calibration
from sop.files.gguf_file import GgufFile
from sop.files.models import embedded_model_path
from sop.llm.gathering import calibrate_model
from sop.llm.model import TorchModel
from sop.llm.opening import open_torch_model
from sop.llm.packages import require
from sop.llm.windows import Text, default_text

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

# ----------------------------------------------------------------- the reader, which needs no torch

NORMS_Q = np.array([3.0, 0.0, 0.5])
NORMS_DOWN = np.array([1.0, 2.0])
MOMENT_Q = np.array([[9, 0, 1.5], [0, 0, 0], [1.5, 0, 0.25]], np.float32)
MOMENT_DOWN = np.array([[1, -1], [-1, 4]], np.float32)


def good_description() -> dict[str, Any]:
    return {
        "version": 2,
        "model": "m.gguf",
        "model_sha256": "ab",
        "config_sha256": "",
        "text": "t.txt",
        "text_sha256": "cd",
        "skip_tokens": 0,
        "tokens": 7,
        "window": 4,
        "prefix_tokens": [],
        "second_moment": True,
        "software": "numpy 2",
        "layers": {"q": "q", "k": "q", "down": "down"},
        "layer_tokens": {"q": 7, "down": 3},
        "uncovered": {"up": "no token was sent there"},
    }


def good_arrays() -> Arrays:
    return {
        "q.channel_norms": NORMS_Q.copy(),
        "q.second_moment": MOMENT_Q.copy(),
        "down.channel_norms": NORMS_DOWN.copy(),
        "down.second_moment": MOMENT_DOWN.copy(),
    }


def write_file(path: Path, arrays: Arrays, description: object) -> Path:
    save_file(arrays, path, {"sop_calibration": json.dumps(description)})
    return path


def test_reader_gives_what_the_file_holds(tmp_path: Path) -> None:
    path = write_file(tmp_path / "c.safetensors", good_arrays(), good_description())
    calibration = Calibration(path)
    assert list(calibration.layers) == ["q", "k", "down"]
    assert calibration.run.tokens == 7
    for name, norms, moment in (
        ("q", NORMS_Q, MOMENT_Q),
        ("k", NORMS_Q, MOMENT_Q),
        ("down", NORMS_DOWN, MOMENT_DOWN),
    ):
        np.testing.assert_array_equal(calibration.channel_norms(name), norms, strict=True)
        read = calibration.second_moment(name)
        assert read is not None
        np.testing.assert_array_equal(read, moment.astype(np.float64), strict=True)


def test_reader_without_second_moments(tmp_path: Path) -> None:
    arrays = {key: value for key, value in good_arrays().items() if key.endswith("norms")}
    description = good_description() | {"second_moment": False}
    calibration = Calibration(write_file(tmp_path / "c.safetensors", arrays, description))
    assert calibration.second_moment("k") is None
    np.testing.assert_array_equal(calibration.channel_norms("k"), NORMS_Q)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 1, "field 'version': 1 is not supported, expected 2; make the file anew"),
        ("version", True, "field 'version': True is not supported"),
        ("tokens", "7", "field 'tokens': expected int, got '7'"),
        ("tokens", True, "field 'tokens': expected int, got True"),
        ("tokens", 0, "field 'tokens': must be at least 1, not 0"),
        ("skip_tokens", -1, "field 'skip_tokens': must be at least 0, not -1"),
        ("window", 0, "field 'window': must be at least 1, not 0"),
        ("second_moment", 1, "field 'second_moment': expected bool, got 1"),
        ("second_moment", False, "second_moment': unknown"),
        ("extra", 1, "field 'extra': unknown"),
        ("layers", [], "field 'layers': expected a JSON object"),
        ("layers", {}, "field 'layers': expected a JSON object with at least one layer"),
        ("layers", {"q": "k"}, "layer 'q' refers to 'k', which has no statistics"),
        ("layers", {"q": "k", "k": "q"}, "layer 'q' refers to 'k', which has no statistics"),
        ("layers", {"q": ["q"]}, r"layer 'q' refers to \['q'\]"),
        ("layers", {"q": "q"}, "field 'layer_tokens': expected a count for each layer with"),
        ("layers", {"q": "q", "down": "down", "o": "o"}, "field 'layer_tokens': expected a count"),
        ("layer_tokens", {"q": 7, "down": 0}, "field 'layer_tokens': 'down': 0 tokens"),
        ("layer_tokens", {"q": 7, "down": True}, "field 'layer_tokens': 'down': True tokens"),
        ("layer_tokens", [7, 3], "field 'layer_tokens': expected a count"),
        ("uncovered", {"q": "lost"}, "field 'uncovered': expected a reason for layers without"),
        ("uncovered", {"up": 1}, "field 'uncovered': expected a reason"),
        ("prefix_tokens", 0, "field 'prefix_tokens': expected a list of token ids, got 0"),
        ("prefix_tokens", ["1"], "field 'prefix_tokens': expected a list of token ids"),
    ],
)
def test_reader_refuses_descriptions(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    description = good_description() | {field: value}
    path = write_file(tmp_path / "c.safetensors", good_arrays(), description)
    with pytest.raises(InputError, match=f"c.safetensors: .*{message}"):
        Calibration(path)


def test_reader_refuses_missing_fields(tmp_path: Path) -> None:
    for field in good_description():
        description = good_description()
        del description[field]
        path = write_file(tmp_path / "c.safetensors", good_arrays(), description)
        with pytest.raises(InputError, match=f"c.safetensors: field '{field}': "):
            Calibration(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not in the metadata; this is not such a calibration file"),
        ({"sop_calibration": "{"}, "field 'sop_calibration': not valid JSON"),
        ({"sop_calibration": "[" * 100_000}, "field 'sop_calibration': not valid JSON"),
        ({"sop_calibration": "[]"}, "field 'sop_calibration': not a JSON object"),
    ],
)
def test_reader_refuses_metadata(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    save_file(good_arrays(), tmp_path / "c.safetensors", metadata)
    with pytest.raises(InputError, match=message):
        Calibration(tmp_path / "c.safetensors")


def test_reader_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"not a header")
    with pytest.raises(InputError, match=r"c\.safetensors: not a valid safetensors file"):
        Calibration(tmp_path / "c.safetensors")
    with pytest.raises(OSError, match="missing"):
        Calibration(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("q.channel_norms", np.ones(3, np.float32), "field 'dtype': F32, expected F64"),
        ("q.channel_norms", np.ones((3, 3)), r"field 'shape': \(3, 3\), expected \(columns,\)"),
        ("q.channel_norms", np.ones(0), r"field 'shape': \(0,\)"),
        ("q.channel_norms", np.array([1, -1.0, 1]), "channel 1 is -1.0, expected"),
        ("q.channel_norms", np.array([1, 1, np.inf]), "channel 2 is inf, expected"),
        ("q.channel_norms", np.array([np.nan, 1, 1]), "channel 0 is nan, expected"),
        ("q.second_moment", np.ones((3, 3)), "field 'dtype': F64, expected F32"),
        ("q.second_moment", np.ones((3, 2), np.float32), r"'shape': \(3, 2\), expected \(columns"),
        ("q.second_moment", np.ones((2, 2), np.float32), "but there are 3 channel norms"),
        ("q.second_moment", np.full((3, 3), np.nan, np.float32), "a value is not finite"),
        ("q.second_moment", np.triu(MOMENT_Q), "not symmetric"),
        ("q.second_moment", MOMENT_Q * np.float32(1.00001), "the diagonal differs"),
    ],
)
def test_reader_refuses_tensors(
    tmp_path: Path, key: str, array: NDArray[Any], message: str
) -> None:
    arrays = good_arrays() | {key: array}
    path = write_file(tmp_path / "c.safetensors", arrays, good_description())
    with pytest.raises(InputError, match=f"c.safetensors: tensor '{key}': .*{message}"):
        Calibration(path).second_moment("k")


def test_reader_names_close_layers(tmp_path: Path) -> None:
    path = write_file(tmp_path / "c.safetensors", good_arrays(), good_description())
    with pytest.raises(InputError, match="tensor 'dwn': not calibrated here, but 'down' are"):
        Calibration(path).channel_norms("dwn")


def warnings_of(tmp_path: Path, **changes: object) -> list[str]:
    path = write_file(tmp_path / "c.safetensors", good_arrays(), good_description() | changes)
    return list(Calibration(path).warnings())


def test_weak_statistics_are_warned_of(tmp_path: Path) -> None:
    few = "only 7 tokens: the statistics are those of a few words"
    lost = "1 layer without statistics: no token was sent there; the first: up"
    assert warnings_of(tmp_path) == [few, lost]
    much = {"tokens": FEW_TOKENS, "layer_tokens": {"q": FEW_TOKENS, "down": FEW_TOKENS}}
    assert warnings_of(tmp_path, **much, uncovered={}) == []
    uneven = {"tokens": 9999, "layer_tokens": {"q": 2, "down": 1}, "uncovered": {}}
    assert warnings_of(tmp_path, **uneven) == [
        f"3 layers saw fewer than {FEW_TOKENS} tokens; the fewest, 1: down",
        "2 of 2 second moments have fewer tokens than channels, so they are singular and know "
        "some directions not at all; the first: q",
    ]
    reasons = {"a": "lost", "b": "no token was sent there", "c": "lost"}
    assert warnings_of(tmp_path, **much, uncovered=reasons) == [
        "2 layers without statistics: lost; the first: a",
        "1 layer without statistics: no token was sent there; the first: b",
    ]


def test_layers_without_statistics_count_alike(tmp_path: Path) -> None:
    calibration = Calibration(
        write_file(tmp_path / "c.safetensors", good_arrays(), good_description())
    )
    assert calibration.known_norms("up") is None
    np.testing.assert_array_equal(calibration.known_norms("k"), NORMS_Q)


def test_default_text_is_sorted_prose() -> None:
    text = default_text().content
    assert text.index('The "assert" statement') < text.index('The "while" statement')
    assert len(text) > 400_000


def test_missing_extra_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(InputError, match=r"package 'torch'; install the llm extra: pip install"):
        open_torch_model(tmp_path)


def test_importing_the_command_does_not_import_torch() -> None:
    code = "import sys, sop.commands.calibrate; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------- a tiny model, written twice

HIDDEN, INNER, HEADS, KV_HEADS, BLOCKS = 32, 48, 4, 2, 2
VOCABULARY = 256
EPSILON, ROPE_BASE = 1e-5, 500.0
SILENT = 5  # channel of `down_proj` of block 1 that is always zero
PROSE = Text("prose", "Twenty-two windows or 7, then it ends: the quick brown fox, of 1024 tokens.")

# Parts of a block in the order in which transformers registers them.
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    reason = "the extra llm is not installed"
    pytest.importorskip("transformers", reason=reason)
    module: ModuleType = pytest.importorskip("torch", reason=reason)
    return module


def byte_tokens() -> list[str]:
    """One token for every byte, in the alphabet of byte-level BPE."""
    tokens: list[str] = sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    return tokens


@pytest.fixture(scope="module")
def folder(torch: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, as a Hugging Face folder."""
    transformers, tokenizers = require("transformers"), require("tokenizers")
    path = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 2 else 1.0
            values = rng.normal(parameter.ndim == 1, scale, parameter.shape).astype(np.float32)
            if name == "model.layers.1.mlp.up_proj.weight":
                values[SILENT] = 0
            parameter.copy_(torch.from_numpy(values))
    model.save_pretrained(path)
    vocabulary = {token: index for index, token in enumerate(byte_tokens())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> TorchModel:
    return open_torch_model(folder)


def reference_inputs(weights: Arrays, ids: NDArray[np.int64]) -> dict[str, Float64]:
    """Inputs of all linear layers, shape (tokens, columns), from the equations in float64.

    Source: Touvron et al., LLaMA, arXiv 2302.13971, section 2.2; Su et al., RoFormer, arXiv
    2104.09864, equation 34, with the two halves of a head as real and imaginary parts.
    """
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    head = HIDDEN // HEADS
    angle = np.arange(len(ids))[:, None] * ROPE_BASE ** (-2 * np.arange(head // 2) / head)
    turn = np.exp(1j * angle)
    later = np.triu(np.ones((len(ids), len(ids)), bool), 1)
    inputs: dict[str, Float64] = {}

    def norm(x: Float64, name: str) -> Float64:
        return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON) * w[f"{name}.weight"]

    def linear(x: Float64, name: str) -> Float64:
        inputs[f"{name}.weight"] = x
        return x @ w[f"{name}.weight"].T

    def turned(x: Float64) -> Float64:
        z = turn * (x[:, : head // 2] + 1j * x[:, head // 2 :])
        return np.hstack([z.real, z.imag])

    def attention(x: Float64, name: str) -> Float64:
        q, k, v = (linear(x, f"{name}.{part}_proj") for part in "qkv")
        mixed = []
        for index in range(HEADS):
            own = slice(index * head, (index + 1) * head)
            group = index // (HEADS // KV_HEADS)
            shared = slice(group * head, (group + 1) * head)
            scores = turned(q[:, own]) @ turned(k[:, shared]).T / np.sqrt(head)
            scores = np.exp(np.where(later, -np.inf, scores))
            mixed.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, shared])
        return linear(np.hstack(mixed), f"{name}.o_proj")

    def mlp(x: Float64, name: str) -> Float64:
        gate, up = linear(x, f"{name}.gate_proj"), linear(x, f"{name}.up_proj")
        return linear(gate / (1 + np.exp(-gate)) * up, f"{name}.down_proj")

    x = w["model.embed_tokens.weight"][ids]
    for block in range(BLOCKS):
        name = f"model.layers.{block}"
        x = x + attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
        x = x + mlp(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
    return inputs


Run = Callable[..., Calibration]


@pytest.fixture
def run(model: TorchModel, tmp_path: Path) -> Run:
    """Calibrate the tiny model; windows of 8 tokens of 22 after 3, the last window short."""

    def calibrated(name: str = "c.safetensors", **changes: Any) -> Calibration:
        settings: dict[str, Any] = {
            "tokens": 22, "window": 8, "skip_tokens": 3, "second_moment": True,
        }  # fmt: skip
        settings |= changes
        used, text = settings.pop("model", model), settings.pop("text", PROSE)
        return calibrate_model(used, text, tmp_path / name, **settings)

    return calibrated


def test_statistics_equal_those_of_the_equations(folder: Path, run: Run) -> None:
    calibration = run()
    weights = load_file(folder / "model.safetensors")
    tokens = byte_tokens()
    # PROSE is ASCII: its bytes are their own letters in the alphabet, but for the space.
    ids = np.array([tokens.index(letter.replace(" ", "Ġ")) for letter in PROSE.content])
    windows = [reference_inputs(weights, part) for part in (ids[3:11], ids[11:19], ids[19:25])]
    assert set(calibration.layers) == set(windows[0])
    for name in calibration.layers:
        inputs = np.concatenate([window[name] for window in windows])
        assert len(inputs) == 22
        moment = np.mean([np.outer(x, x) for x in inputs], axis=0)
        read = calibration.second_moment(name)
        assert read is not None
        np.testing.assert_allclose(read, moment, rtol=1e-4, atol=1e-5 * moment.max(), err_msg=name)
        rms = np.sqrt(np.mean(inputs**2, axis=0))
        np.testing.assert_allclose(
            calibration.channel_norms(name), rms, rtol=1e-4, atol=1e-5 * rms.max(), err_msg=name
        )


def test_layers_with_the_same_input_share_statistics(run: Run) -> None:
    calibration = run()
    groups: dict[str, set[str]] = {}
    for name, leader in calibration.layers.items():
        block, kind = name.split(".")[2], name.split(".")[-2][0]
        groups.setdefault(leader, set()).add(block + kind)
    expected = [{"q", "k", "v"}, {"o"}, {"g", "u"}, {"d"}]
    assert sorted(map(sorted, groups.values())) == sorted(
        sorted(f"{block}{kind}" for kind in kinds) for block in range(BLOCKS) for kinds in expected
    )
    assert len(load_file(calibration.path)) == 2 * len(groups)


def test_channel_norms_are_the_same_without_second_moments(run: Run) -> None:
    full, small = run(), run("small.safetensors", second_moment=False)
    for name in full.layers:
        np.testing.assert_array_equal(full.channel_norms(name), small.channel_norms(name))
        assert small.second_moment(name) is None


def interrupt_after(windows: int) -> Callable[[int, int], None]:
    def on_window(done: int, total: int) -> None:
        if done == windows:
            raise KeyboardInterrupt

    return on_window


@pytest.mark.parametrize(("interrupted", "saved"), [(1, 0), (2, 2), (3, 2), (4, 4)])
def test_resumed_run_gives_the_same_bytes(
    run: Run, tmp_path: Path, interrupted: int, saved: int
) -> None:
    run("whole.safetensors", window=5)
    with pytest.raises(KeyboardInterrupt):
        run(window=5, save_every=2, on_window=interrupt_after(interrupted))
    assert not (tmp_path / "c.safetensors").exists()
    seen: list[tuple[int, int]] = []
    run(window=5, save_every=2, on_window=lambda *counts: seen.append(counts))
    assert seen == [(done, 5) for done in range(saved, 6)]
    whole, resumed = (tmp_path / name for name in ("whole.safetensors", "c.safetensors"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.safetensors", whole.name]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text": Text("prose", PROSE.content + "!")}, "text_sha256"),
        ({"window": 7}, "window"),
        ({"tokens": 21}, "tokens"),
        ({"skip_tokens": 4}, "skip_tokens"),
        ({"second_moment": False}, "second_moment"),
    ],
)
def test_resume_refuses_another_run(run: Run, change: dict[str, Any], field: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(save_every=1, on_window=interrupt_after(2))
    message = rf"partial: field '{field}': was .* when this run was interrupted, is .* now; delete"
    with pytest.raises(InputError, match=message):
        run(**change)


def test_resume_refuses_another_model(model: TorchModel, run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(save_every=1, on_window=interrupt_after(1))
    other = TorchModel(model.path, "0" * 64, model.module, model.places, model.tokenizer)
    with pytest.raises(InputError, match="field 'model_sha256': was"):
        run(model=other)


@pytest.mark.parametrize("windows", ["0", "3", "-1", "1.0", "²", "9" * 5000, ""])
def test_resume_refuses_a_bad_count(run: Run, tmp_path: Path, windows: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(save_every=1, on_window=interrupt_after(1))
    partial = tmp_path / "c.safetensors.partial"
    metadata = header_metadata(partial) | {"windows": windows}
    save_file(load_file(partial), partial, metadata)
    with pytest.raises(InputError, match=r"field 'windows': .* is not in 1\.\.2"):
        run()


def header_metadata(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "--tokens must be at least 1, not 0"),
        ({"window": 0}, "--window must be at least 1, not 0"),
        ({"window": 65}, "--window 65 is too long: .* was made for 64 tokens"),
        ({"skip_tokens": -1}, "--skip-tokens must be at least 0, not -1"),
        (
            {"skip_tokens": 75},
            "prose: has 75 tokens, so 0 are left after skipping 75; at",
        ),
        ({"text": Text("empty", "")}, "empty: has 0 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**change)


def test_second_moments_that_cannot_be_held_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 8 * BLOCKS * (3 * HIDDEN**2 + INNER**2)
    monkeypatch.setattr("sop.llm.gathering._memory_bytes", lambda: needed)
    run()
    monkeypatch.setattr("sop.llm.gathering._memory_bytes", lambda: needed - 1)
    run("small.safetensors", second_moment=False)
    with pytest.raises(InputError, match=r"--second-moment: .*: 8 second moments take 0 GB of mem"):
        run("c2.safetensors")


def test_a_text_that_ends_gives_fewer_tokens(run: Run) -> None:
    assert run(tokens=1000).run.tokens == len(PROSE.content) - 3


def test_file_is_written_whole_or_not_at_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run().path.read_bytes()

    def fail(source: str, target: Path) -> None:
        assert Path(source).stat().st_size == len(before)
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run(skip_tokens=4)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    assert (tmp_path / "c.safetensors").read_bytes() == before


def test_infinite_activations_are_refused(folder: Path, run: Run) -> None:
    broken = open_torch_model(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")[name]
    weights[3] = np.inf
    broken.set_weight(name, weights)
    with pytest.raises(InputError, match=r"down_proj.weight': its input is not finite in window 0"):
        run(model=broken)


# ---------------------------------------------------------------------------------- kinds of models


def llama_cpp_rows(weights: Float32, heads: int) -> Float32:
    """Rows in llama.cpp's order: those of the two halves of a head alternate."""
    rows = weights.shape[0] // heads
    order = [
        head * rows + half * rows // 2 + index
        for head in range(heads)
        for index in range(rows // 2)
        for half in (0, 1)
    ]
    return weights[order]


def write_gguf(path: Path, folder: Path, change: Callable[[dict[str, Any], Arrays], None]) -> Path:
    """The tiny model as a GGUF file; `change` edits metadata and tensors before."""
    metadata: dict[str, Any] = {
        "llama.block_count": BLOCKS,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": ROPE_BASE,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": byte_tokens(),
        "tokenizer.ggml.token_type": [1] * VOCABULARY,
        "tokenizer.ggml.merges": ["t h", "th e"],
    }
    metadata["tokenizer.ggml.tokens"][0:2] = ["the", "th"]  # two letters that PROSE does not have
    weights = load_file(folder / "model.safetensors")
    tensors: Arrays = {"token_embd.weight": weights["model.embed_tokens.weight"]}
    for block in range(BLOCKS):
        for part, ours in PARTS.items():
            values = weights[f"model.layers.{block}.{part}.weight"]
            if ours in ("attn_q", "attn_k"):
                values = llama_cpp_rows(values, HEADS if ours == "attn_q" else KV_HEADS)
            tensors[f"blk.{block}.{ours}.weight"] = values
    tensors["output_norm.weight"] = weights["model.norm.weight"]
    change(metadata, tensors)
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    add: dict[type, Any] = {
        str: writer.add_string,
        float: writer.add_float32,
        int: writer.add_uint32,
    }
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def no_merges(metadata: dict[str, Any], tensors: Arrays) -> None:
    metadata["tokenizer.ggml.tokens"] = byte_tokens()
    metadata["tokenizer.ggml.merges"] = ["! !"]
    metadata["tokenizer.ggml.tokens"][200] = "!!"  # merges must give tokens


def test_gguf_gives_the_statistics_of_the_folder(folder: Path, run: Run, tmp_path: Path) -> None:
    from_gguf = run("g.safetensors", model=open_torch_model(
        write_gguf(tmp_path / "tiny.gguf", folder, no_merges)
    ))  # fmt: skip
    from_folder = run()
    for part, ours in PARTS.items():
        if "norm" not in part:
            for block in range(BLOCKS):
                a = from_gguf.second_moment(f"blk.{block}.{ours}.weight")
                b = from_folder.second_moment(f"model.layers.{block}.{part}.weight")
                assert a is not None
                assert b is not None
                np.testing.assert_array_equal(a, b)


def test_set_weight_takes_rows_as_in_the_file(
    torch: ModuleType, folder: Path, tmp_path: Path
) -> None:
    loaded = open_torch_model(write_gguf(tmp_path / "tiny.gguf", folder, no_merges))
    modules = dict(loaded.module.named_parameters())
    before = {name: modules[place.parameter].clone() for name, place in loaded.places.items()}
    file = GgufFile(tmp_path / "tiny.gguf")
    for name, values in before.items():
        loaded.set_weight(name, np.zeros(values.shape, np.float32))
        loaded.set_weight(name, file.read_tensor(name))
        assert torch.equal(modules[loaded.places[name].parameter], values), name
    file.close()


def set_entry(key: str, value: object) -> Callable[[dict[str, Any], Arrays], None]:
    return lambda metadata, tensors: metadata.update({key: value})


def drop_tensor(name: str) -> Callable[[dict[str, Any], Arrays], None]:
    def change(metadata: dict[str, Any], tensors: Arrays) -> None:
        del tensors[name]

    return change


def set_tensor(name: str, *shape: int) -> Callable[[dict[str, Any], Arrays], None]:
    return lambda metadata, tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry("architecture", "qwen2"), "'general.architecture': 'qwen2' is not supported"),
        (set_entry("llama.rope.scaling.type", "yarn"), "'llama.rope.scaling.type': not supported"),
        (set_entry("llama.rope.dimension_count", 4), "expected 8, the channels of a head"),
        (set_entry("llama.attention.head_count", 5), "5 heads in 32 channels"),
        (set_entry("llama.attention.head_count_kv", 3), "3 does not divide 4 heads"),
        (set_entry("llama.block_count", 0), "'llama.block_count': expected a positive integer"),
        (set_entry("llama.block_count", 3), "tensor 'blk.2.*': not in this file"),
        (set_entry("llama.rope.freq_base", -1.0), "expected a positive number, got -1.0"),
        (set_entry("llama.rope.freq_base", 10), "expected a positive number, got 10"),
        (drop_tensor("blk.1.ffn_up.weight"), "tensor 'blk.1.ffn_up.weight': not in this file"),
        (drop_tensor("token_embd.weight"), "'token_embd.weight': no such tensor"),
        (set_tensor("rope_freqs.weight", 4), "tensor 'rope_freqs.weight': not known in a llama"),
        (set_tensor("blk.0.ffn_up.weight", 48, 31), r"shape \(48, 31\), expected \(48, 32\)"),
        (set_entry("tokenizer.ggml.model", "llama"), "model': 'llama' is not supported"),
        (set_entry("tokenizer.ggml.pre", "qwen2"), "pre': 'qwen2' is not supported"),
        (set_entry("tokenizer.ggml.tokens", ["a", "a"]), "tokens': a token is there twice"),
        (set_entry("tokenizer.ggml.tokens", "a"), "tokens': expected an array of str"),
        (set_entry("tokenizer.ggml.token_type", [1]), "token_type': not one for each of 256"),
        (set_entry("tokenizer.ggml.merges", [1]), "merges': expected an array of str"),
        (set_entry("tokenizer.ggml.merges", ["é q x"]), "field 'tokenizer.ggml.merges': "),
    ],
)
def test_gguf_that_would_run_wrongly_is_refused(
    folder: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any], Arrays], None],
    message: str,
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", folder, change)
    with pytest.raises(InputError, match=f"bad.gguf: .*{message}"):
        open_torch_model(path)


def test_gguf_without_optional_entries(folder: Path, tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: Arrays) -> None:
        for key in ("rope.freq_base", "rope.dimension_count"):
            del metadata[f"llama.{key}"]
        tensors["output.weight"] = np.ones((VOCABULARY, HIDDEN), np.float32)

    loaded = open_torch_model(write_gguf(tmp_path / "tiny.gguf", folder, change))
    assert loaded.module.config.rope_parameters["rope_theta"] == 10000.0  # llama.cpp's default
    assert loaded.module.lm_head.weight.min() == 1


def test_gguf_tokenizer(folder: Path, tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: Arrays) -> None:
        metadata["tokenizer.ggml.tokens"][2:4] = ["<|end|>", "12"]
        metadata["tokenizer.ggml.token_type"][2] = 3
        metadata["tokenizer.ggml.merges"].append("1 2")  # never done: digits stay alone

    loaded = open_torch_model(write_gguf(tmp_path / "tiny.gguf", folder, change))
    tokens = byte_tokens()
    letters = [tokens.index(letter) for letter in "aĠ12"]
    assert loaded.encode("athe 12<|end|>").tolist() == [letters[0], 0, *letters[1:], 2]


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys: 'model.layers.1.mlp.up_proj.weight'"):
        open_torch_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="transformers cannot load it: "):
        open_torch_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled files are never opened"):
        open_torch_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("m.bin", "expected a .gguf file or a Hugging Face folder"), ("m.gguf", "no such file")],
)
def test_other_paths_are_refused(
    torch: ModuleType, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_torch_model(tmp_path / name)


# -------------------------------------------------------------------------------------- the command


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(calibrate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_reports_silent_channels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sop.shared.progress, "_LINE_SECONDS", 0.0)
    text = tmp_path / "prose.txt"
    text.write_text(PROSE.content)
    output = tmp_path / "c.safetensors"
    options = ["--text", text, "--tokens", 22, "--window", 8, "--skip-tokens", 3]
    done = command(folder, "-o", output, *options, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    silent = {layer["name"]: layer["silent_channels"] for layer in report["layers"]}
    assert len(silent) == 7 * BLOCKS
    assert silent.pop("model.layers.1.mlp.down_proj.weight") == 1
    assert set(silent.values()) == {0}
    assert (report["tokens"], report["text"], report["second_moment"]) == (22, "prose.txt", False)
    assert "windows: 3 of 3" in done.stderr
    assert Calibration(output).channel_norms("model.layers.1.mlp.down_proj.weight")[SILENT] == 0

    done = command(folder, "-o", output, *options, "--second-moment")
    assert done.exit_code == 0, done.output
    assert "model.layers.1.mlp.down_proj.weight" in done.stdout
    assert "1 layers have channels that were always zero" in done.stdout
    assert Calibration(output).run.second_moment


def test_command_refuses_bad_files(tmp_path: Path) -> None:
    assert "suffix must be .safetensors" in str(command("-o", tmp_path / "c.npz").exception)
    (tmp_path / "t.txt").write_bytes(b"ab\xff")
    done = command("-o", tmp_path / "c.safetensors", "--text", tmp_path / "t.txt")
    assert "t.txt: not UTF-8: invalid start byte at byte 2" in str(done.exception)


# ----------------------------------------------------------------------------- the embedded SmolLM2


@pytest.fixture(scope="module")
def smollm2(torch: ModuleType) -> TorchModel:
    if "SOP_SLOW_TESTS" not in os.environ:
        pytest.skip("takes a minute; set SOP_SLOW_TESTS=1 to run it")
    return open_torch_model(embedded_model_path())


def test_smollm2_tokenizer_gives_known_ids(smollm2: TorchModel) -> None:
    # From the tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct, by the package tokenizers.
    known = {
        "The quick brown fox jumps over the lazy dog.":
            [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30],
        "+ 3.14159": [27, 216, 35, 30, 33, 36, 33, 37, 41],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "<|im_start|>user\n": [1, 4093, 198],
    }  # fmt: skip
    for text, ids in known.items():
        assert smollm2.encode(text).tolist() == ids


def test_smollm2_perplexity_is_that_of_other_programs(
    torch: ModuleType, smollm2: TorchModel
) -> None:
    # With these ids, which transformers makes of the GGUF file without splitting off digits, and
    # this text, transformers' own GGUF loader gives 10.353 and llama.cpp 10.380.
    path = smollm2.path
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    ids = torch.tensor(tokenizer(default_text().content, verbose=False)["input_ids"])
    losses = []
    for start in range(60_000, 64_096, 1024):
        window = ids[None, start : start + 1024]
        with torch.inference_mode():
            losses.append(smollm2.module(input_ids=window, labels=window).loss.item())
    assert np.exp(np.mean(losses)) == pytest.approx(10.36, abs=0.03)
