"""Kernels with one meaning and a fastest form on each platform."""
