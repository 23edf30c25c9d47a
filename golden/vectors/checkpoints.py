"""Vectors of whole files: checkpoints with their decoded values, and broken ones with verdicts.

Good files come from the writer (:mod:`golden.checkpoint`), broken ones are made from one of them
(:mod:`golden.vectors.broken_checkpoints`). docs/vectors.md describes all for those who read them.
"""

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import METADATA_KEY, Checkpoint, CheckpointWriter, SourceInfo, reconstruct
from golden.corrections import Corrections, column_dtype
from golden.formats import HIF7, HIF8
from golden.notation import QuantFormat, parse_format
from golden.tensor import QuantizedTensor
from golden.vectors.broken_checkpoints import BROKEN, break_checkpoint, verdict_on
from golden.vectors.checkpoint_parts import CheckpointParts
from golden.vectors.decoding import moderate_bfloat16, vector_tensor
from golden.vectors.files import (
    VectorFile,
    VectorJob,
    VectorStream,
    float32_bits,
    hex_strings,
    json_text,
)
from golden.vectors.layers import file_stem

__all__ = ["checkpoint_jobs", "whole_checkpoint"]

_FOLDER = "checkpoints"
_MAX_LISTED = 4096  # decoded values of larger tensors are given by their checksum only

# Every kind of value that JSON has, a string that needs escapes, and numbers that languages print
# in different ways: the hash is that of the text as stored.
_CONFIG: dict[str, Any] = {
    "note": 'größer, "quoted"\\',
    "budget": 4.75,
    "small": 1e-07,
    "large": 1e22,
    "list": [1, None, True, {"nested": []}],
}


