"""Processes, devices, files and programs: nothing here knows a model."""
