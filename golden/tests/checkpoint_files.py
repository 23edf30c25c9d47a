"""Checkpoint files for tests: of any codes, taken apart, changed and put together again."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import golden
from golden.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    CheckpointWriter,
    StoredTensor,
)
from golden.codebooks import Lut
from golden.convert import code_dtype, encode_array
from golden.corrections import Corrections
from golden.formats import BF16, HIF7, HIF8, HifFormat, Kind, NumberFormat
from golden.notation import QuantFormat, parse_format
from golden.tensor import QuantizedTensor

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


def lists(depth: int) -> list[Any]:
    return [lists(depth - 1)] if depth else []


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


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


def write_valid(path: Path) -> None:
    """``a``: pair on HIF8 with row scales and corrections; ``b``: atoms; ``n``: raw."""
    a = random_tensor("DD4-DD4sRS1E2M4", (4, 20), 21, HIF8)
    mask = np.zeros((4, 20), np.bool_)
    mask[[0, 0, 2, 3], [3, 17, 5, 19]] = True
    with CheckpointWriter(path, CONFIG, CALIBRATION) as writer:
        writer.add("a", a, Corrections.from_mask(mask, mask.astype(np.float32)), "BF16")
        writer.add("b", random_tensor("E4M3sBF16", (3, 17), 22), None, "F32")
        writer.add("c", random_tensor("DD5^8sS1E4M4", (1, 3), 23), None, "F32")
        writer.add_raw("n", "F32", (3,), [bytes(12)])


def read_all(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        for name in checkpoint.names:
            checkpoint.read(name)
        for name in checkpoint.raw_names:
            checkpoint.read_raw(name)


# ---------------------------------------------------------------------------------------- changes


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
