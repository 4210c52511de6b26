"""Weights of other programs, read without running anything that they hold, and written for them."""
