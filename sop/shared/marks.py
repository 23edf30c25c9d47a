"""Marks by which files that this program wrote are known again."""

__all__ = [
    "CALIBRATION_KEY",
    "DECODED_KEY",
    "PAGE_MARK",
    "PARTIAL_KEY",
    "PNG_SOFTWARE",
    "TILE_ORDER_KEY",
]

CALIBRATION_KEY = "sop_calibration"
"""Metadata of calibration files."""

PARTIAL_KEY = "sop_calibration_partial"
"""Metadata of files with which an interrupted ``sop calibrate`` goes on."""

DECODED_KEY = "sop_decoded"
"""Metadata of files of ``sop decode``, which are ordinary safetensors files otherwise."""

TILE_ORDER_KEY = "sop_tile_order"
"""Metadata of files of ``sop export --tile-rows``."""

PAGE_MARK = b'<meta name="generator" content="scaled-outer-product">'
"""In the head of every page of ``sop report``."""

PNG_SOFTWARE = "scaled-outer-product"
"""Text in every figure of ``sop report``."""
