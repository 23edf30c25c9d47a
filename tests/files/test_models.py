"""Models in files of any kind: what is opened, which tensors are chosen, what the weights were."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.errors import InputError
from sop.files.choice import linear_matrices_of_block
from sop.files.models import Model, open_model
from tests.support.gguf_bytes import BF16, F16, F32, GOOD, I32, Q4_1, Q8_0, build, entry, open_bytes
from tests.support.messages import pattern


@pytest.fixture
def good(tmp_path: Path) -> Iterator[Model]:
    with open_bytes(tmp_path, GOOD) as model:
        yield model


def names_of_block(model: Model, block: int) -> list[str]:
    return [matrix.name for matrix in linear_matrices_of_block(model, block)]


TAIL = " in this file; errors are measured against those dequantized values"


# --- choosing tensors -----------------------------------------------------------------------------


def named(tmp_path: Path, shapes: dict[str, tuple[int, ...]], suffix: str = ".gguf") -> Model:
    """Return an open model with zero tensors of these names and shapes (NumPy order)."""
    path = tmp_path / f"named{suffix}"
    if suffix == ".safetensors":
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
        return open_model(path)
    entries, offset = [], 0
    for name, shape in shapes.items():
        entries.append(entry(name, shape[::-1], offset=offset))
        offset += -(-4 * int(np.prod(shape)) // 32) * 32
    path.write_bytes(build([], entries, bytes(offset)))
    return open_model(path)


GGUF_NAMES = {
    "token_embd.weight": (8, 4),
    "blk.1.attn_norm.weight": (4,),
    "blk.1.ffn_up.weight": (8, 4),
    "blk.1.attn_q.weight": (4, 4),
    "blk.1.attn_q.bias": (4, 1),
    "blk.10.attn_q.weight": (4, 4),
    "blk.0.attn_q.weight": (4, 4),
    "blk.1.ffn_up_exps.weight": (2, 8, 4),
    "blk.1.ffn_down.weight": (4, 8),
}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["blk.0.*"], ["blk.0.attn_q.weight"]),
        (["*.attn_[qk].weight", "blk.10.*"], [f"blk.{n}.attn_q.weight" for n in (1, 10, 0)]),
        (["blk.1.ffn_down.weight", "token*"], ["token_embd.weight", "blk.1.ffn_down.weight"]),
        (["*"], list(GGUF_NAMES)),
        ([], []),
    ],
)
def test_select_keeps_file_order(tmp_path: Path, patterns: list[str], expected: list[str]) -> None:
    with named(tmp_path, GGUF_NAMES) as model:
        assert model.select(patterns) == expected


@pytest.mark.parametrize("wrong", ["layers.*", "BLK.*", "blk.1"])
def test_pattern_without_match_is_refused(tmp_path: Path, wrong: str) -> None:
    message = f"named.gguf: pattern '{wrong}': matches no tensor; .* 9 tensors, such as 'token_embd"
    with (
        named(tmp_path, GGUF_NAMES) as model,
        pytest.raises(InputError, match=pattern(message)),
    ):
        model.select(["blk.*", wrong])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("blk.0.attn_k.weight", "closest: 'blk.0.attn_q.weight'"), ("zzz", "the file has 9 tensors")],
)
def test_missing_tensor_is_refused_with_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    message = f"named.gguf: tensor '{name}': not in this file; {hint}"
    with (
        named(tmp_path, GGUF_NAMES) as model,
        pytest.raises(InputError, match=pattern(message)),
    ):
        model.read(name)


def test_linear_tensors_of_a_gguf_block(tmp_path: Path) -> None:
    with named(tmp_path, GGUF_NAMES) as model:
        assert names_of_block(model, 1) == [
            "blk.1.ffn_up.weight",
            "blk.1.attn_q.weight",
            "blk.1.ffn_up_exps.weight[0]",
            "blk.1.ffn_up_exps.weight[1]",
            "blk.1.ffn_down.weight",
        ]
        assert names_of_block(model, 10) == ["blk.10.attn_q.weight"]


@pytest.mark.parametrize("prefix", ["model.layers", "layers", "bert.encoder.layer"])
def test_linear_tensors_of_a_hugging_face_block(tmp_path: Path, prefix: str) -> None:
    shapes = {
        f"{prefix}.1.a.q_proj.weight": (4, 4),
        f"{prefix}.1.b.norm.weight": (4,),
        f"{prefix}.1.c.bias": (4, 4),
        f"{prefix}.1.d.down_proj.weight": (4, 8),
        f"{prefix}.11.a.q_proj.weight": (4, 4),
        "embed.1.weight": (4, 4),
        f"{prefix}.x.weight": (4, 4),
        f"{prefix}.{'9' * 5000}.weight": (4, 4),
    }
    with named(tmp_path, shapes, ".safetensors") as model:
        assert names_of_block(model, 1) == [
            f"{prefix}.1.a.q_proj.weight",
            f"{prefix}.1.d.down_proj.weight",
        ]


@pytest.mark.parametrize("block", [2, -1])
def test_missing_block_is_refused(tmp_path: Path, block: int) -> None:
    message = f"named.gguf: block {block}: not in this file, which has blocks 0..10"
    with (
        named(tmp_path, GGUF_NAMES) as model,
        pytest.raises(InputError, match=pattern(message)),
    ):
        linear_matrices_of_block(model, block)


def test_block_of_a_model_without_blocks_is_refused(good: Model) -> None:
    with pytest.raises(InputError, match="no blocks with known names"):
        linear_matrices_of_block(good, 0)


# --- what the source note says --------------------------------------------------------------------


def note_of(tmp_path: Path, *codes: int, dims: tuple[int, ...] = (256, 2)) -> str:
    entries = [entry(f"w{n}", dims, code, 4096 * n) for n, code in enumerate(codes)]
    with open_bytes(tmp_path, build([], entries, bytes(4096 * len(codes)))) as model:
        return model.source_note


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([F32, F16, BF16], ""),
        ([Q4_1], "weights were already Q4_1 (4-bit)" + TAIL),
        ([Q8_0, Q4_1, Q4_1], "weights were already Q4_1 (4-bit) and Q8_0 (8-bit)" + TAIL),
        ([Q4_1, F16], "some weights were already Q4_1 (4-bit)" + TAIL),
        ([I32], ""),
    ],
)
def test_source_note(tmp_path: Path, codes: list[int], expected: str) -> None:
    assert note_of(tmp_path, *codes) == expected


def test_source_note_ignores_vectors(tmp_path: Path) -> None:
    assert note_of(tmp_path, Q4_1, dims=(256,)) == ""


@pytest.mark.parametrize("kind", list(gguf.GGML_QUANT_SIZES), ids=lambda kind: kind.name)
def test_source_note_knows_the_bits_of_every_type(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    note = note_of(tmp_path, kind)
    if block_size == 1:
        assert note == ""
        return
    stated = re.fullmatch(rf"weights were already {kind.name} \((ternary|(\d)-bit)\){TAIL}", note)
    assert stated
    bits = 1.58 if stated[1] == "ternary" else int(stated[2])
    assert bits <= block_bytes * 8 / block_size <= bits + 2  # the scales take at most two bits


# --- which files are opened at all ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".PT", ".ckpt", ".pkl"])
def test_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    path, trap = tmp_path / f"model{suffix}", tmp_path / "executed"
    path.write_bytes(b"cbuiltins\nopen\n(V" + str(trap).encode() + b"\nVw\ntR.")
    with pytest.raises(InputError, match=r"pickled files are never opened.*convert .*safetensors"):
        open_model(path)
    assert not trap.exists()
    pickle.loads(path.read_bytes()).close()
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("name", ["model.onnx", "model", "model.safetensors.index.json"])
def test_other_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(InputError, match=r"suffix '.*', expected \.gguf or \.safetensors"):
        open_model(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_missing_file_and_directory_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.raises(InputError, match=f"model{suffix}: no such file$"):
        open_model(path)
    path.mkdir()
    with pytest.raises(
        InputError, match=rf"model{suffix}: no weights; expected model\.safetensors"
    ):
        open_model(path)


def test_suffix_in_capitals_and_text_path_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "MODEL.GGUF"
    path.write_bytes(GOOD)
    with open_model(str(path)) as model:
        assert model.path == path
        assert list(model.tensors) == ["a", "b"]
