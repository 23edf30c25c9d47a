"""``sop quantize --engine``: the choice is shown, and changes no byte of the file."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from golden.engine import GOLDEN
from golden.errors import InputError
from sop.cli import app
from sop.quantizing.engines import engine_named

NAMES = ("model.layers.0.attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    tensors = {name: rng.standard_normal((24, 40)).astype(np.float32) for name in NAMES}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("fast", "numba")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)


def run(source: Path, *options: object) -> Result:
    arguments = ["quantize", source, "-o", source.with_name("out.safetensors"), "--force", *options]
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def quantized(source: Path, *options: object) -> tuple[str, bytes]:
    """Engine that the JSON names, and the file."""
    result = run(source, "--json", "--format", "Any4-Any4sRS1E2M4", *options)
    assert result.exit_code == 0
    return json.loads(result.stdout)["engine"], source.with_name("out.safetensors").read_bytes()


@pytest.mark.parametrize("jobs", [1, 2])
def test_engines_write_the_same_file(source: Path, jobs: int) -> None:
    pytest.importorskip("numba")
    made = {
        engine: quantized(source, "-j", jobs, "--engine", engine) for engine in ("golden", "fast")
    }
    assert {engine: name for engine, (name, _) in made.items()} == {
        "golden": "golden",
        "fast": "fast",
    }
    assert made["golden"][1] == made["fast"][1]
    assert quantized(source, "-j", jobs) == made["fast"]


def test_the_text_names_the_engine(source: Path) -> None:
    result = run(source, "-j", 1, "--format", "NF4sUE4M4", "--engine", "golden")
    assert "engine golden" in result.stdout


@pytest.mark.usefixtures("without_numba")
def test_without_the_packages_golden_computes(source: Path) -> None:
    assert engine_named("auto") is GOLDEN
    assert quantized(source, "-j", 1)[0] == "golden"


@pytest.mark.usefixtures("without_numba")
def test_the_fast_engine_says_what_it_needs(source: Path) -> None:
    with pytest.raises(InputError, match=r"--engine fast needs .* 'numba'; install .*\[fast\]'"):
        run(source, "--format", "NF4sUE4M4", "--engine", "fast")
    assert not source.with_name("out.safetensors").exists()


def test_an_unknown_engine_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="--engine must be one of auto, golden, fast, not 'slow'"):
        run(source, "--engine", "slow")
