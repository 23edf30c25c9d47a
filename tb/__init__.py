"""Testbenches: cocotb drivers, monitors and benches with the golden model as the reference."""
