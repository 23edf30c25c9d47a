"""Commands of ``sop``, one module each; :mod:`sop.cli` puts them together."""
