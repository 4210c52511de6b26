"""Turns a model and a stream of examples into trained weights: state, steps, loop, checkpoints and metrics."""
