"""A trained model as a folder that serves without this package: programs of StableHLO, weights, a loader."""
