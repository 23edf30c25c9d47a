import os
import stat
from pathlib import Path

import pytest

from golden.new_file import new_file, new_folder


@pytest.fixture(params=["nameless", "named"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With and without files that have no name, which not every file system and system has."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE")
    return tmp_path


def test_a_file_appears_when_it_is_complete(folder: Path) -> None:
    path = folder / "a"
    for content in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with new_file(path) as file:
            file.write(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
        assert os.listdir(folder) == ["a"]


def test_nothing_is_left_of_a_file_that_fails(folder: Path) -> None:
    (folder / "a").write_bytes(b"old")

    def interrupted() -> None:
        with new_file(folder / "a") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(folder) == ["a"]
    assert (folder / "a").read_bytes() == b"old"


def test_the_umask_decides_who_may_read(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        with new_file(folder / "a") as file:
            file.write(b"mine")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o600


def test_the_longest_name_can_be_written(folder: Path) -> None:
    path = folder / ("x" * os.pathconf(folder, "PC_NAME_MAX"))
    with new_file(path) as file:
        file.write(b"1")
    assert path.read_bytes() == b"1"


def test_a_folder_that_cannot_be_written_to_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"), new_file(folder / "none" / "a"):
        pass


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_when_it_is_complete(
    tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether an empty one is there or none; all of it on the disk before it has its name."""
    target, synced = tmp_path / "made", []
    if there:
        target.mkdir()
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def seen_rename(made: Path, path: Path) -> None:
        inside = [made, made / "a", made / "inner", made / "inner" / "b"]
        assert {one.stat().st_ino for one in inside} <= set(synced)
        synced.clear()
        rename(made, path)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    with new_folder(target) as made:
        (made / "a").write_bytes(b"1")
        (made / "inner").mkdir()
        (made / "inner" / "b").write_bytes(b"2")
        assert target.exists() == there
    assert sorted(os.listdir(target)) == ["a", "inner"]
    assert os.listdir(tmp_path) == ["made"]
    assert synced == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_folder_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    """Not even when another one of its name has come up meanwhile."""

    def interrupted() -> None:
        with new_folder(tmp_path / "made") as made:
            (made / "a").write_bytes(b"1")
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            (tmp_path / "made").mkdir()
            (tmp_path / "made" / "b").write_bytes(b"2")

    with pytest.raises(error):
        interrupted()
    left = [] if error is KeyboardInterrupt else ["b", "made"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == left
