"""A second implementation of the formats, written from these pages: standard library only.

It shares no code with the rest of the repository. Others may copy it as a start of their own:

    python docs/decoder.py decode model.safetensors    # SHA-256 of each tensor as float32
    python docs/decoder.py check vectors               # every file of a conformance set

docs/decode.md is the page that the first half follows step by step; docs/checkpoint.md names the
checks, docs/vectors.md the files of the second half. Exit codes: 0, 1 if a set has a wrong answer,
2 for a checkpoint that is refused. It is slow (some 100,000 weights a second) and exact.
"""

import hashlib
import json
import math
import re
import struct
import sys
from bisect import bisect_left
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

SMALLEST_NORMAL, OVERFLOW = 2.0**-126, 2.0**128


class Refused(Exception):
    """What no reader may accept: where a checkpoint is broken, and what kind of check says so."""

    def __init__(self, kind, field, problem):
        super().__init__(problem)
        self.kind, self.tensor, self.field = kind, None, field

    def __str__(self):
        where = "" if self.tensor is None else f"tensor {self.tensor!r}: "
        return f"{where}{'' if self.field is None else self.field + ': '}{super().__str__()}"


@contextmanager
def in_tensor(name):
    """Say in which tensor a refusal happened."""
    try:
        yield
    except Refused as refusal:
        refusal.tensor = name
        raise


def demand(condition, kind, field, problem):
    """Refuse the checkpoint unless a condition holds."""
    if not condition:
        raise Refused(kind, field, problem)


# ---------------------------------------------------------------------------------- number formats


def definition(name):
    """Definition of a number format by its name, with the keys of ``numbers/NAME.json``."""
    if name in ("HIF7", "HIF8", "HIF8T"):
        bits, significand_bits, shifts = {"HIF7": (7, 5, 4), "HIF8": (8, 5, 5), "HIF8T": (8, 6, 4)}[
            name
        ]
        return {
            "bits": bits,
            "family": "hif",
            "significand_bits": significand_bits,
            "shifts": shifts,
        }
    if name in ("INT4", "INT8"):
        return {"bits": int(name[3:]), "family": "integer"}
    head, e, m = re.fullmatch(r"(U|S1|)E(\d)M(\d)", "S1E8M7" if name == "BF16" else name).groups()
    signed, e, m = head != "U", int(e), int(m)
    specials = {"E4M3": "nan_all_ones", "BF16": "top_exponent"}.get(name, "none")
    return {
        "bits": signed + e + m, "family": "float", "signed": signed, "exponent_bits": e,
        "mantissa_bits": m, "bias": 2 ** (e - 1) - 1, "specials": specials,
    }  # fmt: skip


class Number:
    """A number format: codes to exact values and back."""

    def __init__(self, name):
        self.facts = definition(name)
        self.bits = self.facts["bits"]
        self.parts = cache(self._parts)

    def _parts(self, code):
        """Kind, sign, significand and exponent of a code; hardware's value where reserved."""
        facts, bits = self.facts, self.bits
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

    def has_value(self, code):
        """Whether a code is neither NaN nor reserved."""
        return self.parts(code)[0] not in ("nan", "reserved")

    def value(self, code):
        """Exact value of a code (8 bits at most, far inside float64's range)."""
        _, sign, significand, exponent = self.parts(code)
        return math.ldexp(-significand if sign else significand, exponent)

    @cached_property
    def canonical(self):
        """Every value, ascending, with its lowest code."""
        table = {}
        for code in filter(self.has_value, range(1 << self.bits)):
            table.setdefault(self.value(code), code)
        return dict(sorted(table.items()))

    @cached_property
    def grid(self):
        """All values, with ties to even codes."""
        codes = list(self.canonical.values())
        return Grid(list(self.canonical), codes, [code % 2 == 1 for code in codes[:-1]])


number = cache(Number)


