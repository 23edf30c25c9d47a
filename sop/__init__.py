"""Command line, model files and reports: all that is not golden model, RTL or testbench."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("scaled-outer-product")
