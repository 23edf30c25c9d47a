"""The second implementation and golden on format names and on damaged files, at random."""

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from golden.checkpoint import METADATA_KEY, Checkpoint, reconstruct
from golden.errors import InputError
from golden.notation import parse_format
from tests.support.second_implementation import SOURCE, load, some_vectors

# ------------------------------------------------------------------------------------ format names

ELEMENTS = (
    "E2M3", "INT8", "HIF8T", "NF4", "NF4T", "Split87T", "DD4", "DD5", "DD6", "s", "siss", "NF4-DD4",
    "NF4-NF4T", "DD5-DD5", "DD5-DD6", "DD4-s", "ss-sss", "NF4-NF4", "s-s", "E2M3-NF4",
    "DD4-DD4-DD4", "HIF9", "NF5", "Siss", "a" * 24, "a" * 25, "ä", "INT4T", "DD4T", "1s", "",
)  # fmt: skip
BLOCKS = ("", "^0", "^8", "^16", "^32", "^64", "^08", "^128", "^", "8")
SCALES = (
    "UE4M4", "S1E5M5", "S1E7M7", "BF16", "UE8M0", "UE2M0", "RUE4M4", "RS1E2M4", "RBF16", "E4M4",
    "UE8M1", "UE1M4", "UE4M8", "S1E8M0", "SE4M4", "UE4M", "uE4M4", "R", "UE4M4 ", "UE4M4s",
    "RRUE4M4",
)  # fmt: skip


def test_both_read_format_names_alike() -> None:
    """By the grammar of docs/formats.md, and by the parser that knows ``^16`` too."""
    module = load(SOURCE)
    accepted = 0
    for name in map("".join, itertools.product(ELEMENTS, BLOCKS, ("s", "", "S", "ss"), SCALES)):
        try:
            expected = parse_format(name)
        except InputError:
            expected = None
        if expected is None or expected.name != name:
            with pytest.raises(module.Refused):
                module.Format(name)
            continue
        found = module.Format(name)
        assert (found.books, found.block, found.row_scale) == (
            expected.codebooks, expected.block_size, expected.row_scale
        ), name  # fmt: skip
        assert (found.index_bits, found.word_bits, found.scale.bits) == (
            expected.index_bits, expected.word.width, expected.word.scale.width
        ), name  # fmt: skip
        assert found.atom == (None if expected.atom is None else expected.atom.name)
        accepted += 1
    assert accepted > 500


# ------------------------------------------------------------------------- both on random damage

VALUES: list[Any] = [
    None, True, 0, -1, 1, 2, 128, 1 << 31, 1.0, "", "a", "U8", "BF16", "HIF8", "{}", {}, [], [0, 1],
    "NF4sUE4M4", "E2M1^8sBF16", {"tensor": "a", "index": 0, "count": 1, "transposed": False},
]  # fmt: skip
NAMES = ("n", "a", "b.row_scales", "a.indices", "x", "", "a[0]", "é")


def damaged_json(value: Any, random: Random) -> None:
    """Change, remove or rename one thing somewhere in a JSON object."""
    while True:
        key = random.choice(list(value))
        inner = value[key]
        if not (isinstance(inner, dict) and inner and random.random() < 0.7):
            break
        value = inner
    if isinstance(inner, list) and inner and random.random() < 0.5:
        inner[random.randrange(len(inner))] = random.choice(VALUES)
    elif random.random() < 0.3:
        value.pop(key)
    elif random.random() < 0.3:
        value[random.choice(NAMES)] = inner if random.random() < 0.5 else value.pop(key)
    else:
        value[key] = random.choice(VALUES)


def damaged(content: bytes, random: Random) -> bytes:
    """A checkpoint with something changed in its header, in the metadata, or in its bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    where = random.randrange(3)
    if where == 0:
        damaged_json(header, random)
    elif where == 1:
        metadata = json.loads(header["__metadata__"][METADATA_KEY])
        damaged_json(metadata, random)
        header["__metadata__"][METADATA_KEY] = json.dumps(metadata)
    else:
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.choice([0, 1, 127, 128, 255])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def accepted(path: Path) -> bool:
    """Whether the golden model reads and decodes everything in a file."""
    try:
        with Checkpoint(path) as checkpoint:
            for name in checkpoint.names:
                reconstruct(checkpoint.read(name))
    except InputError:
        return False
    return True


@pytest.mark.parametrize("seed", [1, 2])
def test_both_refuse_and_accept_the_same_damaged_files(tmp_path: Path, seed: int) -> None:
    random, path, module = Random(seed), tmp_path / "model.safetensors", load(SOURCE)
    whole = some_vectors("checkpoints")["checkpoints/whole.safetensors"]
    results = []
    for number in range(300):
        content = damaged(whole, random)
        path.write_bytes(content)
        results.append(accepted(path))
        assert (module.verdict(content) is None) == results[-1], f"seed {seed}, file {number}"
    assert 10 < sum(results) < 290