def float_bits(significand, exponent, precision):
    """Bit pattern of ``significand * 2**exponent`` and flags, by the rules of the hardware.

    ``precision`` is 24 significant bits for float32, 8 for bfloat16; flags 2 overflow, 1 underflow.
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


def float32_value(bits):
    """Value of a float32 bit pattern."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def unpack(plane, width, count):
    """Elements of a packed plane, or None if it has another length or bits after the last."""
    bits = int.from_bytes(plane, "little")
    if len(plane) != -(-count * width // 8) or bits >> count * width:
        return None
    text = f"{bits:0{count * width}b}"
    return [int(text[end - width : end], 2) for end in range(count * width, 0, -width)]


# ------------------------------------------------------------------------------------ format names

ATOMS = (
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E3M4",
    "E4M5",
    "E5M6",
    "INT4",
    "INT8",
    "HIF7",
    "HIF8",
    "HIF8T",
)
TRAINED = {"DD4": 4, "DD5": 5, "DD6": 6}
BOOK = r"(?:NF4|BOF4|Split87|SH4)T?|DD[456]|[a-z][a-z0-9]{0,23}"
SCALE = r"(?:U|S1)E[2-7]M[0-7]|UE8M0|BF16"


class Format:
    """A canonical format name taken apart."""

    def __init__(self, name):
        found = re.fullmatch(rf"({'|'.join(ATOMS)})(?:\^(0|8|32|64))?s({SCALE})", name)
        books = re.fullmatch(rf"({BOOK})(?:-({BOOK}))?(?:\^(8|32|64))?s(R?)({SCALE})", name)
        demand(found or books, "metadata", "format", f"{name!r} is not the name of a format")
        if found:
            self.atom, block, scale = found.groups()
            self.books, self.row_scale = (), False
            self.index_bits = number(self.atom).bits
        else:
            first, second, block, row, scale = books.groups()
            self.atom, self.row_scale = None, row == "R"
            self.books = (first,) if second is None else (first, second)
            widths = {TRAINED.get(book, 4) for book in self.books}
            twice = first == second and first not in TRAINED
            demand(len(widths) == 1 and not twice, "metadata", "format", f"{name!r}: no such pair")
            self.index_bits = widths.pop()
        self.block = 16 if block is None else int(block)
        self.scale = number(scale)
        self.word_bits = self.scale.bits + (len(self.books) == 2)
        demand(self.word_bits <= 16, "metadata", "format", f"{name!r}: a word of over 16 bits")


# ---------------------------------------------------------------------------------------- container

TYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


def parse_json(text, kind, field):
    """JSON without the liberties that Python's parser takes."""

    def unique(pairs):
        demand(len({key for key, _ in pairs}) == len(pairs), kind, field, "a duplicate key")
        return dict(pairs)

    def integer(digits):
        demand(len(digits) <= 20, kind, field, "an integer of more than 20 characters")
        return int(digits)

    def constant(name):
        raise Refused(kind, field, f"{name} is not JSON")

    demand(sum(map(text.count, ",[{")) <= 4_000_000, kind, field, "too many values")
    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_int=integer, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        raise Refused(kind, field, f"not JSON: {error}") from error


def has_keys(value, keys, kind):
    """Refuse what is not an object with exactly these keys; the field is the first wrong key."""
    demand(isinstance(value, dict), kind, None, "not an object")
    for key in sorted(value.keys() ^ set(keys)):
        raise Refused(kind, key, "is missing or unknown")


def integers(value, least, kind, field):
    """Refuse what is not a list of integers of at least ``least``."""
    good = isinstance(value, list) and all(type(n) is int and n >= least for n in value)
    demand(good, kind, field, f"not a list of integers from {least} up")
    return value


def is_name(name):
    """Whether a string can be the name of a tensor."""
    try:
        if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", name):
            return False
        return 1 <= len(name.encode()) <= 1024 and name != "__metadata__"
    except UnicodeEncodeError:
        return False


def read_container(content):
    """``__metadata__``, and (dtype, shape, bytes) of every tensor by name."""
    kind = "container"
    demand(len(content) >= 8, kind, "header", "fewer than 8 bytes")
    length = int.from_bytes(content[:8], "little")
    demand(length <= min(100_000_000, len(content) - 8), kind, "header", "longer than the file")
    try:
        text = content[8 : 8 + length].decode()
    except UnicodeDecodeError as error:
        raise Refused(kind, "header", "not UTF-8") from error
    braces = text.startswith("{") and text.rstrip(" ").endswith("}")
    demand(braces, kind, "header", "not an object, padded with spaces only")
    header, data = parse_json(text, kind, "header"), content[8 + length :]
    metadata, tensors, spans = header.pop("__metadata__", {}), {}, []
    for name, entry in header.items():
        with in_tensor(name):
            demand(is_name(name), kind, "name", "no valid Unicode of 1 to 1024 bytes")
            has_keys(entry, ("dtype", "shape", "data_offsets"), kind)
            shape = integers(entry["shape"], 0, kind, "shape")
            offsets = integers(entry["data_offsets"], 0, kind, "data_offsets")
            known = isinstance(entry["dtype"], str) and entry["dtype"] in TYPE_BITS
            demand(known, kind, "dtype", "no type of the safetensors format")
            possible = len(shape) <= 32 and all(size < 1 << 63 for size in shape)
            bits = math.prod(shape) * TYPE_BITS[entry["dtype"]]
            demand(possible and bits % 8 == 0, kind, "shape", "no shape of an array")
            inside = len(offsets) == 2 and offsets[0] <= offsets[1] <= len(data)
            fits = inside and 8 * (offsets[1] - offsets[0]) == bits
            demand(fits, kind, "data_offsets", "not the bytes that type and shape need")
            tensors[name] = (entry["dtype"], shape, data[offsets[0] : offsets[1]])
            spans.append((*offsets, name))
    position = 0
    for start, stop, name in sorted(spans):
        with in_tensor(name):
            demand(start == position, kind, "data_offsets", "a hole or an overlap")
        position = stop
    demand(position == len(data), kind, "header", "bytes after the last tensor")
    return metadata, tensors


# --------------------------------------------------------------------------------------- checkpoint

KEY, VERSION = "scaled_outer_product", 2
FIELDS = (
    "indices", "scales", "luts", "row_scales",
    "corrections.indptr", "corrections.columns", "corrections.values",
)  # fmt: skip


def check_depth(value, field, left=16):
    """Refuse what is nested more than 16 deep."""
    demand(left > 0, "metadata", field, "nested more than 16 deep")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        check_depth(item, field, left - 1)


def read_metadata(metadata):
    """Entries of the quantized tensors."""
    kind = "metadata"
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    demand(strings and KEY in metadata, kind, "__metadata__", f"no object of strings with {KEY}")
    facts = parse_json(metadata[KEY], kind, KEY)
    demand(isinstance(facts, dict), kind, KEY, "not an object")
    version = facts.get("version")
    demand(type(version) is int and version == VERSION, kind, "version", f"not {VERSION}")
    has_keys(facts, ("version", "config", "config_hash", "calibration", "tensors"), kind)
    demand(isinstance(facts["config"], str), kind, "config", "not a string")
    try:
        digest = hashlib.sha256(facts["config"].encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise Refused(kind, "config", "no valid Unicode") from error
    demand(facts["config_hash"] == digest, kind, "config_hash", f"config has {digest}")
    summaries = {"config": parse_json(facts["config"], kind, "config")}
    if facts["calibration"] is not None:
        summaries["calibration"] = facts["calibration"]
    for key, value in (*summaries.items(), ("tensors", facts["tensors"])):
        demand(isinstance(value, dict), kind, key, "not an object")
    for key, value in summaries.items():
        check_depth(value, key)
    return facts["tensors"]


def check_source(name, source):
    """Which part of a tensor of the model a matrix is: null, or a slice, a transpose or both."""
    kind, field = "metadata", "source"
    if source is None:
        return
    keys = isinstance(source, dict) and source.keys() == {"tensor", "index", "count", "transposed"}
    demand(keys, kind, field, "not an object with the four keys")
    tensor, index, count = source["tensor"], source["index"], source["count"]
    demand(isinstance(tensor, str) and is_name(tensor), kind, field, "no name of a tensor")
    demand(type(source["transposed"]) is bool, kind, field, "transposed is neither true nor false")
    if index is None and count is None:
        demand(source["transposed"], kind, field, "must be null for a matrix as it came")
        demand(name == tensor, kind, field, "the matrix has another name")
        return
    numbers = type(index) is int and type(count) is int and 0 <= index < count
    demand(numbers, kind, field, "no index below a count")
    demand(name == f"{tensor}[{index}]", kind, field, "the matrix has another name")


def check_slices(tensors, taken):
    """Slices of a stacked tensor are complete and alike, and nothing else has its name."""
    stacked = {}
    for name, tensor in tensors.items():
        if tensor.source is not None and tensor.source["count"] is not None:
            stacked.setdefault(tensor.source["tensor"], []).append((name, tensor))
    for whole, slices in stacked.items():
        facts = [(t.source["count"], t.source["transposed"], t.shape) for _, t in slices]
        for (name, _), fact in zip(slices, facts, strict=True):
            with in_tensor(name):
                demand(fact == facts[0], "metadata", "source", "slices that are not alike")
        with in_tensor(slices[0][0]):
            demand(len(slices) == facts[0][0], "metadata", "source", "slices are missing")
        with in_tensor(whole):
            demand(whole not in taken, "layout", None, "is stored in slices and as a whole")


class Tensor:
    """A quantized tensor: what the metadata says, and its fields as stored."""

    def __init__(self, name, entry):
        kind = "metadata"
        has_keys(entry, ("format", "hif", "shape", "dtype", "layer_exponent", "source"), kind)
        check_source(name, entry["source"])
        self.source = entry["source"]
        self.shape = integers(entry["shape"], 1, kind, "shape")
        demand(len(self.shape) == 2, kind, "shape", "not two dimensions")
        self.f = entry["layer_exponent"]
        demand(
            type(self.f) is int and -128 <= self.f <= 127, kind, "layer_exponent", "out of range"
        )
        source = isinstance(entry["dtype"], str) and re.fullmatch(r"\w{1,32}", entry["dtype"], re.A)
        demand(source, kind, "dtype", "not the name of a type")
        demand(entry["hif"] in ("HIF7", "HIF8", "HIF8T"), kind, "hif", "no format of LUT entries")
        spelled = entry["format"]
        demand(isinstance(spelled, str) and len(spelled) <= 64, kind, "format", "not a name")
        self.format, self.hif = Format(spelled), number(entry["hif"])
        rows, columns = self.shape
        if self.format.block == 0:
            self.block, self.stored_columns, self.blocks = rows * columns, columns, 1
        else:
            self.block = self.format.block
            self.stored_columns = -(-columns // self.block) * self.block
            self.blocks = rows * self.stored_columns // self.block

    def layout(self, entries):
        """Type and shape of every field; ``entries`` is the number of corrections, or None."""
        fmt, (rows, columns) = self.format, self.shape
        elements = self.blocks * self.block
        fields = {
            "indices": ("U8", [-(-elements * fmt.index_bits // 8)]),
            "scales": ("U8", [-(-self.blocks * fmt.word_bits // 8)]),
        }
        if fmt.books:
            fields["luts"] = ("U8", [len(fmt.books), 1 << fmt.index_bits])
        if fmt.row_scale:
            fields["row_scales"] = ("BF16", [rows])
        if entries is not None:
            fields["corrections.indptr"] = ("U32", [rows + 1])
            fields["corrections.columns"] = ("U32" if columns > 65536 else "U16", [entries])
            fields["corrections.values"] = ("BF16", [entries])
        return fields

    def take_fields(self, name, stored, claimed):
        """Check that the fields are there, each with its type and shape, and no others."""
        names = [name, *(f"{name}.{field}" for field in FIELDS)]
        demand(not claimed.intersection(names), "layout", "name", "is also of another tensor")
        claimed.update(names)
        demand(name not in stored, "layout", "name", "is stored quantized and as it came")
        found = {
            field: stored[f"{name}.{field}"] for field in FIELDS if f"{name}.{field}" in stored
        }
        sparse = [found[field] for field in reversed(FIELDS[4:]) if field in found]
        layout = self.layout(math.prod(sparse[0][1]) if sparse else None)
        for field in FIELDS:
            demand((field in layout) == (field in found), "layout", field, "is missing or too much")
            good = field not in found or found[field][:2] == layout[field]
            demand(good, "layout", field, "has another type or shape")
        self.fields = {field: content for field, (_, _, content) in found.items()}

    def words(self, field, width):
        """A field of little-endian integers."""
        content = self.fields[field]
        return [
            int.from_bytes(content[i : i + width], "little") for i in range(0, len(content), width)
        ]

    def plane(self, field, width, count):
        """Elements of a plane."""
        elements = unpack(self.fields[field], width, count)
        demand(elements is not None, "plane", field, "bits after the last element")
        return elements

    def codes_with_value(self, field, codes, fmt):
        """Refuse NaN and reserved codes."""
        demand(all(map(fmt.has_value, codes)), "code", field, "a NaN or reserved code")

    def luts(self):
        """Codes of each LUT, after all their checks."""
        size, codes = 1 << self.format.index_bits, self.fields["luts"]
        luts = [codes[start : start + size] for start in range(0, len(codes), size)]
        for position, lut in enumerate(luts):
            field = f"luts[{position}]"
            self.codes_with_value(field, lut, self.hif)
            values = [self.hif.value(code) for code in lut]
            canonical = [self.hif.canonical[value] for value in values] == list(lut)
            demand(canonical, "code", field, "an entry that is not canonical")
            demand(values[0] < 0 < values[-1], "code", field, "not on both sides of zero")
            ascending = all(low < high for low, high in pairwise(values))
            demand(ascending, "code", field, "not strictly ascending")
        return luts

    def dense(self):
        """Float32 bit patterns of the dense part, row by row, without padding."""
        fmt, (rows, columns) = self.format, self.shape
        words = self.plane("scales", fmt.word_bits, self.blocks)
        luts = self.luts() if fmt.books else None
        indices = self.plane("indices", fmt.index_bits, self.blocks * self.block)
        element = self.hif if luts else number(fmt.atom)
        if not luts:
            self.codes_with_value("indices", indices, element)
        mask = (1 << fmt.scale.bits) - 1
        self.codes_with_value("scales", [word & mask for word in words], fmt.scale)
        row_scales = [0x3F80] * rows  # 1.0
        if fmt.row_scale:
            row_scales = self.words("row_scales", 2)
            self.codes_with_value("row_scales", row_scales, number("BF16"))
        weights = []
        for i, index in enumerate(indices):
            word = words[i // self.block]
            factors = (
                element.parts(luts[word >> fmt.scale.bits][index] if luts else index),
                fmt.scale.parts(word & mask),
                number("BF16").parts(row_scales[i // self.stored_columns]),
            )
            significand, exponent = 1, self.f
            for _, sign, factor, shift in factors:
                significand *= -factor if sign else factor
                exponent += shift
            bits, flags = float_bits(significand, exponent, 24)
            demand(flags == 0, "range", None, f"element {i} is no normal float32 number")
            if i % self.stored_columns < columns:
                weights.append(bits)
        return weights

    def corrections(self):
        """Position and bfloat16 value of each entry, after all checks."""
        kind, (rows, columns) = "corrections", self.shape
        if "corrections.indptr" not in self.fields:
            return []
        indptr, values = self.words("corrections.indptr", 4), self.words("corrections.values", 2)
        stored = self.words("corrections.columns", 4 if columns > 65536 else 2)
        ordered = all(low <= high for low, high in pairwise(indptr))
        whole = indptr[0] == 0 and indptr[-1] == len(values) and ordered
        demand(whole, kind, "corrections.indptr", "must ascend from 0 to the number of entries")
        entries = []
        for row in range(rows):
            last = -1
            for k in range(indptr[row], indptr[row + 1]):
                good = last < stored[k] < columns
                demand(good, kind, "corrections.columns", "must ascend inside the matrix")
                last = stored[k]
                entries.append((row * columns + last, values[k]))
        finite = all(map(number("BF16").has_value, values))
        demand(finite, kind, "corrections.values", "a NaN or an infinity")
        return entries

    def decode(self):
        """Float32 bit patterns of all weights, row by row."""
        weights, entries = self.dense(), self.corrections()
        for position, value in entries:
            # The sum of two float32 numbers, rounded to float64 and then to float32, is the sum
            # rounded once: 53 bits are at least 2 x 24 + 2.
            total = float32_value(weights[position]) + float32_value(value << 16)
            try:
                weights[position] = int.from_bytes(struct.pack("<f", total), "little")
            except OverflowError as error:
                raise Refused("range", "corrections.values", "a sum overflows") from error
        return weights


def decode_checkpoint(content):
    """Tensors by name: quantized ones as (shape, float32 bits), others as (dtype, shape, bytes).

    Raises
    ------
    Refused
        If anything in the file is not as docs/checkpoint.md demands.
    """
    metadata, stored = read_container(content)
    quantized, claimed = {}, set()
    for name, entry in sorted(read_metadata(metadata).items()):
        with in_tensor(name):
            quantized[name] = Tensor(name, entry)
            quantized[name].take_fields(name, stored, claimed)
    check_slices(quantized, stored.keys() | claimed)
    decoded = {}
    for name, tensor in quantized.items():
        with in_tensor(name):
            decoded[name] = (tensor.shape, tensor.decode())
    return decoded, {name: stored[name] for name in sorted(stored.keys() - claimed)}


# ---------------------------------------------------------------------------------- vectors: encode


class Grid:
    """Ascending values, what is stored for each, and which ties go up."""

    def __init__(self, values, stored, up):
        self.values, self.stored, self.up = values, stored, up
        self.middles = [(low + high) / 2 for low, high in pairwise(values)]  # exact: few bits
        low, high = values[0], values[-1]
        self.small_end, self.large_end = min(-low, high), high if high > -low else low

    def nearest(self, x):
        """Position of the value nearest to a float or Fraction; the comparisons are exact."""
        position = bisect_left(self.middles, x)
        tie = position < len(self.middles) and self.middles[position] == x
        return position + 1 if tie and self.up[position] else position

    def nearest_under(self, scale, x):
        """Position of the value nearest to x / scale, without dividing."""
        x, scale = (-x, -scale) if scale < 0 else (x, scale)
        # Exact: a midpoint times a scale has fewer than 53 bits.
        position = bisect_left(self.middles, x, key=lambda middle: middle * scale)
        tie = position < len(self.middles) and self.middles[position] * scale == x
        return position + 1 if tie and self.up[position] else position


def sum_of_block(values):
    """Element i plus element i + n/2, n padded with zeros to a power of two, and again."""
    half = 1
    while half < len(values):
        half *= 2
    values = values + [0.0] * (half - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[half + i] for i in range(half)]
    return values[0]


def weighted_square(residual, norm):
    """Error of one weight, in this order of the three products."""
    return (residual * residual) * (norm * norm)


class Encoder:
    """The one-pass quantizer of docs/vectors.md, one block at a time."""

    def __init__(self, scale, grids, mode, weights):
        self.scale, self.grids, self.mode = scale, grids, mode
        self.held = True  # whether float32 holds every dense value so far as a normal number
        largest = max(abs(weight) for weight in weights)
        self.f = 0
        if largest and scale.facts["exponent_bits"] < 8:
            limit = min(grid.small_end for grid in grids) * scale.grid.values[-1]
            self.f = math.frexp(largest)[1] - math.frexp(limit)[1] - 3
            while largest > math.ldexp(limit, self.f):
                self.f += 1

    def scale_code(self, block, grid):
        """Scale code of a block that is not all zeros."""
        magnitudes = [abs(weight) for weight in block]
        extreme = Fraction(block[magnitudes.index(max(magnitudes))])
        scales = self.scale.grid
        absmax = self.mode == "absmax"
        end = Fraction(grid.small_end if absmax else grid.large_end)
        wanted = (abs(extreme) if absmax else extreme) / end
        wanted /= Fraction(2) ** self.f
        if absmax and self.scale.facts["mantissa_bits"] == 0:
            position = bisect_left(scales.values, wanted)  # never beyond the largest, by rule 2
        else:
            position = scales.nearest(wanted)
        if scales.values[position] == 0:
            position += -1 if wanted < 0 else 1
        return scales.stored[position]

    def block(self, block, norms):
        """Scale word and elements; norms are 0 in padding."""
        if not any(block):
            return 0, [self.grids[0].stored[self.grids[0].nearest(0.0)]] * len(block)
        results = []
        for metabit, grid in enumerate(self.grids):
            code = self.scale_code(block, grid)
            scale = math.ldexp(self.scale.value(code), self.f)
            positions = [grid.nearest_under(scale, x) for x in block]
            missed = [x - grid.values[p] * scale for x, p in zip(block, positions, strict=True)]
            error = sum_of_block(list(map(weighted_square, missed, norms)))
            word = metabit << self.scale.bits | code
            results.append((error, metabit, word, positions, scale))
        _, metabit, word, positions, scale = min(results)
        grid = self.grids[metabit]
        dense = [abs(grid.values[position] * scale) for position in positions]
        self.held &= all(SMALLEST_NORMAL <= value < OVERFLOW for value in dense if value)
        return word, [grid.stored[position] for position in positions]


# ---------------------------------------------------------------------------------- vectors: kernel


def rounded(value, precision=24):
    """A Fraction to nearest, ties to even; subnormals are kept, a zero has the sign of `value`."""
    if not value:
        return 0.0
    exponent = abs(value).numerator.bit_length() - value.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(value)
    quantum = Fraction(2) ** max(exponent - precision + 1, -125 - precision)
    result = round(value / quantum) * quantum
    return math.copysign(math.inf if abs(result) >= OVERFLOW else float(result), value)


def plus(first, second):
    """Float32 sum; what is infinite stays, and two zeros are -0 if both are."""
    if math.isinf(first) or math.isinf(second):
        return first if math.isinf(first) else second
    return rounded(Fraction(first) + Fraction(second)) if first + second else first + second


def times(first, second):
    """Float32 product of exact numbers; an infinity only gets its sign."""
    if math.isinf(first):
        return math.copysign(first, math.copysign(1, first) * math.copysign(1, second))
    sign = math.copysign(1, first) * math.copysign(1, second)
    return math.copysign(rounded(Fraction(first) * Fraction(second)), sign)


def quantize_token(values, element, scale, size):
    """Elements and scale codes of one token, and its power of two."""
    end, shift, largest = element.grid.small_end, 0, max(map(abs, values))
    if largest and scale.facts["exponent_bits"] < 8:
        limit = end * scale.grid.values[-1]
        shift = math.frexp(largest)[1] - math.frexp(limit)[1] - 3
        while largest > math.ldexp(limit, shift):
            shift += 1
        shift = max(shift, -128)
    elements, codes = [], []
    for start in range(0, len(values), size):
        block = values[start : start + size]
        if not any(block):
            elements += [0] * size
            codes.append(0)
            continue
        scales = scale.grid
        wanted = Fraction(max(map(abs, block))) / Fraction(end) / Fraction(2) ** shift
        if scale.facts["mantissa_bits"] == 0:
            position = min(bisect_left(scales.values, wanted), len(scales.values) - 1)
        else:
            position = scales.nearest(wanted)
        position += scales.values[position] == 0
        codes.append(scales.stored[position])
        unit = math.ldexp(scales.values[position], shift)
        nearest = [element.grid.nearest_under(unit, x) for x in block]
        elements += [element.grid.stored[i] for i in nearest] + [0] * (size - len(block))
    return elements, codes, shift


class Kernel:
    """One case of ``kernel``: the arithmetic of docs/kernel.md on exact numbers."""

    def __init__(self, layer, case):
        self.case, self.rows, self.columns = case, case["rows"], case["columns"]
        scale, size = number(layer["scale_format"]), layer["block_size"]
        stored = -(-self.columns // size) * size if size else self.columns
        count = self.rows * stored
        indices = unpack(bytes.fromhex(case["index_plane"]), layer["index_bits"], count)
        blocks = count // size if size else 1
        plane = bytes.fromhex(case["scale_plane"])
        words = unpack(plane, layer["scale_word_bits"], blocks)
        expect(None not in (indices, words), "bits after the last element")
        element, mask = number(layer["element_format"]), (1 << scale.bits) - 1
        self.weights, self.weight_scales = {}, {}
        for row in range(self.rows):
            for column in range(self.columns):
                i = row * stored + column
                word = words[i // size if size else 0]
                code = indices[i]
                if layer["elements"] == "lut":
                    code = case["luts"][word >> scale.bits][code]
                self.weights[row, column] = Fraction(element.value(code))
                factor = Fraction(scale.value(word & mask)) * Fraction(2) ** case["layer_exponent"]
                self.weight_scales[row, column] = factor
        self._take_activations()

    def _take_activations(self):
        case, columns = self.case, self.columns
        element = number(case["activation_element_format"])
        scale = number(case["activation_scale_format"])
        size = case["activation_block_size"] or columns
        inputs = [float32_value(int(bits, 16)) for bits in case["inputs"]]
        narrow = scale.facts["exponent_bits"] < 8
        found, codes, shifts = [], [], []
        self.activations, self.activation_scales = {}, {}
        for token in range(case["tokens"]):
            values = inputs[token * columns : (token + 1) * columns]
            own, scales, shift = quantize_token(values, element, scale, size)
            found, codes, shifts = found + own, codes + scales, [*shifts, shift]
            for column in range(columns):
                self.activations[token, column] = Fraction(element.value(own[column]))
                factor = Fraction(scale.value(scales[column // size])) * Fraction(2) ** shift
                self.activation_scales[token, column] = factor
        expect(case["activation_elements"] == found, "activation_elements")
        expect(case["activation_scale_codes"] == codes, "activation_scale_codes")
        expect(case["token_exponents"] == (shifts if narrow else None), "token_exponents")

    def output(self, token, row, exact):
        """One output in float32."""
        case, total, whole = self.case, 0.0, Fraction(0)
        for start in range(0, self.columns, case["kernel_block_size"]):
            stop = min(start + case["kernel_block_size"], self.columns)
            channels = range(start, stop)
            product = sum(self.weights[row, k] * self.activations[token, k] for k in channels)
            term = product * self.weight_scales[row, start] * self.activation_scales[token, start]
            whole += term
            total = plus(total, rounded(term))
        y = rounded(whole) if exact else total
        bfloat16 = number("BF16")
        if case["row_scales"] is not None:
            sign, factor = self._signed(bfloat16, case["row_scales"][row])
            y = times(y, math.copysign(factor, sign))
        first, last = case["correction_row_starts"][row : row + 2]
        for entry in range(first, last):
            sign, factor = self._signed(bfloat16, case["correction_values"][entry])
            column = case["correction_columns"][entry]
            x = self.activations[token, column] * self.activation_scales[token, column]
            y = plus(y, times(math.copysign(factor, sign), x))
        return y

    def _signed(self, fmt, code):
        """Sign, which a zero has too, and value of a bfloat16 code."""
        code = int(code, 16)
        return -1 if code >> 15 else 1, fmt.value(code)

    def outputs(self, exact):
        """Of all tokens, row after row."""
        tokens, rows = range(self.case["tokens"]), range(self.rows)
        return [self.output(token, row, exact) for token in tokens for row in rows]


def hex32(value):
    """Bit pattern of a float32 number, in hex."""
    return struct.pack(">f", value).hex()


# ------------------------------------------------------------------------------------ vectors: sets


class Wrong(Exception):
    """An answer of the set that is not the one of this file."""


def expect(condition, where=""):
    """Complain about the set unless a condition holds."""
    if not condition:
        raise Wrong(where)


def read_words(text, fields):
    """Fields of each line of a hex file, in the order of the description."""
    for line in text.splitlines():
        word = int(line.replace("_", ""), 16)
        yield [word >> field["offset"] & (1 << field["width"]) - 1 for field in fields]


def product(layer, luts, index, word):
    """Signed significand and exponent before the layer exponent, and the reserved flag."""
    element, scale = number(layer["element_format"]), number(layer["scale_format"])
    metabit, code = word >> scale.bits, word & (1 << scale.bits) - 1
    a = element.parts(luts[metabit][index] if layer["elements"] == "lut" else index)
    b = scale.parts(code)
    sign = -1 if a[1] != b[1] else 1
    return sign * a[2] * b[2], a[3] + b[3], 4 * ("reserved" in (a[0], b[0]))


def verdict(content):
    """Kind of check, tensor and field of a refusal; None for a good checkpoint."""
    try:
        decode_checkpoint(content)
    except Refused as refusal:
        return refusal.kind, refusal.tensor, refusal.field
    return None


class VectorSet:
    """A conformance set, given as bytes by path, and the answers of this file to it."""

    def __init__(self, files):
        self.files = files
        self.flags = set()  # combinations seen in tensors
        self.manifest = json.loads(files["manifest.json"])

    def check(self):
        """First complaint about each kind of file; empty if all is well."""
        complaints = {}
        for entry in self.manifest["files"]:
            kind, content = entry["kind"], self.files[entry["name"]]
            try:
                expect(hashlib.sha256(content).hexdigest() == entry["sha256"])
                expect(len(content) == entry["bytes"])
                expect(getattr(self, f"check_{kind}")(entry, content) == entry["cases"] > 0)
            except (Wrong, Refused) as error:
                complaints.setdefault(kind, f"{entry['name']}: {error}")
        return complaints

    def check_numbers(self, entry, content):
        """Definition, and the value of every code."""
        document = json.loads(content)
        fmt = number(document["name"])
        expect({key: document[key] for key in fmt.facts} == fmt.facts)
        for code, kind, sign, significand, exponent, canonical, bits in document["rows"]:
            own = fmt.parts(code)
            expect(kind == own[0], code)
            if kind in ("nan", "reserved"):
                expect([sign, significand, exponent, canonical, bits] == [None] * 5)
                continue
            expect((sign, significand, exponent) == own[1:], code)
            value = fmt.value(code)
            expect(canonical == fmt.canonical[value], code)
            if bits is None:
                expect(abs(value) >= OVERFLOW)
            else:
                expect(float32_value(int(bits, 16)) == value)
                expect(int(bits, 16) >> 31 == sign)
        codes = [row[0] for row in document["rows"]]
        expect(codes == sorted(set(codes)))
        expect(document["complete"] == (len(codes) == 1 << document["bits"]) == entry["complete"])
        return len(codes)

    def check_encode(self, entry, content):
        """Nearest code of every input, and whether the hard inputs are there."""
        fmt = number(entry["format"])
        grid, seen = fmt.grid, set()
        signed = fmt.facts.get("signed", False)
        for bits, code in read_words(content.decode(), entry["word"]):
            x = float32_value(bits)
            expected = grid.stored[grid.nearest(x)]
            if signed and expected == 0 and bits >> 31:
                expected = 1 << (fmt.bits - 1)
            expect(code == expected, f"{bits:08x}")
            seen.add(x)
        if self._complete(entry["format"]):
            held = [x for x in grid.middles if abs(x) < OVERFLOW]
            expect(len(held) >= len(grid.middles) - 1)
            expect(seen.issuperset(held), "a midpoint is missing")
        expect(seen.issuperset([0.0, float("inf"), float("-inf")]))
        return len(content.splitlines())

    def _complete(self, name):
        return json.loads(self.files[f"numbers/{name}.json"])["complete"]

    def check_codebooks(self, entry, content):
        """Codes and values from the real levels."""
        books = json.loads(content)["codebooks"]
        by_name = {(book["name"], book["block_size"], book["hif"]): book for book in books}
        for book in books:
            if book["name"].endswith("T"):
                base = by_name[book["name"][:-1], book["block_size"], book["hif"]]["levels"]
                zero = base.index(0.0)
                half_step = (base[zero + 1] - base[zero - 1]) / 4
                expect(book["levels"] == [min(level + half_step, 1.0) for level in base])
            fmt = number(book["hif"])
            values = [fmt.value(code) for code in book["codes"]]
            expect(values == book["values"] == sorted(set(values)), book["name"])
            expect([fmt.canonical[value] for value in values] == book["codes"])
            full = -fmt.grid.values[0]  # a power of two
            nearest = [fmt.grid.nearest(x * full) for x in book["levels"]]
            expect([fmt.grid.stored[i] for i in nearest] == book["codes"], book["name"])
        return len(books)

    def check_tensors(self, entry, content):
        """Every stored element of packed planes, with its flags."""
        layer, total = json.loads(content), 0
        for case in layer["cases"]:
            count, size = case["rows"] * case["stored_columns"], case["weights_per_block"]
            total += count
            indices = unpack(bytes.fromhex(case["index_plane"]), layer["index_bits"], count)
            plane = bytes.fromhex(case["scale_plane"])
            words = unpack(plane, layer["scale_word_bits"], count // size)
            expect(None not in (indices, words), "bits after the last element")
            expected = {
                key: [] for key in ("float32", "float32_flags", "bfloat16", "bfloat16_flags")
            }
            for i, index in enumerate(indices):
                word = words[i // size]
                significand, exponent, reserved = product(layer, case["luts"], index, word)
                exponent += case["layer_exponent"]
                if case["row_scales"] is not None:
                    row_scale = int(case["row_scales"][i // case["stored_columns"]], 16)
                    _, sign, factor, shift = number("BF16").parts(row_scale)
                    significand *= -factor if sign else factor
                    exponent += shift
                for name, precision, digits in (("float32", 24, 8), ("bfloat16", 8, 4)):
                    bits, flags = float_bits(significand, exponent, precision)
                    expected[name].append(f"{bits:0{digits}x}")
                    if flags | reserved:
                        expected[f"{name}_flags"].append([i, flags | reserved])
            for key, values in expected.items():
                expect(case[key] == values, f"{case['name']}, {key}")
            if case["name"] == "accepted":
                expect(case["float32_flags"] == case["bfloat16_flags"] == [])
            self.flags.update(flags for _, flags in case["float32_flags"])
        return total

    def check_decode(self, entry, content):
        """Every index under every scale word."""
        width = entry["index_bits"]
        precision = 24 if entry["word"][0]["name"] == "float32" else 8
        for address, (bits,) in enumerate(read_words(content.decode(), entry["word"])):
            word, index = address >> width, address & (1 << width) - 1
            significand, exponent, _ = product(entry, entry["luts"], index, word)
            expected = float_bits(significand, exponent + entry["layer_exponent"], precision)
            expect(bits == expected[0], f"address {address:#x}")
        expect(address + 1 == 1 << width + entry["scale_word_bits"])
        return address + 1

    def check_products(self, entry, content):
        """Single products with all flags."""
        layer = {"elements": "number", "element_format": entry["hif"], **entry}
        lines = list(read_words(content.decode(), entry["word"]))
        for hif_code, scale_code, exponent, flags32, bits32, flags16, bits16 in lines:
            significand, shift, reserved = product(layer, [], hif_code, scale_code)
            shift += exponent - (exponent >> 7 << 8)
            wide, narrow = (float_bits(significand, shift, bits) for bits in (24, 8))
            where = f"{hif_code:02x}_{scale_code:04x}_{exponent:02x}"
            expect((bits32, flags32) == (wide[0], wide[1] | reserved), where)
            expect((bits16, flags16) == (narrow[0], narrow[1] | reserved), where)
        expect(entry["random"] + entry["directed"] == len(lines))
        return len(lines)

    def check_blocks(self, entry, content):
        """Encodings of small matrices."""
        layer = json.loads(content)
        scale, element = number(layer["scale_format"]), number(layer["element_format"])
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
            expect(len(weights) == case["rows"] * case["columns"])
            encoder = Encoder(scale, grids, case["mode"], weights)
            norms = [1.0] * case["columns"]
            if case["channel_norms"] is not None:
                norms = [struct.unpack(">d", bytes.fromhex(n))[0] for n in case["channel_norms"]]
            columns, size = case["columns"], layer["block_size"]
            words, elements = [], []
            if size == 0:
                columns = size = len(weights)
                norms = norms * case["rows"]
            for start in range(0, len(weights), columns):
                for left in range(0, columns, size):
                    right = min(left + size, columns)
                    padding = [0.0] * (size - (right - left))
                    block = weights[start + left : start + right] + padding
                    word, stored = encoder.block(block, norms[left:right] + padding)
                    words.append(word)
                    elements += stored
            refused = not (encoder.held and -128 <= encoder.f < 128)
            expect(case["refused"] == refused, where)
            if not refused:
                expect(case["layer_exponent"] == encoder.f, where)
                expect(case["scale_words"] == words, where)
                expect(case["elements"] == elements, where)
        return len(layer["cases"])

    def check_kernel(self, entry, content):
        """Quantized activations and products of small matrices with them."""
        layer, total = json.loads(content), 0
        for case in layer["cases"]:
            where = f"{case['activations']}, {case['name']}"
            kernel = Kernel(layer, case)
            outputs = kernel.outputs(exact=False)
            expect(case["float32"] == list(map(hex32, outputs)), where)
            narrow = [y if math.isinf(y) or not y else rounded(Fraction(y), 8) for y in outputs]
            expect(case["bfloat16"] == [hex32(y)[:4] for y in narrow], where)
            expect(case["exact_float32"] == list(map(hex32, kernel.outputs(exact=True))), where)
            total += len(outputs)
        return total

    def check_checkpoints(self, entry, content):
        """Values of good checkpoints, verdicts on broken ones."""
        if entry["name"].endswith(".safetensors"):
            return 1  # looked at with the JSON file that names it
        document = json.loads(content)
        for case in document["cases"]:
            stored = self.files[f"checkpoints/{case['file']}"]
            if "verdict" in case:
                expected = tuple(case["verdict"][key] for key in ("kind", "tensor", "field"))
                expect(verdict(stored) == expected, f"{case['file']}: {verdict(stored)}")
                continue
            decoded, raw = decode_checkpoint(stored)
            expect(list(decoded) == sorted(case["quantized"]), case["file"])
            for name, tensor in case["quantized"].items():
                shape, bits = decoded[name]
                values = struct.pack(f"<{len(bits)}I", *bits)
                where = f"{case['file']}: {name}"
                expect((shape, hashlib.sha256(values).hexdigest()) == (
                    tensor["shape"], tensor["sha256"]
                ), where)  # fmt: skip
                expect(tensor["float32"] in (None, [f"{value:08x}" for value in bits]), where)
            expect(
                {name: [dtype, shape, data.hex()] for name, (dtype, shape, data) in raw.items()}
                == {
                    name: [tensor[key] for key in ("dtype", "shape", "data")]
                    for name, tensor in case["raw"].items()
                },
                case["file"],
            )
        return len(document["cases"])


def main(command, path):
    """Run a command of the module's docstring; return the exit code."""
    if command == "check":
        folder = Path(path)
        files = {
            entry.relative_to(folder).as_posix(): entry.read_bytes()
            for entry in folder.rglob("*") if entry.is_file()
        }  # fmt: skip
        vectors = VectorSet(files)
        complaints = vectors.check()
        for complaint in complaints.values():
            print(complaint)
        if not complaints:
            print(f"{vectors.manifest['cases']} answers, all the same here")
        return int(bool(complaints))
    try:
        decoded, raw = decode_checkpoint(Path(path).read_bytes())
    except Refused as refusal:
        print(f"{path}: {refusal}", file=sys.stderr)
        return 2
    for name, (shape, bits) in decoded.items():
        values = struct.pack(f"<{len(bits)}I", *bits)
        print(hashlib.sha256(values).hexdigest(), "x".join(map(str, shape)), name)
    for name, (dtype, shape, _) in raw.items():
        print(f"{dtype} as stored", "x".join(map(str, shape)), name)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("decode", "check"):
        print("usage: decoder.py decode FILE | check FOLDER", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(*sys.argv[1:]))
