"""Every registered reducer runs, trains, exports and serves, with and without a class token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import evit_jax
from evit_jax.models import create
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.reducer import modules_at
from evit_jax.reduction.registry import get_reducer
from evit_jax.serving import artifact, loader
from tests.helpers import tiny

CONFIG = evit_jax.ViTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, classes=3, init_std=0.2)
NAMES = evit_jax.list_reducers()
BLOCKS = (0, 1)
each_reducer = pytest.mark.parametrize('name', NAMES)
# Reducers that are exported in the fast suite: tokens are kept, merged, masked, mixed, and chosen by learned modules.
EXPORTED = ('evit', 'tome', 'ats', 'sit', 'dynamicvit')


@functools.cache
def build(name, *, dtype=jnp.float32, class_token=True):
    """Returns a model, its parameters, and a plan with two reductions of its 16 patches."""
    reducer = get_reducer(name)
    config = CONFIG if class_token else dataclasses.replace(CONFIG, class_token=False, pooling='avg')
    plan = make_plan(16, 2, rate=0.75, reduce_at=BLOCKS, reducer=reducer)
    model = create(config, dtype=dtype, modules=modules_at(reducer, BLOCKS, plan.tokens))
    return model, model.init(jax.random.key(0)), plan


@each_reducer
@pytest.mark.parametrize('class_token, dtype', [
    pytest.param(True, jnp.bfloat16, id='bfloat16', marks=pytest.mark.slow),
    pytest.param(False, jnp.float32, id='without class token', marks=pytest.mark.slow),
    pytest.param(False, jnp.bfloat16, id='bfloat16 without class token')])
def test_reducer_in_a_model_puts_each_patch_in_one_token(name, class_token, dtype):
    model, params, plan = build(name, dtype=dtype, class_token=class_token)
    images = jnp.asarray(tiny.images(3), jnp.float32) / 255
    logits, intermediates = jax.jit(model.apply, static_argnums=2)(params, images, plan)
    assert logits.shape == (3, 3) and logits.dtype == jnp.float32 and np.isfinite(logits).all()
    masks = intermediates['mask'] or [np.ones(kept.shape) for kept in intermediates['kept']]
    for block, kept, token_of_patch, mask in zip(
            plan.reductions, intermediates['kept'], intermediates['token_of_patch'], masks):
        assert kept.shape == (3, plan.counts[block])
        for ids, tokens, used in zip(*map(np.asarray, (kept, token_of_patch, mask > 0))):
            assert len(set(ids[used].tolist())) == used.sum()
            assert set(tokens.tolist()) - {-1} == set(np.flatnonzero(used).tolist())
            np.testing.assert_array_equal(tokens[ids[ids >= 0]], np.flatnonzero(ids >= 0))


@each_reducer
def test_reducer_in_training_lowers_the_loss(name):
    model, params, plan = build(name)
    images, labels = tiny.stripes(24)
    images, plan = jnp.asarray(images, jnp.float32) / 255, plan.in_training()
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            logits = model.apply(params, images, plan, key)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), 12):
        params, state, value = step(params, state, key)
        losses.append(float(value))
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name not in EXPORTED))
                                  for name in NAMES])
def test_exported_reducer_serves_the_probabilities_of_the_model(name, tmp_path):
    model = tiny.model(reducer=name, keep_rate=0.75, reduce_at=(0,))  # the last block would not change the logits
    artifact.write(tmp_path, model.loaded, {'own': model.plan}, platforms=('cpu',), kept=True)
    images = tiny.images(2)
    expected = jax.nn.softmax(model(images))
    np.testing.assert_allclose(loader.Served(tmp_path)(images, 'own')['probabilities'], expected, atol=1e-5)


@pytest.mark.parametrize('name', [name for name in NAMES if get_reducer(name).merges])
def test_reducer_that_merges_takes_a_number_of_tokens_for_every_block(name):
    model, plan = create(dataclasses.replace(CONFIG, depth=4)), merge_plan(16, 4, r=2, reducer=get_reducer(name))
    params = jax.eval_shape(model.init, jax.random.key(0))
    kept = jax.eval_shape(functools.partial(model.apply, plan=plan), params, jnp.zeros((1, 16, 16, 3)))[1]['kept']
    assert [ids.shape[1] for ids in kept] == [14, 12, 10, 8]
