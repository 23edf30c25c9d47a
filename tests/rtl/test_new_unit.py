"""A unit is a component, a bench and two records: nothing else has to know its name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from amaranth.hdl import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

import sop.commands.verilog
import sop.hdl.resource_table
from rtl.layouts import FLOAT32, float_beat_layout
from rtl.units import UNITS, Unit, build_unit, record_verilog
from sim.bench_config import BenchConfig
from sim.installed import quickest_simulator
from sim.simulator import SimulationError
from sop.hdl.datasheet import INDEX, datasheet_pages
from tb.benches import BENCHES, Bench
from tb.coverage_bins import STALLS
from tb.unit_run import run_unit
from tests.support.commands import invoke_or_raise, json_of

NAME = "beat_register"


class BeatRegister(wiring.Component):  # type: ignore[misc]  # Amaranth is untyped
    """Keep a beat of floats.

    Latency 1 cycle, throughput 1 beat per cycle.

    Parameters
    ----------
    lanes : int
        Values per beat.
    float_layout : data.StructLayout
        Of a value.
    """

    def __init__(self, *, lanes: int, float_layout: data.StructLayout = FLOAT32) -> None:
        if lanes < 1:
            raise ValueError(f"lanes must be at least 1, not {lanes}")
        beat = float_beat_layout(lanes=lanes, float_layout=float_layout)
        super().__init__({"i": In(stream.Signature(beat)), "o": Out(stream.Signature(beat))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.d.comb += self.i.ready.eq(~self.o.valid | self.o.ready)
        with m.If(self.i.ready):
            m.d.sync += [self.o.valid.eq(self.i.valid), self.o.p.eq(self.i.p)]
        return m


BENCH = """\
import cocotb
from cocotb.triggers import RisingEdge
from sim.clock import reset, start_clock

@cocotb.test()
async def one_beat(dut):
    start_clock(dut)
    dut.i__valid.value, dut.o__ready.value = 0, 1
    await reset(dut)
    dut.i__payload.value, dut.i__valid.value = {sent}, 1
    await RisingEdge(dut.clk)
    dut.i__valid.value = 0
    await RisingEdge(dut.clk)
    assert dut.o__valid.value == 1
    assert dut.o__payload.value == 5
"""


@pytest.fixture(autouse=True)
def unit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unit]:
    """The record of the unit, and that of its bench, while a test runs."""
    record = Unit(
        NAME, BeatRegister, ("lanes", "output"), {"i": "float_beat", "o": "float_beat"},
        latency=1, outputs=("float32", "bfloat16"),
    )  # fmt: skip
    monkeypatch.setitem(UNITS, NAME, record)
    monkeypatch.setitem(
        BENCHES, NAME, Bench(record, "beat_register_bench", coverage={"stalls of a tensor": STALLS})
    )
    yield record
    record_verilog.cache_clear()


def test_verilog_with_a_testbench(tmp_path: Path) -> None:
    json_of("verilog", NAME, "--lanes", 8, "--output", "bfloat16", "--testbench", "-o", tmp_path)
    description = json.loads((tmp_path / f"{NAME}_8_bfloat16.json").read_text())
    assert description["parameters"] == {"lanes": 8, "output": "bfloat16"}
    assert description["timing"] == {"latency_clocks": 1, "throughput": "one beat per clock"}
    assert f"{NAME}_8_bfloat16_tb_o.hex" in description["files"]


def test_it_is_one_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def no_files(unit: str, *_: object, **__: object) -> dict[str, bytes]:
        made.append(unit)
        return {}

    monkeypatch.setattr(sop.commands.verilog, "verilog_files", no_files)
    json_of("verilog", "all", "--lanes", 8, "-o", tmp_path)
    assert made == [name for name, unit in UNITS.items() if "lanes" in unit.takes]
    assert NAME in made


def test_datasheet() -> None:
    pages = datasheet_pages()
    assert f"[`{NAME}`]({NAME}.md)" in pages[INDEX]
    page = pages[f"{NAME}.md"]
    assert page.startswith("# BeatRegister: `beat_register`\n")
    for line in (
        "Keep a beat of floats.",
        "| `values` | 1023:0 | 1024 | lanes x F | IEEE 754 values |",
        f"writes module `{NAME}_32_float32`.",
        "| `bfloat16` | 1 | one beat per clock |",
    ):
        assert line in page


def test_synthesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def resources(verilog: str, commands: Any, **_: Any) -> dict[str, Any]:
        made.append(commands[0])
        return {"luts": verilog.count("reg "), "flip_flops": 0, "other": {}}

    monkeypatch.setattr(sop.hdl.resource_table, "resources", resources)
    options = ["--unit", NAME, "--target", "ice40", "--lanes", 2, "--lanes", 4]
    rows = json_of("synth", *options, "--cache", tmp_path)["rows"]
    assert made == [f"synth_ice40 -top {NAME}_{lanes}_float32" for lanes in (2, 4)]
    assert [(row["unit"], row["lanes"], row["formats"]) for row in rows] == [
        (NAME, 2, []), (NAME, 4, [])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["verilog", NAME, "--rows", "2"], "--rows is for other units; beat_register: --lanes"),
        (["verilog", NAME, "-f", "NF4sUE4M4"], "--format is for other units"),
        (["verilog", NAME, "--checkpoint", "model"], "--checkpoint names formats, which this unit"),
        (["synth", "--unit", NAME, "--source", "E4M3"], "--source is for other units"),
        (["verilog", NAME, "--lanes", "0"], "lanes must be at least 1, not 0"),
    ],
)
def test_options_of_others_are_refused(command: list[str], message: str, tmp_path: Path) -> None:
    folder = ["--cache" if command[0] == "synth" else "-o", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        invoke_or_raise(*command, *folder)
    assert not (tmp_path / "out").exists()


def test_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_root: Path, thorough: bool
) -> None:
    if not thorough:
        pytest.skip("only with --all-simulations")
    monkeypatch.syspath_prepend(tmp_path)
    config = BenchConfig("NF4sUE4M4", lanes=1)
    path = tmp_path / "beat_register_bench.py"
    path.write_text(BENCH.format(sent=5))
    run_unit(NAME, config, quickest_simulator(), build_root)
    path.write_text(BENCH.format(sent=4))
    with pytest.raises(SimulationError, match=f"python -m tb.unit_run {NAME}"):
        run_unit(NAME, config, quickest_simulator(), build_root)


def test_build() -> None:
    assert isinstance(build_unit(NAME, (), lanes=2), BeatRegister)
