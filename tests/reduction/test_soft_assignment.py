"""Reducers with learned soft assignments (SiT, PatchMerger, Sinkhorn) against loops, and the counts that they need."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import evit_jax
from evit_jax.checkpoints import workdir
from evit_jax.models import create
from evit_jax.models.costs import module_parameters
from evit_jax.reduction.merging import merge_soft
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import modules_at
from evit_jax.reduction.registry import get_reducer
from evit_jax.training import checks
from tests.helpers import layouts, tiny
from tests.helpers.merged_tokens import make_tokens
from tests.helpers.weights import random_params

NAMES = ('sit', 'patchmerger', 'sinkhorn')
each_reducer = pytest.mark.parametrize('name', NAMES)


def make_module(name, keep, width=6):
    module = get_reducer(name).make_module(width, keep=keep, init_std=0.5, dtype=jnp.float32, rngs=nnx.Rngs(1))
    for leaf in jax.tree.leaves(nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        leaf[...] = leaf[...] + 0.3  # no bias and no scale keeps its initial value
    return module


def layer_norm(row, norm):
    return (row - row.mean()) / np.sqrt(row.var() + 1e-5) * np.asarray(norm.scale) + np.asarray(norm.bias)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def sit_in_a_loop(module, x):
    logits = []
    for row in x:
        hidden = layer_norm(row, module.norm) @ np.asarray(module.fc1.kernel) + np.asarray(module.fc1.bias)
        hidden = np.asarray(jax.nn.gelu(hidden, approximate=False))
        logits.append((hidden @ np.asarray(module.fc2.kernel) + np.asarray(module.fc2.bias)) * float(module.scale[...]))
    weights = [softmax(column) for column in np.transpose(logits)]
    return weights, [sum(w * row for w, row in zip(weights_of_mean, x)) for weights_of_mean in weights]


def patchmerger_in_a_loop(module, x):
    x = [layer_norm(row, module.norm) for row in x]
    weights = [softmax(np.asarray([query @ row for row in x])) for query in np.asarray(module.queries)]
    return weights, [sum(w * row for w, row in zip(weights_of_mean, x)) for weights_of_mean in weights]


def sinkhorn_in_a_loop(module, x):
    x = [row / np.linalg.norm(row) for row in x]
    centres = [centre / np.linalg.norm(centre) for centre in np.asarray(module.centres)]
    weights = np.exp([[centre @ row for row in x] for centre in centres])
    for _ in range(3):
        for row in weights:
            row /= row.sum()
        for column in weights.T:
            column /= column.sum()
    return weights, [sum(w * row for w, row in zip(weights_of_sum, x)) for weights_of_sum in weights]


ORACLES = {'sit': sit_in_a_loop, 'patchmerger': patchmerger_in_a_loop, 'sinkhorn': sinkhorn_in_a_loop}


@each_reducer
@pytest.mark.parametrize('keep', [1, 4, 9])
@pytest.mark.parametrize('num_prefix_tokens', [0, 1])
def test_soft_reducer_gives_the_sums_and_first_choices_of_a_loop(name, keep, num_prefix_tokens):
    tokens, module = make_tokens(num_prefix_tokens=num_prefix_tokens), make_module(name, keep)
    inputs = types.SimpleNamespace(module=module)
    output = jax.jit(lambda tokens: get_reducer(name).reduce(tokens, inputs, keep))(tokens)
    np.testing.assert_array_equal(output.prefix, tokens.prefix)
    for image in range(3):
        weights, sums = ORACLES[name](module, np.asarray(tokens.patches[image], np.float64))
        np.testing.assert_allclose(output.patches[image], sums, rtol=1e-4, atol=1e-5)
        first = np.argmax(weights, axis=0)
        before, after = np.asarray(tokens.token_of_patch[image]), np.asarray(output.token_of_patch[image])
        assert set(after) - {-1} == set(range(keep)) and ((after == -1) == (before == -1)).all()
        moved = [token for token in range(9) if set(after[before == token]) != {first[token]}]
        assert len(moved) <= keep - len(set(first.tolist()))  # only tokens that stand for a sum without first choices


def test_merge_soft_with_empty_sums_gives_each_a_free_token_in_order():
    tokens = make_tokens(batch=1, n=5)
    weights = jnp.asarray([[[0.1, 0.2, 0.9, 0.3, 0.4], [0.5, 0.1, 0.0, 0.2, 0.1], [0.3, 0.1, 0.1, 0.1, 0.1],
                            [0.0, 0.0, 0.0, 0.0, 0.0]]])
    output = merge_soft(tokens, weights, tokens.patches)  # tokens 2 and 0 stand for the sums 0 and 1
    of_token = dict(zip(np.asarray(tokens.token_of_patch[0]).tolist(), np.asarray(output.token_of_patch[0]).tolist()))
    assert [of_token[token] for token in range(5)] == [1, 2, 0, 3, 0]
    np.testing.assert_array_equal(output.patch_ids[0], tokens.patch_ids[0, jnp.asarray([2, 0, 1, 3])])


def test_sinkhorn_weights_give_each_token_one_and_each_centre_an_equal_part():
    weights, _ = make_module('sinkhorn', 3)(make_tokens().patches)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(2), 3, rtol=0.02)


@each_reducer
def test_soft_reducer_in_a_model_counts_its_parameters_and_macs(name):
    reducer = get_reducer(name)
    plan = make_plan(16, 2, tokens=(10, 4), reduce_at=(0, 1), reducer=reducer)
    model = create(tiny.CONFIG, modules=modules_at(reducer, (0, 1), plan.tokens))
    params = random_params(model)
    assert tiny.CONFIG.parameters(plan) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert module_parameters(reducer, 32, 10) > module_parameters(reducer, 32, 4)
    dense = make_plan(16, 2, reduce_at=())
    macs = sum(reducer.module_macs(entering, 32, keep) for entering, keep in ((16, 10), (10, 4)))
    without = plan._replace(reducer=get_reducer('dynamicvit'))
    others = sum(without.reducer.module_macs(entering, 32, 0) for entering in (16, 10))
    assert tiny.CONFIG.macs(plan) - macs == tiny.CONFIG.macs(without) - others < tiny.CONFIG.macs(dense)


@each_reducer
def test_soft_reducer_with_other_counts_than_trained_is_refused(name):
    model = tiny.model(reducer=name, keep_rate=0.5)
    assert model.loaded.modules.tokens == (8,) and model(tiny.images(1)).shape == (1, 3)
    with pytest.raises(ValueError, match=rf'{name} has learned parameters .* to keep \(8,\) tokens, .* keeps \(12,\)'):
        model.with_plan(keep_rate=0.75)
    assert not model.with_plan(keep_rate=1.0).plan.reductions


@each_reducer
def test_soft_reducer_saved_and_loaded_keeps_its_counts(name, tmp_path):
    model = tiny.model(reducer=name, keep_rate=0.5)
    model.save(tmp_path / 'saved')
    loaded = evit_jax.load(tmp_path / 'saved')
    assert loaded.loaded.modules == model.loaded.modules
    np.testing.assert_allclose(loaded(tiny.images(2)), model(tiny.images(2)), atol=1e-6)


def test_with_reducer_adds_random_modules_of_the_counts_of_the_budget():
    model = tiny.model(keep_rate=0.5).with_reducer('patchmerger')
    assert model.loaded.modules.tokens == (8,) and np.isfinite(model(tiny.images(1))).all()


def test_training_with_a_keep_schedule_and_a_soft_reducer_is_refused():
    config = workdir.flat(layouts.config_of(reducer__name='sit', keep__rate=0.5, keep__shrink_epochs=2))
    with pytest.raises(ValueError, match=r'shrink_epochs=2 changes .* reducer sit has .* give --config\.keep\.'):
        checks.check_training(config, layouts.SHAPE)
