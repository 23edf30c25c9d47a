import os
import stat
from pathlib import Path

import pytest

from golden.new_file import new_file


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
