"""What a datasheet says about a unit that cannot be read off its component: one small table."""

from dataclasses import dataclass

__all__ = ["FIELDS", "SYMBOLS", "TEXTS", "FieldText", "Flag", "UnitText"]


@dataclass(frozen=True)
class Flag:
    """Flag of a beat: why it is raised, and what the value is then."""

    name: str
    cause: str
    value: str


@dataclass(frozen=True)
class UnitText:
    """Words about one unit.

    Parameters
    ----------
    equation : str
        What lane k of a beat becomes.
    golden : tuple of str
        Functions of the golden model that it equals, bit by bit.
    flags : tuple of Flag
        Those that it raises.
    benches : tuple of str
        Files with its benches and tests.
    vectors : str
        Which conformance vectors apply.
    notes : tuple of str
        What its user has to know.
    flags_of : str
        What each flag is the OR over.
    timing : str
        Of a unit without a fixed latency.
    """

    equation: str = ""
    golden: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    benches: tuple[str, ...] = ()
    vectors: str = ""
    notes: tuple[str, ...] = ()
    flags_of: str = "the lanes of its beat"
    timing: str = ""


@dataclass(frozen=True)
class FieldText:
    """Field of a payload: its width, a product of :data:`SYMBOLS` and numbers, and meaning."""

    width: str
    text: str


SYMBOLS = {
    "lanes": "weights of a beat, `--lanes`",
    "S": "scale words of a beat, max(1, lanes / block size); block size is the smallest of the "
    "formats",
    "E": "bits of a stored element, of the widest format",
    "W": "bits of a scale word, of the widest format",
    "K": "bits of a scale code, the scale word without metabit, of the widest format",
    "X": "bits of a LUT index, of the widest format with LUTs",
    "H": "bits of a LUT entry: HIF7 7, HIF8 and HIF8T 8",
    "C": "bits of a decoded code: H, or of the widest atom if that is more",
    "F": "bits of a value: float32 32, bfloat16 16",
    "N": "bits of a source code of `float_to_hif`",
    "L": "bits of the layer exponent: 8, or 9 behind the lookup where E2M3 is a format",
    "M": "bits that number the formats; no field where there is one",
    "rows": "rows of weights of a tile, `--rows`",
    "columns": "tokens of a tile, `--columns`",
    "U": "scale units of a tile, ceil(rows x columns / block size)",
    "P": "bits of an element of the weights: the atom, or a LUT entry",
    "Q": "bits of a scale code of the weights, without metabit",
    "A": "bits of an element of the activations",
    "B": "bits of a scale code of the activations",
    "R": "bits of a row number",
    "Y": "bits of a slot number, `--slots`",
}

_LAST = FieldText("1", "final beat of a tensor")
_FLAG = FieldText("1", "see Flags")

