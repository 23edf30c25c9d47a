"""What one command writes and another reads: it comes back as it was."""

import json
from dataclasses import replace

from golden.knapsack import Layer, Option, solve_mckp
from sop.llm.evaluation_file import EvaluationFile, RecordedEvaluation, RecordedLayer
from sop.quantizing.stored_plan import StoredPlan, config_with_plan, plan_of_config
from sop.report.hull import hull_walk


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
