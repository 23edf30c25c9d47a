"""The model with noise that stands for one that nobody quantized before."""

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest

import sop.files.dithered as dithered
import sop.files.models as models
from sop.files.dithered import BLOCK, dither, dithered_copy
from sop.files.gguf_file import GgufFile
from sop.files.models import EMBEDDED_DITHERED, open_model, resolve_model

LINEAR, EMBEDDING, NORM = "blk.0.attn_q.weight", "token_embd.weight", "blk.0.attn_norm.weight"


def on_grid(seed: int, shape: tuple[int, int] = (64, 256)) -> np.ndarray:
    """Weights as Q4_1 has them: 16 levels a block, both ends in use."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 16, (shape[0] * shape[1] // BLOCK, BLOCK))
    levels[:, :2] = 0, 15
    steps = rng.uniform(0.5, 2, (len(levels), 1))
    return ((levels - 8) * steps).astype(np.float32).reshape(shape)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that stands for the embedded one, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    q8 = gguf.quants.quantize(on_grid(1), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(EMBEDDING, q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(NORM, np.arange(256, dtype=np.float32))
    writer.add_tensor(LINEAR, on_grid(2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(models, "embedded_model_path", lambda: path)
    return path


def test_noise_is_uniform_and_a_step_wide() -> None:
    weights = on_grid(3, (256, 512))
    blocks = weights.reshape(-1, BLOCK)
    steps = (blocks.max(axis=1) - blocks.min(axis=1)) / 15
    noise = (dither(weights, "a").reshape(-1, BLOCK) - blocks) / steps[:, None]
    assert -0.5001 < noise.min() < -0.499
    assert 0.499 < noise.max() < 0.5001
    counts, _ = np.histogram(noise, bins=16, range=(-0.5, 0.5))
    assert np.abs(counts / noise.size * 16 - 1).max() < 0.05


def test_each_name_has_noise_of_its_own_the_same_everywhere() -> None:
    weights = np.arange(-1024, 1024, dtype=np.float32).reshape(8, 256)
    assert not np.array_equal(dither(weights, "a"), dither(weights, "b"))
    assert hashlib.sha256(dither(weights, "a").tobytes()).hexdigest().startswith("dd176f9da09aec7d")


def test_linear_layers_are_dithered_and_the_rest_is_copied(source: Path) -> None:
    path = resolve_model(EMBEDDED_DITHERED)
    old, new = GgufFile(source), GgufFile(path)
    assert list(old.tensors) == list(new.tensors)
    assert old.metadata == new.metadata
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    for name in (EMBEDDING, NORM):
        assert old.tensors[name].type_name == new.tensors[name].type_name
        np.testing.assert_array_equal(old.read_tensor(name), new.read_tensor(name))
    expected = dither(old.read_tensor(LINEAR), LINEAR)
    assert new.tensors[LINEAR].type_name == "BF16"
    np.testing.assert_allclose(new.read_tensor(LINEAR), expected, rtol=2**-8)
    old.close()
    new.close()
    with open_model(path) as model:
        assert "Q4_1" not in model.source_note


def test_it_is_made_once(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = resolve_model(EMBEDDED_DITHERED)
    assert "making" in capsys.readouterr().err
    before = path.stat()
    assert resolve_model(EMBEDDED_DITHERED) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert capsys.readouterr().err == ""


def test_one_that_is_interrupted_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(weights: np.ndarray, name: str) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(dithered, "dither", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dithered_copy(source)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_file_of_that_name_comes_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(EMBEDDED_DITHERED).mkdir()
    assert resolve_model(EMBEDDED_DITHERED) == Path(EMBEDDED_DITHERED)
