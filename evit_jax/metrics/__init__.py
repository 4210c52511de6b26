"""Metrics: where they are written, and how fast the steps are."""
