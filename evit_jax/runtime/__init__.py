"""Processes, devices, files and compiled programs of a run. These modules do not depend on models."""
