"""Fixtures of all tests: simulators, and one build folder per session."""

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyslang
import pytest
from amaranth.hdl import Elaboratable

from sim.installed import SIMULATORS, available_simulators
from sim.simulator import SimulationError
from tb.faults import NOTICED, Fault, run_with_fault

pytest.register_assert_rewrite("tests.support")


@pytest.fixture(scope="module", autouse=True)
def _unused_components() -> Iterator[None]:
    """A component that is only looked at, or refused halfway, is no mistake here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Elaboratable, "_MustUse__silence", True, raising=False)
        yield
        gc.collect()


@pytest.fixture(params=SIMULATORS)
def simulator(request: pytest.FixtureRequest) -> str:
    """Each simulator that is installed; the others are reported as skipped."""
    name: str = request.param
    if name not in available_simulators():
        pytest.skip(f"simulator {name} is not installed")
    return name


def pytest_configure() -> None:
    """Look for garbage less often: it took 40 % of the time in which Amaranth elaborates."""
    gc.set_threshold(100_000, 10, 10)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all-simulations``, for what takes too long to run at every change."""
    parser.addoption(
        "--all-simulations",
        action="store_true",
        help="also build every configuration with Verilator, and run over 1,000 AXI seeds",
    )


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether everything is asked for."""
    return bool(request.config.getoption("--all-simulations"))


@pytest.fixture
def built_by_both(request: pytest.FixtureRequest, simulator: str, thorough: bool) -> str:
    """As ``simulator``, but fewer cases unless everything is asked for.

    The first configuration that a test lists meets every kind of stalls, the others all of them at
    once. Verilator, which takes ten times as long to build as Icarus, shows with the first
    configuration of each unit that both agree.
    """
    stalled = request.node.callspec.params.get("stalls", "both") == "both"
    needed = stalled or _is_first(request)
    if simulator == "verilator" and "icarus" in available_simulators():
        needed = stalled and _is_first(request)
    if not (needed or thorough):
        pytest.skip("only with --all-simulations")
    return simulator


def _is_first(request: pytest.FixtureRequest) -> bool:
    """Whether the case has the first configuration of its test."""
    for mark in request.node.iter_markers("parametrize"):
        if mark.args[0] == "config":
            first = next(iter(mark.args[1]))
            return bool(request.node.callspec.params["config"] == first)
    return True


@pytest.fixture(scope="session")
def build_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of simulation builds, shared by all tests and workers of one session."""
    # With xdist each worker has a folder of its own inside that of the session.
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "builds"


@pytest.fixture
def noticed(build_root: Path, thorough: bool) -> Callable[..., None]:
    """Check that a bench notices a fault; those in ``more`` only if everything is asked for."""

    def check(fault: Fault, more: Sequence[Fault] = (), match: str = NOTICED) -> None:
        if fault in more and not thorough:
            pytest.skip("only with --all-simulations")
        with pytest.raises(SimulationError, match=match):
            run_with_fault(fault, build_root, broken=True)

    return check


@pytest.fixture
def slang(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What slang, a strict front end, says about Verilog files: nothing if all is well.

    They are elaborated, so that names, widths and time scales are checked across modules.
    """

    def check(*paths: Path, standard: str = "1364-2005") -> str:
        driver = pyslang.driver.Driver()
        driver.addStandardArgs()
        quoted = " ".join(f'"{path}"' for path in paths)
        assert driver.parseCommandLine(f"slang --error-limit=0 --std {standard} {quoted}")
        driver.processOptions()
        driver.parseAllSources()
        driver.reportCompilation(driver.createCompilation(), True)
        driver.reportDiagnostics(True)
        printed = capfd.readouterr()
        return printed.out + printed.err

    return check
