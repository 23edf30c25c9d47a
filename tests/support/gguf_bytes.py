"""A small writer of GGUF files, good and bad."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sop.files.models import Model, open_model

F32, F16, Q4_1, Q8_0, Q8_1, I32, F64, BF16 = 0, 1, 3, 8, 9, 26, 28, 30  # GGML types
UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10  # metadata value types
HUGE = 1 << 63


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


def open_bytes(tmp_path: Path, content: bytes) -> Model:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return open_model(path)
