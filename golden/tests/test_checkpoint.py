"""The checkpoint file: round trips, an independent reader, the official package, hostile files."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

import golden.container
import golden.strict_json
from golden.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    CheckpointWriter,
    SourceInfo,
    StoredTensor,
    config_hash,
    reconstruct,
)
from golden.codebooks import Lut, fixed_lut
from golden.convert import code_dtype, encode_array
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import BF16, HIF7, HIF8, HIF8T, HIF_FORMATS, HifFormat, Kind, NumberFormat
from golden.notation import QuantFormat, parse_format
from golden.tensor import QuantizedTensor, decode

DOCUMENT = Path(golden.__file__).parent.parent / "docs" / "checkpoint.md"
CONFIG: dict[str, object] = {"budget": 4.75, "scale_mode": "search", "layers": [1, None, True, "é"]}
CALIBRATION: dict[str, object] = {"tokens": 4096, "text": {"sha256": "00ff"}}


@cache
def valid_codes(fmt: NumberFormat) -> NDArray[np.unsignedinteger]:
    codes = [
        code
        for code in range(1 << fmt.width)
        if fmt.decode(code).kind not in (Kind.NAN, Kind.RESERVED)
    ]
    return np.array(codes, code_dtype(fmt.width))


def random_lut(fmt: QuantFormat, rng: np.random.Generator) -> Lut:
    values = list(fmt.hif.canonical)
    ends = [0, len(values) - 1]  # so that both sides of zero are there
    inner = rng.choice(np.arange(1, len(values) - 1), fmt.lut_entries - 2, replace=False)
    picked = sorted([*ends, *inner.tolist()])
    return Lut(fmt.hif, tuple(fmt.hif.canonical[values[k]] for k in picked))


def random_tensor(
    name: str,
    shape: tuple[int, int] = (5, 37),
    seed: int = 1,
    hif: HifFormat = HIF7,
    scales: tuple[float, float] | None = None,
) -> QuantizedTensor:
    """Any codes that have a value; with ``scales``, real scales from that range."""
    rng, fmt = np.random.default_rng(seed), parse_format(name, hif)
    rows, columns = shape
    size = fmt.block_size or rows * columns
    blocks = (rows, -(-columns // size)) if fmt.block_size else (1, 1)
    if fmt.atom is not None:
        indices = rng.choice(valid_codes(fmt.atom), (*blocks, size))
    else:
        indices = rng.integers(0, fmt.lut_entries, (*blocks, size), dtype=np.uint8)
    if scales is None:
        words = rng.choice(valid_codes(fmt.word.scale), blocks).astype(np.uint16)
    else:
        words = encode_array(rng.uniform(*scales, blocks), fmt.word.scale).astype(np.uint16)
    if fmt.word.metabit_bits:
        words |= rng.integers(0, 2, blocks, dtype=np.uint16) << np.uint16(fmt.word.scale.width)
    luts = tuple(random_lut(fmt, rng) for _ in fmt.codebooks)
    row_scales = None
    if fmt.row_scale:
        row_scales = encode_array(rng.uniform(0.5, 2, rows), BF16).astype(np.uint16)
    return QuantizedTensor(fmt, shape, indices, words, luts, int(seed) % 9 - 4, row_scales)


def random_corrections(shape: tuple[int, int], seed: int, density: float = 0.1) -> Corrections:
    rng = np.random.default_rng(seed)
    residuals = rng.standard_normal(shape).astype(np.float32)
    return Corrections.from_mask(rng.random(shape) < density, residuals)


def assert_same(stored: StoredTensor, tensor: QuantizedTensor, other: Corrections | None) -> None:
    read = stored.tensor
    assert (read.format, read.shape, read.luts) == (tensor.format, tensor.shape, tensor.luts)
    assert read.layer_exponent == tensor.layer_exponent
    for name in ("indices", "scale_words", "row_scales"):
        one, two = getattr(read, name), getattr(tensor, name)
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            assert np.array_equal(one, two)
    assert (stored.corrections is None) == (other is None)
    if stored.corrections is not None and other is not None:
        assert stored.corrections.shape == other.shape
        for name in ("indptr", "columns", "values"):
            one, two = getattr(stored.corrections, name), getattr(other, name)
            assert one.dtype == two.dtype
            assert np.array_equal(one, two)


def write_one(
    path: Path, tensor: QuantizedTensor, corrections: Corrections | None, name: str = "w"
) -> None:
    with CheckpointWriter(path, CONFIG, CALIBRATION) as writer:
        writer.add(name, tensor, corrections, "BF16")


# ------------------------------------------------------------------------------------ round trips

KINDS: list[tuple[str, HifFormat]] = [
    ("NF4sUE4M4", HIF7),
    ("BOF4-NF4sS1E5M5", HIF7),  # 12-bit words
    ("DD4-DD4^8sUE5M4", HIF8),  # 10-bit words
    ("DD5-DD5sS1E4M3", HIF8T),  # 9-bit words
    ("DD6sS1E4M3", HIF8T),
    ("DD6^64sBF16", HIF7),
    ("DD4-NF4sRS1E2M4", HIF7),
    ("E2M1^32sUE8M0", HIF7),
    ("E2M3sUE4M4", HIF7),
    ("E4M3^0sUE8M0", HIF7),
    ("INT4^0sBF16", HIF7),
    ("E4M5^64sUE4M4", HIF7),
    ("E5M6^8sS1E5M5", HIF7),
    ("HIF8^32sBF16", HIF7),
]


@pytest.mark.parametrize(("name", "hif"), KINDS)
@pytest.mark.parametrize("sparse", [None, 0.0, 0.2])
@pytest.mark.parametrize("seed", [11])
def test_every_kind_of_format_comes_back(
    tmp_path: Path, name: str, hif: HifFormat, sparse: float | None, seed: int
) -> None:
    for shape in ((5, 37), (1, 1), (3, 64)):
        tensor = random_tensor(name, shape, seed, hif)
        corrections = None if sparse is None else random_corrections(shape, seed, sparse)
        path = tmp_path / "model.safetensors"
        write_one(path, tensor, corrections)
        with Checkpoint(path) as checkpoint:
            assert_same(checkpoint.read("w"), tensor, corrections)
            bits = tensor.format.stored_bits(*shape)
            bits += 0 if corrections is None else corrections.stored_bits
            assert checkpoint.bits("w") == bits
            assert checkpoint.stored_bits_per_weight == Fraction(bits, math.prod(shape))


@pytest.mark.parametrize("seed", [12])
def test_wide_matrices_have_uint32_columns(tmp_path: Path, seed: int) -> None:
    for columns, dtype in ((65536, "U16"), (65537, "U32")):
        tensor = random_tensor("NF4sUE4M4", (1, columns), seed)
        corrections = random_corrections((1, columns), seed, 0.001)
        write_one(tmp_path / "model", tensor, corrections)
        with Checkpoint(tmp_path / "model") as checkpoint:
            assert_same(checkpoint.read("w"), tensor, corrections)
            bits = tensor.format.stored_bits(1, columns) + corrections.stored_bits
            assert checkpoint.bits("w") == bits
        assert load(tmp_path / "model").header["w.corrections.columns"]["dtype"] == dtype


def test_what_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_one(path, random_tensor("DD6sS1E4M3", hif=HIF8T), None)
    with Checkpoint(path) as checkpoint:
        info = checkpoint.info("w")
        assert info.format == parse_format("DD6sS1E4M3", HIF8T)
        assert (info.shape, info.layer_exponent, info.source_dtype) == ((5, 37), -3, "BF16")
        assert checkpoint.names == ("w",)
        assert checkpoint.raw_names == ()
        assert checkpoint.config == CONFIG
        assert checkpoint.calibration == CALIBRATION
        text = '{"budget":4.75,"layers":[1,null,true,"\\u00e9"],"scale_mode":"search"}'
        assert checkpoint.config_hash == hashlib.sha256(text.encode()).hexdigest()
    with CheckpointWriter(path, {}):
        pass
    with Checkpoint(path) as checkpoint:
        assert (checkpoint.names, checkpoint.calibration, checkpoint.config) == ((), None, {})
        with pytest.raises(InputError, match="no tensor is quantized"):
            _ = checkpoint.stored_bits_per_weight


def test_reconstruction_adds_the_corrections(tmp_path: Path) -> None:
    tensor, corrections = random_tensor("BOF4-NF4sS1E5M5"), random_corrections((5, 37), 13)
    dense = decode(tensor)
    write_one(tmp_path / "model", tensor, corrections)
    with Checkpoint(tmp_path / "model") as checkpoint:
        assert np.array_equal(reconstruct(checkpoint.read("w")), corrections.add_to(dense))
    write_one(tmp_path / "model", tensor, None)
    with Checkpoint(tmp_path / "model") as checkpoint:
        assert np.array_equal(reconstruct(checkpoint.read("w")), dense)


# -------------------------------------------------------------------------------------- raw parts

RAW: dict[str, NDArray[Any]] = {
    "BOOL": np.array([True, False, True]),
    "U8": np.arange(7, dtype=np.uint8),
    "I8": np.arange(-3, 4, dtype=np.int8),
    "F8_E4M3": np.arange(5).astype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.arange(5).astype(ml_dtypes.float8_e5m2),
    "I16": np.arange(3, dtype=np.int16).reshape(1, 3),
    "U16": np.arange(3, dtype=np.uint16),
    "F16": np.arange(3, dtype=np.float16),
    "BF16": np.arange(3).astype(ml_dtypes.bfloat16),
    "I32": np.arange(3, dtype=np.int32),
    "U32": np.zeros((0, 3), np.uint32),
    "F32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "C64": np.arange(2).astype(np.complex64),
    "I64": np.array(7, np.int64),
    "U64": np.arange(3, dtype=np.uint64),
    "F64": np.arange(3, dtype=np.float64),
}


def test_raw_tensors_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with CheckpointWriter(path, CONFIG) as writer:
        for dtype, values in RAW.items():
            writer.add_raw(dtype, dtype, values.shape, [values.tobytes()])
        writer.add_raw("four", "F4", (3, 2), [b"\x12\x34\x56"])
        writer.add_raw("six", "F6_E2M3", (4,), [b"abc"])
    with Checkpoint(path) as checkpoint, safetensors.safe_open(path, "numpy") as official:
        assert checkpoint.raw_names == tuple(sorted([*RAW, "four", "six"]))
        for dtype, values in RAW.items():
            read = checkpoint.read_raw(dtype)
            assert (read.dtype, read.shape) == (values.dtype, values.shape)
            assert read.tobytes() == values.tobytes()
            assert (checkpoint.raw_info(dtype).dtype, checkpoint.raw_info(dtype).shape) == (
                dtype,
                values.shape,
            )
            assert b"".join(checkpoint.raw_chunks(dtype)) == values.tobytes()
            assert checkpoint.bits(dtype) == 8 * values.nbytes
            if not dtype.startswith("F8"):  # those the package reads into other frameworks only
                assert official.get_tensor(dtype).tobytes() == values.tobytes()
        assert b"".join(checkpoint.raw_chunks("four")) == b"\x12\x34\x56"
        with pytest.raises(InputError, match=r"tensor 'six': field 'dtype': NumPy has no type"):
            checkpoint.read_raw("six")


def test_raw_bools_are_zero_or_one(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model", CONFIG) as writer:
        writer.add_raw("b", "BOOL", (2,), [b"\0\2"])
    with (
        Checkpoint(tmp_path / "model") as checkpoint,
        pytest.raises(InputError, match=r"tensor 'b': field 'data': a BOOL"),
    ):
        checkpoint.read_raw("b")


def chunked(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        yield data[start : start + size]
        start += size
    yield data[start:]


@pytest.mark.parametrize("seed", [14])
def test_the_bytes_depend_on_the_content_only(tmp_path: Path, seed: int) -> None:
    tensors = {
        name: random_tensor("BOF4-NF4sS1E5M5", seed=seed + k) for k, name in enumerate("abc")
    }
    corrections = random_corrections((5, 37), seed)
    raw = np.random.default_rng(seed).bytes(1000)

    def write(path: Path, order: str, sizes: list[int], config: dict[str, object]) -> bytes:
        with CheckpointWriter(path, config, CALIBRATION) as writer:
            for name in order:
                if name in tensors:
                    writer.add(name, tensors[name], corrections if name == "b" else None, "F32")
                else:
                    writer.add_raw(name, "F32", (25, 10), chunked(raw, sizes))
        return path.read_bytes()

    first = write(tmp_path / "one", "abcxy", [], CONFIG)
    other = dict(reversed(CONFIG.items()))
    assert write(tmp_path / "two", "ycxba", [0, 1, 333, 0, 5], other) == first
    assert write(tmp_path / "two", "ycxba", [1] * 999, {**CONFIG, "budget": 5.0}) != first
    names = list(load(tmp_path / "one").header)
    assert names[0] == "__metadata__"
    assert names[1:3] == ["b.corrections.indptr", "x"]  # widest types first, then by name
    assert names[4:8] == ["b.corrections.columns", "b.corrections.values", "a.indices", "a.luts"]
    assert len(first) == load(tmp_path / "one").start + sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in load(tmp_path / "one").header.items()
        if name != "__metadata__"
    )


@pytest.mark.parametrize("seed", [15])
def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model"
    with CheckpointWriter(path, CONFIG) as writer:
        for k in range(4):
            shape = (3, 5 + k)
            tensor = random_tensor("DD4-DD4sRS1E2M4", shape, seed)
            writer.add(f"w{k}" + "x" * k, tensor, random_corrections(shape, seed), "F32")
            writer.add_raw(f"r{k}", "F64", (k,), [bytes(8 * k)])
    file = load(path)
    assert file.start % 8 == 0
    sizes = {"U8": 1, "BF16": 2, "U16": 2, "U32": 4, "F64": 8}
    for name, entry in file.header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


# ---------------------------------------------------------------- other readers, other writers


@pytest.mark.parametrize("seed", [16])
def test_the_official_package_sees_the_same_and_can_write_it(tmp_path: Path, seed: int) -> None:
    tensor = random_tensor("DD4-DD4sRS1E2M4", seed=seed)
    corrections = random_corrections((5, 37), seed)
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    with CheckpointWriter(path, CONFIG, CALIBRATION) as writer:
        writer.add("blk.0.q", tensor, corrections, "F16")
        writer.add_raw("norm", "F32", (2,), [np.array([1, 2], np.float32).tobytes()])
    expected = {
        "indices": tensor.index_plane,
        "scales": tensor.scale_plane,
        "luts": np.array([lut.codes for lut in tensor.luts], np.uint8),
        "row_scales": tensor.row_scales,
        "corrections.indptr": corrections.indptr.astype(np.uint32),
        "corrections.columns": corrections.columns,
        "corrections.values": corrections.values,
    }
    arrays = safetensors.numpy.load_file(path)
    assert arrays.keys() == {"norm", *(f"blk.0.q.{name}" for name in expected)}
    for name, array in expected.items():
        assert array is not None
        read = arrays[f"blk.0.q.{name}"]
        assert read.shape == array.shape
        assert read.tobytes() == array.tobytes()
        sparse_or_row = name in ("row_scales", "corrections.values")
        assert read.dtype == (ml_dtypes.bfloat16 if sparse_or_row else array.dtype)
    metadata = load(path).header["__metadata__"]
    safetensors.numpy.save_file(arrays, again, metadata={**metadata, "format": "np"})
    with Checkpoint(again) as checkpoint:
        assert_same(checkpoint.read("blk.0.q"), tensor, corrections)


def reader_from_the_document(path: Path, name: str) -> list[list[Fraction]]:
    """Weights by docs/checkpoint.md alone: bytes, integers and fractions."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["scaled_outer_product"])["tensors"][name]

    def part(suffix: str) -> bytes:
        start, stop = header[f"{name}.{suffix}"]["data_offsets"]
        return data[8 + length + start : 8 + length + stop]

    def bits(plane: bytes, width: int, position: int) -> int:
        return int.from_bytes(plane, "little") >> position * width & ((1 << width) - 1)

    def bfloat16(raw: bytes, position: int) -> Fraction:
        code = int.from_bytes(raw[2 * position : 2 * position + 2], "little")
        exponent, mantissa = code >> 7 & 255, code & 127
        magnitude = (mantissa + (128 if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 134)
        return -magnitude if code >> 15 else magnitude

    assert about["format"] == "DD5-DD5sRS1E2M4"
    assert about["hif"] == "HIF8T"
    rows, columns = about["shape"]
    blocks = -(-columns // 16)
    indices, scales, luts = part("indices"), part("scales"), part("luts")
    pointers, numbers = part("corrections.indptr"), part("corrections.columns")
    weights = []
    for row in range(rows):
        line = []
        for column in range(columns):
            block = row * blocks + column // 16
            word = bits(scales, 8, block)
            index = bits(indices, 5, block * 16 + column % 16)
            code = luts[32 * (word >> 7) + index]
            level = ((code & 63) - 64 * (code >> 5 & 1)) << (code >> 6)
            exponent, mantissa = word >> 4 & 3, word & 15
            scale = (mantissa + (16 if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 1 - 4)
            scale *= -1 if word >> 6 & 1 else 1
            line.append(
                level * scale * Fraction(2) ** about["layer_exponent"]
                * bfloat16(part("row_scales"), row)
            )  # fmt: skip
        first, last = (
            int.from_bytes(pointers[4 * k : 4 * k + 4], "little") for k in (row, row + 1)
        )
        for entry in range(first, last):
            column = int.from_bytes(numbers[2 * entry : 2 * entry + 2], "little")
            total = line[column] + bfloat16(part("corrections.values"), entry)
            line[column] = Fraction(float(np.float32(float(total))))
        weights.append(line)
    return weights


@pytest.mark.parametrize("seed", [17])
def test_a_reader_written_from_the_document_agrees(tmp_path: Path, seed: int) -> None:
    tensor = random_tensor("DD5-DD5sRS1E2M4", (3, 21), seed, HIF8T)
    write_one(tmp_path / "model", tensor, random_corrections((3, 21), seed))
    with Checkpoint(tmp_path / "model") as checkpoint:
        weights = reconstruct(checkpoint.read("w"))
    expected = reader_from_the_document(tmp_path / "model", "w")
    assert [[Fraction(float(w)) for w in row] for row in weights] == expected


def write_example(path: Path) -> None:
    """One row of 20 weights in two blocks, with one correction, and a raw tensor."""
    levels = [-128, -96, -72, -56, -40, -28, -20, -12, -4, 4, 12, 24, 32, 48, 64, 96]
    trained = Lut(HIF7, tuple(encode_array(np.array(levels), HIF7).tolist()))
    indices = (np.arange(32, dtype=np.uint8) % 16).reshape(1, 2, 16)
    indices[0, 1, 4:] = 8  # padding
    tensor = QuantizedTensor(
        parse_format("NF4-DD4sS1E5M5"),
        (1, 20),
        indices,
        np.array([[0xABC, 0x123]], np.uint16),
        (fixed_lut("NF4", 16, HIF7), trained),
        -3,
    )
    corrections = Corrections(
        (1, 20), np.array([0, 1]), np.array([17], np.uint16), np.array([0x3E20], np.uint16)
    )
    with CheckpointWriter(path, {"budget": 4.75}) as writer:
        writer.add("blk.0.q", tensor, corrections, "BF16")
        writer.add_raw("norm", "F32", (1,), [np.float32(1).tobytes()])


def test_the_example_of_the_document_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_example(path)
    file = load(path)
    document = DOCUMENT.read_text(encoding="utf-8")
    header = path.read_bytes()[8 : file.start].decode().rstrip(" ")
    assert header in document.replace("\n", "")
    assert f"`{(file.start - 8).to_bytes(8, 'little').hex(' ')}`" in document
    for name, value in file.header.items():
        if name != "__metadata__":
            start, stop = value["data_offsets"]
            row = f"| `{name}` | {start} to {stop} | `{file.data[start:stop].hex(' ')}` |"
            assert row in document
    with Checkpoint(path) as checkpoint:
        weights = reconstruct(checkpoint.read("blk.0.q"))[0]
    assert f"weight 0 is {weights[0]}," in document
    assert f"weight 17 is {weights[17]}." in document


# ----------------------------------------------------------------------------- size and memory


@pytest.mark.parametrize("name", ["BOF4-NF4sS1E5M5", "E2M3sUE4M4"])
@pytest.mark.parametrize("seed", [18])
def test_the_file_is_as_large_as_the_stated_bits(tmp_path: Path, name: str, seed: int) -> None:
    shape = (1024, 1024)
    tensor, corrections = random_tensor(name, shape, seed), random_corrections(shape, seed, 0.003)
    path = tmp_path / "model.safetensors"
    write_one(path, tensor, corrections)
    stated = tensor.format.bits_per_weight * math.prod(shape) + corrections.stored_bits
    assert stated <= 8 * path.stat().st_size <= stated * Fraction(1005, 1000)


def peak_memory(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    shape = (256, 512)
    corrections = random_corrections(shape, 19, 0.01)
    tensor = random_tensor("BOF4-NF4sS1E5M5", shape, 19)

    def write(count: int) -> None:
        with CheckpointWriter(tmp_path / f"{count}", CONFIG) as writer:
            for k in range(count):
                writer.add(f"w{k}", tensor, corrections, "F32")

    def read(count: int) -> None:
        with Checkpoint(tmp_path / f"{count}") as checkpoint:
            for name in checkpoint.names:
                checkpoint.read(name)

    for action in (write, read):
        action(1)  # fills caches
        few, many = (peak_memory(partial(action, count)) for count in (1, 24))
        assert few < 8 * math.prod(shape)
        assert many - few < 200_000, action.__name__  # one plane is 64 KiB, 23 more are 1.5 MB


def test_memory_holds_a_few_chunks_of_a_raw_tensor(tmp_path: Path) -> None:
    size, piece = 24 << 20, 1 << 16

    def write() -> None:
        with CheckpointWriter(tmp_path / "model", CONFIG) as writer:
            writer.add_raw("r", "U8", (size,), (bytes(piece) for _ in range(size // piece)))

    def read() -> None:
        with Checkpoint(tmp_path / "model") as checkpoint:
            assert sum(len(chunk) for chunk in checkpoint.raw_chunks("r")) == size

    assert peak_memory(write) < 4 << 20
    assert peak_memory(read) < 4 << 20


def test_raw_tensors_may_be_read_in_turns(tmp_path: Path) -> None:
    data = {name: np.random.default_rng(k).bytes(3 << 20) for k, name in enumerate("ab")}
    with CheckpointWriter(tmp_path / "model", CONFIG) as writer:
        for name, values in data.items():
            writer.add_raw(name, "U8", (3 << 20,), [values])
    with Checkpoint(tmp_path / "model") as checkpoint:
        pairs = list(zip(*(checkpoint.raw_chunks(name) for name in data), strict=True))
    assert len(pairs) == 3
    for one, values in zip(zip(*pairs, strict=True), data.values(), strict=True):
        assert b"".join(one) == values


# ------------------------------------------------------------------------- failures while writing


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_exception_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    write_one(path, random_tensor("NF4sUE4M4"), None)
    before = files_in(tmp_path)

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    def interrupted() -> Iterator[bytes]:
        yield b"1234"
        raise KeyboardInterrupt

    def write_until_interrupted() -> None:
        with CheckpointWriter(path, CONFIG) as writer:
            writer.add("w", random_tensor("NF4sUE4M4", seed=2), None, "F32")
            writer.add_raw("r", "U8", (8,), interrupted())

    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    assert files_in(tmp_path) == before
    for function in ("fsync", "link", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, disk_full)
            with pytest.raises(OSError, match="disk full"):
                write_one(path, random_tensor("NF4sUE4M4", seed=2), None)
        assert files_in(tmp_path) == before
    write_one(path, random_tensor("NF4sUE4M4", seed=2), None)
    assert list(tmp_path.iterdir()) == [path]
    assert files_in(tmp_path) != before


def test_data_are_on_disk_before_the_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def seen_replace(source: str, target: Path) -> None:
        calls.append(("replace", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_one(tmp_path / "model", random_tensor("NF4sUE4M4"), None)
    size = (tmp_path / "model").stat().st_size
    assert calls[:2] == [("fsync", size), ("replace", size)]
    assert calls[2][0] == "fsync"  # of the folder


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="unnamed files are Linux's")
def test_a_kill_while_tensors_are_gathered_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_one(path, random_tensor("NF4sUE4M4"), None)
    before = files_in(tmp_path)
    script = textwrap.dedent("""
        import os, signal, sys
        from golden.checkpoint import CheckpointWriter
        with CheckpointWriter(sys.argv[1], {}) as writer:
            writer.add_raw("r", "U8", (1 << 20,), [bytes(1 << 20)])
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, check=False, timeout=60, cwd=DOCUMENT.parent.parent)
    assert done.returncode == -signal.SIGKILL
    assert files_in(tmp_path) == before


def test_an_error_while_adding_adds_nothing(tmp_path: Path) -> None:
    """A caller may go on after a refused tensor."""
    good, bad = random_tensor("E4M3sUE4M4"), random_tensor("E4M3sUE4M4")
    bad.indices[2, 1, 3] = 0x7F
    with CheckpointWriter(tmp_path / "one", CONFIG) as writer:
        with pytest.raises(InputError, match=r"tensor 'w': field 'indices': E4M3 code 0x7f at "):
            writer.add("w", bad, None, "F32")
        with pytest.raises(InputError, match=r"tensor 'r': field 'data': 3 bytes"):
            writer.add_raw("r", "U8", (4,), [b"12", b"3"])
        writer.add("w", good, None, "F32")
        writer.add_raw("r", "U8", (4,), [b"1234"])
    with CheckpointWriter(tmp_path / "two", CONFIG) as writer:
        writer.add("w", good, None, "F32")
        writer.add_raw("r", "U8", (4,), [b"1234"])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


Add = Callable[[CheckpointWriter], None]


def add(name: str, source: str = "F32", corrections: Corrections | None = None) -> Add:
    return lambda writer: writer.add(name, random_tensor("NF4sUE4M4"), corrections, source)


def add_raw(
    name: str, dtype: str = "U8", shape: tuple[int, ...] = (4,), data: bytes = b"1234"
) -> Add:
    return lambda writer: writer.add_raw(name, dtype, shape, [data])


BAD_ADDS: list[tuple[Add, str]] = [
    (add("w"), "'w': name 'w' is taken"),
    (add("r"), "'r': name 'r' is taken"),
    (add("w.indices"), "name 'w.indices' is taken"),
    (add("s"), "'s': name 's.corrections.values' is taken"),
    (add_raw("w"), "name 'w' is taken"),
    (add_raw("r"), "name 'r' is taken"),
    (add_raw("w.luts"), "name 'w.luts' is taken"),
    (add_raw("w.row_scales"), "name 'w.row_scales' is taken"),  # a field that this one has not
    (add_raw(""), "name '' is reserved, empty or over 1024 bytes"),
    (add_raw("__metadata__"), "is reserved"),
    (add_raw("é" * 513), "is reserved, empty or over 1024 bytes"),
    (add("n" * 1010), "over 1024 bytes"),
    (add_raw("\ud800"), "not valid Unicode"),
    (add_raw("x", "Q4_1"), "'x': field 'dtype': 'Q4_1', expected BOOL, "),
    (add_raw("x", shape=(5,)), "field 'data': 4 bytes, U8 .* has 5"),
    (add_raw("x", shape=(3,)), "field 'data': more than 3 bytes, U8 .* has 3"),
    (add_raw("x", shape=(-4,)), "field 'shape'"),
    (add_raw("x", "F4", (7,)), "28 bits of F4 are not whole bytes"),
    (add("x", source="F 32"), "'x': field 'dtype': 'F 32' is not a type name"),
    (add("x", corrections=random_corrections((5, 38), 1)), r"corrections: shape \(5, 38\)"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_ADDS)
def test_what_cannot_be_added_is_named(tmp_path: Path, bad: Add, message: str) -> None:
    path = tmp_path / "model.safetensors"
    with CheckpointWriter(path, CONFIG) as writer:
        add("w")(writer)
        add_raw("r")(writer)
        add_raw("s.corrections.values")(writer)
        add_raw("w.bias")(writer)  # not a field
        with pytest.raises(InputError, match=rf"^{path}: tensor .*{message}"):
            bad(writer)


def lists(depth: int) -> list[Any]:
    return [lists(depth - 1)] if depth else []


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


BAD_CONFIGS: list[tuple[dict[Any, object], str]] = [
    ({"a": math.nan}, "nan is not a finite number"),
    ({"a": [math.inf]}, "inf is not a finite number"),
    ({"a": {1: 2}}, "key 1 is not a string"),
    ({"a": {1, 2}}, "a value of type set is not JSON"),
    ({"a": np.float32(1)}, "a value of type float32 is not JSON"),
    ({"a": 10**20}, "more than 20 digits"),
    (nested(17), "nested more than 16 deep"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_CONFIGS)
def test_configurations_that_are_not_json_are_refused(
    tmp_path: Path, bad: dict[Any, object], message: str
) -> None:
    with pytest.raises(InputError, match=f"config: .*{message}"):
        CheckpointWriter(tmp_path / "m", bad)
    with pytest.raises(InputError, match=f"calibration: .*{message}"):
        CheckpointWriter(tmp_path / "m", CONFIG, bad)


def test_the_deepest_configuration_comes_back(tmp_path: Path) -> None:
    config = {"list": (1, -(10**19) + 1), **nested(16)}
    with CheckpointWriter(tmp_path / "m", config):
        config["later"] = "change"  # does not reach the file
    with Checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.config == {"list": [1, -(10**19) + 1], **nested(16)}
        assert checkpoint.config_hash == config_hash(checkpoint.config)


def test_misuse_of_the_writer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        CheckpointWriter(tmp_path, CONFIG)
    writer = CheckpointWriter(tmp_path / "model", CONFIG)
    with pytest.raises(ValueError, match="inside the `with` block only"):
        add("w")(writer)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ hostile files


def test_endless_data_are_refused(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "model", CONFIG) as writer,
        pytest.raises(InputError, match="field 'data': more than 10 bytes"),
    ):
        writer.add_raw("r", "U8", (10,), repeat(b"123"))


def test_headers_beyond_the_limit_are_neither_written_nor_read(
    valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden.container, "_MAX_HEADER_BYTES", 300)
    with pytest.raises(InputError, match=r"header: length \d{4}, at most 300 allowed"):
        Checkpoint(valid)
    with pytest.raises(InputError, match=r"model: header of \d{3} bytes, at most 300"):
        write_one(tmp_path / "model", random_tensor("NF4sUE4M4"), random_corrections((5, 37), 1))
    monkeypatch.undo()
    monkeypatch.setattr(golden.strict_json, "_MAX_MARKS", 20)
    with pytest.raises(InputError, match="header: JSON of more than 20 commas"):
        Checkpoint(valid)
    with pytest.raises(InputError, match="model: header of more than 20 commas"):
        write_one(tmp_path / "model", random_tensor("NF4sUE4M4"), random_corrections((5, 37), 1))
    assert not list(tmp_path.iterdir())


@dataclass
class File:
    """A checkpoint file taken apart, to be changed and put together again."""

    header: dict[str, Any]
    data: bytes
    metadata: dict[str, Any] = field(default_factory=dict)
    start: int = 0
    metadata_key: str = METADATA_KEY
    metadata_text: str | None = None
    header_text: bytes | None = None
    length: int | None = None

    def build(self) -> bytes:
        if self.header_text is None:
            text = json.dumps(self.metadata) if self.metadata_text is None else self.metadata_text
            if isinstance(self.header.get("__metadata__"), dict):
                self.header["__metadata__"].setdefault(self.metadata_key, text)
            self.header_text = json.dumps(self.header).encode()
        length = len(self.header_text) if self.length is None else self.length
        return length.to_bytes(8, "little") + self.header_text + self.data

    def poke(self, name: str, position: int, value: bytes) -> None:
        """Overwrite bytes of a tensor."""
        first = self.header[name]["data_offsets"][0] + position
        self.data = self.data[:first] + value + self.data[first + len(value) :]

    def remove(self, name: str) -> None:
        """Take a tensor out, bytes included."""
        start, stop = self.header.pop(name)["data_offsets"]
        self.data = self.data[:start] + self.data[stop:]
        for key, entry in self.header.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [k - stop + start for k in entry["data_offsets"]]

    def append(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        """Put a tensor at the end."""
        offsets = [len(self.data), len(self.data) + len(data)]
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self.data += data


def load(path: Path) -> File:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return File(header, data[start:], json.loads(header["__metadata__"][METADATA_KEY]), start)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a``: pair on HIF8 with row scales and corrections; ``b``: atoms; ``n``: raw."""
    path = tmp_path_factory.mktemp("valid") / "valid.safetensors"
    a = random_tensor("DD4-DD4sRS1E2M4", (4, 20), 21, HIF8)
    mask = np.zeros((4, 20), np.bool_)
    mask[[0, 0, 2, 3], [3, 17, 5, 19]] = True
    with CheckpointWriter(path, CONFIG, CALIBRATION) as writer:
        writer.add("a", a, Corrections.from_mask(mask, mask.astype(np.float32)), "BF16")
        writer.add("b", random_tensor("E4M3sBF16", (3, 17), 22), None, "F32")
        writer.add("c", random_tensor("DD5^8sS1E4M4", (1, 3), 23), None, "F32")
        writer.add_raw("n", "F32", (3,), [bytes(12)])
    return path


def read_all(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        for name in checkpoint.names:
            checkpoint.read(name)
        for name in checkpoint.raw_names:
            checkpoint.read_raw(name)


def test_the_file_apart_and_together_again_is_valid(valid: Path, tmp_path: Path) -> None:
    file = load(valid)
    del file.header["__metadata__"][METADATA_KEY]
    (tmp_path / "same").write_bytes(file.build())
    read_all(tmp_path / "same")


def entry(name: str, key: str, value: object) -> Callable[[File], None]:
    """Set a key of a tensor in the header."""
    return lambda file: file.header[name].__setitem__(key, value)


def about(name: str, key: str, value: object) -> Callable[[File], None]:
    """Set a key of a tensor in the metadata; of one that is new, it is a copy of ``a``."""
    return lambda file: (
        file.metadata["tensors"]
        .setdefault(name, {**file.metadata["tensors"]["a"]})
        .__setitem__(key, value)
    )


def source_of(
    tensor: str, index: object = None, count: object = None, *, transposed: bool = False
) -> dict[str, object]:
    """Value of the key ``source``."""
    return {"tensor": tensor, "index": index, "count": count, "transposed": transposed}


def meta(key: str, value: object) -> Callable[[File], None]:
    return lambda file: file.metadata.__setitem__(key, value)


def config(text: str) -> Callable[[File], None]:
    """Another configuration, with its right hash."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return lambda file: file.metadata.update(config=text, config_hash=digest)


def poke(name: str, position: int, *values: int) -> Callable[[File], None]:
    return lambda file: file.poke(name, position, bytes(values))


def remove(name: str) -> Callable[[File], None]:
    return lambda file: file.remove(name)


def append(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[File], None]:
    return lambda file: file.append(name, dtype, shape, data)


def attribute(name: str, value: object) -> Callable[[File], None]:
    return lambda file: setattr(file, name, value)


def both(*changes: Callable[[File], None]) -> Callable[[File], None]:
    def change(file: File) -> None:
        for one in changes:
            one(file)

    return change


def shift(name: str, start: int, stop: int) -> Callable[[File], None]:
    """Move the ends of a tensor's data."""

    def change(file: File) -> None:
        offsets = file.header[name]["data_offsets"]
        file.header[name]["data_offsets"] = [offsets[0] + start, offsets[1] + stop]

    return change


def swap_pokes(file: File) -> None:
    """Exchange the first two entries of the second LUT of ``a``."""
    start = file.header["a.luts"]["data_offsets"][0] + 16
    file.poke("a.luts", 16, file.data[start + 1 : start + 2] + file.data[start : start + 1])


def raw_metadata(text: Callable[[str], str]) -> Callable[[File], None]:
    """Replace the JSON text of the metadata."""
    return lambda file: setattr(file, "metadata_text", text(json.dumps(file.metadata)))


def raw_header(text: bytes) -> Callable[[File], None]:
    return attribute("header_text", text)


DEEP = 200_000
INDICES, INDPTR, COLUMNS = "a.indices", "a.corrections.indptr", "a.corrections.columns"
HOSTILE: dict[str, tuple[Callable[[File], None], str]] = {
    # the container
    "length 2^63": (attribute("length", 1 << 63), "header: length 9223372036854775808, at most"),
    "length 2^64-1": (attribute("length", (1 << 64) - 1), "header: length 18446744073709551615"),
    "length one too long": (attribute("length", 1 << 20), "header: length 1048576"),
    "length 0": (attribute("length", 0), "header: must be a JSON object"),
    "length too short": (attribute("length", 100), "header: must be a JSON object"),
    "not UTF-8": (raw_header(b'{"\xff":1}'), "header: not UTF-8: .* at byte 10"),
    "BOM": (raw_header(b"\xef\xbb\xbf{}"), "header: must be a JSON object"),
    "list": (raw_header(b"[]"), "header: must be a JSON object"),
    "leading space": (raw_header(b" {}"), "header: must be a JSON object"),
    "padded with newlines": (raw_header(b"{}\n"), "header: must be a JSON object"),
    "two objects": (raw_header(b"{}{}"), "header: not JSON: Extra data"),
    "broken JSON": (raw_header(b'{"a":}'), "header: not JSON: Expecting value"),
    "deep lists": (raw_header(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"), "nested too deep"),
    "deep objects": (raw_header(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "nested too deep"),
    "lists almost too deep": (raw_header(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "must be an object|too d"),
    "lists in a tensor": (lambda file: file.header.update(n=lists(300)), "'n': must be an object"),
    "many values": (raw_header(b'{"a":[' + b"1," * 4_000_000 + b"1]}"), "JSON of more than"),
    "duplicate tensor": (raw_header(b'{"a":1,"a":1}'), "header: duplicate key 'a'"),
    "duplicate dtype": (raw_header(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "duplicate key 'dtype'"),
    "huge integer": (raw_header(b'{"a":' + b"9" * 1_000_000 + b"}"), "more than 20 digits"),
    "NaN": (raw_header(b'{"a":NaN}'), "header: NaN is not JSON"),
    "no metadata": (lambda file: file.header.pop("__metadata__"), "__metadata__: no key"),
    "metadata of numbers": (lambda file: file.header.update(__metadata__={"a": 1}), "of strings"),
    "metadata list": (lambda file: file.header.update(__metadata__=[]), "of strings"),
    "another program's": (
        attribute("metadata_key", "other_program"),
        "this is a safetensors file, but no checkpoint",
    ),
    "entry not an object": (lambda file: file.header.update(n=3), "tensor 'n': must be an object"),
    "entry without dtype": (lambda file: file.header["n"].pop("dtype"), "key 'dtype' is missing"),
    "entry with more": (entry("n", "more", 1), "tensor 'n': unknown key 'more'"),
    "empty name": (append("", "U8", [0], b""), "tensor '': name '' is reserved, empty"),
    "long name": (append("x" * 1025, "U8", [0], b""), "over 1024 bytes"),
    "line in a name": (append("a\nb", "U8", [0], b""), "a control character or line separator"),
    "line separator": (append("a\u2028b", "U8", [0], b""), "a control character or line separ"),
    "surrogate name": (append("\ud800", "U8", [0], b""), "not valid Unicode"),
    "dtype number": (entry("n", "dtype", 32), "tensor 'n': field 'dtype': 32 is not a string"),
    "dtype unknown": (entry("n", "dtype", "F31"), "tensor 'n': field 'dtype': 'F31', expected"),
    "shape number": (entry("n", "shape", 3), "tensor 'n': field 'shape': must be a list"),
    "shape bool": (entry("n", "shape", [True]), "field 'shape': must be a list"),
    "shape float": (entry("n", "shape", [3.0]), "field 'shape': must be a list"),
    "shape negative": (entry("n", "shape", [-3]), "field 'shape': must be a list"),
    "shape 2^63": (entry("n", "shape", [1 << 63]), "field 'shape': .* is no shape"),
    "shape that wraps to 3": (
        entry("n", "shape", [1 << 62, 16, 3]), "data_offsets': 12 bytes, F32 .* has"
    ),
    "shape of rank 33": (entry("n", "shape", [1] * 33), "field 'shape': .* is no shape"),
    "shape of rank 100000": (entry("n", "shape", [1 << 62] * 100_000), "field 'shape': .* is no"),
    "offsets past the end": (shift("b.indices", 1 << 40, 1 << 40), "is no part of"),
    "offsets 2^63": (entry("n", "data_offsets", [0, 1 << 63]), "is no part of"),
    "offsets backward": (entry("n", "data_offsets", [12, 0]), "is no part of"),
    "offsets negative": (entry("n", "data_offsets", [-12, 0]), "must be a list of integers"),
    "three offsets": (entry("n", "data_offsets", [0, 12, 24]), "is no part of"),
    "overlap": (shift("n", -4, -4), "field 'data_offsets': starts at"),
    "the same bytes twice": (
        lambda file: file.header.update(x=file.header["n"]), "'data_offsets': starts at"
    ),
    "hole": (
        lambda file: file.header.pop("a.luts"), "field 'data_offsets': starts at .* ends at"
    ),
    "hole at the end": (attribute("data", b""), "is no part of 0 bytes"),
    "length and shape differ": (entry("n", "shape", [2]), "12 bytes, F32 .* has 8"),
    # the metadata
    "metadata not JSON": (raw_metadata(lambda text: text[:-1]), "metadata .*: not JSON"),
    "metadata a list": (raw_metadata(lambda text: "[1]"), "metadata .*: must be an object"),
    "metadata deep": (raw_metadata(lambda text: "[" * DEEP), "metadata .*: JSON is nested too"),
    "metadata duplicate key": (
        raw_metadata(lambda text: '{"version": 2, ' + text[1:]), "duplicate key 'version'"
    ),
    "tensor twice": (
        raw_metadata(lambda text: text.replace('"c":', '"a":')), "metadata .*: duplicate key 'a'"
    ),
    "version 1": (meta("version", 1), "version 1, .* reads version 2; .* quantize .* again"),
    "version 3": (meta("version", 3), "version 3, this program reads version 2"),
    "version 1.0": (meta("version", 1.0), "version 1.0, this program"),
    "version true": (meta("version", True), "version True"),
    "no version": (lambda file: file.metadata.pop("version"), "version None"),
    "unknown key": (meta("more", 1), "metadata .*: unknown key 'more'"),
    "missing key": (lambda file: file.metadata.pop("calibration"), "'calibration' is missing"),
    "config hash": (meta("config_hash", "0" * 64), "config_hash: '0000.* config has"),
    "config changed": (meta("config", "{}"), "config_hash: .* config has '44136fa3"),
    "config an object": (meta("config", {}), "config: must be a string, not {}"),
    "config surrogate": (meta("config", "\ud800"), "config: is not valid Unicode"),
    "config no JSON": (config("{"), "config: not JSON"),
    "config twice": (config('{"a":1,"a":2}'), "config: duplicate key 'a'"),
    "config a list": (config("[]"), "config: must be an object"),
    "config infinite": (config('{"a":1e999}'), "config: inf is not a finite"),
    "config deep": (config(json.dumps(nested(17))), "config: nested more than 16 deep"),
    "calibration a list": (meta("calibration", []), "calibration: must be an object"),
    "tensors a list": (meta("tensors", []), "tensors: must be an object"),
    "tensor not an object": (lambda file: file.metadata["tensors"].update(a=1), "'a': must be an"),
    "tensor with more": (about("a", "bits", 4), "tensor 'a': unknown key 'bits'"),
    "format unknown": (about("a", "format", "NF5sUE4M4"), "'a': field 'format': .*unknown element"),
    "format number": (about("a", "format", 4), "field 'format': 4 is not the name"),
    "format long": (about("a", "format", "NF4-" * 99), "field 'format': .* is not the name"),
    "format spelled otherwise": (
        about("b", "format", "E4M3^16sBF16"), "'b': field 'format': .* must be spelled 'E4M3sBF16'"
    ),
    "hif unknown": (about("a", "hif", "HIF9"), "tensor 'a': field 'hif': 'HIF9', expected HIF7"),
    "hif a list": (about("a", "hif", []), "tensor 'a': field 'hif': "),
    "rank 3": (about("a", "shape", [4, 20, 1]), "'a': field 'shape': must have two dimensions"),
    "no rows": (about("a", "shape", [0, 20]), "'a': field 'shape': must be a list of integers"),
    "shape huge": (about("a", "shape", [1 << 62, 1 << 62]), "field 'indices': U8 .*, expected U8"),
    "shape transposed": (about("a", "shape", [20, 4]), "tensor 'a': field 'indices': "),
    "rows changed": (about("b", "shape", [4, 17]), "tensor 'b': field 'indices': "),
    "exponent 128": (about("a", "layer_exponent", 128), "field 'layer_exponent': 128 is not in"),
    "exponent float": (about("a", "layer_exponent", 0.5), "field 'layer_exponent': 0.5 is not"),
    "source missing": (
        lambda file: file.metadata["tensors"]["a"].pop("source"), "'a': key 'source' is missing"
    ),
    "source a list": (about("a", "source", []), "tensor 'a': field 'source': must be an object"),
    "source of another name": (
        about("a", "source", source_of("b", transposed=True)), "'source': 'b', expected the name"
    ),
    "source that says nothing": (about("a", "source", source_of("a")), "'source': must be null"),
    "source without count": (
        about("a[0]", "source", source_of("a", 0, None)), "'index' and 'count' must both be"
    ),
    "source index true": (
        about("a[0]", "source", source_of("a", True, 2)), "'index' must be a number or null"
    ),
    "source index past the end": (
        about("a[0]", "source", source_of("a", 0, 0)), "'source': index 0 is not below 0"
    ),
    "source transposed 1": (
        about("a", "source", source_of("a") | {"transposed": 1}), "'transposed' must be true or"
    ),
    "source with more": (
        about("a", "source", source_of("a") | {"x": 1}), "field 'source': unknown key 'x'"
    ),
    "source tensor a number": (
        about("a", "source", source_of("a") | {"tensor": 1}), "'tensor' must be a string, not 1"
    ),
    "source tensor long": (
        about("a", "source", source_of("x" * 2000)), "field 'source': name .* over 1024 bytes"
    ),
    "source dtype": (about("a", "dtype", "F\n32"), "field 'dtype': .* is not a type name"),
    # the fields of a tensor
    "indices missing": (remove(INDICES), "tensor 'a': field 'indices': is missing"),
    "luts missing": (remove("a.luts"), "tensor 'a': field 'luts': is missing"),
    "row scales missing": (remove("a.row_scales"), "tensor 'a': field 'row_scales': is missing"),
    "indptr missing": (remove(INDPTR), "tensor 'a': field 'corrections.indptr': is missing"),
    "values missing": (remove("a.corrections.values"), "field 'corrections.values': is missing"),
    "luts of atoms": (append("b.luts", "U8", [0], b""), "'b': field 'luts': .* no such field"),
    "row scales of others": (append("b.row_scales", "BF16", [3], bytes(6)), "no such field"),
    "stored twice": (append("a", "U8", [0], b""), "'a': name 'a' is stored quantized and"),
    "name is a field": (
        lambda file: file.metadata["tensors"].update({INDICES: file.metadata["tensors"]["a"]}),
        "tensor 'a.indices': name 'a.indices' is also of another",
    ),
    "indices short": (
        both(remove(INDICES), append(INDICES, "U8", [63], bytes(63))), r"U8 \[63\], expected U8"
    ),
    "indices 2-D": (entry(INDICES, "shape", [4, 16]), r"U8 \[4, 16\], expected U8 \[64\]"),
    "indices signed": (entry(INDICES, "dtype", "I8"), r"field 'indices': I8 \[64\], expected U8"),
    "one LUT": (both(remove("a.luts"), append("a.luts", "U8", [1, 16], bytes(16))),
                r"field 'luts': U8 \[1, 16\], expected U8 \[2, 16\]"),
    "row scales as F16": (entry("a.row_scales", "dtype", "F16"), "F16 .*, expected BF16"),
    "columns as I16": (entry(COLUMNS, "dtype", "I16"), r"field 'corrections.columns': I16 \[4\]"),
    "one column less": (
        both(remove(COLUMNS), append(COLUMNS, "U16", [3], bytes(6))), r"U16 \[3\], expected"
    ),
    # codes
    "LUT entry reserved": (poke("a.luts", 16 + 3, 0xE1), r"field 'luts\[1\]': HIF8 code 0xe1 .*3"),
    "LUT entry not canonical": (poke("a.luts", 15, 0x42), r"luts\[0\]': LUT entry 15: .*0x42 is n"),
    "LUT not sorted": (swap_pokes, r"'a': field 'luts\[1\]': LUT entries must ascend strictly"),
    "LUT entry wide": (poke("c.luts", 0, 0x90), r"field 'luts\[0\]': LUT entries must be 7-bit"),
    "atom NaN": (poke("b.indices", 33, 0xFF), r"'b': field 'indices': E4M3 code 0xff at \(1, 0, 1"),
    "scale NaN": (poke("b.scales", 2, 0x80, 0x7F), "tensor 'b': field 'scales': BF16 code 0x7f80"),
    "row scale infinite": (poke("a.row_scales", 2, 0x80, 0x7F), "'row_scales': BF16 .* 0x7f80 at"),
    "bits after the last": (poke("c.scales", 1, 0xFF), "'c': field 'scales': plane has bits set"),
    # corrections
    "value NaN": (poke("a.corrections.values", 2, 0xC0, 0x7F), "'corrections.values': entry 1"),
    "column twice": (poke(COLUMNS, 2, 3, 0), r"'corrections.columns': entry 1 .* follows column 3"),
    "columns descend": (poke(COLUMNS, 2, 0, 0), "columns': entry 1 .* follows column 3"),
    "column past the end": (poke(COLUMNS, 6, 20, 0), "entry 3 .*, column 20. is not in range"),
    "indptr from 1": (poke(INDPTR, 0, 1), "field 'corrections.indptr': starts at 1"),
    "indptr descends": (poke(INDPTR, 4, 5), "corrections.indptr': entry 2 is 2, less than 5"),
    "indptr ends early": (poke(INDPTR, 16, 3), "corrections.indptr': ends at 3, but there are 4"),
    "indptr 2^32-1": (poke(INDPTR, 16, 255, 255, 255, 255), "indptr': ends at 4294967295"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(valid: Path, tmp_path: Path, case: str) -> None:
    change, message = HOSTILE[case]
    file = load(valid)
    del file.header["__metadata__"][METADATA_KEY]
    change(file)
    path = tmp_path / "model.safetensors"
    path.write_bytes(file.build())
    start = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        read_all(path)
    assert time.perf_counter() - start < 1
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 1000 + len(str(path))


def test_every_truncation_and_extension_is_refused(valid: Path, tmp_path: Path) -> None:
    data = valid.read_bytes()
    path = tmp_path / "model.safetensors"
    file = load(valid)
    borders = {7, 8, file.start, len(data) - 1}
    for name, value in file.header.items():
        if name != "__metadata__":
            borders.add(file.start + value["data_offsets"][0])
    for length in sorted(borders.union(range(0, len(data), 9))):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=rf"^{path}: "):
            Checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match=rf"^{path}: header: tensors cover"):
        Checkpoint(path)


SLICES = [("t", (5, 37)), ("u", (3, 16))]


def write_slices(path: Path) -> dict[str, QuantizedTensor]:
    """Two stacked tensors of two slices each, the second transposed, beside a transposed matrix."""
    added = {}
    with CheckpointWriter(path, CONFIG) as writer:
        for tensor, shape in SLICES:
            for index in range(2):
                name = f"{tensor}[{index}]"
                added[name] = random_tensor("NF4sUE4M4", shape, index)
                source = SourceInfo(tensor, index, 2, tensor == "u")
                writer.add(name, added[name], None, "BF16", source)
        added["v"] = random_tensor("NF4sUE4M4", (4, 16), 7)
        writer.add("v", added["v"], None, "BF16", SourceInfo("v", None, None, True))
    return added


def test_slices_of_stacked_tensors_come_back(tmp_path: Path) -> None:
    added = write_slices(tmp_path / "model")
    with Checkpoint(tmp_path / "model") as checkpoint:
        for name, tensor in added.items():
            assert_same(checkpoint.read(name), tensor, None)
        assert checkpoint.model_tensors == {
            "t": ("t[0]", "t[1]"), "u": ("u[0]", "u[1]"), "v": ("v",)
        }  # fmt: skip
        shapes = []
        for names in checkpoint.model_tensors.values():
            info = checkpoint.info(names[0])
            assert info.source is not None
            shapes.append(info.source.model_shape(info.shape))
        assert shapes == [(2, 5, 37), (2, 16, 3), (16, 4)]


def change_source(name: str, **values: object) -> Callable[[File], None]:
    return lambda file: file.metadata["tensors"][name]["source"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.metadata["tensors"].pop("t[1]"), r"'t\[0\]': .* 1 of 2 slices of 't'"),
        (change_source("t[0]", count=3), r"'t\[1\]': .* count, shape and .* those of 't\[0\]'"),
        (change_source("u[1]", transposed=False), r"'u\[1\]': .* 'transposed' must be those"),
        (append("t", "U8", [0], b""), "tensor 't': is stored in slices and as a whole"),
        (change_source("t[1]", index=0), r"'t\[1\]': .*'t\[0\]', expected the name"),
    ],
)
def test_stacks_that_do_not_fit_together_are_refused(
    tmp_path: Path, change: Callable[[File], None], message: str
) -> None:
    path = tmp_path / "model"
    write_slices(path)
    file = load(path)
    del file.header["__metadata__"][METADATA_KEY]
    change(file)
    path.write_bytes(file.build())
    with pytest.raises(InputError, match=message):
        Checkpoint(path)


def test_a_stack_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    message = r"model: tensor 't\[0\]': field 'source': 1 of 2 slices of 't' are here"
    tensor = random_tensor("NF4sUE4M4", (5, 37), 1)
    with pytest.raises(InputError, match=message), CheckpointWriter(path, CONFIG) as writer:
        writer.add("t[0]", tensor, None, "BF16", SourceInfo("t", 0, 2, False))
    assert not list(tmp_path.iterdir())
    with CheckpointWriter(path, CONFIG) as writer, pytest.raises(InputError, match="'t', expected"):
        writer.add("x", tensor, None, "BF16", SourceInfo("t", None, None, True))


def refusal(path: Path) -> str | None:
    """The error that reading everything ends with, if it does."""
    try:
        read_all(path)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", [24])
def test_changed_bytes_are_refused_or_read_but_never_crash(
    valid: Path, tmp_path: Path, seed: int
) -> None:
    data = valid.read_bytes()
    rng = np.random.default_rng(seed)
    path = tmp_path / "model.safetensors"
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        path.write_bytes(changed)
        message = refusal(path)
        refused += message is not None
        assert message is None or message.startswith(f"{path}: ")
    assert refused > 200


def test_reading_one_tensor_does_not_touch_another(valid: Path, tmp_path: Path) -> None:
    file = load(valid)
    del file.header["__metadata__"][METADATA_KEY]
    file.poke("a.luts", 19, b"\xe1")
    (tmp_path / "model").write_bytes(file.build())
    with Checkpoint(tmp_path / "model") as broken, Checkpoint(valid) as whole:
        stored = whole.read("b")
        assert_same(broken.read("b"), stored.tensor, stored.corrections)
        with pytest.raises(InputError, match="tensor 'a': field 'luts"):
            broken.read("a")


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path: Path) -> None:
    path, size = tmp_path / "model", 1 << 17  # beyond what a buffered file has read already
    with CheckpointWriter(path, CONFIG) as writer:
        writer.add_raw("r", "I16", (size // 2,), [bytes(size)])
        writer.add("w", random_tensor("NF4sUE4M4"), None, "F32")
    with Checkpoint(path) as checkpoint:
        os.truncate(path, size // 2)
        with pytest.raises(InputError, match=r"tensor 'w': field '\w+': the file ends after 0 of"):
            checkpoint.read("w")
        with pytest.raises(
            InputError, match=r"tensor 'r': the file ends after \d+ of 131072 bytes"
        ):
            checkpoint.read_raw("r")
        with pytest.raises(InputError, match="tensor 'r': the file ends at byte 65536, before"):
            list(checkpoint.raw_chunks("r"))


def test_names_and_paths_that_do_not_exist(valid: Path, tmp_path: Path) -> None:
    with Checkpoint(valid) as checkpoint:
        quantized: list[Callable[[str], object]] = [checkpoint.read, checkpoint.info]
        raw: list[Callable[[str], object]] = [checkpoint.read_raw, checkpoint.raw_info]
        for call in quantized:
            with pytest.raises(InputError, match=rf"{valid}: tensor 'n': no such quantized tensor"):
                call("n")
        for call in [*raw, checkpoint.bits]:
            with pytest.raises(InputError, match=r"tensor 'a.luts': no such raw tensor"):
                call("a.luts")
    with pytest.raises(InputError, match="no such file"):
        Checkpoint(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="not a regular file"):
            Checkpoint(path)


def test_the_tests_know_every_hif_format() -> None:
    assert set(HIF_FORMATS.values()) == {HIF7, HIF8, HIF8T}
