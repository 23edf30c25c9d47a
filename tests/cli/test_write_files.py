"""Files take their names when they are complete."""

import os
from pathlib import Path

import pytest

from sop.shared.output import write_files
from tests.support.folders import contents


def test_write_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    files = {"one.v": "module\n", "two.json": "ü\n"}
    assert write_files(folder, files) == [folder / "one.v", folder / "two.json"]
    assert contents(folder) == {name: text.encode() for name, text in files.items()}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_write_files_replaces(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("old and longer")
    (tmp_path / "other").write_text("kept")
    write_files(tmp_path, {"one": "new"})
    assert contents(tmp_path) == {"one": b"new", "other": b"kept"}


def test_write_files_keeps_the_old_file_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").write_text("old")
    seen: list[bytes] = []

    def fail(source: str, target: Path) -> None:
        seen.append(Path(source).read_bytes())
        assert Path(source).parent == tmp_path, "a rename across file systems is not atomic"
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_files(tmp_path, {"one": "new"})
    assert seen == [b"new"], "the file must be complete before it takes its name"
    assert contents(tmp_path) == {"one": b"old"}


def test_write_files_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_files(tmp_path, {"good": "text", "bad": "\ud800"})
    assert contents(tmp_path) == {"good": b"text"}
