"""Vision transformers that drop the tokens they do not need.

    import evit_jax
    model = evit_jax.load('runs/digits')
    logits = model(images)

Public names are imported at first use, so `import evit_jax` is fast and does not import JAX.
"""

import importlib
from typing import Any

_MODULES = {  # public name -> module that defines it
    'load': 'api', 'create_model': 'api', 'train': 'api', 'evaluate': 'api', 'speed_up': 'api',
    'list_models': 'models',
    'list_reducers': 'reduction.registry', 'register_reducer': 'reduction.registry', 'keep_top': 'reduction.gather',
    'make_plan': 'reduction.plan', 'as_source': 'data.sources',
    'VisionModel': 'inference.model', 'ModelOutput': 'inference.compiled', 'Prediction': 'inference.prediction',
    'knn': 'inference.knn',
    'ViTConfig': 'models.config', 'LVViTConfig': 'models.lvvit', 'TokenPlan': 'reduction.plan',
    'Tokens': 'reduction.tokens', 'Reducer': 'reduction.reducer', 'ReducerInputs': 'reduction.reducer'}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
