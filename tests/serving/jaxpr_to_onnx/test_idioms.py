"""Layer norms, GELUs and softmaxes become the operators that ONNX runtimes fuse; all families of models are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evit_jax.kernels.activations import gelu
from evit_jax.kernels.attention import multi_head_attention
from tests.helpers.onnx_programs import assert_same


def layer_norm(epsilon, dtype=jnp.float32):
    def norm(x, scale, bias):
        layer = nnx.LayerNorm(4, epsilon=epsilon, dtype=dtype, rngs=nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = scale, bias
        return layer(x)

    return norm


@pytest.mark.parametrize('epsilon', (1e-6, 1e-2))
def test_layer_norm_becomes_one_operator(epsilon):
    weights = {'scale': np.linspace(1, 2, 4, dtype=np.float32), 'bias': np.linspace(-1, 1, 4, dtype=np.float32)}
    counts = assert_same(layer_norm(epsilon), **weights)
    assert counts['LayerNormalization'] == 1 and sum(counts.values()) == 2  # the other is the output


def test_gelu_becomes_the_sequence_that_runtimes_fuse():
    assert assert_same(gelu) == {'Div': 1, 'Erf': 1, 'Add': 1, 'Mul': 2, 'Identity': 1}


def test_softmax_of_the_last_axis_becomes_one_operator():
    assert assert_same(jax.nn.softmax)['Softmax'] == 1
    assert not assert_same(lambda x: jax.nn.softmax(x, axis=1))['Softmax']


@pytest.mark.parametrize('has_size', (False, True))
def test_attention_becomes_softmax_between_two_products(has_size):
    def attend(x):
        size = 1 + jnp.abs(x[..., 0]) if has_size else None
        output = multi_head_attention(x, 2, size=size)
        return output.out, output.class_attention

    counts = assert_same(attend, (7, 24))
    assert counts['Softmax'] == 2 and not counts['Exp']


def test_masked_attention_equals_jax():
    def attend(x):
        return multi_head_attention(x, 2, mask=(x[..., 0] > 0).astype(jnp.float32)).out

    assert_same(attend, (7, 24))
