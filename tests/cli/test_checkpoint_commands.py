"""``sop inspect``, ``compare``, ``decode`` and the files of ``export``, as users see them."""

import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import sop.cli
from golden.checkpoint import Checkpoint, CheckpointWriter, StoredTensor, reconstruct
from golden.corrections import Corrections
from golden.formats import HIF7, HIF8T, HifFormat
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tensor import QuantizedTensor, decode

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Result:
    """What one run of the program did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Sop = Callable[..., Result]


@pytest.fixture
def sop_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sop:
    """Run ``sop`` in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sop", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            sop.cli.main()
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


def refused(result: Result, *parts: str) -> None:
    """Exit code 2, nothing on standard output, one line with all parts on standard error."""
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("sop: ")
    for part in parts:
        assert part in line


# ------------------------------------------------------------------------------------- checkpoints

CONFIG = {"format": "mixed", "scale_mode": "search"}
CALIBRATION = {"tokens": 7}


def matrix(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def quantized(
    name: str, weights: NDArray[np.float32], hif: HifFormat = HIF7
) -> tuple[QuantizedTensor, Corrections | None]:
    return quantize(weights, parse_format(name, hif)), None


def with_corrections(
    name: str, weights: NDArray[np.float32]
) -> tuple[QuantizedTensor, Corrections]:
    tensor, _ = quantized(name, weights)
    residuals = weights - decode(tensor)
    return tensor, Corrections.from_mask(np.abs(residuals) > 0.2, residuals)


WEIGHTS = {
    "blk.0.pair": matrix(6, 40, 1),
    "blk.0.plain": matrix(4, 32, 2),
    "blk.1.atom": matrix(3, 32, 3),
    "blk.1.layer": matrix(5, 7, 4),
    "blk.1.rows": matrix(4, 48, 5),
}
WEIGHTS["blk.0.pair"][2, :16] = 0

QUANTIZED: dict[str, tuple[QuantizedTensor, Corrections | None]] = {
    "blk.0.pair": with_corrections("BOF4-NF4sS1E5M5", WEIGHTS["blk.0.pair"]),
    "blk.0.plain": quantized("NF4sUE4M4", WEIGHTS["blk.0.plain"]),
    "blk.1.atom": quantized("E2M3^32sUE8M0", WEIGHTS["blk.1.atom"]),
    "blk.1.layer": quantized("E4M3^0sUE8M0", WEIGHTS["blk.1.layer"]),
    "blk.1.rows": quantized("NF4-SH4sRS1E2M4", WEIGHTS["blk.1.rows"], HIF8T),
}
RAW: Arrays = {
    "ids": np.arange(5, dtype=np.int64),
    "norm": np.array([1.0, -0.5, 3.14159265], np.float32),
    "small": np.array([[0.1, 2.0]], ml_dtypes.bfloat16),
}
RAW_TYPES = {"ids": "I64", "norm": "F32", "small": "BF16"}


def write_checkpoint(
    path: Path,
    tensors: dict[str, tuple[QuantizedTensor, Corrections | None]] = QUANTIZED,
    raw: Arrays = RAW,
    config: dict[str, Any] = CONFIG,
    types: dict[str, str] = RAW_TYPES,
) -> Path:
    with CheckpointWriter(path, config, CALIBRATION) as writer:
        for name, (tensor, corrections) in tensors.items():
            writer.add(name, tensor, corrections, "F32")
        for name, array in raw.items():
            writer.add_raw(name, types[name], array.shape, [array.tobytes()])
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "q.safetensors")


def reconstructed(name: str) -> NDArray[np.float32]:
    return reconstruct(StoredTensor(*QUANTIZED[name]))


# ----------------------------------------------------------------------------------------- inspect


