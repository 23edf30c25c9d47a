"""``sop diff``: which difference comes first, the rule behind it, counts, exit codes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.checkpoint import CheckpointWriter
from golden.codebooks import Lut, fixed_lut
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import HIF7, HIF8
from golden.notation import parse_format
from golden.tensor import QuantizedTensor
from sop.checkpoints.diff_rules import RULES
from sop.checkpoints.differences import FIELDS
from sop.commands.diff import diff
from tests.support.commands import invoke_alone

ROOT = Path(__file__).resolve().parents[2]


Tensors = dict[str, tuple[QuantizedTensor, Corrections | None]]


def tensor(name: str, shape: tuple[int, int], seed: int, word: int) -> QuantizedTensor:
    """Random indices under equal scale words."""
    fmt = parse_format(name)
    rng = np.random.default_rng(seed)
    rows, columns = shape
    size = fmt.block_size or rows * columns
    blocks = (rows, -(-columns // size)) if fmt.block_size else (1, 1)
    indices = rng.integers(1, 7, (*blocks, size), dtype=np.uint8)
    luts = tuple(fixed_lut(book, size, fmt.hif) for book in fmt.codebooks)
    words = np.full(blocks, word, np.uint16)
    row_scales = np.full(rows, 0x3F80, np.uint16) if fmt.row_scale else None
    return QuantizedTensor(fmt, shape, indices, words, luts, 2, row_scales)


# In S1E5M5 0x1c0 is 1 * 2^-1 and 0x800 is the metabit; 0x40 is 2^(4 - 7) in UE4M4.
PAIR = tensor("NF4-BOF4sS1E5M5", (3, 40), 1, 0x1C0)
ATOM = tensor("E2M1^0sUE8M0", (2, 5), 2, 127)
ROWS = tensor("NF4sRUE4M4", (2, 16), 3, 0x40)
SPARSE = Corrections(
    (3, 40), np.array([0, 1, 1, 3]), np.array([4, 0, 39], np.uint16), np.array([1, 2, 3], np.uint16)
)
GOOD: Tensors = {"a.pair": (PAIR, SPARSE), "b.atom": (ATOM, None), "c.rows": (ROWS, None)}
CONFIG: dict[str, Any] = {"format": "NF4-BOF4sS1E5M5", "scales": {"mode": "search", "n": 1}}
RAW = {"norm": np.array([1, 2], np.float32), "bias": np.arange(600_000, dtype=np.float32)}


def write(
    path: Path,
    tensors: Tensors = GOOD,
    config: dict[str, Any] = CONFIG,
    calibration: dict[str, Any] | None = None,
    raw: dict[str, NDArray[np.float32]] = RAW,
    source_dtype: str = "BF16",
) -> Path:
    with CheckpointWriter(path, config, calibration) as writer:
        for name, (quantized, corrections) in tensors.items():
            writer.add(name, quantized, corrections, source_dtype)
        for name, array in raw.items():
            writer.add_raw(name, "F32", array.shape, [array.tobytes()])
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "a.safetensors")


def compared(good: Path, other: Path, *more: object) -> dict[str, Any]:
    """What the command says in JSON; the exit code must fit."""
    done = invoke_alone(diff, good, other, "--json", *more)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (0 if report["same"] else 1)
    assert set(report["counts"]) == set(FIELDS)
    report["counts"] = {field: count for field, count in report["counts"].items() if count}
    return report


def with_codes(
    tensor: QuantizedTensor, plane: str, *changes: tuple[tuple[int, ...], int]
) -> QuantizedTensor:
    array = getattr(tensor, plane).copy()
    for position, code in changes:
        array[position] = code
    return replace(tensor, **{plane: array})


def test_equal_files(good: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b.safetensors")
    assert compared(good, other) == {"same": True, "first": None, "counts": {}, "warnings": []}
    done = invoke_alone(diff, good, other)
    assert (done.exit_code, done.stdout) == (0, "same\n")


def pair_with(plane: str, *changes: tuple[tuple[int, ...], int]) -> Tensors:
    return GOOD | {"a.pair": (with_codes(PAIR, plane, *changes), SPARSE)}


def index(row: int, block: int, weight: int) -> int:
    return int(PAIR.indices[row, block, weight])


LUT = PAIR.luts[0]
OTHER_LUT = Lut(HIF7, (LUT.codes[0], HIF7.encode(-104), *LUT.codes[2:]))
assert LUT.values[1] == -96

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, int]]] = {
    # name: what is written, the first difference, its rule, all counts
    "config": (
        {"config": {"format": "NF4-BOF4sS1E5M5", "scales": {"mode": "absmax"}}},
        {"field": "config", "key": "scales.mode", "a": '"search"', "b": '"absmax"'},
        "config",
        {"config": 2},
    ),
    "config-type": (
        {"config": CONFIG | {"scales": {"mode": "search", "n": True}}},
        {"field": "config", "key": "scales.n", "a": "1", "b": "true"},
        "config",
        {"config": 1},
    ),
    "calibration": (
        {"calibration": {"tokens": 7}},
        {"field": "calibration", "key": "(whole)", "a": "null", "b": "absent"},
        "calibration",
        {"calibration": 2},
    ),
    "tensor-list": (
        {"tensors": {"a.pair": GOOD["a.pair"], "d": GOOD["b.atom"], "c.rows": GOOD["c.rows"]}},
        {"field": "tensors", "tensor": "b.atom", "a": "quantized", "b": "absent"},
        "tensors",
        {"tensors": 2},
    ),
    "kind": (
        {"raw": RAW | {"c.rows": np.ones(2, np.float32)},
         "tensors": {name: GOOD[name] for name in ("a.pair", "b.atom")}},
        {"field": "tensors", "tensor": "c.rows", "a": "quantized", "b": "stored as it came"},
        "tensors",
        {"tensors": 1},
    ),
    "format": (
        {"tensors": GOOD | {"c.rows": (tensor("BOF4sRUE4M4", (2, 16), 3, 0x40), None)}},
        {"field": "format", "tensor": "c.rows", "key": "format", "a": "NF4sRUE4M4",
         "b": "BOF4sRUE4M4"},
        "format",
        {"format": 1},
    ),
    "hif-of-an-atom": (
        {"tensors": GOOD | {"b.atom": (
            replace(with_codes(ATOM, "indices", ((0, 0, 7), 0)),
                    format=parse_format(ATOM.format.name, HIF8)), None)}},
        {"field": "format", "tensor": "b.atom", "key": "LUT entries", "a": "HIF7", "b": "HIF8"},
        "format",
        {"format": 1, "indices": 1},
    ),
    "source-type": (
        {"source_dtype": "F32"},
        {"field": "format", "tensor": "a.pair", "key": "type before quantization", "a": "BF16",
         "b": "F32"},
        "format",
        {"format": 3},
    ),
    "layer-exponent": (
        {"tensors": GOOD | {"b.atom": (replace(ATOM, layer_exponent=-1), None)}},
        {"field": "layer_exponent", "tensor": "b.atom", "a": "2", "b": "-1"},
        "layer_exponent",
        {"layer_exponent": 1},
    ),
    "lut": (
        {"tensors": GOOD | {"a.pair": (replace(PAIR, luts=(OTHER_LUT, PAIR.luts[1])), SPARSE)}},
        {"field": "luts", "tensor": "a.pair", "key": "LUT 0, entry 1", "a": f"{LUT.codes[1]:#x}",
         "b": f"{OTHER_LUT.codes[1]:#x}", "facts": ["values -96 and -104"]},
        "luts",
        {"luts": 1},
    ),
    "row-scale": (
        {"tensors": GOOD | {"c.rows": (with_codes(ROWS, "row_scales", ((1,), 0x4000)), None)}},
        {"field": "row_scales", "tensor": "c.rows", "row": 1, "bit": 14, "a": "0x3f80",
         "b": "0x4000", "facts": ["values 1 and 2"]},
        "row_scales",
        {"row_scales": 1},
    ),
    "metabit": (
        {"tensors": pair_with("scale_words", ((2, 1), 0x9C0))},
        {"field": "metabit", "tensor": "a.pair", "row": 2, "block": 1, "bit": 11,
         "a": "0x1c0", "b": "0x9c0",
         "facts": ["A: metabit 0, scale code 0x1c0, scale 2",
                   "B: metabit 1, scale code 0x1c0, scale 2"]},
        "metabit",
        {"metabit": 1},
    ),
    # The lower block comes first, though a higher field differs in a later one.
    "mantissa-before-metabit": (
        {"tensors": pair_with("scale_words", ((0, 2), 0x1C5), ((1, 0), 0x9C0))},
        {"field": "mantissa", "tensor": "a.pair", "row": 0, "block": 2, "bit": 2},
        "scale",
        {"mantissa": 1, "metabit": 1},
    ),
    "sign-of-another-lut": (
        {"tensors": pair_with("scale_words", ((0, 0), 0xDC0), ((1, 0), 0x5E0))},
        {"field": "metabit", "row": 0, "block": 0, "bit": 11},
        "metabit",
        {"metabit": 1, "sign": 2, "exponent": 1},
    ),
    "zero-block": (
        {"tensors": pair_with("scale_words", ((1, 2), 0))},
        {"field": "exponent", "row": 1, "block": 2, "bit": 8},
        "zero_block",
        {"exponent": 1},
    ),
    "index": (
        {"tensors": pair_with("indices", ((1, 1, 15), 7), ((2, 0, 0), 0))},
        {"field": "indices", "tensor": "a.pair", "row": 1, "block": 1, "weight": 15, "column": 31,
         "a": str(index(1, 1, 15)), "b": "7"},
        "index",
        {"indices": 2},
    ),
    "index-under-another-scale": (
        {"tensors": GOOD | {"b.atom": (with_codes(with_codes(ATOM, "indices", ((0, 0, 8), 0)),
                                                  "scale_words", ((0, 0), 128)), None)}},
        {"field": "exponent", "tensor": "b.atom", "row": 0, "block": 0, "bit": 7},
        "scale",
        {"exponent": 1, "indices": 1},
    ),
    "index-of-a-whole-layer": (
        {"tensors": GOOD | {"b.atom": (with_codes(ATOM, "indices", ((0, 0, 8), 0)), None)}},
        {"field": "indices", "tensor": "b.atom", "row": 1, "block": 0, "weight": 8, "column": 3,
         "b": "0"},
        "index",
        {"indices": 1},
    ),
    "padding": (
        {"tensors": pair_with("indices", ((0, 2, 8), 15))},
        {"field": "indices", "row": 0, "block": 2, "weight": 8, "column": 40, "facts": []},
        "padding",
        {"indices": 1},
    ),
    "correction-value": (
        {"tensors": GOOD | {"a.pair": (PAIR, replace(SPARSE, values=np.array([1, 2, 0x3F80],
                                                                            np.uint16)))}},
        {"field": "corrections", "tensor": "a.pair", "row": 2, "column": 39, "a": "0x0003",
         "b": "0x3f80", "bit": 13},
        "corrections",
        {"corrections": 1},
    ),
    "correction-place": (
        {"tensors": GOOD | {"a.pair": (PAIR, replace(SPARSE, columns=np.array([4, 1, 39],
                                                                              np.uint16)))}},
        {"field": "corrections", "row": 2, "column": 0, "a": "0x0002", "b": "no entry"},
        "corrections",
        {"corrections": 2},
    ),
    "no-corrections": (
        {"tensors": GOOD | {"a.pair": (PAIR, None)}},
        {"field": "corrections", "row": 0, "column": 4, "a": "0x0001", "b": "no entry"},
        "corrections",
        {"corrections": 3},
    ),
    "empty-corrections": (
        {"tensors": GOOD | {"b.atom": (ATOM, Corrections.from_mask(
            np.zeros((2, 5), bool), np.zeros((2, 5), np.float32)))}},
        {"field": "corrections", "tensor": "b.atom", "a": "none", "b": "stored but empty"},
        "corrections",
        {"corrections": 1},
    ),
    "raw": (
        {"raw": RAW | {"bias": np.where(np.arange(600_000) == 500_000, 0, RAW["bias"])}},
        {"field": "raw", "tensor": "bias", "key": "byte 2000001", "a": "0x24", "b": "0x00",
         "bit": 5},
        "raw",
        {"raw": 1},
    ),
    "raw-shape": (
        {"raw": RAW | {"norm": np.array([[1], [2]], np.float32)}},
        {"field": "raw", "tensor": "norm", "a": "F32 [2]", "b": "F32 [2, 1]"},
        "raw",
        {"raw": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "first", "rule", "counts"), CASES.values(), ids=CASES)
def test_first_difference(
    good: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    first: dict[str, Any],
    rule: str,
    counts: dict[str, int],
) -> None:
    other = write(tmp_path / "b.safetensors", **changes)
    report = compared(good, other)
    found = report["first"]
    assert {key: found.get(key) for key in first} == first
    assert found["rule"] == RULES[rule].text
    assert report["counts"] == counts
    swapped = compared(other, good)
    assert swapped["counts"] == counts
    assert (swapped["first"]["a"], swapped["first"]["b"]) == (found["b"], found["a"])
    text = invoke_alone(diff, good, other)
    assert text.exit_code == 1
    assert f"{found['a']} against {found['b']}" in text.stdout
    assert RULES[rule].text in text.stdout


def test_fields_come_in_a_fixed_order(good: Path, tmp_path: Path) -> None:
    changed = with_codes(PAIR, "indices", ((0, 0, 0), 0))
    undone: dict[str, Callable[[QuantizedTensor], QuantizedTensor]] = {
        "layer_exponent": lambda tensor: replace(tensor, layer_exponent=2),
        "luts": lambda tensor: replace(tensor, luts=PAIR.luts),
        "mantissa": lambda tensor: replace(tensor, scale_words=PAIR.scale_words),
        "indices": lambda tensor: replace(tensor, indices=PAIR.indices),
        "corrections": lambda tensor: tensor,
    }
    changed = with_codes(changed, "scale_words", ((2, 2), 0x1C1))
    changed = replace(changed, layer_exponent=3, luts=(OTHER_LUT, PAIR.luts[1]))
    for position, (field, undo) in enumerate(undone.items()):
        other = write(tmp_path / "b.safetensors", GOOD | {"a.pair": (changed, None)})
        report = compared(good, other)
        assert report["first"]["field"] == field
        assert list(report["counts"]) == list(undone)[position:]
        changed = undo(changed)


def test_an_index_comes_with_its_levels_and_its_quotient(good: Path, tmp_path: Path) -> None:
    old = index(1, 1, 15)
    other = write(tmp_path / "b.safetensors", pair_with("indices", ((1, 1, 15), old + 1)))
    low, high = (int(LUT.values[i]) for i in (old, old + 1))
    middle = (low + high) / 2
    facts = [
        f"levels {low} and {high}, metabit 0, scale code 0x1c0, scale 2",
        f"midpoint {middle:g}, that is a weight of {2 * middle:g}",
    ]
    assert compared(good, other)["first"]["facts"] == facts
    weights = np.zeros((3, 40), np.float32)
    weights[1, 31] = weight = 2 * middle + 0.5
    save_file({"a.pair": weights}, tmp_path / "m.safetensors")
    told = compared(good, other, "--model", tmp_path / "m.safetensors")["first"]["facts"]
    assert told == [*facts, f"weight of the model {weight}, quotient {weight / 2}"]


def test_a_model_that_does_not_fit(good: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b.safetensors", pair_with("indices", ((1, 1, 15), 0)))
    save_file({"a.pair": np.zeros((3, 41), np.float32)}, tmp_path / "m.safetensors")
    done = invoke_alone(diff, good, other, "--model", tmp_path / "m.safetensors")
    assert isinstance(done.exception, InputError)
    assert "m.safetensors: tensor 'a.pair': shape [3, 41], expected [3, 40]" in str(done.exception)


@pytest.mark.parametrize("name", RULES)
def test_rules_stand_where_they_say(name: str) -> None:
    document, words = RULES[name].source
    text = " ".join((ROOT / document).read_text(encoding="utf-8").split())
    assert words in text


def test_every_rule_is_reached() -> None:
    reached = {rule for _, _, rule, _ in CASES.values()}
    assert reached == set(RULES)
