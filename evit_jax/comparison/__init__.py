"""Compares methods of dropping tokens with the same data, seeds, steps and multiply-accumulates."""