FIELDS: dict[str, dict[str, FieldText]] = {
    "index_beat": {
        "indices": FieldText("lanes x E", "LUT index (or atom code) of each weight"),
        "scale_words": FieldText("S x W", "scale word of each block: scale code, above it metabit"),
        "row_scales": FieldText("S x 16", "bfloat16 row scale of each block (formats with R)"),
        "last": _LAST,
    },
    "lut_write": {
        "index": FieldText("X", "entry to write"),
        "lut": FieldText("1", "0: first LUT, 1: second (metabit 1); no field with one LUT"),
        "code": FieldText("H", "HIF code of the entry"),
        "layer_exponent": FieldText("8", "f, two's complement; counts with `last`"),
        "mode": FieldText("M", "position of the tensor's format; counts with `last`"),
        "last": FieldText("1", "completes the LUTs of a tensor"),
    },
    "hif_beat": {
        "codes": FieldText("lanes x C", "HIF codes; atoms other than E2M3 keep their codes"),
        "scales": FieldText("S x K", "scale code of each block"),
        "row_scales": FieldText("S x 16", "bfloat16 row scale of each block (formats with R)"),
        "layer_exponent": FieldText("L", "f of the tensor, two's complement; 3 less for E2M3"),
        "mode": FieldText("M", "position of the tensor's format"),
        "last": _LAST,
    },
    "float_beat": {
        "values": FieldText("lanes x F", "IEEE 754 values"),
        **dict.fromkeys(("reserved", "overflow", "underflow"), _FLAG),
        "last": _LAST,
    },
    "merged_beat": {
        "values": FieldText("lanes x F", "IEEE 754 values"),
        **dict.fromkeys(("reserved", "overflow", "underflow", "misplaced"), _FLAG),
        "last": _LAST,
    },
    "dense_beat": {
        "values": FieldText("lanes x 32", "IEEE 754 values"),
        **dict.fromkeys(("reserved", "overflow", "underflow"), _FLAG),
        "last": _LAST,
    },
    "correction": {
        "position": FieldText("32", "weight of the tensor in stream order, padding included"),
        "value": FieldText("16", "bfloat16 to add"),
        "empty": FieldText("1", "with `last`: the tensor has no corrections"),
        "last": FieldText("1", "final entry of a tensor"),
    },
    "tile_weights": {
        "codes": FieldText("rows x P", "element of each row, all of the same input channel"),
        "scales": FieldText("rows x Q", "scale code of each row; counts in a block's first beat"),
        "layer_exponent": FieldText(
            "9", "f, two's complement, 3 less for E2M3 in codes of LUT entries; as the scales"
        ),
        "last": FieldText("1", "last beat of a tile; counts in the last beat of a block"),
    },
    "tile_activations": {
        "codes": FieldText("columns x A", "element of each token, of that input channel"),
        "scales": FieldText(
            "columns x B", "scale code of each token; counts in a block's first beat"
        ),
        "token_exponents": FieldText(
            "columns x 8",
            "power of two of each token, two's complement; as the scales (scales of fewer than 8 "
            "exponent bits)",
        ),
    },
    "tile_outputs": {
        "values": FieldText("U x 32", "float32 output of each scale unit"),
        "reserved": _FLAG,
        "overflow": _FLAG,
        "last": FieldText("1", "last outputs of a tile"),
    },
    "tile_indices": {
        "indices": FieldText("rows x E", "LUT index (or atom code) of each row"),
        "scale_words": FieldText(
            "rows x W", "scale word of each row; counts in a block's first beat"
        ),
        "last": FieldText("1", "last beat of a tile; counts in the last beat of a block"),
        "last_tile": FieldText("1", "beside `last`: last tile of a tensor"),
    },
    "tile_row_scales": {
        "scales": FieldText("rows x 16", "bfloat16 row scale of each row of a tile"),
    },
    "epilogue_activations": {
        "codes": FieldText("columns x A", "element of each token, of one input channel"),
        "scales": FieldText(
            "columns x B", "scale code of each token; counts in a block's first beat"
        ),
        "token_exponents": FieldText(
            "columns x 8",
            "power of two of each token, two's complement; as the scales (scales of fewer than 8 "
            "exponent bits)",
        ),
        "last": FieldText("1", "last input channel of a tile"),
    },
    "correction_column": {
        "column": FieldText("32", "input channel of which the tile has corrections; they ascend"),
        "empty": FieldText("1", "with `last`: the tile has no corrections"),
        "last": FieldText("1", "final column of a tile"),
    },
    "tile_correction": {
        "row": FieldText("R", "row of the tile"),
        "slot": FieldText("Y", "position of its column among those of the tile"),
        "value": FieldText("16", "bfloat16 that is multiplied with the activation"),
        "empty": FieldText("1", "with `last`: the tile has no corrections"),
        "last": FieldText("1", "final correction of a tile"),
    },
    "epilogue_outputs": {
        "values": FieldText("U x F", "output of each bank, as the tile's of each scale unit"),
        **dict.fromkeys(("reserved", "overflow", "misplaced"), _FLAG),
        "last": FieldText("1", "last outputs of a tile"),
    },
    "source_beat": {
        "codes": FieldText("lanes x N", "codes of the source format"),
        "last": _LAST,
    },
    "converted_beat": {
        "codes": FieldText("lanes x H", "canonical HIF codes"),
        **dict.fromkeys(("inexact", "saturated", "nan"), _FLAG),
        "last": _LAST,
    },
}
"""Fields by kind of payload."""

