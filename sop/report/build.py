"""From files to the page: what is read, which figures are drawn, how tables are filled."""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from golden.errors import InputError
from sop import __version__
from sop.files.calibration import Calibration
from sop.files.evaluation_file import EvaluationFile, RecordedEvaluation
from sop.files.models import open_model
from sop.files.stored_plan import StoredPlan
from sop.report import WrittenReport
from sop.report.figures import Point, codebook_drawing, pareto_drawing, plan_drawing
from sop.report.heat_maps import format_keys, formats_drawing, gap_drawing, grid_of_layers
from sop.report.hull import hull_walk
from sop.report.layers import CheckpointFacts, LayerFacts, read_checkpoint
from sop.report.svg import Drawing, inline_svg, png, printable
from sop.shared.output import IMAGE, PAGE, write_files, writing_file, writing_folder
from sop.shared.progress import StepReport
from sop.shared.shares import percent

__all__ = ["build_report"]

_WORST = 12  # layers whose codebooks are drawn large
_PER_FIGURE = 12  # layers in one figure of the others


@dataclass
class Table:
    """A table of texts; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass
class Figure:
    """A figure of the page with what it says in words and numbers.

    Attributes
    ----------
    title, text : str
    svg : Markup or None
        None if there is nothing to draw; the text says why.
    table : Table or None
    others : list of (str, Markup)
        More drawings, folded away, each with a title.
    """

    title: str
    text: str
    svg: Markup | None = None
    table: Table | None = None
    others: list[tuple[str, Markup]] = field(default_factory=list)


@dataclass
class Section:
    """A part of the page: an id, a title, facts, figures."""

    anchor: str
    title: str
    facts: list[tuple[str, str]]
    figures: list[Figure]


class _Gallery:
    """Turns drawings into elements of the page and, if wanted, PNG files."""

    def __init__(self, with_images: bool) -> None:
        self.images: dict[str, bytes] | None = {} if with_images else None
        self.count = 0

    def add(self, drawing: Drawing, label: str, image: str | None = None) -> Markup:
        """Element of the page; ``image`` is the stem of the PNG, None for none."""
        if self.images is not None and image is not None:
            self.images[f"{image}.png"] = png(drawing)
        self.count += 1
        return inline_svg(drawing, f"f{self.count}", label)


# ---------------------------------------------------------------------------------------- numbers


def _number(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{percent(value, 1)} %"


# ---------------------------------------------------------------------------------------- overview


def _points(
    checkpoints: Sequence[CheckpointFacts], baselines: Iterable[RecordedEvaluation]
) -> list[Point]:
    points = []
    for facts in checkpoints:
        found = facts.evaluation
        kl = None if found is None else found.kl
        error = None if found is None else found.kl_standard_error
        points.append(Point(facts.label, facts.bits_per_weight, facts.gap_ppm, kl, error, True))
    for b in baselines:
        points.append(Point(b.name, b.bits_per_weight, b.gap_ppm, b.kl, b.kl_standard_error, False))
    return points


def _overview_table(points: Sequence[Point], found: Sequence[RecordedEvaluation | None]) -> Table:
    rows = []
    for point, e in zip(points, found, strict=True):
        rows.append(
            (
                point.name,
                "checkpoint" if point.is_checkpoint else "baseline",
                _number(point.bits_per_weight),
                _number(point.gap_ppm),
                _number(point.kl, 4),
                _number(point.kl_standard_error, 2),
                _number(None if e is None else e.perplexity),
                _number(None if e is None else e.reference_perplexity),
                _percent(None if e is None else e.top1_agreement),
                _number(None if e is None else e.relative_mse, 4),
            )
        )
    columns = (
        "model", "kind", "bits per weight", "ACos gap (ppm)", "KL (nats)", "standard error",
        "perplexity", "unquantized", "same top token", "relative MSE",
    )  # fmt: skip
    return Table("Models and what is known of them", columns, rows)


def _pareto(
    gallery: _Gallery,
    checkpoints: Sequence[CheckpointFacts],
    baselines: Sequence[RecordedEvaluation],
) -> Figure:
    points = _points(checkpoints, baselines)
    table = _overview_table(points, [*(facts.evaluation for facts in checkpoints), *baselines])
    text = "Lower and further left is better. Bits are those stored, scales and tables included."
    if not any(point.kl is not None for point in points):
        text += " KL is left out: it needs an evaluation (--evaluation)."
    elif any(point.kl_standard_error for point in points):
        text += " Bars are one standard error."
    if any(point.bits_per_weight is None for point in points):
        text += " Models without a number of bits are in the table only."
    if any(point.gap_ppm == 0 for point in points):
        text += " Models with a gap of exactly 0 have no place on a logarithmic axis."
    title = "Bits against error"
    drawing = pareto_drawing(points)
    if drawing is None:
        text = "Left out: neither a gap nor a KL divergence is known; give --model or --evaluation."
        return Figure(title, text, table=table)
    return Figure(title, text, gallery.add(drawing, title, "pareto"), table)


# ------------------------------------------------------------------------------------- checkpoints


def _worst_first(layers: Sequence[LayerFacts]) -> list[LayerFacts]:
    """Layers with a known error, the largest gap first (equal ones in name order)."""
    known = [(layer.error.gap_ppm, layer) for layer in layers if layer.error is not None]
    return [layer for _, layer in sorted(known, key=lambda item: -item[0])]


def _layer_table(caption: str, layers: Sequence[LayerFacts], all_layers: CheckpointFacts) -> Table:
    whole = sum(
        layer.params * layer.error.gap_ppm for layer in all_layers.layers if layer.error is not None
    )
    rows = []
    for layer in layers:
        error = layer.error
        part = None if error is None or not whole else layer.params * error.gap_ppm / whole
        rows.append(
            (
                layer.name,
                layer.format,
                f"{layer.shape[0]} x {layer.shape[1]}",
                _number(layer.bits_per_weight),
                _number(None if error is None else error.gap_ppm),
                _percent(part),
                _number(None if error is None else error.relative_mse, 4),
                _percent(layer.second_lut_share),
                "" if layer.corrections is None else f"{layer.corrections:,}",
            )
        )
    columns = (
        "layer", "format", "shape", "bits per weight", "ACos gap (ppm)", "share of the gap",
        "relative MSE", "blocks of LUT 1", "corrections",
    )  # fmt: skip
    return Table(caption, columns, rows)


def _formats(gallery: _Gallery, facts: CheckpointFacts, image: str) -> Figure:
    title, keys = "Chosen formats", format_keys(facts.layers)
    total = len(facts.layers)
    rows = [(key.letter, key.name, str(key.layers), _percent(key.layers / total)) for key in keys]
    table = Table("Formats of this checkpoint", ("letter", "format", "layers", "share"), rows)
    grid = grid_of_layers(facts.layers)
    if grid is None:
        return Figure(
            title, "Left out: too many blocks and tensor types for a figure.", None, table
        )
    label = f"{title} of {printable(facts.label)} by decoder block and tensor type"
    text = "Letters run from the fewest to the most bits per weight."
    return Figure(title, text, gallery.add(formats_drawing(grid, keys), label, image), table)


def _gaps(gallery: _Gallery, facts: CheckpointFacts, image: str) -> Figure:
    title = "ACos gap by layer"
    if not facts.has_errors:
        return Figure(title, f"Left out: the errors of the layers are {facts.error_source}.")
    grid = grid_of_layers(facts.layers)
    drawing = None if grid is None else gap_drawing(grid)
    if drawing is None:
        return Figure(title, "Left out: all gaps are 0, or there are too many layers for a figure.")
    label = f"{title} of {printable(facts.label)} by decoder block and tensor type"
    text = f"Gaps are {facts.error_source}. The table of all layers is at the end of this part."
    return Figure(title, text, gallery.add(drawing, label, image))


def _worst(facts: CheckpointFacts) -> Figure:
    title = "Worst layers"
    layers = _worst_first(facts.layers)[:_WORST]
    if not layers:
        return Figure(title, f"Left out: the errors of the layers are {facts.error_source}.")
    text = (
        f"The {len(layers)} largest gaps, {facts.error_source}. The share of the gap counts the "
        "weights of the layer too."
    )
    return Figure(title, text, None, _layer_table(title, layers, facts))


def _plan(gallery: _Gallery, facts: CheckpointFacts, image: str) -> Figure:
    title = "What each step of the knapsack bought"
    plan = facts.plan
    if plan is None:
        return Figure(title, "Left out: the checkpoint holds no plan.")
    text = (
        "From the smallest option of every layer, the step that saves most per bit comes first. "
        f"The plan takes {plan.bits / plan.params:.5g} of {plan.budget_bits / plan.params:.5g} "
        f"bits per weight, at a mean gap of {plan.mean_gap_ppm:.5g} ppm."
    )
    label = f"{title}: {printable(facts.label)}"
    svg = gallery.add(plan_drawing(plan), label, image)
    return Figure(title, text, svg, _plan_table(plan))


def _plan_table(plan: StoredPlan) -> Table:
    bits, gap, steps = hull_walk(plan)
    rows = [("0", "(start)", "", "", _number(bits / plan.params), _number(gap), "")]
    for number, step in enumerate(steps, 1):
        rows.append(
            (
                str(number),
                step.layer,
                f"{step.before.name} to {step.after.name}",
                f"{step.after.bits - step.before.bits:,}",
                _number(step.bits / plan.params),
                _number(step.mean_gap_ppm),
                "yes" if step.taken else "no",
            )
        )
    columns = ("step", "layer", "change", "bits", "bits per weight", "mean gap (ppm)", "bought")
    return Table("Steps along the hulls", columns, rows)


def _codebooks(gallery: _Gallery, facts: CheckpointFacts, image: str) -> Figure:
    title = "Codebooks"
    with_books = [layer for layer in facts.layers if layer.codebooks]
    if not with_books:
        return Figure(title, "Left out: no layer has a codebook.")
    # Layers without a known error come last, in name order.
    worst = _worst_first(with_books)
    order = worst + [layer for layer in with_books if layer.error is None]
    first, names = order[:_WORST], {layer.name for layer in order[:_WORST]}
    rest = [layer for layer in with_books if layer.name not in names]
    against = (
        "the histogram of its weights over their scales"
        if with_books[0].codebooks[0].histogram is not None
        else "how often each entry is used (the histogram of the weights needs --model)"
    )
    which = "of the layers with the largest gaps" if worst else "of the first layers"
    text = (
        f"Entries of the lookup tables {which}, in units of the full scale, against {against}. "
        "LUT 0 is drawn upwards, LUT 1 downwards."
    )
    figure = Figure(title, text, table=_codebook_table(with_books))
    label = f"{title} {which}: {printable(facts.label)}"
    figure.svg = gallery.add(codebook_drawing(first, detailed=True), label, image)
    for start in range(0, len(rest), _PER_FIGURE):
        part = rest[start : start + _PER_FIGURE]
        name = f"{printable(part[0].name)} to {printable(part[-1].name)}"
        figure.others.append(
            (name, gallery.add(codebook_drawing(part, detailed=False), f"{title}: {name}"))
        )
    return figure


def _codebook_table(layers: Sequence[LayerFacts]) -> Table:
    rows = []
    for layer in layers:
        whole = sum(int(book.uses.sum()) for book in layer.codebooks)
        for position, book in enumerate(layer.codebooks):
            values = " ".join(map(str, book.levels.tolist()))
            share = _percent(int(book.uses.sum()) / whole)
            rows.append((layer.name, str(position), str(book.full_scale), values, share))
    columns = ("layer", "LUT", "full scale", "values", "share of weights")
    return Table("Values of all lookup tables", columns, rows)


_IMAGES = ("formats", "gaps", "plan", "codebooks")


def _stem(label: str) -> str:
    """What the names of a checkpoint's images begin with."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", label)