def test_inspect_sums_up_the_file(file: Path, sop_run: Sop) -> None:
    listing = sop_run("inspect", file, "--json").json
    assert listing["config"] == CONFIG
    assert listing["calibration"] == CALIBRATION
    with Checkpoint(file) as checkpoint:
        assert listing["config_hash"] == checkpoint.config_hash
    count = sum(weights.size for weights in WEIGHTS.values())
    assert (listing["weights"], listing["quantized_tensors"], listing["raw_tensors"]) == (
        count, 5, 3,
    )  # fmt: skip
    sizes = listing["bytes"]
    raw = file.read_bytes()
    assert sum(sizes.values()) == len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert sizes["raw"] == 5 * 8 + 3 * 4 + 2 * 2
    assert sizes["luts"] == (2 + 1 + 2) * 16
    assert sizes["row_scales"] == 2 * 4
    corrections = QUANTIZED["blk.0.pair"][1]
    assert corrections is not None
    assert sizes["corrections"] == corrections.stored_bits // 8
    # Blocks of 12, 8, 8, 8 and 9 bits: a half-full last block counts whole.
    assert sizes["scales"] == 6 * 3 * 12 // 8 + 4 * 2 + 3 + 1 + -(-4 * 3 * 8 // 8)
    quantized_bytes = sum(sizes.values()) - sizes["raw"]
    assert listing["stored_bits_per_weight"] == pytest.approx(8 * quantized_bytes / count)


def test_inspect_tells_how_tensors_use_their_format(file: Path, sop_run: Sop) -> None:
    entries = {t["name"]: t for t in sop_run("inspect", file, "--json").json["tensors"]}
    assert list(entries) == list(QUANTIZED)
    pair, corrections = QUANTIZED["blk.0.pair"]
    assert corrections is not None
    entry = entries["blk.0.pair"]
    assert (entry["format"], entry["hif"], entry["shape"]) == ("BOF4-NF4sS1E5M5", "HIF7", [6, 40])
    assert entry["zero_block_share"] == pytest.approx(1 / 18)
    second = sum(int(word) >> 11 for word in pair.scale_words.flat)
    assert 0 < second < 17
    assert entry["metabit_share"] == pytest.approx(second / 18)
    assert (entry["corrections"], entry["layer_exponent"]) == (
        corrections.entries, pair.layer_exponent,
    )  # fmt: skip
    assert entry["correction_share"] == pytest.approx(corrections.entries / 240)
    plain = entries["blk.0.plain"]
    # 128 indices of 4 bits, 8 scale words of 8 bits, 16 LUT entries of a byte.
    assert plain["stored_bits_per_weight"] == (128 * 4 + 8 * 8 + 16 * 8) / 128
    assert (plain["metabit_share"], plain["corrections"]) == (None, None)
    assert entries["blk.1.rows"]["hif"] == "HIF8T"


def test_inspect_selects_and_shows_codebooks(file: Path, sop_run: Sop) -> None:
    listing = sop_run("inspect", file, "-t", "blk.0.*", "--codebooks", "--json").json
    assert [entry["name"] for entry in listing["tensors"]] == ["blk.0.pair", "blk.0.plain"]
    for entry in listing["tensors"]:
        luts = QUANTIZED[entry["name"]][0].luts
        assert entry["luts"] == [lut.values.tolist() for lut in luts]
    assert listing["weights"] == sum(weights.size for weights in WEIGHTS.values())
    text = sop_run("inspect", file, "--codebooks").out
    assert "BOF4-NF4sS1E5M5 HIF7" in text
    assert " ".join(str(v) for v in QUANTIZED["blk.0.plain"][0].luts[0].values) in text
    assert "luts" not in sop_run("inspect", file, "--json").json["tensors"][0]
    refused(sop_run("inspect", file, "-t", "blk.7.*"), "pattern 'blk.7.*': matches none of 5")


