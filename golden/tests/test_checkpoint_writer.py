"""Writing a checkpoint: what is refused, and that a failure leaves nothing behind."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    SourceInfo,
    config_hash,
)
from golden.corrections import Corrections
from golden.errors import InputError
from golden.tests.checkpoint_files import (
    CONFIG,
    DOCUMENT,
    nested,
    random_corrections,
    random_tensor,
    write_one,
)


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


def test_endless_data_are_refused(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "model", CONFIG) as writer,
        pytest.raises(InputError, match="field 'data': more than 10 bytes"),
    ):
        writer.add_raw("r", "U8", (10,), repeat(b"123"))


def test_copied_tensors_are_those_that_were_added(tmp_path: Path) -> None:
    """Byte by byte, under a source of their own, whatever else the other file holds."""
    source = SourceInfo("w", None, None, True)
    tensors = {
        "w": (random_tensor("DD4-DD4sRS1E2M4"), random_corrections((5, 37), 3)),
        "v": (random_tensor("E4M3^0sUE8M0", (3, 17)), None),
    }

    def write(path: Path, sources: dict[str, SourceInfo]) -> None:
        with CheckpointWriter(path, CONFIG) as writer:
            for name, parts in tensors.items():
                writer.add(name, *parts, "F16", sources.get(name))

    write(tmp_path / "added", {"w": source})
    write(tmp_path / "part", {"v": SourceInfo("v", None, None, True)})
    with CheckpointWriter(tmp_path / "copied", CONFIG) as writer:
        with Checkpoint(tmp_path / "part") as part:
            writer.copy(part, "w", source)
            writer.copy(part, "v")
            with pytest.raises(InputError, match="tensor 'w': name 'w' is taken"):
                writer.copy(part, "w")
            with pytest.raises(InputError, match="tensor 'u': no such quantized tensor"):
                writer.copy(part, "u")
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "added").read_bytes()
