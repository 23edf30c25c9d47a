"""Cocotb bench of :class:`rtl.sop_tile.SopTile`.

The reference is :func:`golden.kernel.matmul`, fed by what the input monitors see.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import cocotb
import numpy as np
from amaranth.lib import data
from cocotb.task import Task
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout

from golden.activations import QuantizedActivations
from golden.formats import FloatFormat, HifFormat, Kind, NumberFormat
from golden.kernel import matmul
from golden.tensor import QuantizedTensor
from rtl.layouts import tile_activations_layout, tile_outputs_layout, tile_weights_layout
from rtl.sop_tile import LATENCY, TileShape
from rtl.tile_units import tile_parameters
from tb.bench import CLOCK_NS
from tb.coverage import Counts
from tb.scoreboard import InOrderScoreboard
from tb.sop_tile_coverage import TileCoverage
from tb.tile_config import TileConfig
from tb.unit_bench import UnitBench
from tb.unit_coverage import UnitCoverage

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["DRAINED", "SopTileBench"]

DRAINED = LATENCY + 64  # clocks in which all outputs of a tile have left
TILES = 24
RESETS = 16
TIMEOUT_CLOCKS = 200_000


def is_legal(fmt: NumberFormat, code: int) -> bool:
    """Whether a code has a meaning."""
    return fmt.decode(code).kind not in (Kind.NAN, Kind.RESERVED)


def substitute(fmt: NumberFormat, code: int) -> int:
    """A code with a meaning that the hardware takes a code for: itself, if it has one.

    HIF shifts that do not exist are the highest, the lowest integer is 0; NaN has no substitute and
    becomes 0.
    """
    if is_legal(fmt, code):
        return code
    if isinstance(fmt, HifFormat):
        return fmt.shifts - 1 << fmt.significand_bits | code & (1 << fmt.significand_bits) - 1
    return 0


def fields_of(layout: data.StructLayout, word: int, name: str) -> list[int]:
    """Elements of an array field, unsigned."""
    field = layout[name]
    width = field.width // field.shape.length
    part = word >> field.offset
    return [part >> number * width & (1 << width) - 1 for number in range(field.shape.length)]


def packed(layout: data.StructLayout, **fields: list[int] | int) -> int:
    """A payload from the codes of array fields and the values of others, negative ones too."""
    word = 0
    for name, values in fields.items():
        field = layout[name]
        items = values if isinstance(values, list) else [values]
        width = field.width // len(items)
        for number, value in enumerate(items):
            word |= (value & (1 << width) - 1) << field.offset + number * width
    return word


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


class SopTileBench(UnitBench):
    """Drivers, sink, monitors and scoreboard around one tile."""

    latency = DRAINED

    def __init__(self, dut: Any, config: TileConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self.weights, self.activations = config.weight_format, config.activation_format
        unit = tile_parameters(self.weights, self.activations)
        self.size = unit["block_size"]
        self.shape = TileShape(config.rows, config.columns, self.size)
        self.elements = {"i": unit["weight"], "i_activation": unit["activation"]}
        self.scales = {"i": unit["weight_scale"], "i_activation": unit["activation_scale"]}
        self.vectors = {"i": config.rows, "i_activation": config.columns}
        self.layouts: dict[str, data.StructLayout] = {
            "i": tile_weights_layout(
                rows=config.rows, element=unit["weight"], scale=unit["weight_scale"]
            ),
            "i_activation": tile_activations_layout(
                columns=config.columns, element=unit["activation"], scale=unit["activation_scale"]
            ),
            "o": tile_outputs_layout(units=self.shape.units),
        }
        self.unchecked = 0
        self._seen: dict[str, list[int]] = {"i": [], "i_activation": []}
        super().__init__(
            dut, config.stalls, config.seed, InOrderScoreboard("SopTile", self._explain),
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

    def _explain(self, expected: int, actual: int) -> str:
        layout = self.layouts["o"]
        pairs = zip(
            fields_of(layout, expected, "values"), fields_of(layout, actual, "values"), strict=True
        )
        lines = [
            f"unit {unit}: got {got:#x}, expected {wanted:#x}"
            for unit, (wanted, got) in enumerate(pairs)
            if wanted != got
        ]
        for flag in ("reserved", "overflow", "last"):
            got = actual >> layout[flag].offset & 1
            if got != expected >> layout[flag].offset & 1:
                lines.append(f"{flag}: got {got}")
        return "; ".join(lines)

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

    def _codes(self, name: str, words: list[int], field: str) -> np.ndarray[Any, Any]:
        """Codes of a field, shape (beats, vectors)."""
        return np.array([fields_of(self.layouts[name], word, field) for word in words])

    def _expect(self, weights: list[int], activations: list[int]) -> None:
        """Put the outputs of a tile on the scoreboard."""
        for step, word in enumerate(self.outputs(weights, activations)):
            what = f"step {step} of a tile of {len(weights)}"
            self.scoreboard.expect(word & ~self.unchecked, what)

    def outputs(self, weights: list[int], activations: list[int]) -> list[int]:
        """Payloads that the beats of a tile give, as golden computes them."""
        layout = self.layouts["i"]
        parts: dict[str, list[np.ndarray[Any, Any]]] = {}
        reserved = False
        for name, words in (("i", weights), ("i_activation", activations)):
            parts[name] = []
            for field, fmt, used in (
                ("codes", self.elements[name], words),
                ("scales", self.scales[name], words[:: self.size]),
            ):
                codes = self._codes(name, used, field)
                reserved |= not all(is_legal(fmt, code) for code in set(codes.ravel().tolist()))
                legal = np.vectorize(lambda code, fmt=fmt: substitute(fmt, code))(codes)
                blocks = (self.vectors[name], -1, self.size) if field == "codes" else (-1,)
                parts[name].append(legal.T.reshape(*blocks) if field == "codes" else legal.T)
        columns = len(weights)
        offset, width = layout["layer_exponent"].offset, layout["layer_exponent"].width
        exponents = None
        if self.activations.has_token_exponents:
            codes = self._codes("i_activation", activations[:1], "token_exponents")[0]
            exponents = np.array([_signed(int(code), 8) for code in codes], np.int16)
        result = matmul(
            QuantizedTensor(
                self.weights, (self.config.rows, columns), parts["i"][0].astype(np.uint8),
                parts["i"][1].astype(np.uint16), (),
                _signed(weights[0] >> offset & (1 << width) - 1, width),
            ),
            QuantizedActivations(
                self.activations, (self.config.columns, columns),
                parts["i_activation"][0].astype(np.uint8),
                parts["i_activation"][1].astype(np.uint16), exponents,
            ),
        )  # fmt: skip
        words = []
        for step in range(self.shape.used):
            places = [self.shape.place(unit, step) for unit in range(self.shape.units)]
            word = packed(
                self.layouts["o"],
                values=[int(result.bits[place[1], place[0]]) if place else 0 for place in places],
                reserved=int(reserved),
                overflow=int(any(result.overflow[place[1], place[0]] for place in places if place)),
                last=int(step == self.shape.used - 1),
            )
            words.append(word)
        return words

    # --- traffic ----------------------------------------------------------------------------------

    def code(self, name: str, kind: int) -> int:
        """A legal code of an element: the lowest, the highest, either of them, or any."""
        fmt, rng = self.elements[name], self.rng
        if kind < 3:
            ends = (fmt.min_value, fmt.max_value)
            return fmt.canonical[ends[kind] if kind < 2 else rng.choice(ends)]
        return substitute(fmt, rng.randrange(1 << fmt.width))

    def scale_code(self, name: str, kind: int) -> int:
        """A legal scale code: zero, at an end, anything, or near 1."""
        fmt, rng = self.scales[name], self.rng
        binade = 1 << fmt.mantissa_bits
        if kind in (0, 1):
            one = fmt.bias << fmt.mantissa_bits
            code = one + rng.randrange(-2 * binade, 2 * binade + 1)
        elif kind == 2:
            top = (
                (1 << fmt.exponent_bits)
                - 1
                - (not is_legal(fmt, (binade << fmt.exponent_bits) - 1))
            )
            code = rng.choice((0, 1, binade - 1, binade, (top + 1) * binade - 1, top * binade))
        else:
            code = rng.randrange(binade << fmt.exponent_bits)
        code |= rng.getrandbits(1) << fmt.width - 1 if fmt.signed else 0
        return code if is_legal(fmt, code) else 0

    def random_tile(self, blocks: int, *, layer_exponent: int | None = None) -> "Tile":
        """A tile with elements and scales of one kind for each block."""
        rng = self.rng
        exponent = (
            rng.choice((0, 0, rng.randint(-128, 127))) if layer_exponent is None else layer_exponent
        )
        tokens = [rng.choice((0, rng.randint(-20, 20))) for _ in range(self.config.columns)]
        beats: Tile = {"i": [], "i_activation": []}
        for _ in range(blocks):
            # Often both sides are extreme: the largest sums there are.
            kinds = {name: (rng.choice((0, 1, 2, 3, 3, 3)), rng.randrange(4)) for name in beats}
            for place in range(self.size):
                for name, (element, scale) in kinds.items():
                    # After the first beat of a block scales and exponents are not looked at,
                    # reserved ones included.
                    count, width = self.vectors[name], self.scales[name].width
                    fields: dict[str, Any] = {
                        "codes": [self.code(name, element) for _ in range(count)],
                        "scales": [
                            rng.getrandbits(width) if place else self.scale_code(name, scale)
                            for _ in range(count)
                        ],
                    }
                    if name == "i":
                        fields["layer_exponent"] = exponent if not place else rng.randint(-128, 127)
                    elif self.activations.has_token_exponents:
                        fields["token_exponents"] = tokens if not place else [0] * count
                    beats[name].append(packed(self.layouts[name], **fields))
        # Elsewhere than at the end of a block `last` is not looked at.
        last = self.layouts["i"]["last"].offset
        for number in range(len(beats["i"])):
            if number % self.size != self.size - 1:
                beats["i"][number] |= rng.getrandbits(1) << last
        beats["i"][-1] |= 1 << last
        return beats

    def legal(self, tile: "Tile") -> "Tile":
        """A tile of which any bits are made into one that golden takes."""
        result: Tile = {}
        for name, words in tile.items():
            layout = self.layouts[name]
            result[name] = []
            for number, word in enumerate(words):
                fields: dict[str, Any] = {
                    "codes": [substitute(self.elements[name], code)
                              for code in fields_of(layout, word, "codes")],
                    "scales": [substitute(self.scales[name], code)
                               for code in fields_of(layout, word, "scales")],
                }  # fmt: skip
                if name == "i":
                    # Of one tile; within the range of a tensor.
                    fields["layer_exponent"] = _signed(words[0] & 0xFF, 8)
                    fields["last"] = int(number == len(words) - 1)
                elif self.activations.has_token_exponents:
                    first = fields_of(layout, words[0], "token_exponents")
                    fields["token_exponents"] = first
                result[name].append(packed(layout, **fields))
        return result

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

    def send(self, tiles: "list[Tile]") -> list[Task[Any]]:
        """Start sending tiles."""
        return [
            cocotb.start_soon(
                self.drivers[name].send([word for tile in tiles for word in tile[name]])
            )
            for name in ("i", "i_activation")
        ]

    async def run(self, tiles: "list[Tile]") -> None:
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


Tile = dict[str, list[int]]
"""Payloads of both streams."""


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
