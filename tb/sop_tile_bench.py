"""Cocotb bench of :class:`rtl.sop_tile.SopTile`.

The reference is :func:`golden.kernel.matmul`, fed by what the input monitors see.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import cocotb
import numpy as np
from cocotb.task import Task
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout

from golden.formats import FloatFormat
from rtl.sop_tile import LATENCY
from sim.clock import CLOCK_NS
from sim.tile_codes import difference, is_legal, packed
from sim.tile_config import TileConfig
from sim.tile_traffic import Tile, TileTraffic
from tb.coverage import Counts
from tb.scoreboard import InOrderScoreboard
from tb.sop_tile_coverage import TileCoverage
from tb.unit_bench import UnitBench
from tb.unit_coverage import UnitCoverage

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["DRAINED", "SopTileBench"]

DRAINED = LATENCY + 64  # clocks in which all outputs of a tile have left
TILES = 24
RESETS = 16
TIMEOUT_CLOCKS = 200_000


class SopTileBench(TileTraffic, UnitBench):
    """Drivers, sink, monitors and scoreboard around one tile."""

    latency = DRAINED

    def __init__(self, dut: Any, config: TileConfig) -> None:
        TileTraffic.__init__(self, config)
        self.unchecked = 0
        self._seen: dict[str, list[int]] = {"i": [], "i_activation": []}
        UnitBench.__init__(
            self, dut, config.stalls, config.seed,
            InOrderScoreboard("SopTile", partial(difference, self.layouts["o"])),
            self._watchers(), self._coverage,
        )  # fmt: skip

    def _watchers(self) -> dict[str, Callable[[int], None]]:
        """What the monitor of each input calls."""
        return {name: partial(self._watch, name) for name in self._seen}

    def _coverage(self, counts: Counts) -> UnitCoverage:
        return TileCoverage(counts, self.size, self.layouts, self.elements, self.scales)

    def check(self, word: int) -> None:
        """Compare a word that came out, without what is not checked now."""
        self.scoreboard.actual(word & ~self.unchecked)

    def forget(self) -> None:
        """Nothing is under way, as after a reset."""
        super().forget()
        for words in self._seen.values():
            words.clear()

    # --- reference --------------------------------------------------------------------------------

    def _watch(self, name: str, word: int) -> None:
        """Collect a beat; with the last ones of a tile, expect its outputs."""
        self._seen[name].append(word)
        weights, activations = self._seen["i"], self._seen["i_activation"]
        last = self.layouts["i"]["last"].offset
        # A unit may take weights before their activations.
        count = len(activations)
        if 0 < count <= len(weights) and not count % self.size and weights[count - 1] >> last:
            self._expect(weights[:count], activations)
            del weights[:count]
            activations.clear()

    def _expect(self, weights: list[int], activations: list[int]) -> None:
        """Put the outputs of a tile on the scoreboard."""
        for step, word in enumerate(self.outputs(weights, activations)):
            what = f"step {step} of a tile of {len(weights)}"
            self.scoreboard.expect(word & ~self.unchecked, what)

    # --- traffic ----------------------------------------------------------------------------------

    def tensors(self) -> "SearchStrategy[Any]":
        """Tiles as data: bits of beats of both streams, whole blocks."""
        from hypothesis import strategies as st

        def beats(blocks: int) -> "SearchStrategy[Any]":
            count = blocks * self.size
            return st.fixed_dictionaries(
                {
                    name: st.lists(
                        st.integers(0, (1 << self.layouts[name].size) - 1),
                        min_size=count, max_size=count,
                    )
                    for name in ("i", "i_activation")
                }
            )  # fmt: skip

        return st.integers(1, 3).flatmap(beats)

    def play(self, tensors: list[Any]) -> tuple[list[Task[Any]], int, int]:
        """Start sending tiles that :meth:`tensors` describes."""
        tiles = [self.legal(tile) for tile in tensors]
        beats = sum(len(tile["i"]) for tile in tiles)
        return self.send(tiles), 2 * beats + LATENCY, len(tiles) * self.shape.used

    def send(self, tiles: list[Tile]) -> list[Task[Any]]:
        """Start sending tiles."""
        return [
            cocotb.start_soon(
                self.drivers[name].send([word for tile in tiles for word in tile[name]])
            )
            for name in ("i", "i_activation")
        ]

    def some_words(self) -> tuple[dict[str, list[int]], int]:
        """Words of some tiles by stream, and how many come out."""
        tiles = [self.random_tile(self.rng.choice((1, 2, 3))) for _ in range(4)]
        words = {name: [word for tile in tiles for word in tile[name]] for name in self.drivers}
        return words, len(tiles) * self.shape.used

    async def run(self, tiles: list[Tile]) -> None:
        """Send tiles and check every beat that comes out, and the timing where nothing stalls."""
        checked, count = self.scoreboard.checked, len(tiles) * self.shape.used
        monitors = self.input_monitor, self.output_monitor
        before = [len(monitor.transfers) for monitor in monitors]
        self.send(tiles)
        await with_timeout(self.sink.run(count), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
        self.scoreboard.finish(checked + count)
        if self.stalls != "none":
            return
        taken, given = (
            monitor.transfers[start:] for monitor, start in zip(monitors, before, strict=True)
        )
        # A beat in every clock, each of them rows x columns products, across all ends.
        assert taken == list(range(taken[0], taken[0] + len(taken))), "input was stalled"
        ends = np.cumsum([len(tile["i"]) for tile in tiles]) - 1
        due = [taken[end] + LATENCY + step for end in ends for step in range(self.shape.used)]
        assert given == due, f"outputs at {given}, expected at {due}"


@cocotb.test()
async def random_tiles(dut: Any) -> None:
    """Tiles of one block and more, with scales of every kind."""
    bench = SopTileBench(dut, TileConfig.from_environment())
    await bench.start()
    await bench.run([bench.random_tile(bench.rng.choice((1, 1, 2, 3, 5))) for _ in range(TILES)])


@cocotb.test()
async def every_code_pair(dut: Any) -> None:
    """Every code of a weight with every code of an activation, reserved ones apart."""
    bench = SopTileBench(dut, TileConfig.from_environment())
    await bench.start()
    codes = {
        name: [code for code in range(1 << fmt.width) if is_legal(fmt, code)]
        for name, fmt in bench.elements.items()
    }
    one = {name: fmt.bias << fmt.mantissa_bits for name, fmt in bench.scales.items()}
    groups = {
        name: [[listed[(start + number) % len(listed)] for number in range(bench.vectors[name])]
               for start in range(0, len(listed), bench.vectors[name])]
        for name, listed in codes.items()
    }  # fmt: skip
    pairs = [(w, x) for w in groups["i"] for x in groups["i_activation"]]
    pairs += pairs[: -len(pairs) % bench.size]
    beats: Tile = {"i": [], "i_activation": []}
    last = bench.layouts["i"]["last"].offset
    for number, pair in enumerate(pairs):
        for (name, words), chosen in zip(beats.items(), pair, strict=True):
            scales = [one[name]] * bench.vectors[name]
            words.append(packed(bench.layouts[name], codes=chosen, scales=scales))
        # A tile is one block: rounding to float32 loses as little as possible.
        beats["i"][-1] |= int(number % bench.size == bench.size - 1) << last
    tiles = [
        {name: words[start : start + bench.size] for name, words in beats.items()}
        for start in range(0, len(pairs), bench.size)
    ]
    await bench.run(tiles)


@cocotb.test()
async def reserved_codes(dut: Any) -> None:
    """A code without a meaning raises the flag in all beats of its tile, and in no other."""
    bench = SopTileBench(dut, TileConfig.from_environment())
    await bench.start()
    tiles = []
    for name, fmt in bench.elements.items():
        bad = [code for code in range(1 << fmt.width) if not is_legal(fmt, code)]
        exact = not isinstance(fmt, FloatFormat)
        slots = 2 * bench.size * bench.vectors[name]
        # One alone anywhere, then all of them.
        chosen = [[bench.rng.choice(bad)]] * 3 if bad else []
        chosen += [bad[start : start + slots] for start in range(0, len(bad), slots)]
        for codes in chosen:
            tile = bench.random_tile(2, layer_exponent=0)
            for slot, code in zip(bench.rng.sample(range(slots), len(codes)), codes, strict=True):
                place, vector = divmod(slot, bench.vectors[name])
                tile[name][place] &= ~((1 << fmt.width) - 1 << vector * fmt.width)
                tile[name][place] |= code << vector * fmt.width
            tiles.append((exact, tile))
    for name, scale in bench.scales.items():
        if not is_legal(scale, (1 << scale.width) - 1):
            for code in ((1 << scale.width) - 1, (1 << scale.width - 1) - 1):
                tile = bench.random_tile(2, layer_exponent=0)
                offset = bench.layouts[name]["scales"].offset
                tile[name][0] &= ~((1 << scale.width) - 1 << offset)
                tile[name][0] |= code << offset
                tiles.append((False, tile))
    values = (1 << bench.layouts["o"]["values"].width) - 1
    values |= 1 << bench.layouts["o"]["overflow"].offset
    for exact, tile in tiles:
        bench.unchecked = 0 if exact else values
        await bench.run([tile])
        bench.unchecked = 0
        await bench.run([bench.random_tile(1)])


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset drops what is under way and leaves nothing behind."""
    bench = SopTileBench(dut, TileConfig.from_environment())
    await bench.start()
    taken, edge, beats = bench.input_monitor.transfers, RisingEdge(dut.clk), 2 * bench.size
    for number in range(RESETS):
        # The first time nothing is under way.
        tiles = [bench.random_tile(2) for _ in range(4 if number else 0)]
        count, before = len(tiles) * bench.shape.used, len(taken)
        tasks = bench.send(tiles)
        if number % 4:  # otherwise the first output waits until the reset
            tasks.append(cocotb.start_soon(bench.sink.run(count)))
        if number % 2:  # together with the last beat of a tile, if nothing pauses then
            while (len(taken) - before) % beats != beats - 2:
                await edge
        else:
            await ClockCycles(dut.clk, bench.rng.randint(1, 8 * bench.size))
        await bench.interrupt(tasks, DRAINED)
        bench.watch()
    await bench.run([bench.random_tile(2) for _ in range(3)])
