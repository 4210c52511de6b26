"""The jitted functions of a model. They run on the local devices, which divide a batch among them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.inference.prediction import OUTPUTS
from evit_jax.models import Params
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import sharding
from evit_jax.training import step as steps


class ModelOutput(NamedTuple):
    """The outputs for B images of P patches. N counts the tokens, except prefix tokens, at a point in the model."""

    logits: Array                       # [B, L] float32
    features: Array                     # [B, D] float32: the vector that the classification head reads
    kept: tuple[Array, ...]             # per reduction, [B, K] int32: ids of the kept patches, best first; the token
                                        # fused by reduction s (0-based) has the id -1-s
    class_attention: tuple[Array, ...]  # per reduction, [B, N] float32: attention of the class token to the tokens
                                        # that enter; empty if the reducer works before the attention
    token_of_patch: tuple[Array, ...]   # per reduction, [B, P] int32: index of the token that holds each patch; -1:
                                        # the patch was dropped
    patch_tokens: Array                 # [B, N, D] float32: tokens after the last norm, without prefix tokens


def num_devices(batch_size: int) -> int:
    """Returns the number of local devices that divide a batch of this size."""
    return math.gcd(batch_size, jax.local_device_count())


class ReplicatedParams:
    """Parameters that are replicated on all devices that divide a batch.

    Attributes:
      params: the parameters, on the devices.
      mesh: the devices.
    """

    def __init__(self, params: Params, batch_size: int):
        """Copies the parameters to `num_devices(batch_size)` devices."""
        self.mesh = sharding.data_mesh(batch_size, jax.local_devices()[:num_devices(batch_size)])
        self.params = jax.device_put(params, sharding.replicated(self.mesh))

    def jit(self, function: Callable[..., Any], *, static_argnums: int | Sequence[int] = ()) -> Callable[..., Any]:
        """Jits a function of parameters and batches. The first axis of every output is sharded over the devices."""
        return _jit(function, self.mesh, static_argnums)

    def put(self, batch: Any) -> Any:
        """Puts a tree of arrays on the devices, sharded along their first axis."""
        return jax.device_put(batch, sharding.batch_sharding(self.mesh))


class CompiledModel:
    """The jitted functions of a model. Each is compiled once for every token plan, batch shape and image type."""

    def __init__(self, model: LoadedModel, batch_size: int):
        """Puts the parameters on the devices.

        Args:
          batch_size: number of images in a batch. Another size works if it is a multiple of the number of devices.
        """
        self._replicated = ReplicatedParams(model.params, batch_size)
        self._jitted = _jit_functions(make_apply(model), model.config, self._replicated.mesh)

    def run(self, name: str, batch: Any, plan: TokenPlan) -> Any:
        """Runs a function on a batch.

        Args:
          name: 'logits', 'features', 'forward' or 'predict', for a batch of images [B, S, S, 3]; or 'evaluate', for a
            dict of image and label.
        """
        return self._jitted[name](self._replicated.params, self._replicated.put(batch), plan)


@functools.lru_cache(maxsize=8)
def _jit_functions(apply: Callable, config: ViTConfig, mesh: Mesh) -> dict[str, Callable]:
    """Returns the jitted functions of `CompiledModel.run` by name."""
    def logits(params, images, plan):
        return apply(params, images, plan)[0]

    def features(params, images, plan):
        return apply(params, images, plan)[1]['features']

    def forward(params, images, plan):
        return model_output(*apply(params, images, plan, patch_tokens=True))

    def predict(params, images, plan):
        logits, outputs = apply(params, images, plan)
        return {'logits': logits} | {name: outputs[name] for name in OUTPUTS}

    evaluate = steps.make_eval_step(models.Model(config, None, apply), prepare=lambda images: images)
    functions = {'logits': logits, 'features': features, 'forward': forward, 'predict': predict, 'evaluate': evaluate}
    return {name: _jit(function, mesh, static_argnums=2) for name, function in functions.items()}


def make_apply(model: LoadedModel) -> Callable[..., tuple[Array, dict[str, Any]]]:
    """Returns the pure function (params, images, plan) -> (logits, outputs) of a model. It normalises uint8 images.

    Models that differ only in their parameters have the same function, and share its compiled programs.
    """
    return _make_apply(models.create(model.config, dtype=jnp.dtype(model.dtype), modules=model.modules),
                       tuple(model.mean), tuple(model.std))


@functools.lru_cache(maxsize=8)
def _make_apply(functions, mean, std):
    def apply(params, images, plan, **options):
        if images.dtype == jnp.uint8:
            images = steps.normalise(images, mean=mean, std=std)
        return functions.apply(params, images, plan, **options)

    return apply


def _jit(function, mesh, static_argnums):
    return jax.jit(sharding.with_mesh(mesh, function), static_argnums=static_argnums,
                   out_shardings=sharding.batch_sharding(mesh))


def model_output(logits: Array, outputs: dict[str, Any]) -> ModelOutput:
    """Returns the outputs of a model as a `ModelOutput`."""
    return ModelOutput(logits, *(outputs[name] for name in ModelOutput._fields[1:]))