# Of decoded values.
_DECODED = (
    Flag(
        "reserved",
        "HIF8 shift 5 to 7; BF16 scale or row scale with exponent 255; NaN of E4M3; most negative "
        "code of INT4 and INT8",
        "shift 4; exponent 255 taken as finite; 480 with its sign; 0",
    ),
    Flag("overflow", "magnitude of 2^128 or more after rounding", "infinity of its sign"),
    Flag("underflow", "magnitude below 2^-126 after rounding, not zero", "+0"),
)
_MISPLACED = Flag(
    "misplaced", "correction that does not ascend, or beyond the tensor's last beat", "dropped"
)
# Of sums, whatever the decoded values are.
_SUMMED = (
    Flag(
        "reserved",
        "that of the beat on `i`; correction that is no finite bfloat16",
        "as on `i`; correction dropped",
    ),
    Flag(
        "overflow",
        "that of the beat on `i`; sum of 2^128 or more after rounding",
        "infinity of its sign",
    ),
    Flag("underflow", "that of the beat on `i`; a subnormal sum raises none", "as on `i`"),
    _MISPLACED,
)
# Of both.
_CORRECTED = (
    Flag(
        "reserved",
        f"{_DECODED[0].cause}; correction that is no finite bfloat16",
        f"{_DECODED[0].value}; correction dropped",
    ),
    Flag("overflow", "magnitude of 2^128 or more after rounding", "infinity of its sign"),
    Flag(
        "underflow",
        "decoded magnitude below 2^-126, not zero; a subnormal sum raises none",
        "+0, to which a correction is added",
    ),
    _MISPLACED,
)
_CONVERTED = (
    Flag("inexact", "a value is not equal to its code", "nearest, ties to even"),
    Flag("saturated", "a value, after rounding, is beyond an end; infinities are", "the end"),
    Flag("nan", "a NaN, which raises neither of the others", "code 0"),
)

_LUT_NOTES = (
    "Write every entry that an index of the tensor can name, for every tensor: an entry that is "
    "not written holds what an earlier tensor left there.",
    "A tensor of atoms needs one write, with `last`, for its layer exponent and mode.",
    "Where a block is longer than a beat its scale word is in every beat of it.",
    "The final beat may be partly filled; the rest is zero bits, which decode to +0.",
)
_ENTRY_NOTES = (
    "A beat waits until the entry after its last correction has been taken from `i_entry`: never "
    "hold back that entry until the beat has left.",
    "Positions count padding: row x padded columns + column.",
)

_TILE_FLAGS = (
    Flag(
        "reserved",
        "a code of the tile has no meaning; in all beats of the tile",
        "as `hif_to_float`; elements of E4M3 and scales: no defined value",
    ),
    Flag("overflow", "an output of the beat is an infinity", "infinity of its sign"),
)

_EPILOGUE_FLAGS = (
    Flag(
        "reserved",
        "it came with the sums; or a row scale or a correction of the tile is no finite bfloat16",
        "as the tile has it; of a row scale no defined value; such a correction is left out",
    ),
    Flag("overflow", "an output of the beat is an infinity", "infinity of its sign"),
    Flag(
        "misplaced",
        "a correction names a row or slot that does not exist, or a column does not ascend, is "
        "beyond the tile, or finds no slot",
        "the correction, or its column and those after it, are left out",
    ),
)

_EPILOGUE_TIMING = (
    "A beat of sums in every clock, s beats of a tile; then one correction a clock "
    "(`clocks_of_correction` of them where a bank has several tokens), where one of a row waits "
    "until 6 clocks after the one before it of the same row; the first outputs 13 clocks after the "
    "last correction, then a beat a clock; then the next tile's sums. So n corrections without "
    "waits take 2 s + n + 11 clocks; a tile without any 2 s + 1, with row scales 2 s + 5. The "
    "bench asserts all of it."
)

