"""Evaluations, plans and models that ``sop report`` refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.errors import InputError
from sop.files.evaluation_file import EvaluationFile
from sop.files.stored_plan import plan_of_config
from sop.report import write_report
from sop.report.hull import hull_walk
from tests.support.report_files import COLUMNS, PLAIN, Float32, make_files


def test_hull_walk_takes_the_steepest_step_first() -> None:
    def layer(name: str, params: int, chosen: str, gaps: list[float]) -> dict[str, Any]:
        options = [
            {"name": str(i), "bits": 100 * (i + 1), "gap_ppm": gap, "on_hull": True}
            for i, gap in enumerate(gaps)
        ]
        return {"name": name, "params": params, "chosen": chosen, "options": options}

    table = {"budget_bits": 500, "bits": 400,
             "layers": [layer("a", 10, "1", [50.0, 20.0, 10.0]),
                        layer("b", 30, "1", [15.0, 0.0])]}  # fmt: skip
    plan = plan_of_config({"plan": table}, "file")
    assert plan is not None
    bits, gap, steps = hull_walk(plan)
    assert (bits, gap) == (200, (10 * 50 + 30 * 15) / 40)
    # Savings per bit: b 30 x 15 = 450, a 10 x 30 = 300, then 10 x 10 = 100, each per 100 bits.
    found = [(s.layer, s.after.name, s.bits, s.mean_gap_ppm, s.taken) for s in steps]
    assert found == [
        ("b", "1", 300, 12.5, True), ("a", "1", 400, 5.0, True), ("a", "2", 500, 2.5, False),
    ]  # fmt: skip
    assert plan.mean_gap_ppm == 5.0


GOOD = {"name": "a", "bits_per_weight": 4.5}
OPTION = {"name": "o", "bits": 10, "gap_ppm": 5.0, "on_hull": True}
LARGER = {"name": "p", "bits": 20, "gap_ppm": 6.0}
LAYER = {"name": "l", "params": 4, "chosen": "o", "options": [OPTION]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"evaluations": [{"name": "a", "bits_per_weight": NaN}]}', "not JSON"),
        ([], "must be an object"),
        ({"evaluations": []}, "field 'evaluations'"),
        ({"evaluations": [3]}, r"evaluations\[0\]: must be an object"),
        ({"evaluations": [{**GOOD, "name": 3}]}, "field 'name'"),
        ({"evaluations": [GOOD, GOOD]}, r"evaluations\[1\]: field 'name'.*twice"),
        ({"evaluations": [{"name": "a"}]}, "field 'bits_per_weight' is missing"),
        ({"evaluations": [{**GOOD, "bits_per_weight": 0}]}, "must be above 0"),
        ({"evaluations": [{**GOOD, "kl": "x"}]}, "field 'kl': must be a number"),
        ({"evaluations": [{**GOOD, "kl": True}]}, "field 'kl': must be a number"),
        ({"evaluations": [{**GOOD, "kl_standard_error": -1}]}, "field 'kl_standard_error'"),
        ({"evaluations": [{**GOOD, "top1_agreement": 1.5}]}, "from 0 to 1, not 1.5"),
        ({"evaluations": [{**GOOD, "gap_ppm": 10**400}]}, "field 'gap_ppm'"),
        ({"tokens": 0, "evaluations": [GOOD]}, "field 'tokens': must be an integer from 1"),
        ({"prefix_tokens": ["a"], "evaluations": [GOOD]}, "field 'prefix_tokens': must be a list"),
        ({"evaluations": [{**GOOD, "layers": {}}]}, "field 'layers': must be a list"),
        ({"evaluations": [{**GOOD, "layers": [{"name": "l"}]}]}, r"layers\[0\]: field 'gap_ppm'"),
        ({"evaluations": [{**GOOD, "layers": [{"name": "l", "gap_ppm": 1}] * 2}]}, "given twice"),
    ],
)
def test_evaluations_are_checked(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        EvaluationFile.read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_bits": -1}, "field 'budget_bits'"),
        ({"bits": 1.5}, "field 'bits': must be an integer"),
        ({"layers": []}, "field 'layers'"),
        ({"layers": [LAYER, LAYER]}, "given twice"),
        ({"layers": [{**LAYER, "params": 0}]}, r"layers\[0\]: field 'params'"),
        ({"layers": [{**LAYER, "chosen": "x"}]}, "'x' is not among the options"),
        ({"layers": [{**LAYER, "options": [OPTION, OPTION]}]}, "given twice"),
        ({"layers": [{**LAYER, "options": [{**OPTION, "gap_ppm": None}]}]}, "'gap_ppm' is missing"),
        ({"layers": [{**LAYER, "options": [{**OPTION, "on_hull": 1}]}]}, "field 'on_hull'"),
        ({"layers": [{**LAYER, "options": [{**OPTION, "on_hull": False}]}]}, "none has 'on_hull'"),
        (
            {"layers": [{**LAYER, "options": [OPTION, LARGER]}]},
            "more bits never have a larger gap",
        ),
    ],
)
def test_plans_are_checked(change: dict[str, Any], message: str) -> None:
    plan = {"budget_bits": 10, "bits": 10, "layers": [LAYER]}
    assert plan_of_config({"plan": plan}, "f") is not None
    with pytest.raises(InputError, match=message) as error:
        plan_of_config({"plan": {**plan, **change}}, "f")
    assert str(error.value).startswith("f: config: plan: ")


def test_no_plan_is_no_error() -> None:
    assert plan_of_config({}, "f") is None
    assert plan_of_config({"plan": None}, "f") is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros((6, 41), np.float32), r"tensor 'blk.0.attn_q.weight': shape \[6, 41\]"),
        (np.full((6, COLUMNS), np.nan, np.float32), "holds NaN"),
    ],
)
def test_model_must_fit(weights: Float32, message: str, tmp_path: Path) -> None:
    files = make_files(tmp_path, PLAIN[:1], "one", None)
    save_file({PLAIN[0]: weights}, files.model)
    with pytest.raises(InputError, match=message):
        write_report([files.checkpoint], tmp_path / "r.html", model=files.model)
    assert not (tmp_path / "r.html").exists()
