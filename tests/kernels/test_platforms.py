"""The choice of a kernel by platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.kernels.platforms import by_platform

traced = []


def add(x, number):
    return x + number


def multiply(x, number):
    traced.append(number)
    return x * number


def compute(x):
    for number in (2, 2, 3):
        x = by_platform(x, tpu=add, default=multiply, number=number)
    return x


def test_by_platform_with_equal_options_traces_a_branch_once():
    traced.clear()
    np.testing.assert_array_equal(jax.jit(compute)(jnp.ones(3)), 12)
    assert traced == [2, 3]


@pytest.mark.parametrize(('platform', 'operation', 'other'), [('tpu', 'add', 'multiply'), ('cpu', 'multiply', 'add')])
def test_by_platform_lowers_the_branch_of_the_platform_alone(platform, operation, other):
    text = jax.jit(compute).trace(jnp.ones(3)).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f'stablehlo.{operation}') == 3 and f'stablehlo.{other}' not in text
