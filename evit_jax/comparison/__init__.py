"""Compares methods of dropping tokens on equal terms: the same data, seeds, steps and multiply-accumulates."""