def _written(add: Callable[[CheckpointWriter], None]) -> bytes:
    """Bytes of the checkpoint that the writer makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        with CheckpointWriter(path, _CONFIG, {"tokens": 4096}) as writer:
            add(writer)
        return path.read_bytes()


def _corrections(shape: tuple[int, int], seed: str, every: int) -> Corrections:
    """About one correction in so many weights; the first row of several has none."""
    stream = VectorStream(f"checkpoint/{seed}/corrections")
    mask = (stream.words(shape[0] * shape[1]) % every == 0).reshape(shape)
    mask[0] &= shape[0] == 1
    entries: NDArray[np.intp] = np.flatnonzero(mask)
    indptr = np.zeros(shape[0] + 1, dtype=np.int64)
    np.cumsum(mask.sum(axis=1), out=indptr[1:])
    columns: NDArray[np.unsignedinteger] = (entries % shape[1]).astype(column_dtype(shape[1]))
    return Corrections(shape, indptr, columns, stream.codes(len(entries), moderate_bfloat16()))


def _tensor(fmt: QuantFormat, shape: tuple[int, int], seed: str) -> QuantizedTensor:
    return vector_tensor(fmt, shape, fmt.block_shape(*shape), f"checkpoint/{seed}")


# ---------------------------------------------------------------------------- good checkpoints

_RAW: tuple[tuple[str, str, tuple[int, ...], bytes], ...] = (
    ("model.norm.weight", "F32", (3,), struct.pack("<3f", 1.0, -0.0, 1e-40)),
    ("emb.weight", "BF16", (2, 2), bytes.fromhex("803f0040c07f80ff")),
    ("scalar", "F64", (), struct.pack("<d", 0.1)),
    ("leer", "F16", (0, 7), b""),
    ("flags", "BOOL", (2,), b"\x01\x00"),
    ("ids", "I64", (2,), struct.pack("<2q", -1, 1 << 40)),
    ("nibbles", "F4", (3, 2), b"\x21\x43\x65"),
    ("schicht.0.größe", "U8", (1,), b"\xff"),
)
"""Tensors stored as they came: name, type, shape, bytes."""


_SUMS: dict[tuple[int, int], int] = {
    (0, 0): 0x3380,  # 1 + 2^-24, a tie: down to 1
    (0, 1): 0x3440,  # 1 + 3 x 2^-24, a tie: up to 1 + 2^-22
    (0, 2): 0x3381,  # right above a tie
    (0, 3): 0xBF80,  # 1 - 1 is +0
    (0, 4): 0x8000,  # 1 - 0
    (0, 5): 0xB440,  # -1 - 3 x 2^-24, a tie: down to -1 - 2^-22
    (0, 6): 0x8000,  # +0 - 0 is +0
    (1, 0): 0x8040,  # 2^-126 - 2^-127 is subnormal, and kept
    (1, 1): 0x8080,  # 2^-126 - 2^-126 is +0
}
"""Corrections on which sums go wrong, as bfloat16 by row and column."""


def _sums() -> tuple[QuantizedTensor, Corrections]:
    """Ones under the scales 1 and 2^-126, and what is added to them."""
    one, minus, zero = 0x38, 0xB8, 0x00  # E4M3
    indices = np.full((2, 1, 16), one, dtype=np.uint8)
    indices[0, 0, 5:7] = minus, zero
    words = np.array([[0x3F80], [0x0080]], dtype=np.uint16)
    tensor = QuantizedTensor(parse_format("E4M3sBF16"), (2, 16), indices, words, (), 0)
    rows, columns = zip(*_SUMS, strict=True)
    indptr = np.searchsorted(rows, [0, 1, 2]).astype(np.int64)
    values = np.array(list(_SUMS.values()), dtype=np.uint16)
    return tensor, Corrections((2, 16), indptr, np.array(columns, dtype=np.uint16), values)


def _add_mixed(writer: CheckpointWriter, formats: Sequence[QuantFormat]) -> None:
    """One tensor of every format, some with corrections, hard sums, tensors of other types."""
    writer.add("sums", *_sums(), "F32")
    # A stack of two transposed matrices, and a transposed one.
    stack, shape = parse_format("BOF4-NF4sUE4M3"), (2, 19)
    for index in range(2):
        name = f"experts.gewölbe[{index}]"
        source = SourceInfo("experts.gewölbe", index, 2, True)
        writer.add(name, _tensor(stack, shape, f"stack/{index}"), None, "F32", source)
    source = SourceInfo("transposed", None, None, True)
    writer.add("transposed", _tensor(stack, shape, "transposed"), None, "F32", source)
    for position, fmt in enumerate(formats):
        shape = (2, 13) if fmt.block_size == 0 else (2, fmt.block_size + 3)
        # Empty corrections too, and names beyond ASCII and beyond 16 bits.
        name = ("blk.{}.q", "層.{}.重み", "blk.{}.\U0001f9ee")[position % 3].format(position)
        every = (0, 5, 1 << 40)[position % 3]
        seed = f"{fmt.name}/{fmt.hif.name}"
        sparse = _corrections(shape, seed, every) if every else None
        writer.add(name, _tensor(fmt, shape, seed), sparse, "BF16")
    for name, dtype, raw_shape, data in _RAW:
        writer.add_raw(name, dtype, raw_shape, [data])


def _add_wide(writer: CheckpointWriter) -> None:
    """65536 columns, the most whose corrections have 16-bit columns, and one more."""
    for columns in (1 << 16, (1 << 16) + 1):
        seed = f"wide/{columns}"
        sparse = _corrections((1, columns), seed, 8192)
        tensor = _tensor(parse_format("NF4^64sUE4M4"), (1, columns), seed)
        writer.add(f"columns.{columns}", tensor, sparse, "F32")


def _add_whole(writer: CheckpointWriter) -> None:
    """Tensors from which the broken files are made.

    ``a`` has everything: a pair of HIF8 LUTs, row scales, corrections; ``b`` numbers and bfloat16
    scales, with 15 elements of padding in each row; ``c`` planes that do not end on whole bytes;
    ``n`` came as it is.
    """
    a = _tensor(parse_format("NF4-DD4sRS1E2M4", HIF8), (2, 20), "a")
    columns = np.array([3, 7, 19], dtype=np.uint16)
    sparse = Corrections((2, 20), np.array([0, 2, 3]), columns, np.full(3, 0x3E20, np.uint16))
    writer.add("a", a, sparse, "BF16")
    writer.add("b", _tensor(parse_format("E4M3sBF16"), (2, 17), "b"), None, "F32")
    writer.add("c", _tensor(parse_format("DD5-DD5^8sS1E4M3", HIF7), (1, 20), "c"), None, "F16")
    writer.add("d", _tensor(parse_format("INT8^0sUE8M0"), (2, 5), "d"), None, "F16")
    writer.add_raw("n", "F32", (3,), [struct.pack("<3f", 1.0, 2.0, 3.0)])


@lru_cache(maxsize=1)
def whole_checkpoint() -> bytes:
    """File from which the broken ones are made."""
    return _written(_add_whole)


def _foreign() -> bytes:
    """What another program may write: nothing in it is as our writer does it, all is allowed."""
    file = CheckpointParts(whole_checkpoint())
    config = '{ "z" : 1E2, "a": [0.10, -0],\n"ä": "\\u00e4\U0001f9ee" }'
    digest = hashlib.sha256(config.encode()).hexdigest()
    file.metadata.update(config=config, config_hash=digest, calibration=None)
    tensors = dict(reversed(file.header.items()))
    tensors["__metadata__"] = {
        "other": "not ours",
        METADATA_KEY: json.dumps(file.metadata, indent=1, ensure_ascii=False),
    }
    header = json.dumps(tensors, indent=1, ensure_ascii=False).encode()
    header += b" " * (1 + -len(header) % 8)  # never a multiple of 8
    return len(header).to_bytes(8, "little") + header + bytes(file.data)


def _expected(name: str, data: bytes) -> dict[str, Any]:
    """What a good checkpoint holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        path.write_bytes(data)
        with Checkpoint(path) as checkpoint:
            quantized = {}
            for tensor in checkpoint.names:
                weights = reconstruct(checkpoint.read(tensor))
                bits = float32_bits(weights).astype("<u4")
                listed = hex_strings(bits, 32) if bits.size <= _MAX_LISTED else None
                digest = hashlib.sha256(bits.tobytes()).hexdigest()
                quantized[tensor] = {
                    "shape": list(weights.shape),
                    "sha256": digest,
                    "float32": listed,
                }
            raw = {}
            for tensor in checkpoint.raw_names:
                info = checkpoint.raw_info(tensor)
                content = b"".join(checkpoint.raw_chunks(tensor)).hex()
                raw[tensor] = {"dtype": info.dtype, "shape": list(info.shape), "data": content}
    return {"file": name, "quantized": quantized, "raw": raw}


