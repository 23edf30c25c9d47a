"""`sop report`: what is read, what the page says, and what a browser makes of it."""

import hashlib
import json
import re
import shutil
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.checkpoint import CheckpointWriter, reconstruct
from golden.errors import InputError
from golden.formats import HIF8
from golden.metrics import cosine_gap_ppm
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tensor import decode
from sop.report import WrittenReport, write_report
from sop.report.heat_maps import grid_of_layers
from sop.report.layers import HISTOGRAM_BINS, HISTOGRAM_LIMIT, natural_key, read_checkpoint
from sop.report.svg import PALETTE, printable
from tests.support.commands import output_of
from tests.support.report_files import COLUMNS, HOSTILE, PAIR, PLAIN, Files, make_files, make_plan

justhtml = pytest.importorskip("justhtml")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("plain"), PLAIN, "small", make_plan(PLAIN))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Files:
    names = [*HOSTILE, "$x^{$.weight", "plain"]
    stem = "<script>alert(3)<a>&$"
    return make_files(tmp_path_factory.mktemp("hostile"), names, stem, make_plan(names))


@pytest.fixture(scope="module")
def written(files: Files) -> WrittenReport:
    return full_report(files)


@pytest.fixture(scope="module")
def hostile_page(hostile: Files) -> Path:
    return full_report(hostile).page


def full_report(files: Files, name: str = "full.html") -> WrittenReport:
    page = files.checkpoint.parent / name
    return write_report([files.checkpoint], page, evaluation=files.evaluation, model=files.model)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def rows_of(page: Path, caption: str) -> list[list[str]]:
    """Texts of the cells of the table with this caption, without its head."""
    document = justhtml.JustHTML(text_of(page), sanitize=False)
    for table in document.query("table"):
        if table.query("caption")[0].to_text() == caption:
            return [
                [cell.to_text() for cell in row.children if cell.name in ("th", "td")]
                for row in table.query("tbody tr")
            ]
    raise AssertionError(f"no table {caption!r}")


def facts_of(files: Files, **options: Any) -> Any:
    given = {"model": None, "calibration": None, "evaluation": None, **options}
    return read_checkpoint(files.checkpoint, "small", on_tensor=lambda done, total: None, **given)


