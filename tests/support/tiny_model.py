"""A model of one block with random weights and letters as tokens, held by PyTorch.

Two of its matrices have the names of a GGUF file. For tests that have the extra ``llm``.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from golden.checkpoint import CheckpointWriter
from golden.corrections import Corrections
from golden.notation import parse_format
from golden.quantize import quantize
from golden.scaling import ScaleMode
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import require
from sop.llm.places import Place
from sop.llm.windows import Text

Float32 = NDArray[np.float32]
Weights = dict[str, Float32]

HIDDEN, INNER, HEADS, VOCABULARY, CONTEXT = 32, 48, 4, 128, 64
QUERY, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
MODULES = {QUERY: "model.layers.0.self_attn.q_proj", DOWN: "model.layers.0.mlp.down_proj"}
SETTINGS: dict[str, Any] = {"tokens": 22, "window": 8, "skip_tokens": 3}
PROSE = Text("prose", "Windows of 8 letters or 7, then it ends: the quick brown fox.")


def sha256(text: Text) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.content.encode()).hexdigest()


def randomize(module: Any, *, matrices_only: bool = False) -> None:
    """Give the parameters normal values; norms and biases keep theirs with `matrices_only`."""
    torch, rng = require("torch"), np.random.default_rng(31)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2 or not matrices_only:
                values = rng.normal(0, 0.3, parameter.shape).astype(np.float32)
                parameter.copy_(torch.from_numpy(values))


def tiny_model(
    family: str = "Llama", *, tied: bool, matrices_only: bool, **changes: Any
) -> TorchModel:
    """The model, of a family of transformers."""
    transformers = require("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied, **changes,
    )  # fmt: skip
    module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomize(module, matrices_only=matrices_only)
    places = {
        QUERY: Place(f"{MODULES[QUERY]}.weight", None, False, 0, 1, (HIDDEN, HIDDEN), HEADS),
        DOWN: Place(f"{MODULES[DOWN]}.weight", None, False, 0, 1, (HIDDEN, INNER)),
    }
    tokenizer = Tokenizer(lambda text: list(text.encode()))
    return TorchModel(Path("tiny.gguf"), "ab" * 32, module, places, tokenizer)


def noisy(model: TorchModel, scale: float = 0.1) -> Weights:
    """Weights some way off those of the model."""
    rng = np.random.default_rng(7)
    return {
        name: (w + scale * rng.normal(size=w.shape)).astype(np.float32)
        for name in model.places
        for w in [model.weight(name)]
    }


def write_checkpoint(
    path: Path,
    tensors: Weights,
    *,
    name: str = "NF4sS1E4M3",
    calibration: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Weights quantized to the format, each with one correction: 1.0 at the top left."""
    with CheckpointWriter(path, config or {}, calibration) as writer:
        writer.add_raw("output_norm.weight", "F32", (1,), [bytes(4)])  # no linear layer: ignored
        for tensor, weights in tensors.items():
            stored = quantize(weights, parse_format(name), mode=ScaleMode.ABSMAX)
            row = np.zeros(weights.shape[0] + 1, np.int64)
            row[1:] = 1
            one = np.array([0x3F80], np.uint16)
            sparse = Corrections(weights.shape, row, np.zeros(1, np.uint16), one)
            writer.add(tensor, stored, sparse, "F32")
    return path


def opened_by(
    command: str, model: TorchModel, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> list[Any]:
    """Make a module of a command open the model whatever it is given; the option for the text."""
    monkeypatch.setattr(f"{command}.open_torch_model", lambda path: model)
    text = folder / "prose.txt"
    text.write_text(PROSE.content)
    return ["--text", text]
