"""Runs that are ended by a signal, and what is left of them: nothing, or what --resume needs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sop.quantizing.workers import Job, WorkerError, Workers

PATIENCE_SECONDS = 30.0
SOON_SECONDS = 5.0  # a worker looks for its parent twice a second

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")


def until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "nothing happened"
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """Processes of a process group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def notice_signals() -> None:
    """Also where the tests themselves run in the background of a script, which ignores SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts commands in process groups of their own."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], start_new_session=True, text=True, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOT},
            preexec_fn=notice_signals,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        for member in members(process.pid):
            os.kill(member, signal.SIGKILL)
        process.communicate()


ROOT = str(Path(__file__).parents[2])

WORKERS = """
import sys, time
from sop.shared.ending import Ended, end_by_signal, raise_on_signals
from sop.quantizing.workers import Job, Workers
try:
    with raise_on_signals():
        list(Workers(2).run([Job(time.sleep, (600,))] * 4))
except Ended as ended:
    end_by_signal(ended.number)
"""


@needs_proc
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_workers_end_with_their_parent(
    start: Callable[..., "subprocess.Popen[str]"], name: str
) -> None:
    parent = start("-c", WORKERS)
    # The parent, two workers, and the process that puts away what they share.
    until(lambda: len(members(parent.pid)) >= 4)
    time.sleep(1)  # for the workers to have begun
    number = signal.Signals[name]
    os.kill(parent.pid, number)
    assert parent.wait(SOON_SECONDS) == -number
    until(lambda: not members(parent.pid), SOON_SECONDS)
    shared = Path("/dev/shm")
    assert not shared.is_dir() or not [
        path.name for path in shared.iterdir() if f"{parent.pid}" in path.name.split("-")
    ]


def test_a_worker_that_is_killed_is_no_bug_of_the_program() -> None:
    with pytest.raises(WorkerError, match="a worker process was ended from outside"):
        list(Workers(2).run([Job(os._exit, (9,))] * 2))
    assert dict(Workers(2).run([Job(bytes, (1,)), Job(bytes, (2,))])) == {0: b"\0", 1: b"\0\0"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    weights = {
        f"model.layers.{block}.mlp.up_proj.weight": rng.standard_normal((64, 64)).astype(np.float32)
        for block in range(3)
    }
    save_file(weights, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@needs_proc
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_run_that_was_ended_goes_on(
    start: Callable[..., "subprocess.Popen[str]"], model: Path, name: str
) -> None:
    output = model.with_name("q.sop")
    command = ["-m", "sop.cli", "quantize", model, "-f", "Any4-Any4sS1E5M5", "-o", output]
    parts = model.with_name("q.sop.parts")
    run = start(*command, "-j", 2)
    until(lambda: list(parts.glob("tensor-*")))
    number = signal.Signals[name]
    os.kill(run.pid, number)
    errors = run.communicate(timeout=PATIENCE_SECONDS)[1]
    if run.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert run.returncode == -number
    if name == "SIGTERM":
        assert errors.splitlines()[-1] == "sop: ended by SIGTERM"
    until(lambda: not members(run.pid), SOON_SECONDS)
    left = {path.name for path in parts.iterdir()}
    assert {name for name in left if not name.startswith("tensor-")} <= {"run.json", "lock"}
    assert ("lock" in left) == (name == "SIGKILL")
    assert {path.name for path in model.parent.iterdir()} == {model.name, parts.name}
    again = start(*command, "-j", 1, "--resume")
    again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0
    assert {path.name for path in model.parent.iterdir()} == {model.name, output.name}


CHILD = """
import sys, time
from pathlib import Path
from rtl.child_process import run
run(["sh", "-c", "echo > began; exec sleep 600"], Path("."))
"""


@needs_proc
def test_a_tool_ends_with_the_program(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    parent = start("-c", CHILD)
    until((tmp_path / "began").exists)
    assert len(members(parent.pid)) == 2
    os.kill(parent.pid, signal.SIGKILL)
    until(lambda: not members(parent.pid), SOON_SECONDS)
