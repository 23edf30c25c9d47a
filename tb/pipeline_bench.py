"""What the benches of HifToFloat and FloatToHif share: one stream in, one out, each beat alone."""

import random
from typing import TYPE_CHECKING, Any

import cocotb
from amaranth.lib import data
from cocotb.task import Task
from cocotb.triggers import ClockCycles, with_timeout

from sim.clock import CLOCK_NS
from tb import shrink
from tb.unit_bench import UnitBench

__all__ = ["PipelineBench"]

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

RESETS = 8
TIMEOUT_CLOCKS_PER_BEAT = 64


class PipelineBench(UnitBench):
    """Bench of a unit that makes a beat of each beat, ``latency`` clocks later."""

    latency: int
    layout_in: data.StructLayout
    rng: random.Random

    def random_words(self, count: int) -> list[int]:
        """Random payloads of input beats."""
        raise NotImplementedError  # each unit has its own

    def legal(self, word: int) -> int:
        """The payload of an input beat that any bits are made into."""
        return word

    def tensors(self) -> "SearchStrategy[Any]":
        """Tensors as data: bits of beats."""
        return shrink.beats_of_bits(self.layout_in["last"].offset)

    def play(self, tensors: list[Any]) -> tuple[list[Task[Any]], int, int]:
        """Start sending tensors that :meth:`tensors` describes."""
        words: list[int] = []
        for beats in tensors:
            words += map(self.legal, beats)
            words[-1] |= 1 << self.layout_in["last"].offset
        return [cocotb.start_soon(self.driver.send(words))], len(words), len(words)

    async def run(self, words: list[int]) -> None:
        """Send beats and check every one that comes out, and the timing where nothing stalls."""
        checked = self.scoreboard.checked
        before = len(self.input_monitor.transfers), len(self.output_monitor.transfers)
        cocotb.start_soon(self.driver.send(words))
        limit = (len(words) + 10) * TIMEOUT_CLOCKS_PER_BEAT * CLOCK_NS
        await with_timeout(self.sink.run(len(words)), limit, "ns")
        self.scoreboard.finish(checked + len(words))
        if self.stalls == "none":
            taken = self.input_monitor.transfers[before[0] :]
            given = self.output_monitor.transfers[before[1] :]
            assert taken == list(range(taken[0], taken[0] + len(words))), "input was stalled"
            latencies = {out - into for into, out in zip(taken, given, strict=True)}
            assert latencies == {self.latency}, f"latencies {latencies}"

    async def fill_while_stalled(self, words: list[int]) -> None:
        """While the output is stalled the unit takes one beat per pipeline stage, and no more."""
        # The first beat reaches the output before the next one is offered: an empty stage in
        # between.
        await self.driver.send(words[:1])
        await ClockCycles(self.dut.clk, 10)
        cocotb.start_soon(self.driver.send(words[1:]))
        await ClockCycles(self.dut.clk, 100)
        assert len(self.input_monitor.transfers) == self.latency
        await with_timeout(self.sink.run(len(words)), 1000 * CLOCK_NS, "ns")
        self.scoreboard.finish(len(words))

    async def reset_in_mid_traffic(self, beats: int, clocks: int) -> None:
        """A reset after up to so many clocks drops what is under way and leaves nothing behind."""
        for number in range(RESETS):
            # The first time nothing is under way.
            words = self.random_words(beats if number else 0)
            tasks = [
                cocotb.start_soon(self.driver.send(words)),
                cocotb.start_soon(self.sink.run(len(words))),
            ]
            await ClockCycles(self.dut.clk, self.rng.randint(1, clocks))
            await self.interrupt(tasks, self.latency)
            self.watch()
        await self.run(self.random_words(beats))
