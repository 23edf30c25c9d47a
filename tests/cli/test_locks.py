"""One run at a time writes a file or fills a folder."""

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest

from golden.errors import InputError
from sop.quantizing.quantization import quantize_model
from sop.quantizing.settings import Settings
from sop.shared.lock import locked
from sop.shared.output import PAGE, locked_folder, writing_file
from tests.support.commands import output_of
from tests.support.folders import contents
from tests.support.one_matrix import FAST, LAYER, one_matrix, quantized


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return one_matrix(tmp_path / "source")


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    return quantized(source, tmp_path / "q.sop")


def test_a_second_run_is_told_of_the_first(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.sop"
    said = []

    def second(what: str, done: int, total: int) -> None:
        for options in ([], ["--resume"], ["--force"]):
            with pytest.raises(InputError) as caught:
                output_of("quantize", source, *FAST, "-o", output, *options)
            said.append(str(caught.value))

    settings = Settings("NF4sUE4M4", None, effort="fast")
    quantize_model(source, [LAYER], output, settings, progress=second)
    assert output.exists()
    start = f"another run (process {os.getpid()} on {socket.gethostname()} since 20"
    assert said
    assert all(one.startswith(start) and one.endswith(f" is writing {output}") for one in said)
    assert sorted(os.listdir(tmp_path)) == ["q.sop", "source"]


FOLDERS = [
    ["vectors", "-f", "NF4sUE4M4"],
    ["verilog", "float_to_hif", "--lanes", "1"],
    ["synth", "--seeds", "0"],
    ["datasheet", "lut_decoder", "--text-only"],
]


@pytest.mark.parametrize("command", FOLDERS, ids=[command[0] for command in FOLDERS])
def test_folders_have_one_run_at_a_time(tmp_path: Path, command: list[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with locked_folder(folder):
        before = contents(folder)
        with pytest.raises(InputError, match=r"another run .* is writing .*out$"):
            output_of(*command, "-o", folder)
        assert contents(folder) == before
    if command[0] != "synth":  # takes long
        output_of(*command, "-o", folder)
        assert contents(folder)
        assert not [path for path in folder.iterdir() if path.name.endswith(".lock")]


def test_a_page_and_its_figures_have_one_run_at_a_time(checkpoint: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "r.html", tmp_path / "figures"
    arguments = ["report", checkpoint, "-o", page, "--png", figures]
    with locked_folder(figures), pytest.raises(InputError, match=r"is writing .*figures$"):
        output_of(*arguments)
    with (
        writing_file(page, PAGE),
        pytest.raises(InputError, match=r"is writing .*r\.html$"),
    ):
        output_of(*arguments)
    assert not page.exists()
    output_of(*arguments)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    assert sorted(path.name for path in figures.glob(".*")) == []


def test_what_a_dead_run_left_is_no_obstacle(tmp_path: Path) -> None:
    lock, output = tmp_path / ".out.lock", tmp_path / "out"
    with locked(lock, output):
        record = lock.read_bytes()
        with pytest.raises(InputError, match="another run"), locked(lock, output):
            pass
        assert lock.read_bytes() == record
    lock.write_bytes(record)
    with locked(lock, output):
        pass
    assert os.listdir(tmp_path) == []
    lock.write_text("mine")
    with pytest.raises(InputError, match="is in the way of a lock"), locked(lock, output):
        pass
    assert lock.read_text() == "mine"


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / ".out.lock", tmp_path / "out"):
        pass
    assert "a second run would not be noticed" in capsys.readouterr().err


def test_parts_that_were_removed_meanwhile_are_missed(source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "q.sop.parts"
    settings = Settings("NF4sUE4M4", None, effort="fast")

    def remove(what: str, done: int, total: int) -> None:
        if not done:
            for path in parts.iterdir():
                path.unlink()
            parts.rmdir()
            parts.mkdir()  # of another run
            (parts / "tensor-00000.safetensors").write_text("theirs")

    with pytest.raises(InputError, match="was removed while this run was writing"):
        quantize_model(source, [LAYER], tmp_path / "q.sop", settings, progress=remove)
    assert contents(parts) == {"tensor-00000.safetensors": b"theirs"}
