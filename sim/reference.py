"""What the golden model says every stream of the decoder carries, as beats of :mod:`sim.beats`."""

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.convert import round_bfloat16
from golden.corrections import Corrections, corrected
from golden.formats import HifFormat
from golden.promotion import is_promoted, promoted_codes
from golden.tensor import QuantizedTensor, decode
from rtl.layouts import correction_layout, hif_beat_layout
from rtl.modes import Modes
from sim.beats import beats_from_fields

__all__ = [
    "code_beats",
    "code_values",
    "correction_beats",
    "stream_positions",
    "value_beats",
    "value_bits",
    "weights",
]


def stream_positions(tensor: QuantizedTensor, sparse: Corrections) -> NDArray[np.int64]:
    """Position of every correction in the stream of padded rows, shape (entries,)."""
    _, blocks, size = tensor.indices.shape
    rows = np.repeat(np.arange(tensor.shape[0]), np.diff(sparse.indptr))
    return rows * (blocks * size) + sparse.columns


def correction_beats(tensor: QuantizedTensor, sparse: Corrections | None) -> NDArray[np.uint8]:
    """Entries of a tensor as :func:`rtl.layouts.correction_layout`, at least the empty one."""
    layout = correction_layout()
    if sparse is None or not sparse.entries:
        return beats_from_fields({"position": np.zeros(1, np.uint32), "empty": 1}, layout)
    fields: dict[str, NDArray[np.unsignedinteger] | int] = {
        "position": stream_positions(tensor, sparse).astype(np.uint32),
        "value": sparse.values,
    }
    return beats_from_fields(fields, layout)


def weights(tensor: QuantizedTensor, sparse: Corrections | None = None) -> NDArray[np.float32]:
    """Decoded weights with their corrections, padded rows one after the other.

    Returns
    -------
    weights : float32 array, shape (stored weights,)
    """
    return corrected(decode(tensor, padded=True), sparse).reshape(-1)


def value_bits(values: NDArray[np.float32], output: str) -> NDArray[np.unsignedinteger]:
    """Bit patterns of values in ``"float32"``, or rounded to ``"bfloat16"``."""
    return round_bfloat16(values) if output == "bfloat16" else values.view(np.uint32)


def value_beats(
    values: NDArray[np.float32], layout: data.StructLayout, output: str
) -> NDArray[np.uint8]:
    """Beats of floating-point values without a flag.

    Parameters
    ----------
    values : float32 array, shape (stored weights,)
        As :func:`weights` gives them; the final beat is filled up with +0.
    layout : data.StructLayout
        :func:`rtl.layouts.float_beat_layout` or :func:`rtl.layouts.merged_beat_layout`.
    output : str
        As for :func:`value_bits`.
    """
    return beats_from_fields({"values": value_bits(values, output)}, layout)


def code_values(tensor: QuantizedTensor, hif: HifFormat) -> NDArray[np.unsignedinteger]:
    """Codes of a tensor after the lookup, padded rows one after the other.

    Parameters
    ----------
    tensor : QuantizedTensor
    hif : HifFormat
        Format into which E2M3 is promoted.
    """
    codes: NDArray[np.unsignedinteger] = tensor.indices
    if tensor.format.codebooks:
        tables = np.array([lut.codes for lut in tensor.luts], dtype=np.uint8)
        codes = tables[tensor.metabits[..., None], tensor.indices]
    elif is_promoted(tensor.format):
        codes = promoted_codes(hif)[tensor.indices]
    return codes.reshape(-1)


def code_beats(tensor: QuantizedTensor, *, lanes: int, modes: Modes) -> NDArray[np.uint8]:
    """Beats of a tensor after the lookup, as :func:`rtl.layouts.hif_beat_layout`."""
    fmt = tensor.format
    codes = code_values(tensor, modes.hif)
    # What fills up the final beat is looked up too: index 0 under a scale word of zeros.
    filler = np.full(-codes.size % lanes, tensor.luts[0].codes[0] if tensor.luts else 0)
    repeat = fmt.block_size * modes.slots(lanes) // lanes
    fields: dict[str, NDArray[np.unsignedinteger] | int] = {
        "codes": np.concatenate([codes, filler.astype(codes.dtype)]),
        "scales": tensor.scale_codes.reshape(-1).repeat(repeat),
        "layer_exponent": tensor.layer_exponent + modes.element_exponent(fmt),
        "mode": modes.mode_of(fmt),
    }
    if tensor.row_scales is not None:
        fields["row_scales"] = tensor.row_scales.repeat(tensor.scale_words.shape[1] * repeat)
    return beats_from_fields(fields, hif_beat_layout(lanes=lanes, modes=modes))
