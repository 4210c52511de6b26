"""Training and evaluation of models: set-up from a config, training loop, losses, optimizer and results."""
