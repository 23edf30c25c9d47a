"""A model, a checkpoint of it and an evaluation for ``sop report``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.checkpoint import CheckpointWriter
from golden.notation import parse_format
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor

Float32 = NDArray[np.float32]

COLUMNS = 40  # three blocks of 16, the last one padded
PAIR, SINGLE, ATOM = "BOF4-NF4sS1E5M5", "NF4sUE4M4", "E2M3sUE4M4"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>.weight',
    "blk.0.--></svg></title><b>&amp;$\\frac$\u202e\u4e2d.weight",
    "{{ 7 * 7 }}{% endblock %}",
)


def make_layers(names: list[str]) -> dict[str, tuple[Float32, QuantizedTensor]]:
    """Weights and their quantization; every fifth layer is an atom, every seventh one LUT only."""
    random = np.random.default_rng(1)
    layers = {}
    for position, name in enumerate(names):
        weights = random.standard_normal((6, COLUMNS)).astype(np.float32)
        weights[0, :16] = 0  # a block with a scale of zero
        fmt = ATOM if position % 5 == 4 else SINGLE if position % 7 == 6 else PAIR
        tensor = quantize(weights, parse_format(fmt), mode=ScaleMode.ABSMAX)
        layers[name] = weights, tensor
    return layers


def make_plan(names: list[str]) -> dict[str, Any]:
    options = [
        {"name": "small", "bits": 1000, "gap_ppm": 3000.0, "on_hull": True},
        {"name": "bad", "bits": 1100, "gap_ppm": 2900.0, "on_hull": False},
        {"name": "large", "bits": 1200, "gap_ppm": 100.5},  # on the hull unless it says not
    ]
    layers = [
        {"name": name, "params": 240, "chosen": "large" if i % 2 else "small", "options": options}
        for i, name in enumerate(names)
    ]
    return {"budget_bits": 1150 * len(names), "bits": 1100 * len(names), "layers": layers}


@dataclass(frozen=True)
class Files:
    """A checkpoint, the model it was made from, and an evaluation."""

    checkpoint: Path
    model: Path
    evaluation: Path
    layers: dict[str, tuple[Float32, QuantizedTensor]]


def make_files(folder: Path, names: list[str], stem: str, plan: object) -> Files:
    layers = make_layers(names)
    checkpoint, model = folder / f"{stem}.safetensors", folder / "model.safetensors"
    with CheckpointWriter(checkpoint, {"plan": plan}) as writer:
        for name, (_, tensor) in layers.items():
            writer.add(name, tensor, None, "F32")
    save_file({name: weights for name, (weights, _) in layers.items()}, model)
    evaluation = folder / "evaluation.json"
    found = [
        {"name": stem, "bits_per_weight": 5.0, "kl": 0.0125, "kl_standard_error": 0.002,
         "perplexity": 11.5, "reference_perplexity": 11.0, "top1_agreement": 0.9,
         "gap_ppm": 1000.0, "relative_mse": 0.004,
         "layers": [{"name": name, "gap_ppm": 10.0 * (i + 1), "relative_mse": 0.004}
                    for i, name in enumerate(names)]},
        {"name": f"other {HOSTILE[0]}", "bits_per_weight": 4.25, "kl": 0.05,
         "kl_standard_error": None, "gap_ppm": 4000},
    ]  # fmt: skip
    evaluation.write_text(json.dumps({"evaluations": found}))
    return Files(checkpoint, model, evaluation, layers)


PLAIN = [f"blk.{block}.{kind}.weight" for block in range(11) for kind in ("attn_q", "ffn_up")]
