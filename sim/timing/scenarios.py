"""What the timing diagrams of each unit show: :mod:`sim.timing.wavejson` records each scenario."""

from dataclasses import dataclass

__all__ = [
    "FLOAT_DECODER",
    "FLOAT_TO_HIF",
    "HIF_TO_FLOAT",
    "LUT_DECODER",
    "SOP_DECODER_AXI",
    "SOP_TILE",
    "SPARSE_DECODER",
    "SPARSE_MERGE",
    "Scenario",
]


@dataclass(frozen=True)
class Scenario:
    """One diagram: the test of that name in a bench drives it.

    Parameters
    ----------
    name : str
        Test, and stem of the file.
    title : str
        Heading in the datasheet.
    text : str
        What there is to see.
    scale : int
        Width of a clock: a label has five characters, or ten where it is 2.
    """

    name: str
    title: str
    text: str
    scale: int = 1


LUT_DECODER = (
    Scenario(
        "lut_decoder_reset",
        "Power-up and reset",
        "Outputs are undefined until the first edge with `rst`. A reset in mid-tensor drops the "
        "beat in flight and both LUT banks: `i` is not ready until LUTs are loaded again.",
    ),
    Scenario(
        "lut_decoder_load",
        "Loading LUTs, first beats",
        "32 writes (La0 to Lb15, one LUT after the other; any order will do), the final one "
        "with `last`. Beats that are offered meanwhile wait until the bank is active.",
    ),
    Scenario(
        "lut_decoder_swap",
        "From one tensor to the next without a bubble",
        "The LUTs of tensor B are loaded while tensor A is decoded. Once they are complete "
        "`i_lut` is not ready; right after A's beat with `last` the banks change places, and B "
        "follows in the next clock.",
    ),
    Scenario(
        "lut_decoder_late",
        "Late LUTs",
        "Tensor A has ended before the LUTs of tensor B are complete: `i` is not ready until "
        "they are.",
    ),
    Scenario(
        "lut_decoder_stall",
        "Stalled output",
        "While `o` has a beat that is not taken, `i` is not ready, in the same clock: the path "
        "from `o__ready` to `i__ready` is combinational.",
    ),
)

HIF_TO_FLOAT = (
    Scenario(
        "hif_to_float_latency",
        "Latency and a stall",
        "While the output waits, stages that are empty fill up; then `i` is not ready. Codes, "
        "scale codes and values of lane 0 are real ones, in hex: 1.0, 2.0 and so on.",
        scale=2,
    ),
)

FLOAT_TO_HIF = (
    Scenario(
        "float_to_hif_latency",
        "Latency, a stall and the flags",
        "bfloat16 to HIF7, lane 0 in hex; the other lanes are zero. 1.0 (3F80) and -1.0 (BF80) "
        "are exact up to the end of the range: 1.0 is 128 there, above the largest code, and "
        "saturates.",
    ),
)

FLOAT_DECODER = (
    Scenario(
        "float_decoder_load",
        "LUTs in, floats out",
        "As `lut_decoder`, with the clocks of `hif_to_float` more.",
    ),
)

SPARSE_MERGE = (
    Scenario(
        "sparse_merge_corrections",
        "Beats with no, one and three corrections",
        "Entries are named by their position, of 32 lanes a beat: 40 is in beat D1, 64 to 66 in "
        "D2. A beat with several takes a clock for each.",
    ),
    Scenario(
        "sparse_merge_late",
        "An entry that comes late, a stall, no corrections",
        "Beat D0 has the correction at 3, but may have more: it waits until the entry after "
        "that, 35, is there. Tensor E has one entry, `empty`.",
    ),
)

SPARSE_DECODER = (
    Scenario(
        "sparse_decoder_tensor",
        "A tensor from planes to weights",
        "Tensor A has corrections at 5 and 70, tensor B none. LUTs, entries and beats are "
        "offered at once; the streams sort themselves out.",
    ),
)

SOP_DECODER_AXI = (
    Scenario(
        "sop_decoder_axi_write",
        "AXI4-Lite write",
        "Address and data may come together or in any order. The second write, to a register "
        "that is read-only, is answered with SLVERR (2) and changes nothing.",
        scale=2,
    ),
    Scenario(
        "sop_decoder_axi_read",
        "AXI4-Lite read",
        "Of `ID` and `CONFIG`.",
        scale=2,
    ),
    Scenario(
        "sop_decoder_axi_luts",
        "Writes to the LUT window",
        "Four entries a word; they are written one a clock, then the answer comes.",
        scale=2,
    ),
    Scenario(
        "sop_decoder_axi_tensor",
        "A tensor from START to interrupt",
        "4 rows of 48 weights, 6 beats; `CONTROL` (010) is written 1, and packets are offered "
        "from the start. `irq` rises once the final beat has left.",
    ),
    Scenario(
        "sop_decoder_axi_corrections",
        "A tensor with corrections",
        "4 rows of 48 weights with three corrections: five row pointers (0, 0, 1, 2, 3), three "
        "columns of 16 bits and three values, two to a word.",
    ),
    Scenario(
        "sop_decoder_axi_two",
        "A second tensor, described while the first one runs",
        "A long tensor (yellow) and the one after it (orange), whose LUTs, registers and "
        "`CONTROL.start` are written and whose packets are offered in good time.",
    ),
    Scenario(
        "sop_decoder_axi_error",
        "A packet that ends early",
        "The packet of indices ends one word early: decoding goes on with zeros, the error "
        "interrupt comes, `ERRORS` names the plane, and writing it back clears both.",
        scale=2,
    ),
    Scenario(
        "sop_decoder_axi_stop",
        "A stop in mid-packet",
        "`CONTROL` (010) is written 4 while a beat waits for its receiver: it stays until it is "
        "taken, as does the one behind it, then a beat with `tlast` and no `tkeep` ends the "
        "packet. Words of planes are taken and dropped from the command on.",
    ),
)

SOP_TILE = (
    Scenario(
        "sop_tile_two",
        "Two tiles without a gap",
        "Tiles A and B of two blocks of 16 beats each, 8 rows and 4 columns. The first outputs of "
        "A leave 12 clocks after its last beat, two of them a beat, while B goes in.",
    ),
    Scenario(
        "sop_tile_stall",
        "An input that waits, a stalled output",
        "The third beat of activations comes two clocks late: weights wait for it. While `o` has "
        "outputs that are not taken, neither input is ready, in the same clock.",
    ),
)
