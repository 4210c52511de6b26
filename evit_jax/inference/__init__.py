"""Models in use: logits, features and predictions, and the experiment of dropping patches."""