def test_inspect_rounds_no_share_to_nothing(tmp_path: Path, sop_run: Sop) -> None:
    weights = matrix(256, 256, 6)
    tensor, _ = quantized("NF4sUE4M4", weights)
    mask = np.zeros(weights.shape, np.bool_)
    mask[5, 7] = True
    corrections = Corrections.from_mask(mask, weights - decode(tensor))
    path = write_checkpoint(tmp_path / "one.safetensors", {"blk.0.one": (tensor, corrections)})
    assert "under 0.01" in sop_run("inspect", path).out


def test_inspect_a_file_without_quantized_tensors(tmp_path: Path, sop_run: Sop) -> None:
    path = write_checkpoint(tmp_path / "raw.safetensors", {})
    assert sop_run("inspect", path, "--json").json["stored_bits_per_weight"] is None
    assert sop_run("inspect", path).code == 0


# ----------------------------------------------------------------------------------------- compare


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What was quantized, with one tensor that the checkpoint does not have."""
    path = tmp_path / "model.safetensors"
    save_file({**WEIGHTS, **RAW, "extra": np.ones(2, np.float32)}, path)
    return path


def plain_errors(name: str) -> tuple[float, float, float]:
    a, b = WEIGHTS[name].astype(np.float64), reconstructed(name).astype(np.float64)
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    return ((a - b) ** 2).sum() / (a * a).sum(), (1 - cosine) * 1e6, np.abs(a - b).max()


def test_compare_a_checkpoint_with_its_source(file: Path, model: Path, sop_run: Sop) -> None:
    result = sop_run("compare", model, file, "--json").json
    entries = {entry["name"]: entry for entry in result["tensors"]}
    assert set(entries) == {*WEIGHTS, "norm", "small"}
    for name in WEIGHTS:
        mse, gap, largest = plain_errors(name)
        assert entries[name]["relative_mse"] == pytest.approx(mse)
        assert entries[name]["cosine_gap_ppm"] == pytest.approx(gap)
        assert entries[name]["max_difference"] == largest > 0
    for name in ("norm", "small"):
        assert (entries[name]["relative_mse"], entries[name]["max_difference"]) == (0, 0)
    assert (result["only_in_a"], result["only_in_b"]) == (["extra"], [])
    assert result["not_compared"] == ["ids"]
    count = sum(weights.size for weights in WEIGHTS.values()) + 3 + 2
    assert result["weights"] == count
    mean = sum(WEIGHTS[name].size * plain_errors(name)[0] for name in WEIGHTS) / count
    assert result["mean_relative_mse"] == pytest.approx(mean)
    assert result["max_difference"] == max(plain_errors(name)[2] for name in WEIGHTS)
    back = sop_run("compare", file, model, "--json").json
    assert (back["only_in_a"], back["only_in_b"]) == ([], ["extra"])
    text = sop_run("compare", model, file).out
    assert "only in A: extra" in text
    assert "not compared, no floats: ids" in text


def write_calibration(path: Path, norms: Arrays) -> Path:
    description = {
        "version": 2, "model": "m", "model_sha256": "", "config_sha256": "", "text": "t",
        "text_sha256": "", "skip_tokens": 0, "tokens": 7, "window": 7, "prefix_tokens": [],
        "second_moment": False, "software": "", "layers": {name: name for name in norms},
        "layer_tokens": dict.fromkeys(norms, 7), "uncovered": {},
    }  # fmt: skip
    arrays = {f"{name}.channel_norms": values for name, values in norms.items()}
    save_file(arrays, path, {"sop_calibration": json.dumps(description)})
    return path


def test_compare_weights_the_cosine_by_activations(
    file: Path, model: Path, tmp_path: Path, sop_run: Sop
) -> None:
    norms = np.random.default_rng(9).uniform(0, 3, 40)
    stats = write_calibration(tmp_path / "c.safetensors", {"blk.0.pair": norms})
    result = sop_run("compare", model, file, "--calibration", stats, "--json").json
    gaps = {entry["name"]: entry["cosine_gap_ppm"] for entry in result["tensors"]}
    a, b = WEIGHTS["blk.0.pair"] * norms, reconstructed("blk.0.pair") * norms
    gap = (1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())) * 1e6
    assert gaps.pop("blk.0.pair") == pytest.approx(gap)
    assert result["mean_cosine_gap_ppm"] == pytest.approx(gap)
    assert set(gaps.values()) == {None}
    assert sop_run("compare", model, file, "--calibration", stats).code == 0


def test_compare_checkpoints_under_any_name(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    tensors = {**QUANTIZED, "blk.1.atom": quantized("E2M1sUE4M4", WEIGHTS["blk.1.atom"])}
    other = write_checkpoint(tmp_path / "other.quantized", tensors)
    result = sop_run("compare", file, other, "--json").json
    differing = [entry["name"] for entry in result["tensors"] if entry["max_difference"]]
    assert differing == ["blk.1.atom"]
    assert sop_run("compare", file, file, "--json").json["mean_relative_mse"] == 0


def test_compare_shows_an_infinite_error_as_null(tmp_path: Path, sop_run: Sop) -> None:
    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "a.safetensors")
    save_file({"w": np.ones((2, 2), np.float32)}, tmp_path / "b.safetensors")
    result = sop_run("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    assert "Infinity" not in result.out
    assert result.json["tensors"][0]["relative_mse"] is None


BAD_PAIRS: dict[str, tuple[Arrays, str]] = {
    "shape": ({"blk.0.plain": np.ones((4, 31), np.float32)}, "tensor 'blk.0.plain': shape (4, 32)"),
    "nan": ({"norm": np.array([1, np.nan, 2], np.float32)}, "'norm': the weight at (1,) is nan"),
    "nothing-in-common": ({"x": np.ones(3, np.float32)}, "no tensor of floats in common"),
    "only-integers": ({"ids": np.arange(5)}, "no tensor of floats in common"),
    "huge": ({"norm": np.array([1e300, 1, 1])}, "'norm': field 'data': 1 float64 values"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_what_cannot_be_compared(
    file: Path, tmp_path: Path, sop_run: Sop, arrays: Arrays, message: str
) -> None:
    save_file(arrays, tmp_path / "a.safetensors")
    refused(sop_run("compare", tmp_path / "a.safetensors", file), message)


def test_raw_values_beyond_float32_cannot_be_compared(tmp_path: Path, sop_run: Sop) -> None:
    path = tmp_path / "q.safetensors"
    for values, problem in (
        (np.array([0.1, np.inf]), "is inf"),
        (np.array([1e300]), "too large for"),
    ):
        write_checkpoint(path, raw={"norm": values}, types={"norm": "F64"})
        refused(sop_run("compare", path, path), "tensor 'norm': ", problem)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"other": np.ones(3)}, "c.safetensors: has none of the tensors that are compared"),
        ({"blk.0.pair": np.ones(3)}, "tensor 'blk.0.pair': 3 channel norms"),
        ({"norm": np.ones(3)}, "tensor 'norm': 3 channel norms, the tensor has shape (3,)"),
    ],
)
def test_calibrations_that_do_not_fit(
    file: Path, tmp_path: Path, sop_run: Sop, norms: Arrays, message: str
) -> None:
    stats = write_calibration(tmp_path / "c.safetensors", norms)
    refused(sop_run("compare", file, file, "--calibration", stats), message)


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
    refused(sop_run("decode", file, "-o", output), "disk full")
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.read_bytes() == before


def test_decode_refuses_bad_targets(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    before = file.read_bytes()
    refused(sop_run("decode", file, "-o", tmp_path / "d.bin"), "the suffix must be .safetensors")
    refused(sop_run("decode", file, "-o", file), "is the input")
    assert file.read_bytes() == before
    (tmp_path / "x.safetensors").mkdir()
    refused(sop_run("decode", file, "-o", tmp_path / "x.safetensors"), "is a folder")
    target = tmp_path / "d.safetensors"
    refused(sop_run("decode", file, "-o", target, "--dtype", "float16"), "--dtype must be one of")
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
    refused(result, "tensor 'w': a weight is too large for bfloat16")
    assert not target.exists()


# ------------------------------------------------------------------------- export, without PyTorch


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face folder with two weight files, and files that are not to be copied."""
    folder = tmp_path / "hf"
    folder.mkdir()
    names = list(WEIGHTS)
    first = {name: WEIGHTS[name] for name in names[:2]}
    second = {name: WEIGHTS[name] for name in names[2:]} | RAW
    places: dict[str, str] = {}
    for file, arrays in (("1-of-2.safetensors", first), ("2-of-2.safetensors", second)):
        save_file(arrays, folder / file)
        places |= dict.fromkeys(arrays, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {"model_type": "llama", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"):
        (folder / name).write_text(name)
    for name in ("modeling.py", "pytorch_model.bin"):
        (folder / name).write_text("not to be copied")
    return folder


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
    refused(result, "out: exists and is not an empty folder")
    refused(sop_run("export", file, "-o", file, "--model", source), "is not a folder")
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
    refused(sop_run("export", file, "-o", target, "--model", source), message)
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_export_needs_a_model_that_it_knows(file: Path, tmp_path: Path, sop_run: Sop) -> None:
    target = tmp_path / "out"
    result = sop_run("export", file, "-o", target, "--model", file)
    refused(result, "expected a .gguf file or a Hugging Face folder")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUX" + bytes(40))
    refused(sop_run("export", file, "-o", target, "--model", bad), "bad.gguf: field 'magic'")
    assert not target.exists()


# ------------------------------------------------------------------------------------ broken files


def cut(raw: bytes) -> bytes:
    return raw[:-1]


def not_json(raw: bytes) -> bytes:
    return raw[:8] + b"x" + raw[9:]


def bad_lut(raw: bytes) -> bytes:
    """A LUT entry that is out of order; the header stays valid."""
    length = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + length])["blk.0.plain.luts"]["data_offsets"][0]
    position = 8 + length + start
    return raw[:position] + raw[position + 1 : position + 2] + raw[position + 1 :]