def _image_names(labels: Iterable[str]) -> list[str]:
    """Files that the images of checkpoints may be written to."""
    return ["pareto.png"] + [f"{_stem(label)}-{what}.png" for label in labels for what in _IMAGES]


def _checkpoint_section(gallery: _Gallery, facts: CheckpointFacts, number: int) -> Section:
    images = {what: f"{_stem(facts.label)}-{what}" for what in _IMAGES}
    weights = sum(layer.params for layer in facts.layers)
    details = [
        ("File", str(facts.path.name)),
        ("Quantized", f"{len(facts.layers)} layers, {weights:,} weights"),
        ("Stored bits per weight", _number(facts.bits_per_weight)),
        ("Mean ACos gap", "" if facts.gap_ppm is None else f"{facts.gap_ppm:.5g} ppm"),
        ("Errors of the layers", facts.error_source),
        ("Hash of the configuration", facts.config_hash),
    ]
    table = _layer_table("All layers", facts.layers, facts)
    figures = [
        _formats(gallery, facts, images["formats"]),
        _gaps(gallery, facts, images["gaps"]),
        _plan(gallery, facts, images["plan"]),
        _worst(facts),
        _codebooks(gallery, facts, images["codebooks"]),
        Figure("All layers", "Every quantized tensor of the file.", None, table),
    ]
    facts_shown = [(name, value) for name, value in details if value]
    return Section(f"checkpoint-{number}", facts.label, facts_shown, figures)


