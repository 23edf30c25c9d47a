"""What one command writes and another reads: it comes back as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from golden.errors import InputError
from golden.knapsack import Layer, Option, solve_mckp
from golden.metrics import Fidelity
from sop.files.calibration_description import (
    CalibrationDescription,
    CalibrationRun,
    CalibrationSummary,
)
from sop.files.evaluation_file import EvaluationFile, RecordedEvaluation, RecordedLayer
from sop.files.recorded_source import RecordedSource
from sop.files.stored_plan import StoredPlan, TriedFormats, config_with_plan, plan_of_config
from sop.hdl.resource_file import IDENTITY, ResourceTable
from sop.quantizing.part_report import FeedbackErrors, PartReport
from sop.quantizing.run_config import RunConfig
from sop.quantizing.settings import Override, Settings
from sop.report.hull import hull_walk

ROOT = Path(__file__).parents[2]


def as_file(value: object) -> object:
    """A value as a JSON file gives it back."""
    return json.loads(json.dumps(value, allow_nan=False))


# --------------------------------------------------------------------------------------------- plan

OPTIONS = (
    Option("small", 100, 50.0),
    Option("middle", 150, 49.0),  # above the line from small to large
    Option("large", 200, 10.00006),
    Option("same", 200, 12.0),
    Option("largest", 300, 10.00002),
)


def test_a_plan_comes_back_with_the_chosen_options_and_the_hull() -> None:
    layers = [Layer("a", 32, OPTIONS), Layer("b", 64, OPTIONS)]
    plan = solve_mckp(layers, 350)
    assert [choice.option.name for choice in plan.choices] == ["middle", "large"]
    config = as_file(config_with_plan({"tensors": ["a", "b"]}, plan))
    assert isinstance(config, dict)
    assert config["tensors"] == ["a", "b"]
    kept = [
        {"name": "small", "bits": 100, "gap_ppm": 50.0},
        {"name": "middle", "bits": 150, "gap_ppm": 49.0, "on_hull": False},
        {"name": "large", "bits": 200, "gap_ppm": 10.0001},
        {"name": "largest", "bits": 300, "gap_ppm": 10.0},
    ]
    assert config["plan"]["layers"][0] == {
        "name": "a", "params": 32, "chosen": "middle", "options": kept
    }  # fmt: skip
    found = plan_of_config(config, "file")
    assert found == StoredPlan.of_plan(plan)
    assert as_file(found.to_json()) == config["plan"]


def test_a_plan_whose_gaps_become_equal_by_rounding_comes_back() -> None:
    options = (Option("small", 100, 0.00004), Option("large", 200, 0.00001))
    plan = solve_mckp([Layer("a", 32, options)], 200)
    found = plan_of_config(config_with_plan({}, plan), "file")
    assert found == StoredPlan.of_plan(plan)
    bits, gap, steps = hull_walk(found)
    assert (bits, gap) == (100, 0.0)
    assert [(step.bits, step.mean_gap_ppm, step.taken) for step in steps] == [(200, 0.0, True)]


def test_no_budget_is_no_plan() -> None:
    config = config_with_plan({}, None)
    assert config == {"plan": None}
    assert plan_of_config(config, "file") is None


def test_what_was_tried_comes_back() -> None:
    tried = TriedFormats(OPTIONS)
    assert TriedFormats.from_json(as_file(tried.to_json()), "options-00000.json") == tried


# ---------------------------------------------------------------------------------------------- run

CONFIG = RunConfig(
    settings=Settings(
        format="NF4sUE4M4", bits_per_weight=None, overrides=(Override("a.*", "keep"),)
    ).to_json(),
    source=RecordedSource("model", "ab" * 32, [128, 128]),
    calibration="cd" * 32,
    tensors=("a", "b"),
)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, calibration=None, tensors=(), source=RecordedSource("m.gguf", "ab" * 32)),
    ],
)
def test_the_description_of_a_run_comes_back(config: RunConfig) -> None:
    found = RunConfig.from_json(as_file(config.to_json()), "run.json")
    assert found == config
    assert config.difference(found) == "of another run"  # no field differs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": ("a",)}, "of a run with another tensors"),
        ({"calibration": None, "tensors": ()}, "of a run with another calibration"),
        ({"source": RecordedSource("model", "00" * 32)}, "of a run with another source"),
        (
            {"settings": {**CONFIG.settings, "effort": "best"}},
            "of a run with another effort: best, not default",
        ),
        ({"settings": {}}, "of a run with another format: None, not NF4sUE4M4"),
    ],
)
def test_the_first_difference_of_two_runs_is_named(change: dict[str, Any], message: str) -> None:
    assert CONFIG.difference(replace(CONFIG, **change)) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": None}, "run.json: field 'settings': must be an object"),
        ({"tensors": [3]}, "run.json: field 'tensors': must be a list of texts"),
        ({"calibration": 3}, "run.json: field 'calibration': must be a text"),
    ],
)
def test_descriptions_of_runs_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        RunConfig.from_json(CONFIG.to_json() | change, "run.json")
    assert str(refused.value).startswith(message)


FIDELITY = Fidelity(1024, 1500.5, 1600.25, 0.125, 40.5, 2)


@pytest.mark.parametrize("feedback", [None, FeedbackErrors(0.25, 0.5, True)])
def test_the_report_of_a_part_comes_back(feedback: FeedbackErrors | None) -> None:
    report = PartReport("ab" * 32, FIDELITY, feedback)
    value = as_file(report.to_json())
    assert isinstance(value, dict)
    assert ("feedback" in value) == (feedback is not None)
    assert PartReport.from_json(value, "file") == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": None}, "file: field 'run': must be a text"),
        ({"fidelity": {}}, "file: fidelity: field 'weights': must be an integer from 1"),
        ({"feedback": {"used": 1}}, "file: feedback: field 'used': must be true or false"),
        ({"feedback": {"used": True}}, "file: feedback: field 'feedback_error' is missing"),
    ],
)
def test_reports_of_parts_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        PartReport.from_json(PartReport("ab", FIDELITY, None).to_json() | change, "file")
    assert str(refused.value).startswith(message)


# ------------------------------------------------------------------------------------- evaluations

MEASURED = RecordedEvaluation(
    name="a.safetensors", activations=None, bits_per_weight=4.75, kl=-1e-9, kl_standard_error=0.002,
    kl_minus_first=0.0, kl_minus_first_standard_error=0.0, perplexity=11.5,
    reference_perplexity=11.0, perplexity_ratio=11.5 / 11.0, top1_agreement=0.9, gap_ppm=1453.0,
    relative_mse=0.0029, layers=(RecordedLayer("blk.0.attn_q.weight", 1024, 1657.0, 0.0033),),
)  # fmt: skip
ALONE = replace(
    MEASURED, name="INT8sUE8M0", activations="INT8sUE8M0", bits_per_weight=None,
    kl_minus_first=-0.5, kl_standard_error=None, kl_minus_first_standard_error=None,
    layers=(RecordedLayer("blk.0.attn_q.weight", 1024, 0.0, None),),
)  # fmt: skip
FILE = EvaluationFile(
    model="m.gguf", model_sha256="ab" * 32, text="prose.txt", text_sha256="cd" * 32, skip_tokens=0,
    tokens=22, window=8, prefix_tokens=(), positions=19, reference_perplexity=11.0,
    channel_norms=None, warnings=("one", "two"), evaluations=(MEASURED, ALONE),
)  # fmt: skip


def test_evaluations_come_back() -> None:
    for file in (FILE, replace(FILE, prefix_tokens=(1, 2), channel_norms="c.safetensors")):
        assert EvaluationFile.from_json(as_file(file.to_json()), "file") == file


def test_evaluations_of_another_program_need_a_name_and_bits() -> None:
    found = EvaluationFile.from_json(
        {"program": 1, "evaluations": [{"name": "a", "bits_per_weight": 4, "colour": "red"}]}, "f"
    )
    assert (found.model, found.tokens, found.warnings) == (None, None, ())
    (one,) = found.evaluations
    assert (one.name, one.bits_per_weight, one.kl, one.layers) == ("a", 4.0, None, ())


# ------------------------------------------------------------------------------------- calibration

STATISTICS = CalibrationRun(
    model="m.gguf", model_sha256="ab" * 32, config_sha256="", text="prose.txt",
    text_sha256="cd" * 32, skip_tokens=3, tokens=22, window=8, prefix_tokens=(1,),
    second_moment=True, software="numpy 2",
)  # fmt: skip
PARTIAL = CalibrationDescription(STATISTICS, {"q": "q", "k": "q", "down": "down"})
WHOLE = replace(PARTIAL, layer_tokens={"q": 22, "down": 7}, uncovered={"up": "no token"})


@pytest.mark.parametrize("description", [PARTIAL, WHOLE, replace(WHOLE, uncovered={})])
def test_the_description_of_a_calibration_comes_back(description: CalibrationDescription) -> None:
    partial = description is PARTIAL
    value = as_file(description.to_json())
    assert isinstance(value, dict)
    assert None not in value.values()
    found = CalibrationDescription.from_json(value, "c.safetensors", partial=partial)
    assert found == description
    assert (found.run.model, found.run.text) == ("m.gguf", "prose.txt")  # no part of equality


def test_a_checkpoint_says_what_its_calibration_has_seen() -> None:
    summary = CalibrationSummary.from_json(as_file(STATISTICS.to_json()))
    assert summary == CalibrationSummary("ab" * 32, "cd" * 32, 3, 22, (1,))
    others: list[object] = [None, [], {"tokens": "22", "skip_tokens": True, "prefix_tokens": [3.5]}]
    for value in others:
        assert CalibrationSummary.from_json(value) == CalibrationSummary()


# --------------------------------------------------------------------------------------- resources


def test_the_measured_resources_come_back() -> None:
    path = ROOT / "docs" / "resources.json"
    table = ResourceTable.read(path)
    assert json.dumps(table.to_json(), indent=1) + "\n" == path.read_text(encoding="utf-8")
    assert table.rows
    assert all(set(IDENTITY) & row.keys() for row in table.rows)
    assert ResourceTable.from_json(as_file(table.to_json()), "file") == table
