"""A compiled engine for the inner loops of the golden quantizer: the same bits, faster.

Every function here takes the place of one of :mod:`golden`'s and does the same IEEE operations in
the same order: no reassociation, no fused multiply-add. golden does not know this package;
:mod:`sop.engines` brings the two together.
"""
