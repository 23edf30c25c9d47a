"""Conformance vectors against a reader that knows only docs/vectors.md and the files.

The reader uses the standard library and exact fractions; nothing of the golden model. It must
accept the set, and must notice when the golden model that wrote the set is broken.
"""

import gc
import hashlib
import json
import math
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import golden.convert
import golden.float_output
import golden.formats
import golden.packing
import golden.quantize
import golden.scaling
import golden.vectors.decoding
from golden.errors import InputError
from golden.formats import HIF8T
from golden.notation import QuantFormat, parse_format
from golden.vectors.conformance import DEFAULT_FORMATS, Level, jobs, manifest_entry, manifest_text
from golden.vectors.files import VectorStream, float32_bits, json_text

Fields = list[dict[str, Any]]
SMALLEST_NORMAL, OVERFLOW = 2.0**-126, 2.0**128


# ----------------------------------------------------------------------------------------- reader


def float32_value(bits: int) -> float:
    """Value of a float32 bit pattern."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def float_bits(significand: int, exponent: int, precision: int) -> tuple[int, int]:
    """Bit pattern of ``significand * 2**exponent`` and flags, by the rules of the hardware.

    ``precision`` is 24 significant bits for float32, 8 for bfloat16.
    """
    if significand == 0:
        return 0, 0
    sign, magnitude = (1 if significand < 0 else 0), abs(significand)
    surplus = magnitude.bit_length() - precision
    exponent += surplus
    if surplus <= 0:
        magnitude <<= -surplus
    else:
        rest, half = magnitude & (1 << surplus) - 1, 1 << (surplus - 1)
        magnitude >>= surplus
        magnitude += rest > half or (rest == half and magnitude & 1)
        if magnitude >> precision:
            magnitude, exponent = magnitude >> 1, exponent + 1
    biased = exponent + precision - 1 + 127
    if biased < 1:
        return 0, 1
    infinite = biased >= 255
    mantissa_bits = precision - 1
    mantissa = 0 if infinite else magnitude & (1 << mantissa_bits) - 1
    return sign << mantissa_bits + 8 | min(biased, 255) << mantissa_bits | mantissa, 2 * infinite


def read_words(text: str, fields: Fields) -> Iterator[list[int]]:
    """Fields of each line of a hex file, in the order of the description."""
    for line in text.splitlines():
        word = int(line.replace("_", ""), 16)
        yield [word >> field["offset"] & (1 << field["width"]) - 1 for field in fields]


def read_plane(plane: str, width: int, count: int) -> list[int]:
    """Elements of a packed plane; bits after the last one must be zero."""
    number = int.from_bytes(bytes.fromhex(plane), "little")
    assert len(plane) == 2 * -(-count * width // 8)
    assert number >> count * width == 0
    return [number >> i * width & (1 << width) - 1 for i in range(count)]


class Number:
    """A number format as its file defines it."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.parts = cache(self._parts)

    def _parts(self, code: int) -> tuple[str, int, int, int]:
        """Kind, sign, significand and exponent of a code; hardware's value where reserved."""
        facts, bits = self.facts, self.facts["bits"]
        if facts["family"] == "integer":
            value = code - (1 << bits) if code >> (bits - 1) else code
            kind = "reserved" if code == 1 << (bits - 1) else "normal" if value else "zero"
            return kind, int(value < 0), abs(value), 0
        if facts["family"] == "hif":
            low = facts["significand_bits"]
            value, shift = code & (1 << low) - 1, code >> low
            value -= value >> (low - 1) << low
            kind = "reserved" if shift >= facts["shifts"] else "normal" if value else "zero"
            return kind, int(value < 0), abs(value), min(shift, facts["shifts"] - 1)
        m, top = facts["mantissa_bits"], (1 << facts["exponent_bits"]) - 1
        mantissa, field = code & (1 << m) - 1, code >> m & top
        sign = code >> m >> facts["exponent_bits"]
        significand = mantissa + (field > 0) * (1 << m)
        kind = "normal" if field else "subnormal" if mantissa else "zero"
        if facts["specials"] == "nan_all_ones" and (field, mantissa) == (top, (1 << m) - 1):
            kind = "nan"
        if facts["specials"] == "top_exponent" and field == top:
            kind = "reserved"
        return kind, sign, significand, max(field, 1) - facts["bias"] - m

    def value(self, code: int) -> float:
        """Exact value of a code (8 bits at most, far inside float64's range)."""
        _, sign, significand, exponent = self.parts(code)
        return math.ldexp(-significand if sign else significand, exponent)

    @cached_property
    def canonical(self) -> dict[float, int]:
        """Every value, ascending, with its lowest code."""
        table: dict[float, int] = {}
        for code in range(1 << self.facts["bits"]):
            if self.parts(code)[0] not in ("nan", "reserved"):
                table.setdefault(self.value(code), code)
        return dict(sorted(table.items()))

    @cached_property
    def grid(self) -> "Grid":
        codes = list(self.canonical.values())
        return Grid(list(self.canonical), codes, [code % 2 == 1 for code in codes[:-1]])


