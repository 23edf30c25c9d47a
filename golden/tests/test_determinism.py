"""The quantizer writes the same bytes whatever the processor and its vector instructions are.

Each environment is a process of its own, because NumPy and OpenBLAS choose their code when they are
loaded. Run as a program, this module quantizes a layer in every way and prints SHA-256 sums.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import CheckpointWriter
from golden.factors import factor_second_moment
from golden.formats import HIF7
from golden.layer import QuantizedLayer, parse_recipe, quantize_layer
from golden.notation import parse_format
from golden.pair_search import fixed_candidates, search_codebooks
from golden.scaling import ScaleMode
from golden.tests.processors import digests_by_environment
from golden.training import Training

ROWS, COLUMNS = 48, 150  # the last block of a row is short

Case = Callable[[NDArray[np.float32], NDArray[np.float64]], QuantizedLayer]


def layer() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Weights and second moment, made of exact sums of integers and one division."""
    rng = np.random.default_rng(20250101)
    weights = rng.integers(-2047, 2048, (4, ROWS, COLUMNS)).sum(axis=0)
    weights[rng.integers(0, ROWS, 40), rng.integers(0, COLUMNS, 40)] *= 5
    mixing = rng.integers(-2, 3, (COLUMNS, 24))
    sample = rng.integers(-8, 9, (4, 400, COLUMNS)).sum(axis=0)
    sample += rng.integers(-8, 9, (400, 24)) @ mixing.T
    sample *= 1 << rng.integers(0, 5, COLUMNS)
    moment = (sample.T @ sample).astype(np.float64) / 1000
    return weights.astype(np.float32) / np.float32(1e5), moment


def case(name: str, *, feedback: bool = False, **options: Any) -> Case:
    """One way to quantize; ``feedback`` uses the second moment, all use channel norms."""

    def run(weights: NDArray[np.float32], moment: NDArray[np.float64]) -> QuantizedLayer:
        recipe = parse_recipe(name, **options)
        norms = np.sqrt(np.diag(moment))
        return quantize_layer(weights, recipe, norms, moment if feedback else None)

    return run


CASES = {
    "search": case("BOF4-NF4sS1E5M5"),
    "search of the layer exponent": case("SH4sUE2M3"),
    "absmax": case("NF4sUE4M4", mode=ScaleMode.ABSMAX),
    "argmax": case("NF4sS1E4M3", mode=ScaleMode.ARGMAX),
    "atoms": case("E2M3^32sUE8M0"),
    "row scales": case("NF4-BOF4sRUE4M4"),
    "pair search": case("Any4-Any4sS1E5M5", training=Training(blocks=96, sweeps=0)),
    "trained": case("DD4sS1E5M5", training=Training(blocks=48, rounds=1, sweeps=1)),
    "corrections": case("NF4sS1E5M5", outliers=0.01, residuals=0.01),
    "feedback": case("BOF4-NF4sS1E5M5", feedback=True),
    "feedback with row scales": case("NF4^8sRUE3M4", feedback=True),
}


def sums_behind(
    weights: NDArray[np.float32], moment: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Numbers that decide codes: sixteen levels seldom show that the last bit of one differs."""
    factors = factor_second_moment(moment, 16)
    pairs = search_codebooks(
        weights,
        parse_format("DD4-DD4sS1E5M5"),
        candidates=fixed_candidates(16, HIF7)[:3],
        channel_norms=np.sqrt(np.diag(moment)),
    )
    return {
        "factors": np.concatenate([factors.diagonal, factors.upper.ravel()]),
        "errors of pairs": np.array([error for _, error in pairs.errors]),
    }


def digests() -> dict[str, str]:
    """SHA-256 of the checkpoint file of every case, and of the sums behind them."""
    weights, moment = layer()
    made = {name: sha256(sums.tobytes()) for name, sums in sums_behind(weights, moment).items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in CASES.items():
            result = run(weights, moment)
            path = Path(folder, "layer.safetensors")
            with CheckpointWriter(path, {"case": name}) as writer:
                writer.add("layer", result.tensor, result.corrections, "F32")
            made[name] = sha256(path.read_bytes())
            if result.feedback is not None:
                errors = np.array([result.feedback.plain_error, result.feedback.feedback_error])
                made[f"errors, {name}"] = sha256(errors.tobytes())
    return made


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------ tests


def test_files_are_the_same_on_every_processor() -> None:
    found = digests_by_environment("golden.tests.test_determinism")
    expected = found["default"]
    assert expected.keys() > CASES.keys()
    assert len(set(expected.values())) == len(expected)
    different = {
        (environment, name)
        for environment, made in found.items()
        for name, digest in made.items()
        if digest != expected[name]
    }
    assert not different


if __name__ == "__main__":
    print(json.dumps(digests()))
