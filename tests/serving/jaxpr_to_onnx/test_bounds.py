"""Bounds of integers: indices that are provably in range need no check in the graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.serving.jaxpr_to_onnx.bounds import UNKNOWN, Bounds
from evit_jax.serving.jaxpr_to_onnx.equations import trace

X = jax.ShapeDtypeStruct((2, 5), jnp.float32)


def bounds_of(function):
    _, (output,) = trace(lambda x: [function(x)], X)
    return Bounds()(output)


def order(x):
    return jnp.argsort(x, axis=1)


@pytest.mark.parametrize('function, interval', [
    (lambda x: jax.lax.top_k(x, 2)[1], (0, 4)), (order, (0, 4)), (lambda x: x.argmax(1), (0, 4)),
    (lambda x: order(x) + 3, (3, 7)), (lambda x: 2 - order(x), (-2, 2)), (lambda x: 2 * order(x), (0, 8)),
    (lambda x: jnp.maximum(order(x), 2), (2, 4)), (lambda x: (x > 0).cumsum(1) - 1, (-1, 4)),
    (lambda x: jnp.where(order(x) < 2, order(x) + 1, 9), (1, 9)),
    (lambda x: jnp.concatenate([order(x), jnp.full((2, 1), -1)], axis=1), (-1, 4))])
def test_bounds_of_an_expression_contain_its_values(function, interval):
    assert bounds_of(function) == interval


def test_bounds_of_a_selected_case_use_the_condition():
    def wrapped(x):
        index = order(x) - 2
        return jnp.where(index < 0, index + 5, index)

    assert bounds_of(wrapped) == (0, 4)


def test_bounds_of_converted_floats_are_unknown():
    assert bounds_of(lambda x: x.astype(jnp.int32)) == UNKNOWN
    assert Bounds()(np.ones(3, np.float32)) == UNKNOWN