class Grid:
    """Ascending values, what is stored for each, and which ties go up."""

    def __init__(self, values: list[float], stored: list[int], up: list[bool]) -> None:
        self.values, self.stored, self.up = values, stored, up
        self.middles = [(low + high) / 2 for low, high in pairwise(values)]  # exact: few bits

    def nearest(self, x: Fraction | float) -> int:
        """Position of the nearest value; the comparisons are exact."""
        position = bisect_left(self.middles, x)
        tie = position < len(self.middles) and self.middles[position] == x
        return position + 1 if tie and self.up[position] else position

    def nearest_under(self, scale: float, x: float) -> int:
        """Position of the value nearest to x / scale, without dividing."""
        x, scale = (-x, -scale) if scale < 0 else (x, scale)
        # Exact: a midpoint times a scale has fewer than 53 bits.
        position = bisect_left(self.middles, x, key=lambda middle: middle * scale)
        tie = position < len(self.middles) and self.middles[position] * scale == x
        return position + 1 if tie and self.up[position] else position

    @property
    def small_end(self) -> float:
        return min(-self.values[0], self.values[-1])

    @property
    def large_end(self) -> float:
        low, high = self.values[0], self.values[-1]
        return high if high > -low else low


def ordered_sum(values: list[float]) -> float:
    """Element i plus element i + n/2, n padded with zeros to a power of two, and again."""
    half = 1
    while half < len(values):
        half *= 2
    values = values + [0.0] * (half - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[half + i] for i in range(half)]
    return values[0]


class Encoder:
    """The one-pass quantizer of docs/vectors.md, one block at a time."""

    def __init__(self, scale: Number, grids: list[Grid], mode: str, weights: list[float]) -> None:
        self.scale, self.grids, self.mode = scale, grids, mode
        self.held = True  # whether float32 holds every dense value so far as a normal number
        largest = max(abs(weight) for weight in weights)
        self.exponent = 0
        if largest and scale.facts["exponent_bits"] < 8:
            limit = min(grid.small_end for grid in grids) * scale.grid.values[-1]
            self.exponent = math.frexp(largest)[1] - math.frexp(limit)[1] - 3
            while largest > math.ldexp(limit, self.exponent):
                self.exponent += 1

    def scale_code(self, block: list[float], grid: Grid) -> int:
        """Scale code of a block that is not all zeros."""
        magnitudes = [abs(weight) for weight in block]
        extreme = Fraction(block[magnitudes.index(max(magnitudes))])
        scales = self.scale.grid
        absmax = self.mode == "absmax"
        end = Fraction(grid.small_end if absmax else grid.large_end)
        wanted = (abs(extreme) if absmax else extreme) / end
        wanted /= Fraction(2) ** self.exponent
        if absmax and self.scale.facts["mantissa_bits"] == 0:
            position = min(bisect_left(scales.values, wanted), len(scales.values) - 1)
        else:
            position = scales.nearest(wanted)
        if scales.values[position] == 0:
            position += -1 if wanted < 0 else 1
        return scales.stored[position]

    def block(self, block: list[float], importance: list[float]) -> tuple[int, list[int]]:
        """Scale word and elements."""
        if not any(block):
            return 0, [self.grids[0].stored[self.grids[0].nearest(0.0)]] * len(block)
        results = []
        for metabit, grid in enumerate(self.grids):
            code = self.scale_code(block, grid)
            scale = math.ldexp(self.scale.value(code), self.exponent)
            positions = [grid.nearest_under(scale, x) for x in block]
            squares = []
            for x, position, weight in zip(block, positions, importance, strict=True):
                residual = x - grid.values[position] * scale
                squares.append(residual * residual * weight)
            word = metabit << self.scale.facts["bits"] | code
            results.append((ordered_sum(squares), metabit, word, positions, scale))
        _, metabit, word, positions, scale = min(results)
        grid = self.grids[metabit]
        dense = [abs(grid.values[position] * scale) for position in positions]
        self.held &= all(SMALLEST_NORMAL <= value < OVERFLOW for value in dense if value)
        return word, [grid.stored[position] for position in positions]


