"""Reducers registered by name, and the inputs that they can read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evit_jax.models import create
from evit_jax.models.config import ViTConfig
from evit_jax.reduction import registry
from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import Modules, Reducer
from evit_jax.reduction.registry import get_reducer, list_reducers, register_reducer
from tests.helpers.weights import random_params

CONFIG = ViTConfig(image_size=32, patch_size=4, width=16, depth=2, heads=2, classes=5)
INPUTS = ('class_attention', 'class_attention_per_head', 'received_attention', 'keys', 'mean_keys', 'values')


@pytest.fixture(autouse=True)
def registry_copy(monkeypatch):
    list_reducers()  # registers the package's reducers
    monkeypatch.setattr(registry, '_REDUCERS', dict(registry._REDUCERS))


def images(batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 32, 32, 3)), jnp.float32)


def plan_of(reducer, reduce_at=(0,)):
    return make_plan(64, 2, rate=0.5, reduce_at=reduce_at, fuse=False, reducer=reducer)


@functools.cache
def model_and_params():
    model = create(CONFIG)
    return model, random_params(model)


@functools.partial(jax.jit, static_argnums=2)
def jitted_apply(params, images, plan):
    return model_and_params()[0].apply(params, images, plan)


def cost(reducer):
    """Returns the flops and bytes of the forward pass with a reducer, as the compiler counts them."""
    model, params = model_and_params()
    program = jax.jit(lambda params, images: model.apply(params, images, plan_of(reducer))[0])
    analysis = program.lower(params, images()).compile().cost_analysis()
    return analysis['flops'], analysis['bytes accessed']


def test_register_reducer_with_a_function_reduces_the_tokens_of_a_model():
    @register_reducer('l2')
    def l2(tokens, inputs, keep):
        return keep_top(tokens, jnp.linalg.norm(tokens.patches, axis=-1), keep)

    _, intermediates = jitted_apply(model_and_params()[1], images(), plan_of(l2))
    assert get_reducer('l2') is l2 and 'l2' in list_reducers() and str(l2) == 'l2'
    assert intermediates['kept'][0].shape == (2, 32)


@functools.cache
def cost_without_reading():
    """Returns the cost of a reducer that reads the class attention only."""
    @register_reducer('unread')
    def unread(tokens, inputs, keep):
        return keep_top(tokens, tokens.patches.sum(-1) + inputs.class_attention * 0, keep)

    return cost(unread)


@pytest.mark.parametrize('name', INPUTS)
def test_reducer_input_has_its_shape_and_costs_nothing_unread(name):
    shapes = {}

    @register_reducer('read')
    def read(tokens, inputs, keep):
        shapes[name] = getattr(inputs, name).shape
        return keep_top(tokens, tokens.patches.sum(-1) + inputs.class_attention * 0, keep)

    assert cost(read) == cost_without_reading()
    expected = {'class_attention': (2, 64), 'class_attention_per_head': (2, 2, 64), 'received_attention': (2, 64),
                'keys': (2, 2, 64, 8), 'mean_keys': (2, 64, 8), 'values': (2, 2, 64, 8)}
    assert shapes[name] == expected[name]


def test_received_attention_costs_a_softmax_only_when_read():
    @register_reducer('received')
    def received(tokens, inputs, keep):
        return keep_top(tokens, inputs.received_attention, keep)

    elements = 2 * 2 * 65 * 65  # softmax of two images and two heads; XLA shares Q K^T with the attention
    assert cost(received)[0] - cost(get_reducer('evit'))[0] > elements


def test_previous_scores_at_the_second_reduction_are_those_of_the_kept_tokens():
    recorded = []

    @register_reducer('watch', can_fuse=True)
    def watch(tokens, inputs, keep):
        recorded.append((inputs.stage, inputs.block, inputs.num_prefix_tokens, inputs.previous_scores))
        return keep_top(tokens, inputs.class_attention, keep, fuse_weights=inputs.fuse_weights)

    model, params = model_and_params()
    plan = make_plan(64, 2, rate=0.5, reduce_at=(0, 1), reducer=watch)
    intermediates, scores = jax.jit(lambda params, images: (
        model.apply(params, images, plan)[1], recorded[1][3]))(params, images())
    first = np.asarray(intermediates['class_attention'][0])
    kept = np.asarray(intermediates['kept'][0])
    assert [entry[:3] for entry in recorded] == [(0, 0, 1), (1, 1, 1)] and recorded[0][3] is None
    np.testing.assert_array_equal(scores[:, :-1], np.take_along_axis(first, kept[:, :-1], axis=1))
    np.testing.assert_allclose(scores.sum(1), first.sum(1), rtol=1e-5)


def test_rng_differs_by_image_and_reduction_but_not_by_batch():
    params, plan = model_and_params()[1], plan_of(get_reducer('random'), reduce_at=(0, 1))
    kept, alone = (jitted_apply(params, batch, plan)[1]['kept'] for batch in (images(), images()[:1]))
    np.testing.assert_array_equal(kept[0][:1], alone[0])
    assert set(np.asarray(kept[0][0]).tolist()) != set(np.asarray(kept[0][1]).tolist())


def test_register_reducer_twice_replaces_the_reducer_and_compiles_again(caplog):
    def first(tokens, inputs, keep):
        return keep_top(tokens, inputs.class_attention, keep)

    def second(tokens, inputs, keep):
        return keep_top(tokens, -inputs.class_attention, keep)

    model, params = model_and_params()
    apply = jax.jit(lambda params, images, plan: model.apply(params, images, plan)[1]['kept'][0], static_argnums=2)
    old, new = register_reducer('mine')(first), register_reducer('mine')(second)
    assert old != new and hash(old) != hash(new) and get_reducer('mine') is new
    before, after = (np.asarray(apply(params, images(), plan_of(reducer))) for reducer in (old, new))
    assert (before != after).any()
    assert apply._cache_size() == 2
    apply(params, images(), plan_of(get_reducer('mine')))
    assert apply._cache_size() == 2


def test_register_reducer_with_a_module_adds_parameters_with_a_gradient():
    @register_reducer('scored', module=lambda width, rngs: nnx.Linear(width, 1, rngs=rngs))
    def scored(tokens, inputs, keep):
        scores = inputs.module(tokens.patches)[..., 0]
        weighted = tokens.replace(x=tokens.x.at[:, 1:].multiply(jax.nn.sigmoid(scores)[..., None]))
        return keep_top(weighted, scores, keep)

    model = create(CONFIG, modules=Modules(scored, 1))
    params = random_params(model)
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, images(), plan_of(scored))[0].sum()))(params)
    assert params['reducer'][0]['kernel'].shape == (16, 1) and np.any(gradient['reducer'][0]['kernel'])
    assert CONFIG.parameters(plan_of(scored)) == sum(leaf.size for leaf in jax.tree.leaves(params))
    with pytest.raises(ValueError, match='reducer scored needs a learned module'):
        model_and_params()[0].apply(model_and_params()[1], images(), plan_of(scored))


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: register_reducer(''), 'name of a reducer is empty'),
    (lambda: register_reducer('a', fuse=True), r'fuse=True is no option of a reducer: there are module, can_fuse'),
    (lambda: register_reducer('a')(lambda tokens: tokens), r'must take \(tokens, inputs, keep\)'),
    (lambda: get_reducer('evti'), "unknown reducer 'evti': did you mean evit"),
    (lambda: get_reducer(lambda tokens, inputs, keep: tokens), '@evit_jax.register_reducer')])
def test_registry_with_invalid_arguments_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_reducer_that_returns_another_number_of_tokens_raises():
    @register_reducer('careless')
    def careless(tokens, inputs, keep):
        return keep_top(tokens, inputs.class_attention, keep - 1)

    params = model_and_params()[1]
    with pytest.raises(ValueError, match='reducer careless returned 31 patch tokens at block 0, and the plan has 32'):
        jitted_apply(params, images(), plan_of(careless))


def test_class_attention_in_front_of_a_block_raises_when_read():
    @register_reducer('early', before_block=True)
    def early(tokens, inputs, keep):
        return keep_top(tokens, inputs.class_attention, keep)

    params = model_and_params()[1]
    with pytest.raises(ValueError, match=r'inputs\.class_attention does not exist before block 0'):
        jitted_apply(params, images(), plan_of(early))


def test_reduce_of_a_class_that_defines_none_raises():
    reducer = register_reducer('empty')(type('Empty', (Reducer,), {}))
    with pytest.raises(NotImplementedError, match='Empty defines no reduce'):
        reducer.reduce(None, None, 1)
