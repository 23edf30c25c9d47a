"""Standard output and error that are closed, full, lost or of few characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PRINTS = """
import sys
from sop.shared.streams import StreamError, drop_output, prepare_streams
prepare_streams()
try:
    print(sys.argv[1])
    print("note", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    with open("file", "w") as file:
        file.write(str(file.fileno()))
except StreamError as error:
    drop_output()
    print(error, file=sys.stderr)
    sys.exit(141 if error.reader_gone else 2)
"""
GONE = "| (exec <&-; sleep 0.3); exit ${PIPESTATUS[0]}"
CLI = "import sys; from sop.cli import main; main()"


def shell(
    redirect: str, script: str, *arguments: str | bytes, folder: Path, **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    """Run a script with standard streams that a shell redirects."""
    command = ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-c", script]
    return subprocess.run(
        [*command, *arguments], capture_output=True, check=False, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(tmp_path: Path, redirect: str) -> None:
    done = shell(redirect, PRINTS, "text", folder=tmp_path)
    assert done.returncode == 0
    assert done.stdout == (b"" if ">&-" in redirect.replace("2>&-", "") else b"text\n")
    # No file takes the place of a stream that is not there.
    assert int((tmp_path / "file").read_text()) > 2


def test_a_full_disk_is_an_error_that_names_the_stream(tmp_path: Path) -> None:
    done = shell("> /dev/full", PRINTS, "text", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == b"note\nstandard output: No space left on device\n"
    assert shell("2> /dev/full", PRINTS, "text", folder=tmp_path).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, unbuffered: str) -> None:
    done = shell(
        GONE, PRINTS, "text" * 20_000, folder=tmp_path, PYTHONUNBUFFERED=unbuffered,
    )  # fmt: skip
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "a ± b", b"a ? b"),
        ("latin-1", "± ∞", b"\xb1 ?"),
        ("utf-8", "± ∞", "± ∞".encode()),
        ("utf-8", b"name \xff \xe9", b"name \xff \xe9"),
        ("ascii", b"name \xff", b"name \xff"),
    ],
)
def test_every_text_can_be_printed(
    tmp_path: Path, encoding: str, text: str | bytes, expected: bytes
) -> None:
    done = shell("", PRINTS, text, folder=tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="1")
    assert (done.returncode, done.stdout) == (0, expected + b"\n")


def test_the_command_line_uses_such_streams(tmp_path: Path) -> None:
    full = shell("> /dev/full", CLI, "formats", folder=tmp_path)
    assert (full.returncode, full.stderr) == (2, b"sop: standard output: No space left on device\n")
    gone = shell(
        GONE, CLI, "formats", folder=tmp_path,
        PYTHONUNBUFFERED="1",
    )  # fmt: skip
    assert (gone.returncode, gone.stderr) == (141, b"")
    closed = shell(">&-", CLI, "formats", folder=tmp_path)
    assert (closed.returncode, closed.stderr) == (0, b"")
