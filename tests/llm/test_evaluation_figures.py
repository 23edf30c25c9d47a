"""Figures of an evaluation, without a model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sop.files.calibration_description import CalibrationSummary
from sop.llm.evaluation import Evaluation, LayerError, overlapping_tokens
from tests.support.tiny_model import PROSE, sha256


def evaluation(**changes: Any) -> Evaluation:
    return replace(
        Evaluation(
            name="a",
            bits_per_weight=4.5,
            kl=0.5,
            kl_standard_error=0.1,
            perplexity=12.0,
            reference_perplexity=8.0,
            top1_agreement=0.75,
            layers=(LayerError("x", 30, 10.0, 0.5), LayerError("y", 10, 50.0, 0.1)),
            block_positions=(256, 256, 256),
            block_kl=(0.4, 0.5, 0.6),
        ),
        **changes,
    )


def test_means_over_layers_count_weights() -> None:
    one = evaluation()
    assert one.cosine_gap_ppm == pytest.approx(20.0)
    assert one.relative_mse == pytest.approx(0.4)
    assert one.perplexity_ratio == 1.5
    assert one.positions == 768


def test_error_of_a_difference_is_that_of_paired_blocks() -> None:
    # Both vary by 0.1 from block to block, together: the difference hardly does.
    first, second = evaluation(), evaluation(block_kl=(0.71, 0.79, 0.90))
    difference, error = first.kl_difference(second)
    values = np.array([0.4 - 0.71, 0.5 - 0.79, 0.6 - 0.90])
    assert difference == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(3))


def test_blocks_count_by_their_positions() -> None:
    sizes = (256, 256, 128)
    first = evaluation(block_positions=sizes, block_kl=(0.1, 0.3, 0.9))
    difference, error = first.kl_difference(evaluation(block_positions=sizes, block_kl=(0, 0, 0)))
    assert difference == pytest.approx((2 * 0.1 + 2 * 0.3 + 0.9) / 5)
    deviations = np.array([2 / 5, 2 / 5, 1 / 5]) * (np.array([0.1, 0.3, 0.9]) - difference)
    assert error == pytest.approx(np.sqrt(3 / 2 * np.sum(deviations**2)))


def test_one_block_has_no_error() -> None:
    one = evaluation(block_positions=(99,), block_kl=(0.5,))
    assert one.kl_difference(one) == (0.0, None)


def test_difference_needs_the_same_positions() -> None:
    with pytest.raises(ValueError, match="a and b were evaluated on other tokens"):
        evaluation().kl_difference(evaluation(name="b", block_positions=(256, 256, 255)))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({}, 10),  # 10..29 of 20..39
        ({"tokens": 10}, 0),
        ({"tokens": 11}, 1),
        ({"skip_tokens": 0, "tokens": 100}, 20),
        ({"skip_tokens": 39, "tokens": 100}, 1),
        ({"skip_tokens": 40}, 0),
        ({"text_sha256": "0" * 64}, 0),
        ({"tokens": "20"}, 0),
        ({"skip_tokens": None}, 0),
    ],
)
def test_overlap_with_a_calibration(change: dict[str, Any], seen: int) -> None:
    run = {"text_sha256": sha256(PROSE), "skip_tokens": 10, "tokens": 20} | change
    assert overlapping_tokens(CalibrationSummary.from_json(run), PROSE, 20, 20) == seen


def test_a_calibration_that_says_nothing_overlaps_nothing() -> None:
    assert overlapping_tokens(CalibrationSummary(), PROSE, 0, 100) == 0
