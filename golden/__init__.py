"""Pure-NumPy model of the quantizer and decoder: the truth that hardware must equal."""
