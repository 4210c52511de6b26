"""Benchmarks of models, of the input pipeline, and of programs compiled for TPU; see `evit_jax/benchmark.py`."""
