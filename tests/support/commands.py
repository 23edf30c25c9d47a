"""Run ``sop`` as users do, in this process or in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
import typer.testing
from typer.testing import CliRunner

import sop.cli


@dataclass(frozen=True)
class Result:
    """What one run of the program did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Sop = Callable[..., Result]


def sop_process(*arguments: object, **environment: str) -> Result:
    """Run ``sop`` as a process of its own."""
    command = [sys.executable, "-m", "sop.cli", *map(str, arguments)]
    run = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return Result(run.returncode, run.stdout, run.stderr)


def assert_refused(result: Result, *parts: str, progress: bool = False) -> None:
    """Exit code 2, one line of the form ``sop: ...`` with all parts, and no traceback.

    With ``progress``, lines that report progress may stand before it.
    """
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert [line.startswith("sop: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("sop: ")
    if not progress:
        assert len(lines) == 1
    for part in parts:
        assert part in lines[-1]


def invoke(*arguments: object) -> typer.testing.Result:
    """Run ``sop`` in this process; an error that it raises is the result's ``exception``."""
    return CliRunner().invoke(sop.cli.app, [*map(str, arguments)])


def invoke_or_raise(*arguments: object) -> typer.testing.Result:
    """As :func:`invoke`, but the caller gets the error."""
    return CliRunner().invoke(sop.cli.app, [*map(str, arguments)], catch_exceptions=False)


def invoke_alone(command: Callable[..., Any], *arguments: object) -> typer.testing.Result:
    """As :func:`invoke`, for a command that is not one of several."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments)])


def output_of(*arguments: object) -> str:
    """Standard output of a run that ends well; an error goes on to the caller."""
    result = invoke_or_raise(*arguments)
    assert result.exit_code == 0
    return result.stdout


def json_of(*arguments: object) -> Any:
    """What a run that ends well says with ``--json``."""
    return json.loads(output_of(*arguments, "--json"))
