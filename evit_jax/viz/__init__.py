"""Pictures of what a model keeps and of how it was trained. Knows numpy arrays, no model."""
