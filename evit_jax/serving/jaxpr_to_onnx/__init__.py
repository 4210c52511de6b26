"""Converts JAX functions to ONNX graphs, one primitive at a time."""