class Reader:
    """Checks a set, given as texts by path."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.flags: set[int] = set()  # combinations seen in tensors
        self.manifest = json.loads(files["manifest.json"])
        self.numbers = {
            entry["name"].split("/")[1][:-5]: Number(json.loads(files[entry["name"]]))
            for entry in self.manifest["files"]
            if entry["kind"] == "numbers"
        }

    def check(self) -> dict[str, str]:
        """First complaint about each kind of file; empty if all is well."""
        complaints: dict[str, str] = {}
        for entry in self.manifest["files"]:
            kind, text = entry["kind"], self.files[entry["name"]]
            try:
                assert hashlib.sha256(text.encode()).hexdigest() == entry["sha256"]
                assert len(text.encode()) == entry["bytes"]
                cases = getattr(self, f"check_{kind}")(entry, text)
                assert cases == entry["cases"] > 0
            except AssertionError as error:
                complaints.setdefault(kind, f"{entry['name']}: {error}")
        return complaints

    def check_numbers(self, entry: dict[str, Any], text: str) -> int:
        document = json.loads(text)
        number = Number(document)
        for code, kind, sign, significand, exponent, canonical, bits in document["rows"]:
            own = number.parts(code)
            assert kind == own[0], code
            if kind in ("nan", "reserved"):
                assert [sign, significand, exponent, canonical, bits] == [None] * 5
                continue
            assert (sign, significand, exponent) == own[1:], code
            value = number.value(code)
            assert canonical == number.canonical[value], code
            if bits is None:
                assert abs(value) >= OVERFLOW
            else:
                assert float32_value(int(bits, 16)) == value
                assert int(bits, 16) >> 31 == sign
        codes = [row[0] for row in document["rows"]]
        assert codes == sorted(set(codes))
        assert document["complete"] == (len(codes) == 1 << document["bits"]) == entry["complete"]
        return len(codes)

    def check_encode(self, entry: dict[str, Any], text: str) -> int:
        number = self.numbers[entry["format"]]
        grid, seen = number.grid, set()
        signed = number.facts.get("signed", False)
        for bits, code in read_words(text, entry["word"]):
            x = float32_value(bits)
            expected = grid.stored[grid.nearest(x)]
            if signed and expected == 0 and bits >> 31:
                expected = 1 << (number.facts["bits"] - 1)
            assert code == expected, f"{bits:08x}"
            seen.add(x)
        if number.facts["complete"]:
            held = [x for x in grid.middles if abs(x) < OVERFLOW]
            assert len(held) >= len(grid.middles) - 1
            assert seen.issuperset(held), "a midpoint is missing"
        assert seen.issuperset([0.0, float("inf"), float("-inf")])
        return len(text.splitlines())

    def check_codebooks(self, entry: dict[str, Any], text: str) -> int:
        books = json.loads(text)["codebooks"]
        for book in books:
            number = self.numbers.get(book["hif"])
            if number is None:
                continue
            values = [number.value(code) for code in book["codes"]]
            assert values == book["values"] == sorted(set(values)), book["name"]
            assert [number.canonical[value] for value in values] == book["codes"]
            full = -number.grid.values[0]  # a power of two
            nearest = [number.grid.nearest(x * full) for x in book["levels"]]
            assert [number.grid.stored[i] for i in nearest] == book["codes"], book["name"]
        return len(books)

    def _decode(
        self, layer: dict[str, Any], luts: list[list[int]], index: int, word: int
    ) -> tuple[int, int, int]:
        """Signed significand and exponent before the layer exponent, and the reserved flag."""
        element, scale = self.numbers[layer["element_format"]], self.numbers[layer["scale_format"]]
        metabit, code = word >> scale.facts["bits"], word & (1 << scale.facts["bits"]) - 1
        a = element.parts(luts[metabit][index] if layer["elements"] == "lut" else index)
        b = scale.parts(code)
        sign = -1 if a[1] != b[1] else 1
        return sign * a[2] * b[2], a[3] + b[3], 4 * ("reserved" in (a[0], b[0]))

    def check_tensors(self, entry: dict[str, Any], text: str) -> int:
        layer, total = json.loads(text), 0
        for case in layer["cases"]:
            count = case["rows"] * case["stored_columns"]
            total += count
            indices = read_plane(case["index_plane"], layer["index_bits"], count)
            blocks = count // case["weights_per_block"]
            words = read_plane(case["scale_plane"], layer["scale_word_bits"], blocks)
            expected: dict[str, list[Any]] = {
                key: [] for key in ("float32", "float32_flags", "bfloat16", "bfloat16_flags")
            }
            for i, index in enumerate(indices):
                word = words[i // case["weights_per_block"]]
                significand, exponent, reserved = self._decode(layer, case["luts"], index, word)
                exponent += case["layer_exponent"]
                if case["row_scales"] is not None:
                    row_scale = int(case["row_scales"][i // case["stored_columns"]], 16)
                    _, sign, factor, shift = self.numbers["BF16"].parts(row_scale)
                    significand *= -factor if sign else factor
                    exponent += shift
                for name, precision, digits in (("float32", 24, 8), ("bfloat16", 8, 4)):
                    bits, flags = float_bits(significand, exponent, precision)
                    expected[name].append(f"{bits:0{digits}x}")
                    if flags | reserved:
                        expected[f"{name}_flags"].append([i, flags | reserved])
            for key, values in expected.items():
                assert case[key] == values, f"{case['name']}, {key}"
            if case["name"] == "accepted":
                assert case["float32_flags"] == case["bfloat16_flags"] == []
            self.flags.update(flags for _, flags in case["float32_flags"])
        return total

    def check_decode(self, entry: dict[str, Any], text: str) -> int:
        width = entry["index_bits"]
        precision = 24 if entry["word"][0]["name"] == "float32" else 8
        for address, (bits,) in enumerate(read_words(text, entry["word"])):
            word, index = address >> width, address & (1 << width) - 1
            significand, exponent, _ = self._decode(entry, entry["luts"], index, word)
            expected = float_bits(significand, exponent + entry["layer_exponent"], precision)
            assert bits == expected[0], f"address {address:#x}"
        assert address + 1 == 1 << width + entry["scale_word_bits"]
        return address + 1

    def check_products(self, entry: dict[str, Any], text: str) -> int:
        layer = {"elements": "number", "element_format": entry["hif"], **entry}
        lines = list(read_words(text, entry["word"]))
        for hif_code, scale_code, exponent, flags32, bits32, flags16, bits16 in lines:
            significand, shift, reserved = self._decode(layer, [], hif_code, scale_code)
            shift += exponent - (exponent >> 7 << 8)
            wide, narrow = (float_bits(significand, shift, bits) for bits in (24, 8))
            where = f"{hif_code:02x}_{scale_code:04x}_{exponent:02x}"
            assert (bits32, flags32) == (wide[0], wide[1] | reserved), where
            assert (bits16, flags16) == (narrow[0], narrow[1] | reserved), where
        assert entry["random"] + entry["directed"] == len(lines)
        return len(lines)

    def check_blocks(self, entry: dict[str, Any], text: str) -> int:
        layer = json.loads(text)
        scale, element = self.numbers[layer["scale_format"]], self.numbers[layer["element_format"]]
        grids = [element.grid]
        if layer["elements"] == "lut":
            order = list(range(1 << layer["index_bits"]))
            grids = [
                Grid([element.value(code) for code in lut], order, [False] * (len(order) - 1))
                for lut in layer["luts"]
            ]
        for case in layer["cases"]:
            where = f"{case['name']}, {case['mode']}"
            weights = [float32_value(int(bits, 16)) for bits in case["weights"]]
            assert len(weights) == case["rows"] * case["columns"]
            encoder = Encoder(scale, grids, case["mode"], weights)
            importance = [norm * norm for norm in case["channel_norms"] or [1.0] * case["columns"]]
            columns, size = case["columns"], layer["block_size"]
            words, elements = [], []
            if size == 0:
                columns = size = len(weights)
                importance *= case["rows"]
            for start in range(0, len(weights), columns):
                for left in range(0, columns, size):
                    right = min(left + size, columns)
                    padding = [0.0] * (size - (right - left))
                    block = weights[start + left : start + right] + padding
                    word, stored = encoder.block(block, importance[left:right] + padding)
                    words.append(word)
                    elements += stored
            refused = not (encoder.held and -128 <= encoder.exponent < 128)
            assert case["refused"] == refused, where
            if not refused:
                assert case["layer_exponent"] == encoder.exponent, where
                assert case["scale_words"] == words, where
                assert case["elements"] == elements, where
        return len(layer["cases"])


# ------------------------------------------------------------------------------------------ tests

# One of each: a pair with signed scales, power-of-two scales, a signed number format.
SMALL_SET = ("BOF4-NF4^8sS1E3M3", "E2M1^8sUE8M0", "DD5^8sUE5M7")
KINDS = ("numbers", "encode", "codebooks", "products", "tensors", "decode", "blocks")


def make_set(level: Level, formats: list[QuantFormat]) -> dict[str, str]:
    """Texts of a set by path."""
    files, entries = {}, []
    for job in jobs(level, formats):
        file = job.build()
        files[job.path] = file.text
        entries.append(manifest_entry(job, file))
    return files | {"manifest.json": manifest_text(level, formats, entries)}


def make_small_set() -> dict[str, str]:
    return make_set(Level.QUICK, [parse_format(name) for name in SMALL_SET])


@pytest.fixture(name="small_set", scope="module")
def _small_set() -> dict[str, str]:
    """Written by the whole golden model; format instances cache what they need for it."""
    return make_small_set()


def test_reader_accepts_the_whole_quick_set() -> None:
    files = make_set(Level.QUICK, [])
    reader = Reader(files)
    assert reader.check() == {}
    manifest = reader.manifest
    assert {entry["kind"] for entry in manifest["files"]} == set(KINDS)
    assert manifest["cases"] == sum(entry["cases"] for entry in manifest["files"])
    assert manifest["formats"] == list(dict.fromkeys(name for name, _ in DEFAULT_FORMATS))
    assert reader.flags == {1, 2, 4}
    assert sum(len(text) for text in files.values()) < 6e6
    assert all(text.isascii() and text.endswith("\n") for text in files.values())


def test_quick_set_covers_every_width_and_rule() -> None:
    formats = [parse_format(name, hif) for name, hif in DEFAULT_FORMATS]
    luts = [fmt for fmt in formats if fmt.atom is None]
    assert {fmt.index_bits for fmt in formats} >= {4, 5, 6, 7, 8, 10, 12}
    for lut_count in (1, 2):
        words = {fmt.word.width for fmt in luts if len(fmt.codebooks) == lut_count}
        assert words >= {8, 10, 12, 16}
        indices = {fmt.index_bits for fmt in luts if len(fmt.codebooks) == lut_count}
        assert indices >= {4, 5, 6}
    assert {fmt.hif.name for fmt in luts} == {"HIF7", "HIF8", "HIF8T"}
    assert {fmt.block_size for fmt in formats} == {0, 8, 16, 32, 64}


def test_exhaustive_set_has_every_scale_format_and_full_tables() -> None:
    found = {job.path: job for job in jobs(Level.EXHAUSTIVE)}
    scales = [path for path in found if path.startswith(("numbers/UE", "numbers/S1E"))]
    assert len(scales) == 2 * 6 * 8 + 1  # exponents of 2 to 7, mantissas of 0 to 7 bits, and UE8M0
    assert "decode/BOF4-NF4sS1E5M5_HIF7.float32.hex" in found
    wide = found["numbers/S1E5M7.json"].build()
    assert wide.cases == 1 << 13
    assert wide.facts == {"complete": True}


def test_restricted_set_is_small_and_accepted(small_set: dict[str, str]) -> None:
    assert Reader(small_set).check() == {}
    assert {path for path in small_set if path.startswith("numbers/")} == {
        f"numbers/{name}.json" for name in ("HIF7", "S1E3M3", "E2M1", "UE8M0", "UE5M7")
    }
    trained = make_set(Level.QUICK, [parse_format("DD6-DD6^8sS1E2M1", HIF8T)])
    assert Reader(trained).check() == {}
    assert "decode/DD6-DD6_b8sS1E2M1_HIF8T.bfloat16.hex" in trained


def test_bytes_do_not_depend_on_the_machine(small_set: dict[str, str]) -> None:
    # A change here is a change of the golden model's behaviour or of the layout: raise
    # VECTOR_VERSION where a reader would notice. (Codebooks may be added.)
    digest = hashlib.sha256()
    for path in sorted(path for path in small_set if path.split("/")[0] in KINDS):
        if not path.startswith("codebooks/"):
            digest.update(small_set[path].encode("ascii"))
    assert digest.hexdigest() == "3812ae70ecba92fc5018c42c5a77c01679caed19aafc8b8e4887484d5c231f1a"


@pytest.mark.parametrize("kind", KINDS)
def test_reader_notices_a_changed_file(kind: str, small_set: dict[str, str]) -> None:
    path = next(path for path in small_set if path.startswith(f"{kind}/"))
    changed = small_set[path].replace("0", "1", 1)
    assert kind in Reader(small_set | {path: changed}).check()


def _clear_caches() -> None:
    for candidate in gc.get_objects():
        if hasattr(type(candidate), "cache_clear") and "golden" in str(candidate.__module__):
            candidate.cache_clear()


Patch = pytest.MonkeyPatch


def _break_decode_table(patch: Patch) -> None:
    good = golden.convert._decoded_values

    def bad(fmt: golden.formats.NumberFormat) -> golden.convert.Float64:
        table = good(fmt).copy()
        if isinstance(fmt, golden.formats.FloatFormat):
            table[3] = table[2]
        return table

    patch.setattr(golden.convert, "_decoded_values", bad)


def _break_tie_to_even(patch: Patch) -> None:
    good = golden.formats.NumberFormat.is_even
    patch.setattr(golden.formats.NumberFormat, "is_even", lambda *args: not good(*args))


def _break_tie_to_lower_index(patch: Patch) -> None:
    good = golden.convert.RoundingTable

    def bad(levels: list[int]) -> golden.convert.RoundingTable:
        return good(np.asarray(levels, dtype=np.float64), np.ones(len(levels) - 1, dtype=bool))

    patch.setattr(golden.quantize, "level_table", bad)


def _break_bfloat16_rounding(patch: Patch) -> None:
    patch.setitem(golden.float_output._PRECISION, "bfloat16", 7)


def _break_overflow(patch: Patch) -> None:
    patch.setattr(golden.float_output, "_OVERFLOW", 2.0**127)


def _break_underflow(patch: Patch) -> None:
    patch.setattr(golden.float_output, "_SMALLEST_NORMAL", 2.0**-127)


def _break_packing(patch: Patch) -> None:
    good = golden.packing.pack_bits
    patch.setattr(golden.vectors.decoding, "pack_bits", lambda *args: good(*args)[::-1].copy())


def _break_smallest_scale(patch: Patch) -> None:
    good = golden.scaling.ScaleRounder.nearest

    def bad(self: golden.scaling.ScaleRounder, wanted: Any) -> Any:
        smallest, next_one = self.codes[self.zero + 1], self.codes[self.zero + 2]
        codes = good(self, wanted)
        return np.where(codes == smallest, next_one, codes)

    patch.setattr(golden.scaling.ScaleRounder, "nearest", bad)


def _break_power_of_two_scale(patch: Patch) -> None:
    good = golden.scaling.ScaleRounder.nearest
    patch.setattr(golden.scaling.ScaleRounder, "covering", good)


def _break_metabit_of_equal_errors(patch: Patch) -> None:
    good = golden.quantize.choose_metabits

    def bad(encodings: list[golden.scaling.BlockEncoding]) -> Any:
        metabits, chosen = good(encodings[::-1])
        return (metabits if len(encodings) == 1 else 1 - metabits), chosen

    patch.setattr(golden.quantize, "choose_metabits", bad)


def _break_first_extreme(patch: Patch) -> None:
    good = golden.scaling.one_pass_codes

    def bad(chunk: golden.scaling.Chunk, *args: Any) -> Any:
        return good(golden.scaling.Chunk(chunk.blocks[::-1], None, chunk.multipliers), *args)

    patch.setattr(golden.scaling, "one_pass_codes", bad)


def _break_layer_exponent(patch: Patch) -> None:
    good = golden.scaling.choose_layer_exponent
    patch.setattr(golden.quantize, "choose_layer_exponent", lambda *args: good(*args) + 1)


def _break_error_weights(patch: Patch) -> None:
    patch.setattr(golden.quantize, "usable_channel_norms", lambda _, columns: (np.ones(columns), 0))


FAULTS: dict[str, tuple[Callable[[Patch], None], set[str]]] = {
    "decode_table": (_break_decode_table, {"tensors", "encode", "blocks"}),
    "tie_to_even": (_break_tie_to_even, {"encode", "blocks"}),
    "tie_to_lower_index": (_break_tie_to_lower_index, {"blocks"}),
    "bfloat16_rounding": (_break_bfloat16_rounding, {"products", "tensors", "decode"}),
    "overflow": (_break_overflow, {"products", "tensors"}),
    "underflow": (_break_underflow, {"products", "tensors"}),
    "packing": (_break_packing, {"tensors"}),
    "smallest_scale": (_break_smallest_scale, {"blocks"}),
    "power_of_two_scale": (_break_power_of_two_scale, {"blocks"}),
    "metabit_of_equal_errors": (_break_metabit_of_equal_errors, {"blocks"}),
    "first_extreme": (_break_first_extreme, {"blocks"}),
    "layer_exponent": (_break_layer_exponent, {"blocks"}),
    "error_weights": (_break_error_weights, {"blocks"}),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("small_set")
def test_reader_notices_a_broken_golden_model(name: str) -> None:
    break_golden, kinds = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        _clear_caches()
        break_golden(patch)
        try:
            complaints = Reader(make_small_set()).check()
        finally:
            _clear_caches()
    assert set(complaints) >= kinds, complaints


def test_stream_is_the_documented_one() -> None:
    digest = hashlib.sha256(b"seed/0").digest() + hashlib.sha256(b"seed/1").digest()
    expected = list(struct.unpack("<16I", digest))
    assert VectorStream("seed").words(16).tolist() == expected
    allowed = np.arange(16) % 3 == 0
    kept = [word & 15 for word in expected if (word & 15) % 3 == 0]
    assert VectorStream("seed").codes(len(kept), allowed).tolist() == kept
    bell = sum(word & 0xFFFF for word in expected[:4])
    assert VectorStream("seed").bell(1).tolist() == [bell / 65536 - 2]


def test_json_has_one_row_a_line() -> None:
    document = {"a": [1, 2], "rows": [[1, "x"], [2, None]], "cases": [{"n": 1, "m": [3]}, {}]}
    text = json_text(document)
    assert json.loads(text) == document
    assert ' "rows": [\n  [1, "x"],\n  [2, null]\n ],' in text


def test_float32_bits() -> None:
    assert float32_bits(np.array([1.0, -0.0])).tolist() == [0x3F800000, 0x80000000]


def test_refused_inputs_have_no_code() -> None:
    with pytest.raises(InputError, match="NaN"):
        golden.convert.encode_array(np.float32(np.nan), HIF8T)
