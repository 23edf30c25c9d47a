"""Scenarios of the tile, for the timing diagrams of :mod:`sim.timing.wavejson`."""

from typing import Any

import cocotb
from cocotb.triggers import ClockCycles

from sim.clock import reset, start_clock
from sim.stream import StreamDriver, StreamPins
from sim.tile_config import TileConfig
from sim.tile_traffic import Tile, TileTraffic
from sim.timing.recorder import Recorder
from sim.timing.stream_bench import named, pauses

__all__ = ["TileScene"]

INPUTS = ("i", "i_activation")


class TileScene:
    """Drivers and recorder around one tile, and tiles A, B and so on."""

    def __init__(self, dut: Any, *blocks: int) -> None:
        self.dut = dut
        traffic = TileTraffic(TileConfig.from_environment())
        self.recorder = Recorder(dut)
        self.words: dict[str, list[int]] = {name: [] for name in INPUTS}
        labels: dict[str, dict[int, Any]] = {name: {} for name in (*INPUTS, "o")}
        for number, count in enumerate(blocks):
            tile = self._framed(traffic, traffic.random_tile(count, layer_exponent=0))
            tile["o"] = traffic.outputs(tile["i"], tile["i_activation"])
            for name, words in tile.items():
                labels[name] |= named(words, "AB"[number], number)
            for name in INPUTS:
                self.words[name] += tile[name]
        for name in (*INPUTS, "o"):
            fields = () if name == "i_activation" else ("last",)
            self.recorder.payload(name, labels[name], traffic.layouts[name], *fields)
        for name in INPUTS:
            getattr(dut, f"{name}__valid").value = 0
        dut.o__ready.value = 1
        start_clock(dut)

    @staticmethod
    def _framed(traffic: TileTraffic, tile: Tile) -> Tile:
        """With ``last`` in the final beat alone: elsewhere random traffic has it at random."""
        last = 1 << traffic.layouts["i"]["last"].offset
        return {**tile, "i": [*(word & ~last for word in tile["i"][:-1]), tile["i"][-1]]}

    async def start(self, *idle: int) -> None:
        """Reset, record, offer all beats; activations wait so many clocks before the first ones."""
        await reset(self.dut)
        self.recorder.start()
        for name, waits in zip(INPUTS, ((1,), (1, *idle)), strict=True):
            driver = StreamDriver(StreamPins(self.dut, name, self.dut.clk), pauses(*waits))
            cocotb.start_soon(driver.send(self.words[name]))


@cocotb.test()
async def sop_tile_two(dut: Any) -> None:
    """Two tiles of two blocks, one behind the other."""
    scene = TileScene(dut, 2, 2)
    await scene.start()
    await ClockCycles(dut.clk, 96)
    scene.recorder.write("sop_tile_two")


@cocotb.test()
async def sop_tile_stall(dut: Any) -> None:
    """Activations that come late, and an output that is not taken."""
    scene = TileScene(dut, 1, 1)
    await scene.start(0, 2)
    await ClockCycles(dut.clk, 33)
    dut.o__ready.value = 0
    await ClockCycles(dut.clk, 3)
    dut.o__ready.value = 1
    await ClockCycles(dut.clk, 30)
    scene.recorder.write("sop_tile_stall")