# ---------------------------------------------------------------------------------------- jobs


def _json(cases: list[dict[str, Any]]) -> VectorFile:
    return VectorFile(json_text({"cases": cases}), len(cases))


def _binary(name: str, build: Callable[[], bytes]) -> VectorJob:
    return VectorJob(_FOLDER, name, lambda: VectorFile(build(), 1))


def checkpoint_jobs(formats: Sequence[QuantFormat], *, whole: bool) -> list[VectorJob]:
    """Checkpoints of a set.

    Parameters
    ----------
    formats : sequence of QuantFormat
        Of the checkpoint that mixes everything.
    whole : bool
        Also one of wide matrices, one that another program could have written, the one from which
        the broken ones are made, and the broken ones.
    """
    unique = list({file_stem(fmt): fmt for fmt in formats}.values())
    good: dict[str, Callable[[], bytes]] = {
        "mixed": lambda: _written(lambda writer: _add_mixed(writer, unique))
    }
    if whole:
        good |= {
            "wide": lambda: _written(_add_wide),
            "whole": whole_checkpoint,
            "foreign": _foreign,
        }

    def expected() -> VectorFile:
        return _json([_expected(f"{name}.safetensors", build()) for name, build in good.items()])

    jobs = [_binary(f"{name}.safetensors", build) for name, build in good.items()]
    jobs.append(VectorJob(_FOLDER, "expected.json", expected))
    return jobs + (list(_broken_jobs()) if whole else [])


def _broken(name: str) -> bytes:
    return break_checkpoint(name, whole_checkpoint())


def _broken_jobs() -> Iterator[VectorJob]:
    for name in BROKEN:
        yield _binary(f"broken_{name}.safetensors", partial(_broken, name))
    yield VectorJob(_FOLDER, "verdicts.json", lambda: _json([verdict_on(name) for name in BROKEN]))
