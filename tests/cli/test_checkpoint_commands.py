"""``sop inspect`` and ``compare``, and what all commands do with broken checkpoints."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.checkpoint import Checkpoint
from golden.corrections import Corrections
from golden.tensor import decode
from tests.support.checkpoint_file import (
    CALIBRATION,
    CONFIG,
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
    assert_refused(
        sop_run("inspect", file, "-t", "blk.7.*"), "pattern 'blk.7.*': matches none of 5"
    )


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
    assert_refused(sop_run("compare", tmp_path / "a.safetensors", file), message)


def test_raw_values_beyond_float32_cannot_be_compared(tmp_path: Path, sop_run: Sop) -> None:
    path = tmp_path / "q.safetensors"
    for values, problem in (
        (np.array([0.1, np.inf]), "is inf"),
        (np.array([1e300]), "too large for"),
    ):
        write_checkpoint(path, raw={"norm": values}, types={"norm": "F64"})
        assert_refused(sop_run("compare", path, path), "tensor 'norm': ", problem)


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
    assert_refused(sop_run("compare", file, file, "--calibration", stats), message)


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
    tmp_path: Path,
    sop_run: Sop,
    command: str,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(damage(file.read_bytes()))
    source, folder = source_folder(tmp_path / "hf"), tmp_path / "made"
    arguments: dict[str, list[object]] = {
        "inspect": [bad],
        "compare": [file, bad],
        "diff": [file, bad],
        "decode": [bad, "-o", folder / "d.safetensors"],
        "export": [bad, "-o", folder / "out", "--model", source],
    }
    assert_refused(sop_run(command, *arguments[command]), message)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("command", ["inspect", "compare", "diff", "decode"])
def test_other_files_are_refused(tmp_path: Path, sop_run: Sop, command: str) -> None:
    more = {"decode": ["-o", tmp_path / "d.safetensors"], "inspect": []}
    for path in (tmp_path / "missing.safetensors", tmp_path):
        arguments = [path, *more.get(command, [path])]
        assert_refused(sop_run(command, *arguments), str(path))


def test_long_work_reports_its_progress(
    file: Path, sop_run: Sop, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[int] = iter(range(0, 1000, 3))
    monkeypatch.setattr("sop.shared.progress.time.monotonic", lambda: next(clock))
    result = sop_run("inspect", file)
    assert "tensors: 4 of 5" in result.err.splitlines()
