"""GGUF files that are broken or made to do harm."""

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest

from golden.errors import InputError
from sop.files.models import open_model
from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    GOOD,
    GOOD_PAIRS,
    HUGE,
    Q4_1,
    Q8_0,
    STRING,
    UINT32,
    UINT64,
    array,
    build,
    entry,
    nested,
    pair,
    text,
    u32,
    u64,
)
from tests.support.messages import pattern


def with_value(code: int, value: bytes) -> bytes:
    return build([pair("k", code, value)])


def with_entry(**fields: Any) -> bytes:
    return build([], [entry(**fields)], bytes(256))


def with_alignment(value: int, code: int = UINT32) -> bytes:
    raw = u32(value) if code == UINT32 else u64(value)
    return build([pair("general.alignment", code, raw)], [entry()], bytes(64))


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
