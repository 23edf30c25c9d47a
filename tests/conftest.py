"""Fixtures of all tests: simulators, and one build folder per session."""

from pathlib import Path

import pytest

from tb.simulator import SIMULATORS, available_simulators


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
