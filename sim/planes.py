"""Planes of a tensor as the AXI decoder takes them: one packet on one stream each."""

from golden.checkpoint.layout import field_arrays
from golden.corrections import Corrections
from golden.tensor import QuantizedTensor

__all__ = ["plane_packets"]

_STREAMS = {
    "indices": "indices",
    "scales": "scales",
    "row_scales": "row_scales",
    "corrections.indptr": "row_pointers",
    "corrections.columns": "columns",
    "corrections.values": "values",
}
"""Stream of each field of a checkpoint; LUTs are written through registers."""


def plane_packets(
    tensor: QuantizedTensor, corrections: Corrections | None = None
) -> dict[str, bytes]:
    """Packet of each plane by the name of its stream, which are the bytes of the file.

    Parameters
    ----------
    tensor : QuantizedTensor
    corrections : Corrections, optional
        Those without entries have no packets: the hardware is told that there are none.
    """
    sparse = corrections if corrections is not None and corrections.entries else None
    arrays = field_arrays(tensor, sparse)
    return {_STREAMS[field]: array.tobytes() for field, array in arrays if field in _STREAMS}
