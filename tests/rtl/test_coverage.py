"""Functional coverage: every bin is hit by the chosen runs, and not without their stimuli."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from golden.formats import BF16, E4M3, HIF8, INT8, NumberFormat, scale_format
from sim.bench_config import BenchConfig
from tb.coverage import BINS, Counts, declared_table, empty_bins, merge
from tb.coverage_classes import element_class, float_class, result_class, sum_classes
from tb.coverage_report import main
from tb.coverage_runs import Run, run_all

PAIR = BenchConfig("BOF4-NF4sS1E5M5", lanes=32, seed=1)


@pytest.mark.timeout(1200)
def test_the_runs_hit_every_bin(
    tmp_path: Path, build_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(tmp_path / "counts", build_root)
    assert main([str(tmp_path / "counts"), "--json", str(tmp_path / "all.json")]) == 0
    table = json.loads((tmp_path / "all.json").read_text())
    assert {group: tuple(bins) for group, bins in table.items()} == BINS
    assert all(count > 0 for bins in table.values() for count in bins.values())
    assert f"| all | | {sum(map(len, BINS.values()))} |" in capsys.readouterr().out


def empty_after(run: Run, tmp_path: Path, build_root: Path) -> dict[str, set[str]]:
    """Empty bins of the unit by group, without the unit's name."""
    run_all(tmp_path / "counts", build_root, [run])
    groups: dict[str, set[str]] = {}
    for name in empty_bins(merge(tmp_path / "counts")):
        unit, group, bin_name = name.split(": ")
        if unit == run.unit:
            groups.setdefault(group, set()).add(bin_name)
    return groups


def test_no_resets_no_coverage_of_resets(tmp_path: Path, build_root: Path) -> None:
    # A seed whose tensors meet every kind of stalls.
    run = Run("lut_decoder", replace(PAIR, stalls="both", seed=2), "random_tensors")
    empty = empty_after(run, tmp_path, build_root)
    assert empty["reset"] == set(BINS["lut_decoder: reset"])
    assert "stalls of a tensor" not in empty


def test_no_stalls_no_coverage_of_stalls(
    tmp_path: Path, build_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run("lut_decoder", PAIR, "random_tensors|no_bubble")
    empty = empty_after(run, tmp_path, build_root)
    assert empty["stalls of a tensor"] == {"in", "out", "both"}
    assert "entries of 4-bit LUTs" not in empty
    assert main([str(tmp_path / "counts")]) == 1
    assert "empty bin: lut_decoder: stalls of a tensor: both" in capsys.readouterr().err


def test_one_lut_only_no_coverage_of_the_other(tmp_path: Path, build_root: Path) -> None:
    config = BenchConfig("NF4sUE4M4", "HIF8", seed=1)
    empty = empty_after(Run("lut_decoder", config, "random_tensors"), tmp_path, build_root)
    assert empty["entries of 4-bit LUTs"] == {f"Lb {index}" for index in range(16)}
    assert empty["metabits of a beat"] == {"all 0", "all 1", "mixed"}


def test_no_wrong_entries_no_coverage_of_their_flags(tmp_path: Path, build_root: Path) -> None:
    config = BenchConfig("NF4sUE4M4", lanes=16, stalls="both", seed=3)
    empty = empty_after(Run("sparse_merge", config, "random_tensors"), tmp_path, build_root)
    assert empty["flags of a beat"] == {"reserved", "misplaced"}
    assert empty["correction"] >= {"reserved", "misplaced"}


def test_the_documentation_has_the_declared_bins() -> None:
    text = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text()
    assert declared_table() in text
    assert f"{sum(map(len, BINS.values()))} bins" in text


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("UE4M4", 0x00, "zero"),
        ("UE4M4", 0x01, "subnormal"),
        ("UE4M4", 0x0F, "subnormal"),
        ("UE4M4", 0x10, "smallest normal"),
        ("UE4M4", 0x11, "mid"),
        ("UE4M4", 0xFF, "largest"),
        ("S1E5M5", 0x400, "- zero"),
        ("S1E5M5", 0x3FF, "+ largest"),
        ("UE8M0", 0x00, "zero"),
        ("UE8M0", 0x01, "smallest normal"),
        ("BF16", 0x7F7F, "+ largest"),
        ("BF16", 0xFF80, "- reserved"),
        ("E4M3", 0x7E, "+ largest"),
        ("E4M3", 0x7F, "NaN"),
    ],
)
def test_classes_of_floats(name: str, code: int, expected: str) -> None:
    fmt = {"BF16": BF16, "E4M3": E4M3}.get(name) or scale_format(name)
    assert float_class(code, fmt) == expected


