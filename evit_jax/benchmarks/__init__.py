"""Measurements, a file each. `evit_jax/benchmark.py` is their door."""
