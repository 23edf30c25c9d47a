"""Fixtures of all tests: simulators, and one build folder per session."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from amaranth.hdl import Elaboratable

from tb.simulator import SIMULATORS, available_simulators


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


@pytest.fixture(scope="session")
def build_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of simulation builds, shared by all tests and workers of one session."""
    # With xdist each worker has a folder of its own inside that of the session.
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "builds"
