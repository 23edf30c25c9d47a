"""Parts with streams, each alone: every word comes out once, in order, whatever stalls."""

from pathlib import Path

import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

import rtl.parts.pipeline
import rtl.register_slice
from rtl.verilog import to_verilog
from sim.installed import quickest_simulator
from sim.simulator import SimulationError
from tb.faults import NOTICED, changed_module
from tests.support.stage import WIDTH, run_stage


class HandThrough(wiring.Component):  # type: ignore[misc]  # Amaranth is untyped
    """Words through the stages of :class:`rtl.parts.pipeline.Handshakes`.

    Members
    -------
    i, o : stream.Signature(unsigned)
        Words.
    """

    def __init__(self, stages: int, handshakes: type = rtl.parts.pipeline.Handshakes) -> None:
        self.stages = stages
        self.handshakes = handshakes
        super().__init__({"i": In(stream.Signature(WIDTH)), "o": Out(stream.Signature(WIDTH))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        pipeline = self.handshakes(m, self.i, self.o, self.stages)
        word = self.i.p
        for number in range(self.stages):
            held = Signal(WIDTH, name=f"word_{number}")
            with pipeline.stage(number):
                m.d.sync += held.eq(word)
            word = held
        m.d.comb += self.o.p.eq(word)
        return m


PARTS = {
    "2 stages": HandThrough(2),
    "5 stages": HandThrough(5),
    "slice": rtl.register_slice.RegisterSlice(shape=WIDTH),
}


@pytest.mark.parametrize("stalls", ["none", "both"])
@pytest.mark.parametrize("part", PARTS)
def test_words_arrive_in_order(part: str, stalls: str, build_root: Path) -> None:
    """Without stalls also one word in every clock."""
    run_stage(to_verilog(PARTS[part], "stage"), quickest_simulator(), build_root, stalls=stalls)


@pytest.mark.parametrize(
    ("old", "new", "stalls"),
    [
        ("ready[-1].eq(~o.valid | o.ready)", "ready[-1].eq(1)", "both"),
        ("with m.If(ready):", "with m.If(ready & self._valid[number]):", "both"),
        ("i.ready.eq(~valid[0] | ready[0])", "i.ready.eq(~valid[0])", "none"),
    ],
    ids=["overwritten", "doubled", "bubbles"],
)
def test_a_wrong_handshake_is_noticed(old: str, new: str, stalls: str, build_root: Path) -> None:
    faulty = changed_module(rtl.parts.pipeline, old, new).Handshakes
    verilog = to_verilog(HandThrough(3, faulty), "stage")
    with pytest.raises(SimulationError, match=NOTICED):
        run_stage(verilog, quickest_simulator(), build_root, stalls=stalls)
