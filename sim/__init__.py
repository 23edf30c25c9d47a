"""Simulations that the product runs: whole tensors, models and layers against the golden model.

Also what every simulation needs: simulators, streams, beats, and the words that golden expects.
"""
