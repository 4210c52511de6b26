"""Exports a model as a folder that serves without this package: StableHLO programs, weights and a loader."""