# -------------------------------------------------------------------------------------------- page


def _labels(paths: Sequence[Path]) -> list[str]:
    """Stem of each file; its path where two files share one."""
    stems = [path.stem for path in paths]
    labels = [
        stem if stems.count(stem) == 1 else str(path)
        for stem, path in zip(stems, paths, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label}: given twice")
    return labels


def _match(
    paths: Sequence[Path], evaluations: Sequence[RecordedEvaluation]
) -> tuple[list[RecordedEvaluation | None], list[RecordedEvaluation]]:
    """Evaluation of each checkpoint, and the others."""
    by_name = {evaluation.name: evaluation for evaluation in evaluations}
    found = []
    for path in paths:
        names = (str(path), path.name, path.stem)
        found.append(next((by_name[name] for name in names if name in by_name), None))
    used = {evaluation.name for evaluation in found if evaluation is not None}
    return found, [evaluation for evaluation in evaluations if evaluation.name not in used]


def _template(name: str) -> str:
    return (files("sop.report") / "templates" / name).read_text(encoding="utf-8")


def _render(overview: Figure, sections: Sequence[Section], sources: list[tuple[str, str]]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = printable
    script = _template("script.js")
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return environment.from_string(_template("page.html")).render(
        overview=overview,
        sections=sections,
        sources=sources,
        version=__version__,
        # Both are this package's own files.
        css=Markup(_template("style.css")),
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode("ascii"),
    )


def build_report(
    checkpoints: Sequence[Path],
    page: Path,
    *,
    evaluation: Path | None,
    model: Path | None,
    calibration: Path | None,
    images: Path | None,
    force: bool,
    on_tensor: StepReport,
) -> WrittenReport:
    """See :func:`sop.report.write_report`."""
    inputs = [*checkpoints, evaluation, model, calibration]
    with ExitStack() as stack:
        target = stack.enter_context(writing_file(page, PAGE, inputs, force=force))
        if images is not None:
            names = _image_names(_labels(checkpoints))
            opened_folder = writing_folder(images, names, IMAGE, inputs, force=force)
            image_folder = stack.enter_context(opened_folder)
        if calibration is not None and model is None:
            raise InputError("--calibration goes with --model: it weights errors that are measured")
        labels = _labels(checkpoints)
        evaluations = () if evaluation is None else EvaluationFile.read(evaluation).evaluations
        found, baselines = _match(checkpoints, evaluations)
        statistics = None if calibration is None else Calibration(calibration)
        gathered = []
        opened = None if model is None else stack.enter_context(open_model(model))
        for path, label, own in zip(checkpoints, labels, found, strict=True):
            gathered.append(
                read_checkpoint(
                    path,
                    label,
                    model=opened,
                    calibration=statistics,
                    evaluation=own,
                    on_tensor=partial(on_tensor, label),
                )
            )
        note = opened.source_note if opened else ""
        sources = [
            ("Model", model and model.name), ("Note", note),
            ("Calibration", calibration and calibration.name),
            ("Evaluation", evaluation and evaluation.name),
        ]  # fmt: skip
        gallery = _Gallery(images is not None)
        overview = _pareto(gallery, gathered, baselines)
        sections = [
            _checkpoint_section(gallery, facts, number) for number, facts in enumerate(gathered, 1)
        ]
        text = _render(overview, sections, [(name, value) for name, value in sources if value])
        write_files(target.parent, {target.name: text})
        written = []
        if images is not None:
            drawn = gallery.images or {}
            write_files(image_folder, drawn)
            written = [images / name for name in drawn]
        warnings = tuple(facts.other_model for facts in gathered if facts.other_model)
        size = len(text.encode("utf-8"))
        return WrittenReport(page, size, gallery.count, tuple(written), warnings)
