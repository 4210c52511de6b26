"""Reads the weights of other programs without executing anything in their files, and writes weights for them."""
