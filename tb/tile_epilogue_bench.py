"""Cocotb bench of :class:`rtl.tile_epilogue.TileEpilogue`.

The reference is :func:`golden.kernel.finish`, fed by what the input monitors see.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import cocotb
import numpy as np
from cocotb.task import Task
from cocotb.triggers import ClockCycles, with_timeout

from rtl.tile_epilogue import clocks_of_tile
from sim.clock import CLOCK_NS
from sim.tile_codes import difference
from sim.tile_config import EpilogueConfig
from tb.coverage import Counts
from tb.scoreboard import InOrderScoreboard
from tb.tile_epilogue_coverage import EpilogueCoverage
from tb.tile_epilogue_model import Words
from tb.tile_epilogue_traffic import EpilogueTraffic
from tb.unit_bench import UnitBench
from tb.unit_coverage import UnitCoverage

__all__ = ["DRAINED", "TileEpilogueBench"]

TILES = 40
RESETS = 24
DRAINED = 80  # clocks in which whatever is under way has left
TIMEOUT_CLOCKS = 100_000


class TileEpilogueBench(EpilogueTraffic, UnitBench):
    """Drivers, sink, monitors and scoreboard around one unit."""

    latency = DRAINED

    def __init__(self, dut: Any, config: EpilogueConfig) -> None:
        EpilogueTraffic.__init__(self, config)
        self.unchecked = 0
        self._seen: Words = {name: [] for name in self.inputs}
        UnitBench.__init__(
            self, dut, config.stalls, config.seed,
            InOrderScoreboard("TileEpilogue", partial(difference, self.layouts["o"])),
            self._watchers(), self._coverage,
        )  # fmt: skip
        self.transfers = {
            name: monitor.transfers
            for name, monitor in zip(self.layouts, self.monitors, strict=True)
        }

    def _watchers(self) -> dict[str, Callable[[int], None]]:
        return {name: partial(self._watch, name) for name in self.inputs}

    def _coverage(self, counts: Counts) -> UnitCoverage:
        return EpilogueCoverage(counts, self)

    def check(self, word: int) -> None:
        """Compare a word that came out, without what is not checked now."""
        self.scoreboard.actual(word & ~self.unchecked)

    def forget(self) -> None:
        """Nothing is under way, as after a reset."""
        super().forget()
        for words in self._seen.values():
            words.clear()

    def _watch(self, name: str, word: int) -> None:
        """Collect a word; with the last one of a tile, expect its outputs."""
        self._seen[name].append(word)
        tile = self.take_tile(self._seen)
        if tile is not None:
            for step, expected in enumerate(self.outputs(tile)):
                self.scoreboard.expect(expected & ~self.unchecked, f"step {step} of a tile")

    def play(self, tensors: list[Any]) -> tuple[list[Task[Any]], int, int]:
        """Start sending tiles that :meth:`tensors` describes."""
        tiles = [self.legal(drawn) for drawn in tensors]
        words = sum(len(words) for tile in tiles for words in tile.values())
        return self.send(tiles), 8 * words + DRAINED * len(tiles), len(tiles) * self.shape.used

    def send(self, tiles: list[Words]) -> list[Task[Any]]:
        """Start sending tiles."""
        return [
            cocotb.start_soon(driver.send([word for tile in tiles for word in tile[name]]))
            for name, driver in self.drivers.items()
        ]

    def some_words(self) -> tuple[dict[str, list[int]], int]:
        """Words of some tiles by stream, and how many come out."""
        tiles = [self.random_tile(self.rng.choice((1, 2, 3))) for _ in range(4)]
        words = {name: [word for tile in tiles for word in tile[name]] for name in self.drivers}
        return words, len(tiles) * self.shape.used

    async def run(self, tiles: list[Words], *, timed: bool = True) -> None:
        """Send tiles and check every beat that comes out, and the timing where nothing stalls.

        Not ``timed``: corrections that are dropped take their clocks, too.
        """
        checked, count = self.scoreboard.checked, len(tiles) * self.shape.used
        before = {name: len(clocks) for name, clocks in self.transfers.items()}
        self.send(tiles)
        await with_timeout(self.sink.run(count), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
        self.scoreboard.finish(checked + count)
        if timed and self.stalls == "none":
            self._check_timing(
                tiles, {name: clocks[before[name] :] for name, clocks in self.transfers.items()}
            )

    def _check_timing(self, tiles: list[Words], clocks: dict[str, list[int]]) -> None:
        """Sums and outputs come in every clock, and as long apart as is promised."""
        used = self.shape.used
        beats = 0
        for number, tile in enumerate(tiles):
            taken, given = (
                clocks[name][number * used : (number + 1) * used] for name in ("i", "o")
            )
            beats += len(tile["i_activation"])
            assert taken == list(range(taken[0], taken[0] + used)), "sums were stalled"
            # The corrections wait for the last of the tile's activations, and columns.
            kept = max(clocks["i_activation"][beats - 1], taken[-1])
            rows = [row for row, _, _ in self.added(tile)[0]]
            work = clocks_of_tile(self.shape, rows, row_scales=self.weights.row_scale) - 2 * used
            first = taken[-1] + work if not rows else kept + work
            first = max(first, kept + 1) + 2
            assert given == list(range(first, first + used)), (
                f"outputs of tile {number} at {given}, expected from {first} on"
            )
            if number + 1 < len(tiles):
                after = clocks["i"][(number + 1) * used]
                assert after == given[-1], f"the next tile at {after}, expected at {given[-1]}"


@cocotb.test()
async def random_tiles(dut: Any) -> None:
    """Tiles of one block and more, with corrections in every order."""
    bench = TileEpilogueBench(dut, EpilogueConfig.from_environment())
    await bench.start()
    await bench.run([bench.random_tile(bench.rng.choice((1, 1, 2, 4))) for _ in range(TILES)])


@cocotb.test()
async def dropped(dut: Any) -> None:
    """Corrections and columns that cannot be, and numbers that are none, raise flags."""
    bench = TileEpilogueBench(dut, EpilogueConfig.from_environment())
    await bench.start()
    rng, config = bench.rng, bench.config
    blocks = config.slots // bench.size + 1
    channels = blocks * bench.size
    values = (1 << bench.layouts["o"]["values"].width) - 1
    values |= 1 << bench.layouts["o"]["overflow"].offset
    sums = np.array([[bench.random_float(32) for _ in range(config.rows)]
                     for _ in range(config.columns)], np.uint32)  # fmt: skip
    one, infinity = 0x3F80, 0x7F80
    ones = [one] * config.rows
    some = sorted(rng.sample(range(channels), 2))
    good = [[0, 0, one], [config.rows - 1, 1, one]]
    every = list(range(config.slots + 1))

    def tile(columns: list[int], entries: list[list[int]], **more: Any) -> Words:
        scales = more.pop("scales", ones)
        return bench.tile(sums, scales, bench.random_activations(blocks), columns, entries, **more)

    cases = [
        tile(some[:1], [*good[:1], [0, 1, one]]),  # no such slot
        tile([*some, channels], good),  # no such channel
        tile([some[0], channels, some[1]], good[:1]),
        tile([some[1], some[0]], good[:1]),  # does not ascend
        tile(every, good),  # no slot left
        tile([], good),  # none kept
        tile(some, [good[0], [0, 1, infinity], good[1]]),
        tile(some, [good[0], [config.rows - 1, 0, infinity | 1 << 15 | 3]]),
        tile(some, good, reserved=1),
    ]
    if config.rows & (config.rows - 1):
        cases.append(tile(some, [*good, [config.rows, 1, one]]))
    for case in cases:
        await bench.run([case, bench.random_tile(1)], timed=False)
    if bench.weights.row_scale:
        bench.unchecked = values
        await bench.run([tile(some, good, scales=[*ones[1:], infinity])])
        bench.unchecked = 0
        await bench.run([bench.random_tile(1)])


@cocotb.test()
async def late_inputs(dut: Any) -> None:
    """Whatever comes last is waited for."""
    bench = TileEpilogueBench(dut, EpilogueConfig.from_environment())
    await bench.start()
    for name in bench.inputs:
        tiles = [bench.random_tile(1) for _ in range(2)]
        words = {stream: [word for tile in tiles for word in tile[stream]] for stream in tiles[0]}
        for stream, driver in bench.drivers.items():
            if stream != name:
                cocotb.start_soon(driver.send(words[stream]))
        taking = cocotb.start_soon(bench.sink.run(2 * bench.shape.used))
        checked = bench.scoreboard.checked
        await ClockCycles(dut.clk, 4 * DRAINED)
        assert bench.scoreboard.checked == checked, f"did not wait for {name}"
        cocotb.start_soon(bench.drivers[name].send(words[name]))
        await with_timeout(taking, TIMEOUT_CLOCKS * CLOCK_NS, "ns")


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset drops what is under way and leaves nothing behind."""
    bench = TileEpilogueBench(dut, EpilogueConfig.from_environment())
    await bench.start()
    for number in range(RESETS):
        # The first time nothing is under way.
        tiles = [bench.random_tile(bench.rng.choice((1, 2))) for _ in range(4 if number else 0)]
        tasks = bench.send(tiles)
        if number % 4:  # otherwise the first output waits until the reset
            tasks.append(cocotb.start_soon(bench.sink.run(len(tiles) * bench.shape.used)))
        await ClockCycles(dut.clk, bench.rng.randint(1, 8 * bench.size + DRAINED // 2))
        # New traffic at once or when nothing can be left.
        await bench.interrupt(tasks, bench.rng.choice((0, DRAINED)))
        bench.watch()
    await bench.run([bench.random_tile(1) for _ in range(3)])
