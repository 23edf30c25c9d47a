"""Calibration: gathering statistics, against a model written in NumPy.

What runs a model is skipped where the extra ``llm`` is not installed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import Result

import sop.shared.progress
from golden.errors import InputError
from sop.commands.calibrate import calibrate
from sop.files.calibration import Calibration
from sop.files.models import embedded_model_path
from sop.llm.gathering import calibrate_model
from sop.llm.model import TorchModel
from sop.llm.opening import open_torch_model
from sop.llm.packages import require
from sop.llm.windows import Text, default_text
from sop.shared.progress import Report
from tests.support.commands import invoke_alone
from tests.support.imports import imported_by
from tests.support.tiny_llama import (
    BLOCKS,
    EPSILON,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    PARTS,
    ROPE_BASE,
    byte_tokens,
    no_merges,
    save_tiny_llama,
    write_gguf,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]


SILENT = 5  # channel of `down_proj` of block 1 that is always zero


@pytest.fixture(scope="module")
def folder(torch: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as a Hugging Face folder."""

    def silence(name: str, values: Float32) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            values[SILENT] = 0

    path = tmp_path_factory.mktemp("tiny")
    return save_tiny_llama(path, tied=True, norm_spread=1.0, change=silence)


def test_default_text_is_sorted_prose() -> None:
    text = default_text().content
    assert text.index('The "assert" statement') < text.index('The "while" statement')
    assert len(text) > 400_000


def test_importing_the_command_does_not_import_torch() -> None:
    assert not {"torch", "transformers"} & imported_by("sop.commands.calibrate")


# ---------------------------------------------------------------------- a tiny model, written twice


PROSE = Text("prose", "Twenty-two windows or 7, then it ends: the quick brown fox, of 1024 tokens.")


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


def interrupt_after(windows: int) -> Report:
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


# -------------------------------------------------------------------------------------- the command


def command(*arguments: object) -> Result:
    return invoke_alone(calibrate, *arguments)


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
