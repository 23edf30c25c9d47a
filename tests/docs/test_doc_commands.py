"""Command lines in the documentation are those of the real command line; the cheap ones run."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from sim.installed import available_simulators
from sop.cli import app

ROOT = Path(__file__).parents[2]

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
SOP: Any = typer.main.get_command(app)
USAGE_ERROR: Any = typer.BadParameter.__base__  # typer has a click of its own inside
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# Whose command lines are theirs to check.
OTHERS = {"cd", "fusesoc", "iverilog", "pip", "printf", "sta", "verilator", "vvp", "yosys"}
OPTIONS_OF_OTHERS = {
    "--all-simulations", "--binary", "--bins", "--cores-root", "--liberty", "--lint-only", "--set",
    "--std", "--target", "--testcase", "--timing", "--top",
}  # fmt: skip


def console(page: Path) -> list[str]:
    """The console blocks of a page."""
    return re.findall(r"^```console\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def typed(block: str) -> list[str]:
    """What a user types: the lines after ``$``, continued ones joined."""
    return re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.MULTILINE)


def commands(line: str) -> list[list[str]]:
    """Words of each command of a line, without redirections and comment."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return [part[: part.index(">")] if ">" in part else part for part in parts]


def check_command(words: list[str]) -> None:
    """Refuse what the real command line or the Makefile refuses, without running it."""
    name, *arguments = words
    if name == "sop":
        command, *arguments = arguments
        assert command in SOP.commands, f"no command {command}"
        SOP.commands[command].make_context(command, list(arguments))
    elif name == "make":
        given = {word for word in arguments if "=" not in word}
        assert given <= TARGETS, f"no target {given - TARGETS}"
    elif name == "python":
        assert (ROOT / arguments[0]).is_file(), f"no script {arguments[0]}"
    else:
        assert name in OTHERS or re.match(r"\w+=|obj_dir/", name), f"unknown program {name}"


LINES = [(page.relative_to(ROOT), line) for page in PAGES for block in console(page)
         for line in typed(block)]  # fmt: skip


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda part: str(part)[:60])
def test_command_line_is_accepted(page: Path, line: str) -> None:
    for words in commands(line):
        check_command(words)


def test_lines_are_found() -> None:
    assert len(LINES) > 40
    assert {"README.md", "docs/quantize.md", "docs/files.md"} <= {str(page) for page, _ in LINES}
    unmarked = [
        page.name
        for page in PAGES
        if re.search(r"^```\n(sop|make|pip) ", page.read_text("utf-8"), re.MULTILINE)
    ]
    assert unmarked == []


@pytest.mark.parametrize(
    "line",
    ["sop export a.safetensors folder", "sop sim --lane 3", "sop simulate", "sop sim --lanes x",
     "make simulate", "synopsys"],
)  # fmt: skip
def test_wrong_line_is_refused(line: str) -> None:
    with pytest.raises((USAGE_ERROR, AssertionError)):
        check_command(line.split())


@pytest.mark.parametrize("command", SOP.commands)
def test_examples_of_the_help_are_accepted(command: str) -> None:
    examples = re.findall(r"Example: `(.*?)`", SOP.commands[command].callback.__doc__, re.DOTALL)
    for example in examples:
        check_command(shlex.split(example))


def spans(page: Path) -> list[str]:
    """Inline code of a page."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_targets_in_prose_exist(page: Path) -> None:
    known = {option for command in SOP.commands.values() for parameter in command.params
             for option in (*parameter.opts, *parameter.secondary_opts)}  # fmt: skip
    known |= {"--help", "--version"} | OPTIONS_OF_OTHERS
    code = spans(page)
    options = {option for span in code for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert options <= known
    called = {span.split()[1] for span in code if re.match(r"sop [a-z]", span)}
    assert called <= set(SOP.commands)
    made = {span.split()[1] for span in code if re.match(r"make [a-z]", span)}
    assert made <= TARGETS


# --- what is cheap is run -------------------------------------------------------------------------


BLOCKS = {"README.md": ("sop verilog sop_dec", 2), "docs/hardware.md": ("sop verilog lut_dec", 3)}


@pytest.mark.parametrize("page", BLOCKS)
def test_block_runs(page: str, tmp_path: Path, thorough: bool) -> None:
    """The first lines of a block, typed into a shell in an empty folder."""
    if "icarus" not in available_simulators():
        pytest.skip("BLOCK NOT RUN: Icarus Verilog is not installed (apt-get install iverilog)")
    if page == "README.md" and not thorough:  # its unit takes several times as long to make
        pytest.skip("only with --all-simulations")
    start, lines = BLOCKS[page]
    (block,) = (block for block in console(ROOT / page) if block.startswith(f"$ {start}"))
    script = "\n".join(["set -e", *typed(block)[:lines]])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"PASS: \d\d+ words, 3 times", last)
    # Where the page shows the answer, it is this one.
    assert [line for line in block.splitlines() if line.startswith("PASS")] in ([], [last])


CHEAP = [line for _, line in LINES if line.startswith("sop formats")]


@pytest.mark.parametrize("line", CHEAP)
def test_line_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(line):
        if words[0] == "sop":
            SOP.main(words[1:], standalone_mode=False)


def test_python_of_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    index_bytes, scale_bytes, error = printed.getvalue().split()
    assert (int(index_bytes), int(scale_bytes)) == (64 * 256 // 2, 64 * 256 // 16 * 12 // 8)
    assert float(error) < 1