@pytest.mark.parametrize(
    ("fmt", "code", "expected"),
    [
        (HIF8, 5 << 5 | 0x10, "5 negative (reserved)"),
        (HIF8, 4 << 5, "4 zero"),
        (INT8, 0x80, "integer reserved"),
        (INT8, 0xFF, "integer negative"),
        (E4M3, 0x81, "float - subnormal"),
    ],
)
def test_classes_of_elements(fmt: NumberFormat, code: int, expected: str) -> None:
    assert element_class(code, fmt)[1] == expected


def test_classes_of_results() -> None:
    values = np.array([0.0, 1.0, -1e-40, -np.inf], np.float32).view(np.uint32).tolist()
    classes = [result_class(bits, 23) for bits in values]
    assert classes == ["zero", "+ normal", "- subnormal", "- infinity"]
    assert result_class(0x7F80, 7) == "+ infinity"


@pytest.mark.parametrize(
    ("dense", "value", "expected"),
    [
        (1.0, 2.0**-24, {"tie", "rounded down", "nothing changed"}),  # to even, which is below
        (1.0 + 2.0**-23, 2.0**-24, {"tie", "rounded up"}),
        (1.0, -(2.0**-25), {"tie", "rounded up", "nothing changed", "by a negative"}),
        (1.0, 2.0**-25, {"rounded down", "nothing changed"}),
        (1.0, -1.0, {"exact", "cancelled to zero", "by a negative"}),
        (1.0, 1.0, {"exact", "carry"}),
        (1.0, -0.9375, {"exact", "cancelled in part", "by a negative"}),
        (2.0**-126, -(2.0**-127), {"exact", "subnormal sum", "by a subnormal", "by a negative"}),
        (3e38, 3e38, {"overflow"}),
        (0.0, 0.0, {"exact", "of a zero", "by zero"}),
    ],
)
def test_classes_of_sums(dense: float, value: float, expected: set[str]) -> None:
    bits = np.array([dense, value], np.float32).view(np.uint32).tolist()
    assert set(sum_classes(bits[0], bits[1])) == expected


def test_ties_against_exact_fractions() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(3000):
        # Operands of few bits whose sum ends just below the last place of the larger one.
        dense = np.float32((1 << 23 | int(rng.integers(1 << 23))) * 2.0**-23)
        value = np.float32(int(rng.integers(-255, 256)) * 2.0 ** int(rng.integers(-33, -20)))
        bits = [int(number.view(np.uint32)) for number in (dense, value)]
        exact = float(dense) + float(value)  # 24 bits and 8 bits close by fit float64
        total = np.float32(exact)
        up = exact > float(total)
        neighbour = np.nextafter(total, np.float32(np.inf if up else -np.inf))
        tie = exact != float(total) and 2 * exact == float(total) + float(neighbour)
        found += tie
        assert ("tie" in sum_classes(bits[0], bits[1])) == tie
    assert found > 100


# --- files ----------------------------------------------------------------------------------------


def test_counts_of_several_simulations_are_added(tmp_path: Path) -> None:
    for _ in range(2):
        counts = Counts()
        counts.hit("lut_decoder: metabits of a beat", "mixed", 3)
        counts.write(tmp_path)
    assert merge(tmp_path) == {("lut_decoder: metabits of a beat", "mixed"): 6}


def test_a_bin_that_is_not_declared_is_an_error(tmp_path: Path) -> None:
    counts = Counts()
    counts.hit("lut_decoder: metabits of a beat", "upside down")
    counts.write(tmp_path)
    with pytest.raises(ValueError, match="not declared: lut_decoder: metabits of a beat: upside"):
        merge(tmp_path)