BREAKS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (cut, "bad.safetensors: "),
    "not-json": (not_json, "bad.safetensors: header: "),
    "lut": (bad_lut, "bad.safetensors: tensor 'blk.0.plain': field 'luts[0]': "),
}


@pytest.mark.parametrize(("damage", "message"), BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("command", ["inspect", "compare", "diff", "decode", "export"])
def test_broken_files_are_refused(
    file: Path,
    source: Path,
    tmp_path: Path,
    sop_run: Sop,
    command: str,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(damage(file.read_bytes()))
    folder = tmp_path / "made"
    arguments: dict[str, list[object]] = {
        "inspect": [bad],
        "compare": [file, bad],
        "diff": [file, bad],
        "decode": [bad, "-o", folder / "d.safetensors"],
        "export": [bad, "-o", folder / "out", "--model", source],
    }
    refused(sop_run(command, *arguments[command]), message)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("command", ["inspect", "compare", "diff", "decode"])
def test_other_files_are_refused(tmp_path: Path, sop_run: Sop, command: str) -> None:
    more = {"decode": ["-o", tmp_path / "d.safetensors"], "inspect": []}
    for path in (tmp_path / "missing.safetensors", tmp_path):
        arguments = [path, *more.get(command, [path])]
        refused(sop_run(command, *arguments), str(path))


def test_long_work_reports_its_progress(
    file: Path, sop_run: Sop, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[int] = iter(range(0, 1000, 3))
    monkeypatch.setattr("sop.shared.progress.time.monotonic", lambda: next(clock))
    result = sop_run("inspect", file)
    assert "tensors: 4 of 5" in result.err.splitlines()
