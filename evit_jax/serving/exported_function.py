"""The function that exports write, in every format: weights by name and images to outputs by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.weights import fitted
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.reducer import NO_MODULES, Modules
from evit_jax.training import step

KEPT_OUTPUTS = 'kept', 'token_of_patch', 'class_attention'  # names of the outputs of each reduction


def apply_by_name(config: ViTConfig, plan: TokenPlan, *, dtype: str = 'float32', modules: Modules = NO_MODULES,
                  path: str = '') -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """Returns the function (weights by name, normalised images) -> (logits, outputs) of a model under a plan.

    Args:
      dtype: compute dtype.
      modules: learned modules of the reducer.
      path: origin of the weights, for error messages.
    """
    model = models.create(config, dtype=jnp.dtype(dtype), modules=modules)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return lambda weights, images: model.apply(fitted(weights, like, path), images, plan)


def exported_function(trained: LoadedModel, plan: TokenPlan, kept: bool) -> Callable[..., dict[str, Any]]:
    """Returns the function (weights by name, images of 0 to 255) -> outputs by name, of a model under a plan.

    The first output is the result of the model. The outputs are:
      logits: [B, L] float32, if the model has classes.
      embedding: [B, E] float32, if the head of the model is a projection (CLIP).
      features: [B, D] float32, the input of the head.
      kept, token_of_patch, class_attention: tuples with one array for each reduction, as in
        `inference.compiled.ModelOutput`.

    Args:
      kept: if True, the function returns `KEPT_OUTPUTS` that the plan has.
    """
    apply = apply_by_name(trained.config, plan, dtype=trained.dtype, modules=trained.modules, path=trained.path)

    def function(weights: dict[str, jax.Array], images: jax.Array) -> dict[str, Any]:
        logits, outputs = apply(weights, step.normalise(images, trained.mean, trained.std))
        results = {}
        if trained.config.classes:
            results['logits' if trained.config.has_classes else 'embedding'] = logits
        results['features'] = outputs['features'].astype(jnp.float32)
        return results | {name: outputs[name] for name in KEPT_OUTPUTS if kept and outputs[name]}

    return function
