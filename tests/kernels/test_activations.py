"""Activations against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from evit_jax.kernels.activations import ACTIVATIONS


@pytest.mark.parametrize('name, formula', [
    ('gelu', lambda x: x * 0.5 * (1 + special.erf(x / np.sqrt(2)))),
    ('quick_gelu', lambda x: x * special.expit(1.702 * x)),
    ('gelu_tanh', lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))])
def test_activation_equals_its_formula_and_keeps_the_dtype(name, formula):
    x = np.linspace(-5, 5, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), formula(x), atol=1e-6)
    assert ACTIVATIONS[name](jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
