"""Quantizers of others, and the tables of the paper, for comparison."""
