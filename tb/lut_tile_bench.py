"""Cocotb bench of :class:`rtl.lut_tile.LutTile`.

The reference is the definition of a lookup, and behind it that of :mod:`tb.sop_tile_bench`:
:func:`golden.kernel.matmul`, fed by what the input monitors see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import cocotb
from cocotb.task import Task
from cocotb.triggers import ClockCycles, with_timeout

from golden.promotion import element_exponent
from rtl.layouts import tile_indices_layout
from rtl.lut_tile import LATENCY
from sim.clock import CLOCK_NS
from sim.lut_model import LutModel
from sim.tile_codes import fields_of, is_legal, packed
from sim.tile_config import LutTileConfig
from tb.coverage import Counts
from tb.lut_tile_coverage import LutTileCoverage
from tb.sop_tile_bench import DRAINED, TIMEOUT_CLOCKS, SopTileBench
from tb.unit_coverage import UnitCoverage

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TENSORS = 16
RESETS = 12


@dataclass
class Tensor:
    """Traffic of one tensor: payloads of every stream, and how many tiles and beats they are."""

    words: dict[str, list[int]] = field(
        default_factory=lambda: {"i": [], "i_lut": [], "i_activation": []}
    )
    ends: list[int] = field(default_factory=list)


class LutTileBench(SopTileBench):
    """Drivers, sink, monitors and scoreboard around one tile with LUTs."""

    def __init__(self, dut: Any, config: LutTileConfig) -> None:
        self.model = LutModel(config.modes)
        self.indices = tile_indices_layout(rows=config.rows, modes=config.modes)
        self._clear()
        super().__init__(dut, config)

    def _watchers(self) -> dict[str, Callable[[int], None]]:
        return {
            "i_lut": self.model.write,
            "i": self._look_up,
            "i_activation": partial(self._watch, "i_activation"),
        }

    def _coverage(self, counts: Counts) -> UnitCoverage:
        return LutTileCoverage(counts, self.model.modes, self.size, self.indices, self.layouts["o"])

    def _clear(self) -> None:
        self._place = 0
        self._words: list[int] = []  # scale words of the block

    def forget(self) -> None:
        """Nothing is under way, as after a reset."""
        super().forget()
        self.model.clear()
        self._clear()

    def _look_up(self, word: int) -> None:
        """Weights of a beat of indices."""
        luts, layer_exponent, _, fmt = self.model.current()
        if not self._place:
            self._words = fields_of(self.indices, word, "scale_words")
        self._place = (self._place + 1) % self.size
        indices = fields_of(self.indices, word, "indices")
        last, last_tile = (word >> self.indices[name].offset & 1 for name in ("last", "last_tile"))
        weights = packed(
            self.layouts["i"],
            codes=[
                self.model.decode_element(fmt, luts, scale_word, index)
                for scale_word, index in zip(self._words, indices, strict=True)
            ],
            scales=[fmt.word.scale_code(scale_word) for scale_word in self._words],
            layer_exponent=layer_exponent,
            last=last,
        )
        if last and last_tile and not self._place:
            self.model.tensor += 1
        self._watch("i", weights)

    # --- traffic ----------------------------------------------------------------------------------

    def random_tensor(self, tiles: Sequence[int], mode: int | None = None) -> Tensor:
        """Random indices, scale words and LUTs; of each tile the number of its blocks is given."""
        rng, modes = self.rng, self.model.modes
        mode = rng.randrange(len(modes.formats)) if mode is None else mode
        fmt, places, result = modes.formats[mode], self.model.places(mode), Tensor()
        rng.shuffle(places)
        entries = self.elements["i"]
        codes = [code for code in range(1 << entries.width) if is_legal(entries, code)]
        low = -128 - element_exponent(fmt)  # the sum with its own exponent is golden's
        exponents = [rng.getrandbits(8) for _ in places[1:]]
        exponents.append(rng.choice((0, rng.randint(low, 127))) & 0xFF)
        # Only the last write counts.
        noise = [rng.getrandbits(max(1, modes.mode_bits)) for _ in places[1:]]
        result.words["i_lut"] = self.model.writes(
            places, [rng.choice(codes) for _ in places], exponents, [*noise, mode]
        )
        for number, blocks in enumerate(tiles):
            result.words["i_activation"] += self.random_tile(blocks)["i_activation"]
            result.words["i"] += self._tile(mode, blocks, last=number == len(tiles) - 1)
            result.ends.append(len(result.words["i"]))
        return result

    def _tile(self, mode: int, blocks: int, *, last: bool) -> list[int]:
        """Words of ``i`` of one tile."""
        rng, fmt = self.rng, self.model.modes.formats[mode]
        rows, words = self.config.rows, []
        for block in range(blocks):
            kind = rng.randrange(4)
            for place in range(self.size):
                # Where they do not count scale words and ends are anything.
                scales = [rng.getrandbits(fmt.word.width) for _ in range(rows)]
                ends = {"last": rng.getrandbits(1), "last_tile": rng.getrandbits(1)}
                if not place:
                    scales = [
                        fmt.word.join(
                            self.scale_code("i", kind), rng.getrandbits(fmt.word.metabit_bits)
                        )
                        for _ in range(rows)
                    ]
                if place == self.size - 1:
                    ends["last"] = int(block == blocks - 1)
                    if ends["last"]:
                        ends["last_tile"] = int(last)
                indices = [rng.getrandbits(fmt.index_bits) for _ in range(rows)]
                words.append(packed(self.indices, indices=indices, scale_words=scales, **ends))
        return words

    def tensors(self) -> "SearchStrategy[Any]":
        """Tensors as data: format, blocks of each tile, and a seed of all that is in them."""
        from hypothesis import strategies as st

        return st.fixed_dictionaries(
            {
                "mode": st.integers(0, len(self.model.modes.formats) - 1),
                "tiles": st.lists(st.integers(1, 3), min_size=1, max_size=3),
                "seed": st.integers(0, 1 << 16),
            }
        )

    def play(self, tensors: list[Any]) -> tuple[list[Task[Any]], int, int]:
        """Start sending tensors that :meth:`tensors` describes."""
        made = []
        for drawn in tensors:
            self.rng.seed(drawn["seed"])
            made.append(self.random_tensor(drawn["tiles"], drawn["mode"]))
        words = sum(len(words) for tensor in made for words in tensor.words.values())
        tiles = sum(len(tensor.ends) for tensor in made)
        return self.send_tensors(made), 2 * words + LATENCY, tiles * self.shape.used

    def some_words(self) -> tuple[dict[str, list[int]], int]:
        """Words of some tensors by stream, and how many come out."""
        tensors = [self.random_tensor([1, 2]) for _ in range(2)]
        tiles = sum(len(tensor.ends) for tensor in tensors)
        return {
            name: [word for tensor in tensors for word in tensor.words[name]]
            for name in self.drivers
        }, tiles * self.shape.used

    def send_tensors(self, tensors: Sequence[Tensor]) -> list[Task[Any]]:
        """Start sending tensors and their LUTs."""
        return [
            cocotb.start_soon(
                driver.send([word for tensor in tensors for word in tensor.words[name]])
            )
            for name, driver in self.drivers.items()
        ]

    async def receive(self, tensors: Sequence[Tensor]) -> None:
        """Take and check all that comes out of some tensors."""
        count = sum(len(tensor.ends) for tensor in tensors) * self.shape.used
        checked = self.scoreboard.checked
        await with_timeout(self.sink.run(count), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
        self.scoreboard.finish(checked + count)


@cocotb.test()
async def random_tensors(dut: Any) -> None:
    """Tensors shorter than a LUT load, where the input waits, and longer ones."""
    bench = LutTileBench(dut, LutTileConfig.from_environment())
    await bench.start()
    choose = bench.rng.choice
    tensors = [
        bench.random_tensor([choose((1, 1, 2, 4)) for _ in range(choose((1, 2, 3)))])
        for _ in range(TENSORS)
    ]
    bench.send_tensors(tensors)
    await bench.receive(tensors)


@cocotb.test()
async def full_rate(dut: Any) -> None:
    """With LUTs loaded in time a beat every clock, across tensors too, and exact latency."""
    config = LutTileConfig.from_environment()
    bench = LutTileBench(dut, config)
    if config.stalls != "none":
        dut._log.info("timing is checked where nothing stalls")
        return
    await bench.start()
    writes = max(len(fmt.codebooks) * fmt.lut_entries for fmt in config.modes.formats)
    blocks = writes // bench.size + 1  # longer than a load
    tensors = [bench.random_tensor([1, blocks]) for _ in range(4)]
    bench.send_tensors(tensors)
    await bench.receive(tensors)
    taken, given = bench.input_monitor.transfers, bench.output_monitor.transfers
    assert taken == list(range(taken[0], taken[0] + len(taken))), "a bubble"
    start, due = 0, list[int]()
    for tensor in tensors:
        for end in tensor.ends:
            first = taken[start + end - 1] + LATENCY
            due += range(first, first + bench.shape.used)
        start += tensor.ends[-1]
    assert given == due, f"outputs at {given}, expected at {due}"


@cocotb.test()
async def waits_for_luts(dut: Any) -> None:
    """Without LUTs no beat is taken, at the start and after the last tensor."""
    bench = LutTileBench(dut, LutTileConfig.from_environment())
    await bench.start()
    tensor = bench.random_tensor([1])
    for _ in range(2):
        taken = len(bench.input_monitor.transfers)
        for name in ("i", "i_activation"):
            cocotb.start_soon(bench.drivers[name].send(tensor.words[name]))
        await ClockCycles(dut.clk, 4 * bench.size)
        assert len(bench.input_monitor.transfers) == taken, "a beat was taken without LUTs"
        cocotb.start_soon(bench.drivers["i_lut"].send(tensor.words["i_lut"]))
        await bench.receive([tensor])


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset drops what is under way and leaves nothing behind."""
    bench = LutTileBench(dut, LutTileConfig.from_environment())
    await bench.start()
    for number in range(RESETS):
        # The first time nothing is under way.
        tensors = [bench.random_tensor([1, 2]) for _ in range(4 if number else 0)]
        tasks = bench.send_tensors(tensors)
        if number % 3:  # otherwise the first output waits until the reset
            count = sum(len(tensor.ends) for tensor in tensors) * bench.shape.used
            tasks.append(cocotb.start_soon(bench.sink.run(count)))
        await ClockCycles(dut.clk, bench.rng.randint(1, 12 * bench.size))
        await bench.interrupt(tasks, DRAINED)
        assert not dut.i__ready.value, "LUTs survived the reset"
        bench.watch()
    tensors = [bench.random_tensor([2, 1]) for _ in range(3)]
    bench.send_tensors(tensors)
    await bench.receive(tensors)
