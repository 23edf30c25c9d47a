"""Timing diagrams of the datasheet: scenarios, the simulations that record them, WaveJSON."""
