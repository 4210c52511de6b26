"""Sources, transforms, the input pipeline, and mixing on the devices. Independent of models.

Only `transforms.mixing` and `token_labels.mixtoken` import jax. Each worker process of Grain imports all other modules.
"""
