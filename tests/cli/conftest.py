"""Fixtures of the tests of commands."""

import sys
from pathlib import Path

import pytest

import sop.cli
from tests.support.checkpoint_file import write_checkpoint
from tests.support.commands import Result, Sop


@pytest.fixture
def sop_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sop:
    """Run ``sop`` in this process; the exit code is what ``sys.exit`` got."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sop", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            sop.cli.main()
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small checkpoint with everything in it."""
    return write_checkpoint(tmp_path / "q.safetensors")