TEXTS = {
    "lut_decoder": UnitText(
        "`code[k] = LUT[metabit of the block][index[k]]`; of E2M3 "
        "`code[k] = canonical HIF code of 8 x value`, of other atoms `code[k] = element[k]`",
        ("golden.tensor.decode",),
        (),
        ("tb/lut_decoder_bench.py", "tests/rtl/test_units_rtl.py"),
        "`tensors/*.json`: planes and LUTs; `decode/*.hex` with `hif_to_float` behind it",
        _LUT_NOTES,
    ),
    "hif_to_float": UnitText(
        "`value[k] = element(code[k]) x scale x 2^f` (`x row scale`)",
        ("golden.float_output.element_to_float", "golden.tensor.decode"),
        _DECODED,
        ("tb/hif_to_float_bench.py", "tests/rtl/test_units_rtl.py"),
        "`products/*.hex`: code, scale code and f to float32 and bfloat16, with flags",
    ),
    "float_to_hif": UnitText(
        "`code[k] = nearest HIF code of source[k] x 2^shift`",
        ("golden.float_input.float_to_hif",),
        _CONVERTED,
        ("tb/float_to_hif_bench.py", "tests/rtl/test_float_to_hif_rtl.py"),
        "`encode/HIF7.hex`, `HIF8.hex` and `HIF8T.hex`, those inputs that the source format holds, "
        "with the power of two",
        ("`shift` is fixed in the hardware; the JSON description names it.",),
    ),
    "float_decoder": UnitText(
        "`value[k] = LUT[metabit][index[k]] x scale x 2^f` (`x row scale`)",
        ("golden.tensor.decode",),
        _DECODED,
        ("sim/tensor_bench.py", "tests/rtl/test_tensors_rtl.py"),
        "`tensors/*.json` and `decode/*.hex`",
        _LUT_NOTES,
    ),
    "sparse_merge": UnitText(
        "`value[p] = dense[p] + correction at p`, one float32 addition",
        ("golden.corrections.Corrections.add_to",),
        _SUMMED,
        ("tb/sparse_merge_bench.py", "tests/rtl/test_sparse_merge_rtl.py"),
        "none: any IEEE 754 float32 addition, nearest even, is the reference",
        _ENTRY_NOTES,
    ),
    "sparse_decoder": UnitText(
        "`value[p] = LUT[metabit][index[p]] x scale x 2^f` (`x row scale`) `+ correction at p`",
        ("golden.tensor.decode", "golden.corrections.Corrections.add_to"),
        _CORRECTED,
        ("sim/bulk_bench.py", "tests/rtl/test_sim_model.py"),
        "`tensors/*.json` and `decode/*.hex`, each tensor with one `empty` entry",
        (*_LUT_NOTES, *_ENTRY_NOTES),
    ),
    "sop_decoder_axi": UnitText(
        "`value[p] = LUT[metabit][index[p]] x scale x 2^f` (`x row scale`) `+ correction at p`",
        ("golden.tensor.decode", "golden.corrections.Corrections.add_to"),
        (),
        ("tb/axi_bench.py", "tests/rtl/test_axi_rtl.py"),
        "`tensors/*.json`: `index_plane` and `scale_plane` are the packets",
        (
            "There is no `tkeep` on inputs: words are full, lowest byte first, up to the final "
            "one, which has `tlast`; its bytes after the plane are ignored.",
            "The buses of indices and scales are the narrowest of 32, 64, 128 and so on bits that "
            "bring a beat every clock; those of the other planes have 32 bits. The JSON "
            "description and the C header name all widths.",
            "**Words before START.** Each input takes up to two words before a tensor wants them; "
            "they are the first ones of the next tensor that has such a plane.",
            "**A packet without `tlast`.** The plane is complete with its last word: its values "
            "are right, and `ERRORS.long_*` is set at once; but the tensor stays busy, uncounted, "
            "because what follows on that stream, up to and including the next `tlast`, still "
            "belongs to its packet and is dropped. So the packet of the next tensor is lost, and "
            "that tensor waits until `TIMEOUT`. Stop and reset.",
            "**Waiting.** The hardware waits without limit for words that do not come, for `tlast` "
            "and for a receiver that takes none. `TIMEOUT` sets `ERRORS.timeout` after so many "
            "clocks in a row in which a tensor was under way and no word moved on any stream, and "
            "again after the next such silence; nothing is given up by itself. `INPUT_WAITS` and "
            "`OUTPUT_WAITS` count who waits for whom.",
            "**Stop.** From `CONTROL.stop` on words on all inputs are taken and dropped, so that "
            "DMA engines run to their ends. `m_axis` keeps what it offers; if a packet has begun "
            "and its last beat is not on its way, one beat follows with `tlast`, all of whose "
            "`tkeep` is 0 (codes have no `tkeep`: that beat has no meaning). `STATUS.stopped` says "
            "that the packet has ended. START and LUT writes are refused until `CONTROL.reset`.",
            "**Reset command.** `CONTROL.reset` forgets tensors, LUTs and what is on the streams, "
            "at once; the rest of a packet that is still being sent would be taken for the next "
            "tensor's, so first see to it that nobody sends. Without a stop before it `tvalid` of "
            "`m_axis` may fall with a word that was not taken, and a packet stay without `tlast`, "
            "which AXI4-Stream forbids. Registers, flags and counters stay.",
            "**Several commands** in one write of `CONTROL` are refused: SLVERR, none is carried "
            "out, and with START among them `start_refused` is set.",
            "**LUTs.** START is refused with `luts_missing` until every entry of the tensor's LUTs "
            "was written since the last reset of either kind. An entry that is not written again "
            "for a later tensor holds what an earlier one left there, with the lookups `two_banks` "
            "and `memory` the one before that; so write all LUTs of every tensor.",
            "**Writes.** Bytes of a register without their `wstrb` bit stay as they are; in "
            "`CONTROL` and where 1 clears they count as 0; in the LUT window they are not written. "
            "The two lowest bits of addresses do not count: lanes of data are always those of the "
            "aligned word.",
            "**Refused addresses.** The LUT window is 0x400 to 0x7ff. A strobed byte there that is "
            "beyond the last LUT, or that comes when `STATUS.lut_ready` is 0, is answered with "
            "SLVERR and sets `lut_refused`, and no byte of the word is written. Reads "
            "there, and all accesses from 0x800 on or between registers, are answered with SLVERR "
            "and set nothing. In a decoder of atoms alone the whole window is beyond the LUTs.",
            "**Outstanding transactions.** One write and one read at a time: `awready` and "
            "`wready` stay low until the answer to a write was taken, `arready` until that to a "
            "read. Address and data of a write may come in any order.",
            "**`too_large`** comes up to 40 clocks after START, which is answered with OKAY: the "
            "tensor is dropped, is not counted in `TENSORS` and sets no `done`. Products of rows "
            "and columns padded to whole blocks count, up to 4,294,967,295.",
            "**Columns of corrections** are 16 bits each for tensors of up to 65,536 columns, else "
            "32, as in the file.",
            "**Exponents.** Without `float_layout` the layer exponent in `tuser` is 3 less for "
            "E2M3, whose codes come out as HIF codes of 8 times the value; `LAYER_EXPONENT` is "
            "written as the file has it.",
            "**Clock.** `<module>.sdc` has the clock and placeholders for delays of ports.",
            "**Handshake rules** as assertions are in `<module>_rules.sv`, which binds itself to "
            "every instance in a simulator or formal tool. It also checks what is connected.",
        ),
    ),
    "sop_tile": UnitText(
        "`y[r, c] = sum of T_b over the blocks b`, each addition rounded to float32, "
        "`T_b = round(P_b x weight scale x activation scale x 2^f)`, "
        "`P_b = sum of weight[r, k] x activation[k, c] over the block`, exact",
        ("golden.kernel.matmul",),
        _TILE_FLAGS,
        ("tb/sop_tile_bench.py", "tests/rtl/test_sop_tile_rtl.py"),
        "`kernel/*.json`: `float32` before row scales and corrections, which come after the tile",
        (
            "Decoded elements go in: `lut_decoder` or others before it do the lookup. Row scales "
            "and corrections are for what comes after it.",
            "A tile is whole blocks of the weights: fill the rest of a row's last block with codes "
            "of 0.",
            "A beat goes in when both inputs have one. Where blocks of the activations are longer, "
            "or a token has one scale, repeat the scale in each block of the weights.",
            "Outputs are numbered column by column, and scale unit u has those from u x s on, one "
            "in each of s beats; `outputs` of the JSON description lists row and column of each. "
            "Lanes without an output are +0.",
            "`multiplier` changes what it costs and nothing else: [synthesis](../synthesis.md).",
        ),
        "everything that its beat was made from",
    ),
    "lut_tile": UnitText(
        "`sop_tile` of `weight[r, k] = LUT[metabit of the row's block][index[r, k]]`",
        ("golden.kernel.accumulate",),
        _TILE_FLAGS,
        ("tb/lut_tile_bench.py", "tests/rtl/test_lut_tile_rtl.py"),
        "`kernel/*.json`: `float32` before row scales and corrections, which come after the tile",
        (
            "Planes go in in [tile order](../kernel.md#tile-order), LUTs as into `lut_decoder`.",
            "A tile is whole blocks; row scales and corrections are for `tile_epilogue`.",
        ),
        "everything that its beat was made from",
    ),
    "tile_epilogue": UnitText(
        "`y = round(sum x row scale)`, then for each correction of the row `y = round(y + "
        "round(value x activation))`, then, if bfloat16 comes out, `round(y)`",
        ("golden.kernel.finish",),
        _EPILOGUE_FLAGS,
        ("tb/tile_epilogue_bench.py", "tests/rtl/test_tile_epilogue_rtl.py"),
        "`kernel/*.json`: from sums to `float32` or `bfloat16`",
        (
            "Activations are those of the tile itself, beat by beat, with `last` beside the "
            "weights' `last`. Those of channels with corrections are kept: 2 x slots words of all "
            "tokens' elements and scales.",
            "`golden.tile_order.tile_corrections` has columns and corrections in the order in "
            "which they go in: rows take turns, so that hardly any waits for the one before.",
            "Tiles without row scales in hardware that has them get row scales of 1, 0x3f80.",
            "The banks are memories with one port to write and one to read at once; synthesis "
            "for gates makes flip-flops of them.",
        ),
        "everything that its tile was made from; overflow, over its beat",
        _EPILOGUE_TIMING,
    ),
    "matmul_tile": UnitText(
        "`lut_tile`, then `tile_epilogue`: everything from the stored planes to the layer's output",
        ("golden.kernel.matmul",),
        _EPILOGUE_FLAGS,
        ("sim/bulk_matmul.py", "tests/rtl/test_bulk_matmul.py"),
        "`kernel/*.json`: everything",
        (
            "Each activation goes to tile and epilogue in the same clock; `last` of both streams "
            "has to agree.",
            "`sop sim-matmul` computes layers of a running model with it.",
        ),
        "everything that its tile was made from; overflow, over its beat",
        "Products in every clock, across the ends of blocks, tiles and tensors, as long as the "
        "LUTs of the next tensor are there and the epilogue of each tile takes no more clocks than "
        "the next tile has input channels; its own clocks as in "
        "[`tile_epilogue`](tile_epilogue.md#timing). The first outputs of a tile leave 13 clocks "
        "and those of its epilogue after its last beat.",
    ),
}  # fmt: skip

REACTIONS = {
    "start_refused": "SLVERR; nothing changes",
    "lut_refused": "SLVERR; no entry is written",
    "too_large": "the tensor is skipped, and its packets would count for the next one: stop and "
    "reset",
    "wrong_corrections": "the entry, or those of the rows beside a wrong row pointer, are left "
    "out; the tensor goes on",
    "reserved_code": "a defined value, see `hif_to_float` and `sparse_merge`; the tensor goes on",
    "overflow": "infinity of its sign; the tensor goes on",
    "underflow": "+0; the tensor goes on",
    "luts_missing": "SLVERR; nothing changes",
    "timeout": "nothing: it goes on waiting",
    "short": "the plane is continued with zeros",
    "long": "what follows the plane is dropped, up to `tlast`",
}
"""What the hardware does about an error, by flag of ERRORS, or by its first word."""

AXI_SIGNALS = {
    "aw": "write address", "w": "write data", "b": "write response", "ar": "read address",
    "r": "read data",
}  # fmt: skip
"""Channels of AXI4-Lite by the first letters of a signal."""
