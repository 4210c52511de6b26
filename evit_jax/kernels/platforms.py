"""Chooses between the implementations of a kernel by platform, when a program is lowered."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array


def by_platform(*arrays: Array | None, tpu: Callable[..., Any], default: Callable[..., Any], **options: Any) -> Any:
    """Returns `tpu(*arrays, **options)` in a program for TPUs, and `default(*arrays, **options)` in other programs.

    JAX caches the trace and the derivative of a branch by the identity of its function. Equal options give the same
    function here, so that blocks of equal shapes are traced once.

    Args:
      tpu, default: functions defined in a module, so that each is one object.
      options: hashable arguments that are the same on all platforms.
    """
    options = tuple(sorted(options.items()))
    return jax.lax.platform_dependent(*arrays, tpu=_with_options(tpu, options), default=_with_options(default, options))


@functools.lru_cache(maxsize=256)
def _with_options(function, options):
    return functools.partial(function, **dict(options))
