"""Sources, transforms, the input pipeline, and mixing on the devices. Knows no model.

Only `mixing` imports jax: Grain's workers import what makes batches again.
"""