# ---------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("kind", ["written", "hostile_page"])
def test_page_is_valid_and_holds_all_it_needs(kind: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(kind)
    text = text_of(made if isinstance(made, Path) else made.page)
    document = justhtml.JustHTML(text, strict=True, sanitize=False)  # raises for invalid HTML
    elements = document.query("*")
    ids = [e.attrs["id"] for e in elements if "id" in e.attrs]
    assert len(ids) == len(set(ids))
    for element in elements:
        for name, value in element.attrs.items():
            assert not name.startswith("on"), (element.name, name)
            for reference in re.findall(r"url\(([^)]*)\)", value or ""):
                assert reference[1:] in ids
            if name in ("href", "src", "xlink:href", "action", "srcset"):
                assert value[:1] == "#", value
                assert value[1:] in ids, value
    assert {e.name for e in elements}.isdisjoint({"img", "link", "iframe", "object", "b", "image"})
    assert not re.search(r"@import|https?:", re.sub(r'xmlns="[^"]*"', "", text))
    (script,) = document.query("script")
    source = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert script.attrs == {}
    assert source
    digest = b64encode(hashlib.sha256(source[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_same_bytes_on_every_run(files: Files, written: WrittenReport) -> None:
    assert full_report(files, "again.html").page.read_bytes() == written.page.read_bytes()


def test_names_from_files_are_shown_as_they_are(hostile_page: Path) -> None:
    rows = rows_of(hostile_page, "All layers")
    assert {row[0] for row in rows} >= {printable(name) for name in HOSTILE}
    assert "\\u202e\u4e2d" in text_of(hostile_page)
    assert "\u202e" not in text_of(hostile_page)


def test_colours_follow_the_page(written: WrittenReport) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", text_of(written.page), re.DOTALL):
        assert "var(--ink)" in drawing
        assert not any(colour in drawing for colour in PALETTE.values())


def test_folded_figures_stay_small(written: WrittenReport) -> None:
    """210 layers of a language model must fit into 2 MB."""
    others = re.search(r"The other layers</summary>(.*?)</details>", text_of(written.page), re.S)
    assert others
    layers = others[1].count('class="mark"') / 2
    assert layers >= 4
    assert len(others[1]) / layers < 5500


# ------------------------------------------------------------------------------------- the numbers


def test_errors_are_measured_and_the_worst_come_first(files: Files, written: WrittenReport) -> None:
    gaps = {
        name: cosine_gap_ppm(weights, decode(tensor))
        for name, (weights, tensor) in files.layers.items()
    }
    expected = sorted(gaps, key=lambda name: -gaps[name])[:12]
    rows = rows_of(written.page, "Worst layers")
    assert [row[0] for row in rows] == expected
    assert [row[4] for row in rows] == [f"{gaps[name]:.5g}" for name in expected]
    assert [row[0] for row in rows_of(written.page, "All layers")] == PLAIN
    mean = sum(gaps.values()) / len(gaps)  # all layers have the same size
    assert rows_of(written.page, "Models and what is known of them")[0][3] == f"{mean:.5g}"


def test_gaps_are_weighted_by_the_calibration(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = np.linspace(0.0, 3.0, COLUMNS)

    class Statistics:
        def __init__(self, path: Path) -> None:
            self.path = path
            self.run = SimpleNamespace(model_sha256="another", model="m")

        def known_norms(self, name: str) -> NDArray[np.float64] | None:
            return norms if name == PLAIN[0] else None

    monkeypatch.setattr("sop.report.build.Calibration", Statistics)
    page = tmp_path / "report.html"
    write_report([files.checkpoint], page, model=files.model, calibration=tmp_path / "norms")
    weights, tensor = files.layers[PLAIN[0]]
    found = {row[0]: row[4] for row in rows_of(page, "All layers")}
    assert found[PLAIN[0]] == f"{cosine_gap_ppm(weights, decode(tensor), norms):.5g}"
    other, tensor = files.layers[PLAIN[1]]
    assert found[PLAIN[1]] == f"{cosine_gap_ppm(other, decode(tensor)):.5g}"
    layers = len(files.layers)
    said = f"calibration of other weights (a model called m), {layers - 1} of {layers} layers"
    assert said in page.read_text(encoding="utf-8")


def test_codebooks_are_counted_without_padding(files: Files) -> None:
    from sop.files.models import open_model

    with open_model(files.model) as model:
        facts = facts_of(files, model=model)
    (layer,) = [layer for layer in facts.layers if layer.name == PLAIN[0]]
    weights, tensor = files.layers[layer.name]
    uses = np.zeros((2, 16), dtype=int)
    counts = np.zeros((2, HISTOGRAM_BINS), dtype=int)
    edges = np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1) * 128
    dense = decode(tensor)
    for row in range(6):
        for column in range(COLUMNS):
            block, place = divmod(column, 16)
            lut, index = tensor.metabits[row, block], tensor.indices[row, block, place]
            uses[lut, index] += 1
            # The scale is what decoding multiplies any level other than zero by.
            levels = tensor.luts[lut].values[tensor.indices[row, block]]
            known = [i for i in np.flatnonzero(levels) if 16 * block + i < COLUMNS]
            if known and dense[row, 16 * block + known[0]]:
                scale = dense[row, 16 * block + known[0]] / levels[known[0]]
                counts[lut] += np.histogram(weights[row, column] / scale, edges)[0]
    assert [book.uses.tolist() for book in layer.codebooks] == uses.tolist()
    assert [book.histogram.tolist() for book in layer.codebooks] == counts.tolist()
    assert uses.sum() == weights.size
    assert 0 < counts.sum() < weights.size  # the block without a scale is left out


def test_numbers_in_names_count_as_numbers() -> None:
    assert sorted(["a.10", "a.9", "a", "a.b", "9"], key=natural_key) == [
        "9", "a", "a.9", "a.10", "a.b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("blk.12.attn_q.weight", "12", "attn_q"),
        ("model.layers.3.self_attn.q_proj.weight", "3", "self_attn.q_proj"),
        ("encoder.layer.0.output.dense.weight", "0", "encoder.output.dense"),
        ("lm_head.weight", "-", "lm_head"),
    ],
)
def test_layers_have_a_place_in_the_heat_map(
    name: str, block: str, kind: str, tmp_path: Path
) -> None:
    facts = facts_of(make_files(tmp_path, [name], "one", None))
    grid = grid_of_layers(facts.layers)
    assert grid is not None
    assert (grid.blocks, grid.types) == ((block,), (kind,))


def test_hif_format_and_corrections_are_named(tmp_path: Path) -> None:
    from golden.corrections import Corrections

    weights = np.random.default_rng(2).standard_normal((2, 16)).astype(np.float32)
    tensor = quantize(weights, parse_format(PAIR, HIF8))
    sparse = Corrections(
        (2, 16), np.array([0, 1, 1]), np.array([3], np.uint16), np.array([0x3F80], np.uint16)
    )
    path = tmp_path / "c.safetensors"
    with CheckpointWriter(path, {}) as writer:
        writer.add("x", tensor, sparse, "F32")
    save_file({"x": weights}, tmp_path / "m.safetensors")
    page = write_report([path], tmp_path / "r.html", model=tmp_path / "m.safetensors").page
    (row,) = rows_of(page, "Worst layers")
    assert (row[1], row[8]) == (f"{PAIR} (HIF8)", "1")
    from golden.checkpoint import StoredTensor

    gap = cosine_gap_ppm(weights, reconstruct(StoredTensor(tensor, sparse)))
    assert row[4] == f"{gap:.5g}"


# --------------------------------------------------------------------- evaluations, and without one


def test_evaluation_gives_what_is_not_measured(files: Files, tmp_path: Path) -> None:
    page = write_report([files.checkpoint], tmp_path / "r.html", evaluation=files.evaluation).page
    own, baseline = rows_of(page, "Models and what is known of them")
    assert own[:2] == ["small", "checkpoint"]
    assert own[4:] == ["0.0125", "0.002", "11.5", "11", "90.0 %", "0.004"]
    assert baseline[1:6] == ["baseline", "4.25", "4000", "0.05", ""]
    assert rows_of(page, "Worst layers")[0][:1] == [PLAIN[-1]]
    assert rows_of(page, "Worst layers")[0][4] == "220"
    assert "taken from the evaluation" in text_of(page)
    assert "the histogram of the weights needs --model" in text_of(page)


def test_plan_gives_the_gaps_if_nothing_else_does(files: Files, tmp_path: Path) -> None:
    page = write_report([files.checkpoint], tmp_path / "r.html").page
    assert "taken from the plan in the checkpoint" in text_of(page)
    assert rows_of(page, "Worst layers")[0][4] == "3000"
    assert "KL is left out" in text_of(page)


def test_what_is_not_known_is_left_out_with_a_reason(tmp_path: Path) -> None:
    files = make_files(tmp_path, PLAIN[:5], "bare", None)
    page = write_report([files.checkpoint], tmp_path / "r.html").page
    text = text_of(page)
    for reason in (
        "neither a gap nor a KL divergence is known",
        "they need the weights (--model)",
        "the checkpoint holds no plan",
    ):
        assert f"Left out: {reason}" in text or reason in text
    assert text.count("<svg") == 2  # formats and codebooks


def test_several_checkpoints(files: Files, tmp_path: Path) -> None:
    other = make_files(tmp_path, PLAIN[:3], "small", None)
    page = write_report([files.checkpoint, other.checkpoint], tmp_path / "r.html").page
    rows = rows_of(page, "Models and what is known of them")
    assert [row[0] for row in rows] == [str(files.checkpoint), str(other.checkpoint)]
    with pytest.raises(InputError, match="given twice"):
        write_report([files.checkpoint, files.checkpoint], tmp_path / "r.html")


def test_evaluation_without_bits_is_in_the_table_only(files: Files, tmp_path: Path) -> None:
    """`sop eval --activations` alone measures the model's own weights, which have no bits."""
    evaluation = tmp_path / "e.json"
    alone = {"name": "INT8sUE8M0", "bits_per_weight": None, "kl": 0.25, "gap_ppm": 0.0}
    other = {"name": "other", "bits_per_weight": 4.25, "kl": 0.5}
    evaluation.write_text(json.dumps({"evaluations": [alone, other]}))
    page = tmp_path / "r.html"
    write_report([files.checkpoint], page, evaluation=evaluation)
    rows = {row[0]: row[1:] for row in rows_of(page, "Models and what is known of them")}
    assert rows["INT8sUE8M0"][:4] == ["baseline", "", "0", "0.25"]
    assert "Models without a number of bits are in the table only." in text_of(page)
    assert "other: 4.25 bits per weight, KL 0.5 nats" in text_of(page)
    assert "INT8sUE8M0: " not in text_of(page)


def test_calibration_without_model_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--calibration goes with --model"):
        write_report([files.checkpoint], tmp_path / "r.html", calibration=tmp_path / "c")


def test_missing_extra_is_named(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if re.match(r"sop\.report\.(build|fig|svg)", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"'matplotlib'; install the report extra: pip install"):
        write_report([files.checkpoint], tmp_path / "r.html")


# ---------------------------------------------------------------------------------------- command


def test_command_writes_page_and_images(files: Files, tmp_path: Path) -> None:
    page, images = tmp_path / "new" / "r.html", tmp_path / "png"
    arguments = ["report", files.checkpoint, "-o", page, "--png", images, "--json"]
    found = json.loads(output_of(*arguments))
    assert found["bytes"] == page.stat().st_size
    names = ["pareto", "small-formats", "small-gaps", "small-plan", "small-codebooks"]
    assert found["images"] == [str(images / f"{name}.png") for name in names]
    for path in found["images"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_command_wants_an_html_file(files: Files) -> None:
    with pytest.raises(InputError, match=r"suffix must be \.html"):
        output_of("report", files.checkpoint, "-o", "r.txt")


# ---------------------------------------------------------------------------------------- browser

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium that is installed on this machine."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
    if path is None:
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox does not work for root, and the page is our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[OpenPage]:
    """Open a file without network; the test fails if the browser complains about anything."""
    problems: list[str] = []
    contexts = []

    def opened(path: Path, **options: Any) -> Any:
        context = chromium.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("dialog", lambda dialog: dialog.dismiss())
        page.on("request", lambda request: requests.append(request.url))
        requests: list[str] = []
        page.goto(path.as_uri())
        assert requests == [path.as_uri()]
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_every_figure(
    written: WrittenReport, open_page: OpenPage, scheme: str
) -> None:
    page = open_page(written.page, color_scheme=scheme)
    for folded in page.locator("details").all():
        folded.evaluate("element => { element.open = true; }")
    plots = page.locator("svg.plot")
    assert plots.count() == written.figures == 6
    for plot in plots.all():
        assert plot.is_visible()
        box = plot.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 80
    ink = page.locator("svg.plot text").first.evaluate("e => getComputedStyle(e).fill")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    values = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, ground)]
    assert (values[0] < values[1]) == (scheme == "light")
    assert abs(values[0] - values[1]) > 400
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_browser_shows_values_at_the_pointer(
    files: Files, written: WrittenReport, open_page: OpenPage
) -> None:
    page = open_page(written.page)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    for plot in page.locator("figure > svg.plot").all():
        if plot.is_visible():
            plot.locator(".mark").last.hover(force=True)
            assert tip.is_visible()
            assert re.search(r"\d", tip.inner_text())
    cells = page.locator("svg.plot[aria-label^='ACos gap']").locator(".mark")
    first, last = cells.first.bounding_box(), cells.last.bounding_box()
    assert (first["x"] < last["x"], first["y"] < last["y"]) == (True, True)
    cells.first.hover()
    weights, tensor = files.layers[PLAIN[0]]
    gap = cosine_gap_ppm(weights, decode(tensor))
    assert tip.inner_text() == f"{PLAIN[0]}: ACos gap {gap:.5g} ppm ({PAIR})"
    page.mouse.move(2, 2)
    assert tip.is_hidden()


def test_browser_reads_values_from_the_keyboard(
    written: WrittenReport, open_page: OpenPage
) -> None:
    page = open_page(written.page)
    tip = page.locator("#tip")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('svg.plot[aria-label^=Chosen]')"):
            break
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith(PLAIN[0])
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith(PLAIN[1])
    page.keyboard.press("End")
    assert tip.inner_text().startswith(PLAIN[-1])
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_browser_runs_nothing_from_files(hostile_page: Path, open_page: OpenPage) -> None:
    page = open_page(hostile_page)
    page.locator("svg.plot[aria-label^='Chosen']").locator(".mark").first.hover()
    assert page.locator("#tip > *").count() == 0
    names = {printable(name) for name in HOSTILE}
    assert page.locator("#tip").inner_text().rpartition(": ")[0] in names


def test_browser_fits_a_telephone(written: WrittenReport, open_page: OpenPage) -> None:
    page = open_page(written.page, viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
