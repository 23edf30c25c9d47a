"""Reading weights from GGUF files: what a valid file holds, type by type."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from golden.errors import InputError
from sop.files.gguf_file import GgufFile
from sop.files.models import Model
from sop.files.tensor_info import TensorInfo
from tests.support.gguf_bytes import (
    ARRAY,
    BF16,
    BOOL,
    F16,
    F32,
    F64,
    FLOAT32,
    GOOD,
    I32,
    Q4_1,
    Q8_0,
    Q8_1,
    STRING,
    UINT32,
    array,
    build,
    entry,
    floats,
    nested,
    open_bytes,
    pair,
    text,
    u32,
)


@pytest.fixture
def good(tmp_path: Path) -> Iterator[Model]:
    with open_bytes(tmp_path, GOOD) as model:
        yield model


def test_tensors_have_numpy_shape_and_file_order(good: Model) -> None:
    assert list(good.tensors.values()) == [
        TensorInfo("a", (2, 4), "F32"),
        TensorInfo("b", (3,), "F32"),
    ]


def test_values_are_read_as_contiguous_writable_float32(good: Model) -> None:
    values = good.read("a")
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert values.flags.writeable
    assert values.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert good.read("b").tolist() == [9, 10, 11]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_versions_and_alignments(tmp_path: Path, version: int, alignment: int) -> None:
    entries = [entry("a", (2,)), entry("b", (1,), offset=alignment)]
    data = floats(1, 2).ljust(alignment, b"\0") + floats(3)
    pairs = [pair("general.alignment", UINT32, u32(alignment))]
    content = build(pairs, entries, data, version=version, alignment=alignment)
    with open_bytes(tmp_path, content) as model:
        assert model.read("a").tolist() == [1, 2]
        assert model.read("b").tolist() == [3]


def test_tensors_may_lie_in_another_order_than_the_table(tmp_path: Path) -> None:
    entries = [entry("late", (1,), offset=32), entry("early", (8,), offset=0)]
    with open_bytes(tmp_path, build([], entries, floats(*range(9)))) as model:
        assert list(model.tensors) == ["late", "early"]
        assert model.read("late").tolist() == [8]
        assert model.read("early").tolist() == list(range(8))


def test_file_without_tensors_and_padding_is_valid(tmp_path: Path) -> None:
    with open_bytes(tmp_path, build(alignment=1)) as model:
        assert not model.tensors
        assert model.source_note == ""


SCALARS = [
    (0, "<B", 255),
    (1, "<b", -128),
    (2, "<H", 65535),
    (3, "<h", -32768),
    (4, "<I", 2**32 - 1),
    (5, "<i", -(2**31)),
    (6, "<f", 0.5),
    (7, "<?", True),
    (7, "<?", False),
    (10, "<Q", 2**64 - 1),
    (11, "<q", -(2**63)),
    (12, "<d", 0.1),
]


@pytest.mark.parametrize(("code", "fmt", "value"), SCALARS)
def test_metadata_scalars(tmp_path: Path, code: int, fmt: str, value: float | bool) -> None:
    path = tmp_path / "model.gguf"
    packed = struct.pack(fmt, value)
    after = pair("after", STRING, text("π"))
    values = pair("array", ARRAY, array(code, [packed] * 3))
    path.write_bytes(build([pair("k", code, packed), values, after]))
    file = GgufFile(path)
    file.close()
    assert file.metadata == {"k": value, "after": "π"}
    assert type(file.metadata["k"]) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        array(STRING, []),
        array(ARRAY, []),
        array(STRING, [text(""), text("x" * 300), text(b"\xff")]),
        nested(4),
        array(ARRAY, [array(STRING, [text("a")]), array(FLOAT32, [floats(1)])]),
    ],
)
def test_arrays_are_stepped_over(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build([pair("k", ARRAY, value), pair("after", BOOL, b"\1")]))
    file = GgufFile(path)
    file.close()
    assert file.metadata == {"after": True}


def test_large_vocabulary_is_stepped_over_quickly(tmp_path: Path) -> None:
    words = [text(f"word{index}") for index in range(200_000)]
    content = build([pair("tokens", ARRAY, array(STRING, words))], [entry()], bytes(32))
    started = time.perf_counter()
    with open_bytes(tmp_path, content) as model:
        assert list(model.tensors) == ["w"]
    assert time.perf_counter() - started < 1


# One block of 32 weights, worked out by hand: Q4_1 is d * q + m with the low nibbles first,
# Q8_0 is d * q.
Q4_1_BLOCK = struct.pack("<ee", 0.5, -1.0) + bytes(0xF0 | q for q in range(16))
Q4_1_VALUES = [0.5 * q - 1 for q in range(16)] + [0.5 * 15 - 1] * 16
Q8_0_BLOCK = struct.pack("<e", 0.25) + bytes(range(31)) + b"\x80"
Q8_0_VALUES = [0.25 * q for q in range(31)] + [-32.0]


@pytest.mark.parametrize(
    ("code", "data", "expected"),
    [
        (F32, floats(*range(64)), list(range(64))),
        (F16, np.arange(64, dtype="<f2").tobytes(), list(range(64))),
        (BF16, np.arange(64, dtype=ml_dtypes.bfloat16).tobytes(), list(range(64))),
        (Q4_1, Q4_1_BLOCK * 2, Q4_1_VALUES * 2),
        (Q8_0, Q8_0_BLOCK * 2, Q8_0_VALUES * 2),
    ],
    ids=["F32", "F16", "BF16", "Q4_1", "Q8_0"],
)
@pytest.mark.parametrize("dims", [(64,), (32, 2), (32, 1, 2), (32, 2, 1, 1)])
def test_dequantized_values(
    tmp_path: Path, code: int, data: bytes, expected: list[float], dims: tuple[int, ...]
) -> None:
    with open_bytes(tmp_path, build([], [entry("w", dims, code)], data)) as model:
        values = model.read("w")
    assert values.dtype == np.float32
    assert values.shape == dims[::-1]
    assert values.ravel().tolist() == expected


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2049])
def test_tensor_with_many_rows_is_read_completely(tmp_path: Path, rows: int) -> None:
    data = np.arange(rows * 3, dtype="<f4")
    with open_bytes(tmp_path, build([], [entry("w", (3, rows))], data.tobytes())) as model:
        np.testing.assert_array_equal(model.read("w"), data.reshape(rows, 3))


@pytest.mark.filterwarnings("error")
def test_nan_and_infinity_pass_through_silently(tmp_path: Path) -> None:
    half_inf = struct.pack("<ee", np.inf, -np.inf) + bytes([0x10]) * 16
    entries = [entry("f", (3,)), entry("q", (32,), Q4_1, 32)]
    data = floats(np.nan, np.inf, -np.inf).ljust(32, b"\0") + half_inf
    with open_bytes(tmp_path, build([], entries, data)) as model:
        np.testing.assert_array_equal(model.read("f"), [np.nan, np.inf, -np.inf])
        assert np.isnan(model.read("q")).all()


@pytest.mark.parametrize(("code", "name"), [(I32, "I32"), (F64, "F64"), (Q8_1, "Q8_1")])
def test_type_that_cannot_be_dequantized_is_listed_but_not_read(
    tmp_path: Path, code: int, name: str
) -> None:
    with open_bytes(tmp_path, build([], [entry("w", (32,), code)], bytes(256))) as model:
        assert model.tensors["w"].source_type == name
        with pytest.raises(InputError, match=f"tensor 'w': field 'type': {name} values"):
            model.read("w")


def test_file_that_shrinks_while_open_is_refused(good: Model) -> None:
    with good.path.open("r+b") as file:
        file.truncate(len(GOOD) - 1)
    with pytest.raises(InputError, match=f"tensor 'b': .* cut to {len(GOOD) - 1} bytes"):
        good.read("b")
    assert good.read("a").shape == (2, 4)


def test_array_outlives_the_model_and_closed_model_refuses(good: Model) -> None:
    values = good.read("b")
    good.close()
    good.close()
    assert values.tolist() == [9, 10, 11]
    with pytest.raises(ValueError, match="this model is closed"):
        good.read("b")


def test_file_written_by_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((6, 64), dtype=np.float32)
    packed = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "é", ""])
    writer.add_float64("x", 0.25)
    writer.add_tensor("plain", matrix)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.metadata == {"general.architecture": "llama", "general.alignment": 64, "x": 0.25}
    np.testing.assert_array_equal(file.read_tensor("plain"), matrix)
    np.testing.assert_allclose(file.read_tensor("packed"), matrix, atol=np.abs(matrix).max() / 250)
    file.close()
