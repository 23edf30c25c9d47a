"""Hardware of the scaled outer product, in Amaranth.

Every width, bias and field position comes from the format objects of :mod:`golden`; see
:mod:`rtl.layouts`. Verilog is written by :mod:`rtl.verilog` only.
"""
