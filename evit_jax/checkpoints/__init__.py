"""Files of a run: checkpoints, weights, the workdir and its lock."""
