"""Metric writers and the step timer of the training loop."""
