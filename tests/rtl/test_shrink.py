"""Random traffic on every unit; what fails is shrunk to the smallest traffic and repeatable."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from amaranth.lib import wiring

import rtl.correction_window
import rtl.float_to_hif
import rtl.hif_to_float
import rtl.lut_decoder
import rtl.parts.pipeline
import rtl.sparse_merge
import tb.unit_run
from rtl.layouts import FLOAT32
from rtl.verilog import to_verilog
from sim.bench_config import BenchConfig
from sim.installed import quickest_simulator
from sim.simulator import Design, SimulationError, simulate
from tb.faults import changed_module
from tb.float_to_hif_bench import ConverterConfig
from tb.traffic import (
    EXAMPLES_VARIABLE,
    RANDOM_TRAFFIC,
    TRAFFIC_BENCH,
    TRAFFIC_FILE,
    UNIT_VARIABLE,
)
from tb.unit_run import main, run_unit

SIMULATOR = quickest_simulator()
# Where Hypothesis starts depends on the seed, and on constants that it finds in our modules; from a
# some starts it ends at traffic of which no part can be left out, but which is not the smallest.
SINGLE = BenchConfig("NF4sUE4M4", "HIF8", lanes=16, seed=4)
CONVERTER = ConverterConfig("E4M3", "HIF8", lanes=4, shift=1, seed=1)
EXAMPLES, ALL_EXAMPLES = 100, 2000  # the second with --all-simulations


@pytest.mark.parametrize(
    ("unit", "config"),
    [
        ("lut_decoder", SINGLE),
        ("hif_to_float", SINGLE),
        ("sparse_merge", BenchConfig("NF4sUE4M4", lanes=16, seed=1)),
        ("float_to_hif", CONVERTER),
    ],
)
def test_random_traffic(
    unit: str, config: BenchConfig | ConverterConfig, build_root: Path, thorough: bool
) -> None:
    examples = ALL_EXAMPLES if thorough else EXAMPLES
    environment = {EXAMPLES_VARIABLE: str(examples)}
    run_unit(unit, config, SIMULATOR, build_root, RANDOM_TRAFFIC, environment)


# --- smallest traffic -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A wrong version of a unit, and what the smallest traffic that shows it needs."""

    name: str
    module: ModuleType
    old: str
    new: str
    tensors: int
    beats: int
    stalls: int = 0
    corrections: int = 0
    part: ModuleType | None = None  # of `module`, with the text


LUT, FLOAT = rtl.lut_decoder, rtl.hif_to_float
MERGE, CONVERT = rtl.sparse_merge, rtl.float_to_hif
PIPELINE, WINDOW = rtl.parts.pipeline, rtl.correction_window

FAULTS = (
    Fault("bank changes before the last beat", LUT, "change_at(step & self.i.p.last)",
          "change_at(step)", tensors=1, beats=2),
    # Of this and the next one: the third beat overwrites the second one, which waits because of
    # the one pause.
    Fault("beat lost when stalled", LUT, "loaded & (~self.o.valid | self.o.ready)", "loaded",
          tensors=1, beats=3, stalls=1),
    Fault("stage overwritten when stalled", FLOAT, "ready[-1].eq(~o.valid | o.ready)",
          "ready[-1].eq(1)", tensors=1, beats=3, stalls=1, part=PIPELINE),
    Fault("position not reset", MERGE, "*(end.eq(end.init) for end in ends)", "",
          tensors=2, beats=4, corrections=1, part=WINDOW),
    Fault("beat doubled", CONVERT, "with m.If(ready):",
          "with m.If(ready & self._valid[number]):", tensors=1, beats=1, part=PIPELINE),
)  # fmt: skip


def broken(fault: Fault) -> tuple[wiring.Component, Any]:
    """The wrong unit and a configuration."""
    module = changed_module(fault.module, fault.old, fault.new, part=fault.part)
    if fault.module is LUT:
        return module.LutDecoder(lanes=SINGLE.lanes, modes=SINGLE.modes), SINGLE
    if fault.module is FLOAT:
        modes = SINGLE.modes
        return module.HifToFloat(lanes=SINGLE.lanes, modes=modes, float_layout=FLOAT32), SINGLE
    if fault.module is MERGE:
        return module.SparseMerge(lanes=SINGLE.lanes, float_layout=FLOAT32), SINGLE
    config = CONVERTER
    unit = module.FloatToHif(
        lanes=config.lanes, source=config.source, hif=config.hif, shift=config.shift
    )
    return unit, config


def smallest(fault: Fault, build_root: Path) -> list[dict[str, Any]]:
    """Smallest traffic that shows a fault."""
    unit, config = broken(fault)
    unit_name = fault.module.__name__.rpartition(".")[2]
    name = f"{unit_name}_under_test"
    with pytest.raises(SimulationError, match="Smallest traffic") as caught:
        simulate(
            Design(name, to_verilog(unit, name), randomize=True),
            module=TRAFFIC_BENCH,
            simulator=SIMULATOR,
            build_root=build_root,
            environment={**config.as_environment(), UNIT_VARIABLE: unit_name},
            seed=config.seed,
        )
    traffic: list[dict[str, Any]] = json.loads((caught.value.folder / TRAFFIC_FILE).read_text())
    return traffic


@pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: f"{fault.module.__name__}: {fault.name}"
)
def test_a_fault_shrinks_to_its_smallest_traffic(fault: Fault, build_root: Path) -> None:
    traffic = smallest(fault, build_root)
    tensors = [tensor for one in traffic for tensor in one["tensors"]]
    beats = [tensor["beats"] if isinstance(tensor, dict) else tensor for tensor in tensors]
    pauses = [pause for one in traffic for part in one["stalls"].values() for pause in part]
    corrections = [one for tensor in tensors if isinstance(tensor, dict)
                   for one in tensor.get("corrections", ())]  # fmt: skip
    # What survives a reset can leave rounds with nothing in them.
    (played,) = [one for one in traffic if one["tensors"]]
    assert played["reset_after"] is None
    assert len(tensors) == fault.tensors
    assert sum(map(len, beats)) == fault.beats
    assert sum(map(bool, pauses)) == fault.stalls
    assert len(corrections) == fault.corrections


def test_the_smallest_traffic_is_repeated_by_one_command(
    build_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[2]
    unit, config = broken(fault)
    text = "hif_to_float_broken", to_verilog(unit, "hif_to_float_broken")
    monkeypatch.setattr(tb.unit_run, "_verilog", lambda unit, config: text)
    with pytest.raises(SimulationError) as caught:
        run_unit("hif_to_float", config, SIMULATOR, build_root, RANDOM_TRAFFIC)
    message = str(caught.value)
    waveform = re.search(r"Waveform: (\S+)", message)
    command = re.search(r"Repeat with: (.*)", message)
    assert waveform is not None
    assert command is not None
    assert Path(waveform[1]).stat().st_size > 0
    words = shlex.split(command[1])
    assert words[:4] == ["python", "-m", "tb.unit_run", "hif_to_float"]
    assert main([*words[3:], "--build", str(build_root)]) == 1
    again = capsys.readouterr().err
    assert command[1] in again
    # This time it is played once and nothing is searched.
    assert "Smallest traffic" in message
    assert "Smallest traffic" not in again
