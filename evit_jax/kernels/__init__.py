"""Kernels: one result on every platform, computed by the fastest implementation for the platform."""
