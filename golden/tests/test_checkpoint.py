"""The checkpoint file: round trips, an independent reader, the official package, memory."""

import hashlib
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from golden.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    reconstruct,
)
from golden.codebooks import Lut, fixed_lut
from golden.convert import encode_array
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import HIF7, HIF8, HIF8T, HIF_FORMATS, HifFormat
from golden.notation import parse_format
from golden.tensor import QuantizedTensor, decode
from golden.tests.checkpoint_files import (
    CALIBRATION,
    CONFIG,
    DOCUMENT,
    assert_same,
    load,
    random_corrections,
    random_tensor,
    write_one,
)

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


def test_the_tests_know_every_hif_format() -> None:
    assert set(HIF_FORMATS.values()) == {HIF7, HIF8, HIF8T}
