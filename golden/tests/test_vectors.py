"""Conformance vectors against a reader that knows only docs/vectors.md and the files.

The reader is docs/decoder.py: the standard library and exact fractions, nothing of the golden
model. It must accept the set, and must notice when the golden model that wrote the set is broken.
"""

import gc
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import golden.activations
import golden.convert
import golden.corrections
import golden.float_output
import golden.formats
import golden.kernel
import golden.packing
import golden.quantize
import golden.scaling
import golden.vectors.decoding
from golden.errors import InputError
from golden.formats import HIF8T, FloatFormat, Specials
from golden.notation import QuantFormat, parse_format
from golden.vectors.conformance import DEFAULT_FORMATS, Level, jobs, manifest_entry, manifest_text
from golden.vectors.files import VectorStream, float32_bits, json_text

DECODER = Path(golden.__file__).parents[1] / "docs" / "decoder.py"
Files = dict[str, bytes]


def load_decoder(text: str) -> ModuleType:
    """The second implementation, from its source text."""
    module = ModuleType("second_implementation")
    exec(compile(text, str(DECODER), "exec"), module.__dict__)
    return module


VectorSet: Any = load_decoder(DECODER.read_text()).VectorSet


# ------------------------------------------------------------------------------------------ tests

# One of each: a pair with signed scales, power-of-two scales, a signed number format.
SMALL_SET = ("BOF4-NF4^8sS1E3M3", "E2M1^8sUE8M0", "DD5^8sUE5M7")
KINDS = (
    "numbers", "encode", "codebooks", "products", "tensors", "decode", "blocks", "kernel",
    "checkpoints",
)  # fmt: skip


def make_set(level: Level, formats: list[QuantFormat]) -> Files:
    """Bytes of a set by path."""
    files, entries = {}, []
    for job in jobs(level, formats):
        file = job.build()
        files[job.path] = file.data
        entries.append(manifest_entry(job, file))
    return files | {"manifest.json": manifest_text(level, formats, entries).encode()}


def make_small_set() -> Files:
    return make_set(Level.QUICK, [parse_format(name) for name in SMALL_SET])


@pytest.fixture(name="small_set", scope="module")
def _small_set() -> Files:
    """Written by the whole golden model; format instances cache what they need for it."""
    return make_small_set()


def test_reader_accepts_the_whole_quick_set() -> None:
    files = make_set(Level.QUICK, [])
    reader = VectorSet(files)
    assert reader.check() == {}
    manifest = reader.manifest
    assert {entry["kind"] for entry in manifest["files"]} == set(KINDS)
    assert manifest["cases"] == sum(entry["cases"] for entry in manifest["files"])
    page = DECODER.with_name("decode.md").read_text(encoding="utf-8")
    assert f"\n{manifest['cases']} answers, all the same here\n" in page
    assert manifest["formats"] == list(dict.fromkeys(name for name, _ in DEFAULT_FORMATS))
    assert reader.flags == {1, 2, 4}
    assert sum(len(text) for text in files.values()) < 6e6
    texts = [text for path, text in files.items() if not path.endswith(".safetensors")]
    assert all(text.isascii() and text.endswith(b"\n") for text in texts)


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


def test_restricted_set_is_small_and_accepted(small_set: Files) -> None:
    assert VectorSet(small_set).check() == {}
    assert {path for path in small_set if path.startswith("numbers/")} == {
        f"numbers/{name}.json" for name in ("HIF7", "S1E3M3", "E2M1", "UE8M0", "UE5M7")
    }
    trained = make_set(Level.QUICK, [parse_format("DD6-DD6^8sS1E2M1", HIF8T)])
    assert VectorSet(trained).check() == {}
    assert "decode/DD6-DD6_b8sS1E2M1_HIF8T.bfloat16.hex" in trained


def test_bytes_do_not_depend_on_the_machine(small_set: Files) -> None:
    # A change here is a change of the golden model's behaviour or of the layout: raise
    # VECTOR_VERSION where a reader would notice. (Codebooks may be added.)
    digest = hashlib.sha256()
    for path in sorted(path for path in small_set if path.split("/")[0] in KINDS):
        if not path.startswith("codebooks/"):
            digest.update(small_set[path])
    assert digest.hexdigest() == "80a9899df486882f1733d57dd801548ef991d7190c49d44265de484b978a3025"


@pytest.mark.parametrize("kind", KINDS)
def test_reader_notices_a_changed_file(kind: str, small_set: Files) -> None:
    path = next(path for path in small_set if path.startswith(f"{kind}/"))
    changed = small_set[path].replace(b"0", b"1", 1)
    assert kind in VectorSet(small_set | {path: changed}).check()


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
    narrower = FloatFormat("BF15", True, 8, 6, Specials.TOP_EXPONENT)
    patch.setitem(golden.formats.OUTPUT_FORMATS, "bfloat16", narrower)


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


def _break_block_order(patch: Patch) -> None:
    good = golden.kernel._direct_terms

    def bad(*operands: Any) -> Any:
        return reversed([(term.copy(),) for (term,) in good(*operands)])

    patch.setattr(golden.kernel, "_direct_terms", bad)


def _break_correction_order(patch: Patch) -> None:
    good = golden.kernel._add_corrections

    def bad(values: Any, corrections: golden.corrections.Corrections, *rest: Any) -> None:
        turned = replace(corrections, values=corrections.values[[1, 0, 2]])
        good(values, turned, *rest)

    patch.setattr(golden.kernel, "_add_corrections", bad)


def _break_activation_end(patch: Patch) -> None:
    def bad(absmax: Any, fmt: golden.activations.ActivationFormat) -> Any:
        rounder = golden.scaling.ScaleRounder(fmt.scale)
        end = golden.convert.format_table(fmt.element).large_end
        return np.where(absmax == 0, 0, rounder.covering(absmax / abs(end))).astype(np.uint16)

    patch.setattr(golden.activations, "_scale_codes", bad)


def _break_exact_sum(patch: Patch) -> None:
    patch.setattr(golden.kernel, "_sum_exactly", lambda terms, shape, *_: _summed(terms, shape))


def _summed(terms: Any, shape: tuple[int, int]) -> Any:
    return golden.kernel._accumulate(terms, shape, np.inf)


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
    "block_order": (_break_block_order, {"kernel"}),
    "correction_order": (_break_correction_order, {"kernel"}),
    "activation_end": (_break_activation_end, {"kernel"}),
    "exact_sum": (_break_exact_sum, {"kernel"}),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("small_set")
def test_reader_notices_a_broken_golden_model(name: str) -> None:
    break_golden, kinds = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        _clear_caches()
        break_golden(patch)
        try:
            complaints = VectorSet(make_small_set()).check()
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
