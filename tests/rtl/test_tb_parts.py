"""The testbench's own parts: a check that cannot fail proves nothing."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from golden.formats import HIF_FORMATS
from golden.notation import QuantFormat, parse_format
from golden.packing import pack_bits
from golden.quantize import quantize
from golden.tensor import QuantizedTensor
from rtl.layouts import index_beat_layout, lut_write_layout
from rtl.modes import Modes
from sim.beats import beats_from_planes, lut_writes, payloads
from sim.installed import available_simulators
from sim.simulator import SimulationError
from sim.stalls import STALL_MODES, no_stalls, random_stalls, stall_pair
from tb.scoreboard import InOrderScoreboard
from tests.support.stage import STAGE, WIDTH, broken, run_stage

needs_icarus = pytest.mark.skipif(
    "icarus" not in available_simulators(), reason="simulator icarus is not installed"
)


# A word that waits disappears after one clock.
WITHDRAWS = broken("else if (o__ready) full <= 1'b0;", "else full <= 1'b0;")
# A word that waits loses its lowest bit.
CHANGES = broken(
    "else if (o__ready) full <= 1'b0;", "else if (o__ready) full <= 1'b0; else word[0] <= 1'b0;"
)
# Bit 5 is never written.
UNDEFINED = broken("word <= i__payload;", f"{{word[{WIDTH - 1}:6], word[4:0]}} <= "
                   f"{{i__payload[{WIDTH - 1}:6], i__payload[4:0]}};")  # fmt: skip
LOSES = broken("full <= 1'b1;", "full <= i__payload[2:0] != 3'd5;")


# --- driver, sink and monitor ---------------------------------------------------------------------


@pytest.mark.parametrize("stalls", STALL_MODES)
def test_every_word_arrives_in_order(stalls: str, simulator: str, build_root: Path) -> None:
    run_stage(STAGE, simulator, build_root, stalls=stalls)


@needs_icarus
def test_monitor_notices_withdrawn_word(build_root: Path) -> None:
    with pytest.raises(SimulationError, match=r"o: word withdrawn at edge \d+ before transfer"):
        run_stage(WITHDRAWS, "icarus", build_root, stalls="out")


@needs_icarus
def test_monitor_notices_changed_word(build_root: Path) -> None:
    pattern = r"o: word changed from 0x[0-9a-f]+ to 0x[0-9a-f]+ at edge \d+ before transfer"
    with pytest.raises(SimulationError, match=pattern):
        run_stage(CHANGES, "icarus", build_root, stalls="out")


@pytest.mark.parametrize("verilog", [WITHDRAWS, CHANGES], ids=["withdraws", "changes"])
@needs_icarus
def test_broken_stage_is_fine_while_nobody_waits(verilog: str, build_root: Path) -> None:
    # The monitor must object to what it saw, not to the module.
    run_stage(verilog, "icarus", build_root, stalls="none")


@needs_icarus
def test_scoreboard_notices_lost_word(build_root: Path) -> None:
    pattern = r"stage: item \d+ for a word that went in: got 0x[0-9a-f]+, expected 0x[0-9a-f]+"
    with pytest.raises(SimulationError, match=pattern):
        run_stage(LOSES, "icarus", build_root)


@needs_icarus
def test_sink_refuses_undefined_bits(build_root: Path) -> None:
    with pytest.raises(SimulationError, match="non-0/1 values"):
        run_stage(UNDEFINED, "icarus", build_root, test="sink_alone")


# --- scoreboard -----------------------------------------------------------------------------------


def test_scoreboard_accepts_words_in_order() -> None:
    board = InOrderScoreboard("unit")
    for word in (3, 1, 2):
        board.expect(word, "somewhere")
    for word in (3, 1, 2):
        board.actual(word)
    board.finish(3)
    assert board.checked == 3


def test_scoreboard_refuses_words_out_of_order() -> None:
    board = InOrderScoreboard("unit")
    board.expect(3, "first")
    board.expect(1, "second")
    with pytest.raises(AssertionError, match="unit: item 0 for first: got 0x1, expected 0x3"):
        board.actual(1)


def test_scoreboard_explains_mismatch() -> None:
    board = InOrderScoreboard("unit", lambda expected, actual: f"bits {expected ^ actual:#b}")
    board.expect(0, "beat 0")
    board.actual(0)
    board.expect(0xBEEF, "beat 1")
    pattern = "unit: item 1 for beat 1: got 0xbeed, expected 0xbeef bits 0b10"
    with pytest.raises(AssertionError, match=re.escape(pattern)):
        board.actual(0xBEED)


def test_scoreboard_refuses_unexpected_word() -> None:
    board = InOrderScoreboard("unit")
    with pytest.raises(AssertionError, match="unit: item 0 = 0x2a was not expected"):
        board.actual(42)


def test_scoreboard_refuses_leftovers() -> None:
    board = InOrderScoreboard("unit")
    board.expect(1, "first")
    board.expect(2, "second")
    board.actual(1)
    with pytest.raises(AssertionError, match="unit: 1 items never came out"):
        board.finish(1)


def test_scoreboard_refuses_wrong_count() -> None:
    board = InOrderScoreboard("unit")
    board.expect(1, "first")
    board.actual(1)
    with pytest.raises(AssertionError, match="unit: 1 items checked, expected 2"):
        board.finish(2)


def test_scoreboard_forgets_what_a_reset_drops() -> None:
    board = InOrderScoreboard("unit")
    board.expect(1, "before the reset")
    board.clear()
    board.expect(2, "after the reset")
    board.actual(2)
    board.finish(1)


# --- stalls ---------------------------------------------------------------------------------------


def take(stalls: Iterator[int], count: int = 2000) -> list[int]:
    return list(itertools.islice(stalls, count))


def test_no_stalls_never_pause() -> None:
    assert set(take(no_stalls())) == {0}


def test_random_stalls_are_mostly_none_and_reach_every_length() -> None:
    pauses = take(random_stalls("x"), 20_000)
    assert set(pauses) == set(range(21))
    assert 0.55 < pauses.count(0) / len(pauses) < 0.65
    long = sum(pause > 4 for pause in pauses) / len(pauses)
    assert 0.01 < long < 0.06


def test_random_stalls_depend_on_the_seed_alone() -> None:
    assert take(random_stalls("x")) == take(random_stalls("x"))
    assert take(random_stalls("x")) != take(random_stalls("y"))


@pytest.mark.parametrize("mode", STALL_MODES)
def test_stall_pair_pauses_the_named_side(mode: str) -> None:
    source, sink = (any(take(stalls)) for stalls in stall_pair(mode, 1))
    assert (source, sink) == (mode in ("in", "both"), mode in ("out", "both"))


def test_stall_pair_sides_are_independent() -> None:
    source, sink = (take(stalls) for stalls in stall_pair("both", 1))
    assert source != sink
    # Which side else pauses does not change when this one does.
    assert source == take(stall_pair("in", 1)[0])
    assert sink == take(stall_pair("out", 1)[1])
    assert source != take(stall_pair("both", 2)[0])


def test_unknown_stall_mode() -> None:
    with pytest.raises(ValueError, match=r"stall mode must be one of .*'sideways'"):
        stall_pair("sideways", 1)


# --- beats ----------------------------------------------------------------------------------------


def reference_beats(
    modes: Modes, fmt: QuantFormat, lanes: int, elements: list[int], words: list[int],
    row_scales: list[int], blocks_per_row: int,
) -> list[int]:  # fmt: skip
    """Beats as big integers, weight by weight."""
    layout = index_beat_layout(lanes=lanes, modes=modes)
    slots = modes.slots(lanes)
    beats = [0] * -(-len(elements) // lanes)
    for position, element in enumerate(elements):
        beat, lane = divmod(position, lanes)
        beats[beat] |= element << (layout["indices"].offset + lane * modes.element_bits)
        block = position // fmt.block_size
        slot = lane * slots // lanes
        # Several lanes share a slot, so setting it twice must not change it.
        word = words[block] << (layout["scale_words"].offset + slot * modes.word_bits)
        if row_scales:
            row_scale = row_scales[block // blocks_per_row]
            word |= row_scale << (layout["row_scales"].offset + 16 * slot)
        beats[beat] |= word
    beats[-1] |= 1 << layout["last"].offset
    return beats


@pytest.mark.parametrize(
    ("names", "lanes", "rows", "blocks_per_row"),
    [
        ("NF4sUE4M4", 16, 1, 1),
        ("NF4sUE4M4", 16, 1, 7),
        ("NF4sUE4M4", 64, 1, 5),
        ("BOF4-NF4sS1E5M5", 32, 3, 3),
        ("BOF4-NF4^32sUE8M0", 64, 2, 2),
        ("NF4^8sBF16", 24, 1, 11),
        ("DD5^8sUE2M1", 8, 1, 13),
        ("DD6sS1E4M3", 48, 2, 5),
        ("BOF4-NF4^64sRS1E2M4", 16, 3, 2),
        ("NF4^64sUE4M4 DD6sRS1E2M4 E4M5^32sBF16", 32, 3, 3),
        ("NF4^64sUE4M4 DD6sRS1E2M4 E4M5^32sBF16", 8, 2, 2),
    ],
)
def test_beats_equal_big_integers(names: str, lanes: int, rows: int, blocks_per_row: int) -> None:
    modes = Modes(tuple(parse_format(name) for name in names.split()))
    rng = np.random.default_rng(rows)
    for fmt in modes.formats:
        blocks = rows * blocks_per_row
        elements = rng.integers(1 << fmt.index_bits, size=blocks * fmt.block_size, dtype=np.uint16)
        words = rng.integers(1 << fmt.word.width, size=blocks, dtype=np.uint16)
        row_scales = rng.integers(1 << 16, size=rows, dtype=np.uint16) if fmt.row_scale else None
        beats = beats_from_planes(
            pack_bits(elements, fmt.index_bits),
            pack_bits(words, fmt.word.width),
            fmt,
            lanes=lanes,
            modes=modes,
            row_scales=row_scales,
        )
        assert beats.shape[1] == -(-index_beat_layout(lanes=lanes, modes=modes).size // 8)
        scales = [] if row_scales is None else row_scales.tolist()
        assert list(payloads(beats)) == reference_beats(
            modes, fmt, lanes, elements.tolist(), words.tolist(), scales, blocks_per_row
        )


@pytest.mark.parametrize("hif", sorted(HIF_FORMATS))
@pytest.mark.parametrize("name", ["NF4sUE4M4", "BOF4-NF4sS1E5M5"])
def test_lut_writes_hold_every_entry(name: str, hif: str) -> None:
    fmt = parse_format(name, HIF_FORMATS[hif])
    weights = np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32)
    quantized = quantize(weights, fmt)
    for exponent in (quantized.layer_exponent, -128, 127):
        tensor = QuantizedTensor(
            fmt, quantized.shape, quantized.indices, quantized.scale_words, quantized.luts, exponent
        )
        modes = Modes((fmt,))
        layout = lut_write_layout(modes=modes)
        writes = lut_writes(tensor, modes)
        table = {}
        for position, word in enumerate(writes):
            assert 0 <= word < 1 << layout.size
            fields = layout.from_bits(word)
            lut = word >> layout["lut"].offset & (1 << layout["lut"].width) - 1
            table[lut, fields.index] = fields.code.as_bits()
            assert fields.layer_exponent == exponent
            assert fields.last == (position == len(writes) - 1)
        assert len(table) == len(writes) == len(tensor.luts) * fmt.lut_entries
        assert table == {
            (lut, index): code
            for lut, entries in enumerate(tensor.luts)
            for index, code in enumerate(entries.codes)
        }
