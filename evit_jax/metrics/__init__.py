"""Metric writers, and the timer of the training loop."""
