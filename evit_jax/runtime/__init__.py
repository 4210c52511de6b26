"""Processes, devices, files and compiled programs of a run. Nothing here depends on a model."""
