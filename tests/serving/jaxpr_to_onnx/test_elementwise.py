"""Elementwise primitives, broadcasts and changes of the shape have the results of JAX in ONNX Runtime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.onnx_programs import assert_same, convert

UNARY = {
    'abs': jnp.abs, 'ceil': jnp.ceil, 'cos': jnp.cos, 'erf': jax.lax.erf, 'exp': jnp.exp, 'exp2': jnp.exp2,
    'expm1': jnp.expm1, 'floor': jnp.floor, 'log': lambda x: jnp.log(jnp.abs(x)), 'neg': jnp.negative,
    'log1p': lambda x: jnp.log1p(jnp.abs(x)), 'logistic': jax.nn.sigmoid, 'relu': jax.nn.relu, 'sign': jnp.sign,
    'rsqrt': lambda x: jax.lax.rsqrt(jnp.abs(x)), 'sin': jnp.sin, 'square': jnp.square, 'elu': jax.nn.elu,
    'sqrt': lambda x: jnp.sqrt(jnp.abs(x)), 'tanh': jnp.tanh, 'cube': lambda x: x**3,
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True), 'clip': lambda x: jnp.clip(x, -1, 2),
    'clamp': lambda x: jax.lax.clamp(-1.0, x, 1.0), 'convert': lambda x: x.astype(jnp.int32),
    'remainder': lambda x: (x.astype(jnp.int32) % 3, x % 2), 'is_finite': lambda x: jnp.isfinite(jnp.log(x)),
    'batch_size': lambda x: x / x.shape[0], 'logical': lambda x: ((x > 1) | ~(x < 0)) & (x != 2)}
SHAPES = {
    'reshape': lambda x: x.reshape(x.shape[0], 20), 'squeeze': lambda x: x[:, :, None, :1].squeeze((2, 3)),
    'transpose': lambda x: x.transpose(2, 0, 1).transpose(1, 2, 0), 'slice': lambda x: x[:, 1:4, 2:],
    'reverse': lambda x: x[:, :, ::-1],
    'concatenate': lambda x: jnp.concatenate([x, jnp.ones((x.shape[0], 1, 4)), x[:, :0]], axis=1),
    'stack': lambda x: jnp.stack([x, -x], axis=2), 'unstack': lambda x: sum(jnp.unstack(x, axis=1)),
    'split': lambda x: jnp.split(x, [0, 2], axis=1)[2], 'pad': lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))),
    'tile': lambda x: jnp.tile(x, (1, 1, 2)), 'repeat': lambda x: jnp.repeat(x, 2, axis=1),
    'roll': lambda x: jnp.roll(x, 1, axis=2), 'transposed_slice': lambda x: x.transpose(2, 0, 1)[1]}
BROADCASTS = {
    'vector': lambda x: x + jnp.arange(4), 'over_the_batch': lambda x: jnp.broadcast_to(jnp.arange(5), (x.shape[0], 5)),
    'sum_of_stretched': lambda x: jnp.broadcast_to(x[:, :1], x.shape).sum(1),
    'max_of_stretched': lambda x: jnp.broadcast_to(x[:, :1], x.shape).max((1, 2)),
    'where': lambda x: jnp.where(x[..., :1] > 0, x, jnp.zeros(4)), 'new_axes': lambda x: x[:, :, None] * x[:, None],
    'transpose_of_stretched': lambda x: jnp.broadcast_to(x[:, :, :1], x.shape).transpose(0, 2, 1),
    'stretched_and_single': lambda x: jnp.full(x.shape[:2], 2.0) / x.sum((1, 2), keepdims=True)[..., 0],
    'ratio_of_stretched': lambda x: (jnp.ones(x.shape[:2]) / jnp.ones(x.shape[:2]).sum(1, keepdims=True)) @ jnp.ones(5),
    'iota': lambda x: jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 5), 1) + x[..., 0].astype(jnp.int32)}


@pytest.mark.parametrize('name', UNARY)
def test_elementwise_primitive_equals_jax(name):
    assert_same(UNARY[name])


@pytest.mark.parametrize('name', ('add', 'subtract', 'multiply', 'divide', 'maximum', 'minimum', 'less', 'equal',
                                  'greater_equal'))
def test_binary_primitive_equals_jax(name):
    assert_same(lambda x: (getattr(jnp, name)(x, x[:, ::-1]), getattr(jnp, name)(x, 1.5)))


@pytest.mark.parametrize('name', SHAPES)
def test_change_of_shape_equals_jax(name):
    assert_same(SHAPES[name])


@pytest.mark.parametrize('name', BROADCASTS)
def test_broadcast_equals_jax(name):
    assert_same(BROADCASTS[name])


def test_broadcast_of_an_elementwise_input_needs_no_node():
    assert not assert_same(lambda x: x - x.max(axis=2, keepdims=True))['Expand']


def test_transposes_in_succession_become_one():
    assert assert_same(lambda x: x.transpose(0, 2, 1).transpose(1, 0, 2))['Transpose'] == 1
    assert assert_same(lambda x: x.transpose(2, 0, 1).transpose(1, 2, 0) + 1)['Transpose'] == 0


def test_select_among_three_cases_is_refused():
    with pytest.raises(ValueError, match=r'the model computes select_n .*does not support: export with --format=stab'):
        convert(lambda x: jax.lax.select_n(x[..., 0].astype(jnp.int32), *(x[..., i] for i in range(3))))


def test_float16_stays_float16():
    assert_same(lambda x: (x * 2 + 1).astype(jnp.float32), dtype=np.float16)
