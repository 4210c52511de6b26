"""Reads the weights of other programs without executing code in their files, and writes weights for them."""
