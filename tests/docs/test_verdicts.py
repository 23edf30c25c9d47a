"""Verdicts of ``sop`` on broken checkpoints, and good ones decoded as by docs/decoder.py."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors

from golden.errors import InputError
from golden.vectors.broken_checkpoints import BROKEN
from tests.support.commands import invoke, sop_process
from tests.support.second_implementation import DECODER, some_vectors, verdicts


@pytest.mark.parametrize("name", BROKEN)
def test_sop_gives_the_stated_verdict(name: str, tmp_path: Path) -> None:
    path, output = tmp_path / "model.safetensors", tmp_path / "decoded.safetensors"
    content, verdict = verdicts()[f"broken_{name}.safetensors"]
    assert verdict is not None
    kind, tensor, field = verdict
    path.write_bytes(content)
    commands: list[list[str | Path]] = [["decode", path, "-o", output]]
    if kind != "range":  # a reader may find that when it decodes
        commands.append(["inspect", path])
    where = f"{path}: " + ("" if tensor is None else f"tensor {tensor!r}: ")
    for command in commands:
        error = invoke(*command).exception
        assert isinstance(error, InputError)
        assert str(error).startswith(where)
        assert (field or "") in str(error).removeprefix(where)
        assert not output.exists()


def test_a_refusal_is_the_last_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(verdicts()["broken_padding_overflow.safetensors"][0])
    result = sop_process("decode", path, "-o", tmp_path / "o.safetensors")
    assert (result.code, result.out) == (2, "")
    line = result.err.splitlines()[-1]  # after what it says of its progress
    assert re.fullmatch(rf"sop: {re.escape(str(path))}: tensor 'b': .* overflow float32", line)


def matrix_of(decoded: Any, name: str, shape: list[int]) -> bytes:
    """Values of a quantized matrix out of the tensors of the model, stacked and transposed ones."""
    if name in decoded.keys():
        matrix = decoded.get_tensor(name)
    else:
        whole, _, index = name.removesuffix("]").rpartition("[")
        matrix = decoded.get_tensor(whole)[int(index)]
    if list(matrix.shape) != shape:
        matrix = matrix.T
    assert list(matrix.shape) == shape
    return bytes(matrix.tobytes())  # row by row, whatever the order in memory


def test_good_checkpoints_are_decoded_alike(tmp_path: Path) -> None:
    """By ``sop decode`` and by the command line of the second implementation."""
    files = some_vectors("checkpoints")
    for case in json.loads(files["checkpoints/expected.json"])["cases"]:
        path, output = tmp_path / case["file"], tmp_path / "decoded.safetensors"
        path.write_bytes(files[f"checkpoints/{case['file']}"])
        assert invoke("decode", path, "-o", output).exit_code == 0
        command = [sys.executable, str(DECODER), "decode", str(path)]
        done = subprocess.run(
            command, check=True, capture_output=True, timeout=60, encoding="utf-8"
        )
        lines = set(done.stdout.splitlines())
        opener: Any = safetensors.safe_open  # its stubs are not annotated
        decoded = opener(str(output), framework="numpy")
        for name, expected in case["quantized"].items():
            digest = hashlib.sha256(matrix_of(decoded, name, expected["shape"])).hexdigest()
            assert digest == expected["sha256"]
            assert f"{digest} {'x'.join(map(str, expected['shape']))} {name}" in lines
        assert len(lines) == len(case["quantized"]) + len(case["raw"])


def test_there_are_at_least_thirty_of_every_kind() -> None:
    kinds = {broken.kind for broken in BROKEN.values()}
    assert kinds == {"container", "metadata", "layout", "plane", "code", "corrections", "range"}
    assert len(BROKEN) >= 30
    bases = {name: content for name, (content, _) in verdicts().items()}
    assert len(set(bases.values())) == len(BROKEN)
