"""Inference: logits, features, predictions and label maps, and the dropping experiment."""
