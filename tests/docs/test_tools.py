"""What is missing or cannot work is named before anything starts, in a line each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sim.installed
from golden.errors import InputError
from sim.installed import quickest_simulator, require_simulator

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "scripts" / "check_tools.sh"
NEEDED = ("python3", "g++", "make", "perl")


def folder_of_tools(folder: Path, *names: str) -> str:
    """A PATH on which only these programs are."""
    folder.mkdir()
    for name in ("sh", *names):
        found = sys.executable if name == "python3" else shutil.which(name)
        assert found is not None, name
        (folder / name).write_text(f'#!/bin/sh\nexec "{found}" "$@"\n')
        (folder / name).chmod(0o755)
    return str(folder)


def check_tools(
    path: str, folder: Path = ROOT, command: tuple[str, ...] = ("sh", str(CHECK)), **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={"PATH": path, **more}, capture_output=True, text=True, check=False
    )


def test_nothing_is_said_where_all_is_well(tmp_path: Path) -> None:
    done = check_tools(folder_of_tools(tmp_path / "bin", *NEEDED))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", [*NEEDED, "g++ make perl"])
def test_missing_tool_is_named(missing: str, tmp_path: Path) -> None:
    gone = missing.split()
    left = [name for name in NEEDED if name not in gone]
    done = check_tools(folder_of_tools(tmp_path / "bin", *left))
    assert done.returncode == 1
    for line, name in zip(done.stderr.splitlines(), gone, strict=True):
        assert line.startswith(f"missing: {name}")
        assert line.endswith(f"; on Debian: apt-get install {name}")


@pytest.mark.parametrize("name", ["a b", "it's", 'say "so"', "a;b", "a[1]", "$HOME", "50%"])
def test_path_that_cannot_work_is_named(name: str, tmp_path: Path) -> None:
    path = folder_of_tools(tmp_path / "bin", *NEEDED)
    bad = tmp_path / name
    bad.mkdir()
    for done, what in (
        (check_tools(path, bad), "checkout"),
        (check_tools(path, TMPDIR=str(bad)), "TMPDIR"),
    ):
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{what} {bad}: ")


@pytest.mark.parametrize("name", ["plain", "ünï", "a+b,c=d@e", "model-1.0_x"])
def test_other_paths_are_fine(name: str, tmp_path: Path) -> None:
    path = folder_of_tools(tmp_path / "bin", *NEEDED)
    (tmp_path / name).mkdir()
    assert check_tools(path, tmp_path / name, TMPDIR=str(tmp_path / name)).returncode == 0
    sim.installed._check_paths("verilator", tmp_path / name)


def test_make_checks_before_it_sets_up(tmp_path: Path) -> None:
    """Of every target, also where everything was set up before a tool went."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements-model.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(CHECK, tmp_path / "scripts")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    path = folder_of_tools(tmp_path / "bin", "make", "python3", "g++")
    for target in ("sim", "test", "verilog"):
        done = check_tools(path, tmp_path, ("make", target))
        assert done.returncode == 2
        assert done.stderr.splitlines()[0] == "missing: perl; on Debian: apt-get install perl"
        assert done.stdout == ""


def test_verilator_without_its_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_simulator("verilator", tmp_path)
    monkeypatch.setenv("PATH", folder_of_tools(tmp_path / "bin", "make"))
    with pytest.raises(
        InputError, match=r"^verilator needs perl g\+\+; on Debian: apt-get install"
    ):
        require_simulator("verilator", tmp_path)


@pytest.mark.parametrize("name", ["a b", 'a"b', "a#b", "a:b", "a;b", "it's", "a$b", "a%b"])
def test_build_folder_that_cannot_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"build folder .*: verilator cannot work with"):
        require_simulator("verilator", tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_python_in_a_folder_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/my env/bin/python")
    with pytest.raises(InputError, match="Python environment '/my env/bin/python': verilator"):
        require_simulator("verilator", tmp_path)


def test_icarus_takes_all_but_double_quotes(tmp_path: Path) -> None:
    sim.installed._check_paths("icarus", tmp_path / "it's a [b]; $c")
    with pytest.raises(InputError, match="icarus cannot work with '\"' in a path"):
        sim.installed._check_paths("icarus", tmp_path / 'a"b')


def test_no_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quickest_simulator() in sim.installed.SIMULATORS
    monkeypatch.setattr(sim.installed, "available_simulators", lambda: ())
    with pytest.raises(InputError, match="no simulator is installed: pip install"):
        quickest_simulator()
