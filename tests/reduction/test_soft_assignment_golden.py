"""Parity of SiT, PatchMerger and Sinkhorn with JoakimHaurum/TokenReduction, by arrays in tests/golden/token_reduction.

The modules of the references run in PyTorch with the parameters and tokens in the files.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evit_jax.reduction.registry import get_reducer
from evit_jax.reduction.tokens import Tokens
from tests.helpers import golden

# name of the reducer -> name of a parameter in the reference -> path of ours
PARAMETERS = {
    'sit': {'weight.0.weight': ('norm', 'scale'), 'weight.0.bias': ('norm', 'bias'),
            'weight.1.weight': ('fc1', 'kernel'), 'weight.1.bias': ('fc1', 'bias'),
            'weight.3.weight': ('fc2', 'kernel'), 'weight.3.bias': ('fc2', 'bias'), 'scale': ('scale',)},
    'patchmerger': {'norm.weight': ('norm', 'scale'), 'norm.bias': ('norm', 'bias'), 'queries': ('queries',)},
    'sinkhorn': {'v': ('centres',)}}
each_case = pytest.mark.parametrize('name,keep', [(name, keep) for name in PARAMETERS for keep in (5, 12)])


def read(name, keep):
    """Returns the recorded arrays of a case, and the parameters and their gradients by our paths."""
    arrays = np.load(golden.FOLDER / 'token_reduction' / f'{name}_{keep}.npz')

    def by_path(prefix):
        values = {path: arrays[f'{prefix}/{key}'] for key, path in PARAMETERS[name].items()}
        return {path: value.T if path[-1] == 'kernel' else value.reshape(()) if path == ('scale',) else value
                for path, value in values.items()}

    assert sum(key.startswith('param/') for key in arrays) == len(PARAMETERS[name])
    return arrays, by_path('param'), by_path('grad')


def make_module(name, keep, params):
    """Makes our module with given parameters by path."""
    width = 8
    module = get_reducer(name).make_module(width, keep=keep, init_std=0.02, dtype=jnp.float32, rngs=nnx.Rngs(0))
    variables = dict(nnx.to_flat_state(nnx.state(module)))
    assert {path: variable.shape for path, variable in variables.items()} == {
        path: value.shape for path, value in params.items()}
    for path, value in params.items():
        functools.reduce(getattr, path, module)[...] = value
    return module


@functools.partial(jax.jit, static_argnums=(0, 1))
def reduce(name, keep, params, x):
    """Returns the reduced tokens, and the weights [B, K, N] of our module."""
    module = make_module(name, keep, params)
    ids = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    output = get_reducer(name).reduce(Tokens(x, ids, ids), types.SimpleNamespace(module=module), keep)
    weights = module(x)
    return output, weights if name == 'sit' else weights[0]


@each_case
def test_soft_reducer_gives_the_tokens_and_weights_of_the_reference(name, keep):
    expected, params, _ = read(name, keep)
    output, weights = reduce(name, keep, params, expected['x'])
    np.testing.assert_allclose(weights, expected['weights'], rtol=0, atol=1e-5)
    np.testing.assert_allclose(output.x, expected['output'], rtol=0, atol=1e-5)


@each_case
def test_soft_reducer_assigns_tokens_as_the_reference_unless_a_sum_is_empty(name, keep):
    expected, params, _ = read(name, keep)
    assigned = np.asarray(reduce(name, keep, params, expected['x'])[0].token_of_patch)
    for ours, first in zip(assigned, expected['weights'].argmax(axis=1), strict=True):
        empty = set(range(keep)) - set(first.tolist())
        assert set(ours[ours != first].tolist()) == empty and (ours != first).sum() == len(empty)


@each_case
def test_soft_reducer_has_the_gradients_of_the_reference(name, keep):
    expected, params, of_params = read(name, keep)

    def loss(params, x):
        return (reduce(name, keep, params, x)[0].x * expected['cotangent']).sum()

    ours, of_x = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(expected['x']))
    if name == 'sinkhorn':  # the gradient of the reference is that of the unit centres; ours passes through c / |c|
        centre, = params.values()
        norm = np.linalg.norm(centre, axis=-1, keepdims=True)
        unit = centre / norm
        of_params = {path: (value - (value * unit).sum(-1, keepdims=True) * unit) / norm
                     for path, value in of_params.items()}
    np.testing.assert_allclose(of_x, expected['grad/x'], rtol=0, atol=1e-5)
    for path, value in of_params.items():
        np.testing.assert_allclose(ours[path], value, rtol=0, atol=1e-5, err_msg=str(path))
