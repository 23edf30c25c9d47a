"""``sop eval``: what it prints, warns of and refuses.

What runs a model is skipped where the extra ``llm`` is not installed.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import Result

import sop.commands.eval
import sop.llm.evaluation
import sop.shared.progress
from golden.checkpoint import Checkpoint, reconstruct
from golden.errors import InputError
from golden.metrics import cosine_gap_ppm
from sop.baselines.others import BASELINES
from sop.commands.eval import eval_command
from sop.files.evaluation_file import EvaluationFile
from sop.llm.candidates import baseline_candidate
from sop.llm.evaluation import evaluate
from sop.llm.model import TorchModel
from sop.llm.windows import Text
from tests.support.commands import invoke_alone
from tests.support.imports import imported_by
from tests.support.tiny_model import (
    DOWN,
    PROSE,
    QUERY,
    SETTINGS,
    Weights,
    noisy,
    opened_by,
    sha256,
    tiny_model,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def model(torch: ModuleType) -> TorchModel:
    return tiny_model(tied=True, matrices_only=True)


def test_importing_the_command_does_not_import_torch() -> None:
    assert not {"torch", "transformers"} & imported_by("sop.commands.eval")


def command(*arguments: object) -> Result:
    return invoke_alone(eval_command, *arguments)


@pytest.fixture
def opened(model: TorchModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The command opens the tiny model; its options for the small text."""
    text = opened_by("sop.commands.eval", model, monkeypatch, tmp_path)
    return [*text, "--tokens", 22, "--window", 8, "--skip-tokens", 3]


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
    seen = write_checkpoint(
        tmp_path / "seen.safetensors", tensors, calibration=calibrated(model, PROSE)
    )
    done = command("m.gguf", seen, "--baseline", "MXFP4", "--baselines", *opened, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    file = EvaluationFile.from_json(report, "eval")
    assert json.loads(json.dumps(file.to_json())) == report
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
