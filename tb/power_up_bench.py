"""Cocotb bench of a unit from power-up on Icarus, where what nothing has written is undefined.

No reference: monitors refuse a ``valid`` or ``ready`` that is undefined and a valid payload with an
undefined bit. Sources leave payloads undefined whenever they offer no word.
"""

import random
from typing import Any

import cocotb
from amaranth.lib import data
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout
from cocotb.types import LogicArray

from rtl.layouts import correction_layout, lut_write_layout
from sim.bench_config import BenchConfig
from sim.clock import CLOCK_NS, start_clock
from sim.stalls import STALL_MODES, stall_pair
from sim.stream import StreamDriver, StreamMonitor, StreamPins, StreamSink

__all__ = ["from_power_up"]

SIDES = ("i_lut", "i_entry")
TIMEOUT_CLOCKS = 20_000


def _words(layout: data.StructLayout, items: list[dict[str, int]]) -> list[int]:
    """Payloads of items, the last of which has ``last``."""
    items[-1]["last"] = 1
    words = []
    for item in items:
        word = 0
        for name, value in item.items():
            word |= value << layout[name].offset
        words.append(word)
    return words


class Traffic:
    """Random tensors for whatever streams a unit has.

    Payloads of ``i`` are random bits: every format here uses all of them.
    """

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.rng = random.Random(config.seed)
        self.config = config
        self.width = len(dut.i__payload)

    def beats(self, count: int) -> list[int]:
        """Payloads of ``i``; ``last`` is their top bit."""
        words = [self.rng.getrandbits(self.width - 1) for _ in range(count)]
        words[-1] |= 1 << self.width - 1
        return words

    def side(self, name: str, beats: int) -> list[int]:
        """Payloads of the other input of a tensor."""
        rng, modes = self.rng, self.config.modes
        if name == "i_entry":
            end = beats * self.config.lanes
            places = sorted(rng.sample(range(end), rng.choice([0, 1, min(20, end)])))
            items = [{"position": place, "value": 0x3F80 | rng.getrandbits(7)} for place in places]
            return _words(correction_layout(), items or [{"empty": 1}])
        layout = lut_write_layout(modes=modes)
        (fmt,) = modes.formats
        items = [
            {"lut": lut, "index": index, "code": rng.getrandbits(modes.hif.width)}
            for lut in range(len(fmt.codebooks))
            for index in range(fmt.lut_entries)
        ]
        return _words(layout, items)


def _undefined(handle: Any) -> bool:
    return not handle.value.is_resolvable


@cocotb.test()
async def from_power_up(dut: Any) -> None:
    """Before the reset anything; after one clock of it nothing undefined where it counts.

    Every kind of stalls twice, each time ended by a reset but for the last.
    """
    config = BenchConfig.from_environment()
    sides = [name for name in SIDES if hasattr(dut, f"{name}__valid")]
    inputs = ["i", *sides]
    pins = {name: StreamPins(dut, name, dut.clk) for name in (*inputs, "o")}
    outputs = [pins["o"].valid, *(pins[name].ready for name in inputs)]

    # Every input is undefined while the clock already runs: registers take what they can get.
    for name in inputs:
        pins[name].valid.value = LogicArray("X")[0]
        pins[name].payload.value = LogicArray("X" * len(pins[name].payload))
    pins["o"].ready.value = LogicArray("X")[0]
    dut.rst.value = LogicArray("X")[0]
    start_clock(dut)
    await ClockCycles(dut.clk, 5)
    assert _undefined(pins["o"].valid), "this simulator gives registers a value at power-up"
    edge = RisingEdge(dut.clk)
    dut.rst.value = 1
    await edge  # the registers see the reset; all other inputs are still undefined

    drivers = {name: StreamDriver(pins[name], undefined=True) for name in inputs}
    sink = StreamSink(pins["o"])
    monitors = [StreamMonitor(part) for part in pins.values()]
    traffic = Traffic(dut, config)
    dut.rst.value = 0
    rounds = [*STALL_MODES, *STALL_MODES]
    for number, stalls in enumerate(rounds):
        # After one clock of reset.
        await edge
        for handle in outputs:
            assert not _undefined(handle), f"{handle._name} is {handle.value} after reset {number}"
        assert not pins["o"].valid.value, f"a beat comes out after reset {number}"
        drivers["i"].stalls, sink.stalls = stall_pair(stalls, number)
        for name in sides:
            drivers[name].stalls = stall_pair(stalls, number + 100)[0]
        for monitor in monitors:
            monitor.start()
        lengths = [traffic.rng.choice([1, 2, 9]) for _ in range(5)]
        words: dict[str, list[list[int]]] = {name: [] for name in inputs}
        for length in lengths:
            words["i"].append(traffic.beats(length))
            for name in sides:
                words[name].append(traffic.side(name, length))

        async def send(driver: StreamDriver, tensors: list[list[int]]) -> None:
            for tensor in tensors:
                await driver.send(tensor)

        tasks = [cocotb.start_soon(send(drivers[name], words[name])) for name in inputs]
        taking = sink.run(sum(lengths))
        if number == len(rounds) - 1:
            await with_timeout(taking, TIMEOUT_CLOCKS * CLOCK_NS, "ns")
            return
        tasks.append(cocotb.start_soon(taking))
        # Traffic goes on while the registers see the reset.
        await ClockCycles(dut.clk, traffic.rng.randint(1, 120))
        for monitor in monitors:
            monitor.stop()
        dut.rst.value = 1
        await edge
        for task in tasks:
            task.cancel()
        for driver in drivers.values():
            driver.rest()
        sink.pins.ready.value = 0
        dut.rst.value = 0
