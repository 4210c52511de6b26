"""Checkpoints, weights and workdirs of runs."""
