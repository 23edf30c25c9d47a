"""``sop decode`` and the files of ``export``, as users see them."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from golden.corrections import Corrections
from tests.support.checkpoint_file import (
    QUANTIZED,
    RAW,
    WEIGHTS,
    Arrays,
    matrix,
    quantized,
    reconstructed,
    source_folder,
    write_checkpoint,
)
from tests.support.commands import Sop, assert_refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_folder(tmp_path / "hf")


# ------------------------------------------------------------------------------------------ decode


def test_decode_writes_every_tensor(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    output = tmp_path / "new" / "d.safetensors"
    result = sop_run("decode", file, "-o", output, "--json")
    assert result.json == {"output": str(output), "decoded": 5, "copied": 3}
    arrays = load_file(output)
    assert set(arrays) == {*QUANTIZED, *RAW}
    for name in QUANTIZED:
        np.testing.assert_array_equal(arrays[name], reconstructed(name), strict=True)
    for name, array in RAW.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.stat().st_mode & 0o777 == 0o644


def test_decode_to_bfloat16_rounds_to_even(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    output = tmp_path / "d.safetensors"
    assert sop_run("decode", file, "-o", output, "--dtype", "bfloat16").code == 0
    arrays = load_file(output)
    for name in QUANTIZED:
        bits = reconstructed(name).view(np.uint32).astype(np.uint64)
        expected = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        assert arrays[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(arrays[name].view(np.uint16), expected)
    assert arrays["norm"].dtype == np.float32


def test_decoded_tensors_are_aligned(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    output = tmp_path / "d.safetensors"
    sop_run("decode", file, "-o", output, "--dtype", "bfloat16")
    raw = output.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt", "sop_decoded": "1"}
    for entry in header.values():
        width = {"I64": 8, "F32": 4, "BF16": 2}[entry["dtype"]]
        assert entry["data_offsets"][0] % width == 0


def test_decode_holds_one_tensor(tmp_path: Path, sop_run: Sop) -> None:
    one = quantized("NF4sUE4M4", matrix(128, 512, 1))

    def peak(count: int) -> int:
        path = write_checkpoint(
            tmp_path / f"{count}.safetensors", {f"w{i:02}": one for i in range(count)}, {}
        )
        tracemalloc.start()
        try:
            assert sop_run("decode", path, "-o", tmp_path / "d.safetensors").code == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(12) - peak(1) < 128 * 512 * 4


def test_decode_keeps_what_was_there_if_it_fails(
    file: Path, tmp_path: Path, sop_run: Sop, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "d.safetensors"
    output.parent.mkdir()
    assert sop_run("decode", file, "-o", output, "--dtype", "bfloat16").code == 0
    before = output.read_bytes()

    def fail(source: str, target: Path) -> None:
        assert set(load_file(source)) == {*QUANTIZED, *RAW}, "must be complete before the rename"
        assert Path(source).parent == output.parent
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert_refused(sop_run("decode", file, "-o", output), "disk full")
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.read_bytes() == before


def test_decode_refuses_bad_targets(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    before = file.read_bytes()
    assert_refused(
        sop_run("decode", file, "-o", tmp_path / "d.bin"), "the suffix must be .safetensors"
    )
    assert_refused(sop_run("decode", file, "-o", file), "is the input")
    assert file.read_bytes() == before
    (tmp_path / "x.safetensors").mkdir()
    assert_refused(sop_run("decode", file, "-o", tmp_path / "x.safetensors"), "is a folder")
    target = tmp_path / "d.safetensors"
    assert_refused(
        sop_run("decode", file, "-o", target, "--dtype", "float16"), "--dtype must be one of"
    )
    assert not target.exists()


def test_decode_refuses_what_bfloat16_cannot_hold(tmp_path: Path, sop_run: Sop) -> None:
    # Dense 1e36 plus the largest bfloat16: a float32, but beyond the last tie of bfloat16.
    tensor, _ = quantized("NF4sUE4M4", np.full((1, 16), 1e36, np.float32))
    residual = np.zeros((1, 16), np.float32)
    residual[0, 3] = (2 - 2**-7) * 2.0**127  # the largest bfloat16
    mask = residual > 0
    path = write_checkpoint(
        tmp_path / "q.safetensors", {"w": (tensor, Corrections.from_mask(mask, residual))}, {}
    )
    target = tmp_path / "d.safetensors"
    assert sop_run("decode", path, "-o", target).code == 0
    target.unlink()
    result = sop_run("decode", path, "-o", target, "--dtype", "bfloat16")
    assert_refused(result, "tensor 'w': a weight is too large for bfloat16")
    assert not target.exists()


# ------------------------------------------------------------------------- export, without PyTorch


def test_export_of_a_folder(file: Path, source: Path, tmp_path: Path, sop_run: Sop) -> None:
    target = tmp_path / "made" / "out"
    result = sop_run("export", file, "-o", target, "--model", source, "--dtype", "bfloat16")
    assert (result.code, result.out) == (0, f"{target}\n")
    copied = ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model"]
    files = sorted(path.name for path in target.iterdir())
    assert files == sorted([*copied, "config.json", "model.safetensors"])
    for name in copied:
        assert (target / name).read_text() == name
    config = json.loads((target / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    arrays = load_file(target / "model.safetensors")
    for name in QUANTIZED:
        expected = reconstructed(name).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(arrays[name], expected, strict=True)
    assert arrays["norm"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(arrays["ids"], RAW["ids"], strict=True)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_export_takes_an_empty_folder_only(
    file: Path, source: Path, tmp_path: Path, sop_run: Sop
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    assert sop_run("export", file, "-o", target, "--model", source).code == 0
    before = (target / "config.json").read_bytes()
    result = sop_run("export", file, "-o", target, "--model", source)
    assert_refused(result, "out: exists and is not an empty folder")
    assert_refused(sop_run("export", file, "-o", file, "--model", source), "is not a folder")
    assert (target / "config.json").read_bytes() == before


def edit_config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(changes))


def only_file(folder: Path, arrays: Arrays) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file(arrays, folder / "model.safetensors")


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "hf: ",
    ),
    "broken-weights": (
        lambda folder: (folder / "1-of-2.safetensors").write_bytes(b"\0"),
        "1-of-2.safetensors: not a valid safetensors file",
    ),
    "more": (
        lambda folder: only_file(folder, {**WEIGHTS, **RAW, "more": np.ones(1)}),
        "tensor 'more': no such tensor in this checkpoint, (1,) in ",
    ),
    "fewer": (
        lambda folder: only_file(folder, RAW),
        "tensor 'blk.0.pair': (6, 40) in this checkpoint, no such tensor in",
    ),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no-json": (lambda folder: (folder / "config.json").write_text("{"), "not a JSON file"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "not a JSON file"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "quantized": (edit_config(quantization_config={}), "field 'quantization_config'"),
    "quantized-part": (
        edit_config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        "field 'text_config.quantization_config'",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_sources_that_do_not_fit(
    file: Path,
    source: Path,
    tmp_path: Path,
    sop_run: Sop,
    change: Callable[[Path], object],
    message: str,
) -> None:
    change(source)
    target = tmp_path / "made" / "out"
    assert_refused(sop_run("export", file, "-o", target, "--model", source), message)
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_export_needs_a_model_that_it_knows(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    target = tmp_path / "out"
    result = sop_run("export", file, "-o", target, "--model", file)
    assert_refused(result, "expected a .gguf file or a Hugging Face folder")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUX" + bytes(40))
    assert_refused(sop_run("export", file, "-o", target, "--model", bad), "bad.gguf: field 'magic'")
    assert not target.exists()
