"""The inputs of reducers: each importance against a loop, and models without a class token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.kernels.attention import multi_head_attention
from evit_jax.reduction.inputs import IMPORTANCES, ModelInputs, ReducerInputs
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.registry import get_reducer
from evit_jax.reduction.tokens import Tokens


def make_inputs(importance='', *, prefix=1, size=None, class_token=True, attention=True, **options):
    """Returns the inputs of a reduction of 2 images with 5 patch tokens, 2 heads of 4 channels, and the tokens."""
    rng = np.random.default_rng(0)
    qkv, x = (jnp.asarray(rng.normal(size=(2, prefix + 5, width)), jnp.float32) for width in (24, 8))
    whole = None if size is None else jnp.pad(size, ((0, 0), (prefix, 0)), constant_values=1)
    tokens = Tokens(x, jnp.broadcast_to(jnp.arange(5), (2, 5)), size=size)
    attention = multi_head_attention(qkv, 2, size=whole) if attention else None
    reducer = get_reducer(f'evit:{importance}' if importance else 'evit')
    plan = make_plan(5, 4, tokens=(3,), reduce_at=(3,), fuse=False, reducer=reducer)
    inputs = ReducerInputs(tokens, attention, plan, 3, jax.random.split(jax.random.key(0), 2),
                           ModelInputs(has_class_token=class_token, **options))
    return inputs, tokens, qkv


def received_in_a_loop(qkv, size):
    """Returns the mean over queries and heads of the softmax; a query or key of size s counts as s tokens."""
    q, k, _ = np.asarray(qkv, np.float64).reshape(*qkv.shape[:2], 3, 2, 4).transpose(2, 0, 3, 1, 4)
    received = np.zeros(size.shape)
    for image in range(len(q)):
        for head in range(2):
            for query, count in enumerate(size[image]):
                row = np.exp(k[image, head] @ q[image, head, query] / 2) * size[image]
                received[image] += count * row / row.sum()
        received[image] /= 2 * size[image].sum()
    return received


@pytest.mark.parametrize('prefix', [0, 1, 3])
@pytest.mark.parametrize('sizes', [False, True], ids=['equal', 'sizes'])
def test_importance_mean_equals_a_loop_over_queries(prefix, sizes):
    size = jnp.asarray([[1, 2, 1, 3, 1], [4, 1, 1, 1, 2]], jnp.float32) if sizes else None
    inputs, _, qkv = make_inputs('mean', prefix=prefix, size=size, class_token=prefix > 0)
    whole = np.pad(np.ones((2, 5)) if size is None else size, ((0, 0), (prefix, 0)), constant_values=1)
    np.testing.assert_allclose(inputs.importance, received_in_a_loop(qkv, whole)[:, prefix:], rtol=1e-5)


def test_importance_by_default_is_class_attention_or_mean_without_a_class_token():
    inputs, _, _ = make_inputs('')
    np.testing.assert_array_equal(inputs.importance, inputs.class_attention)
    inputs, _, _ = make_inputs('', prefix=2, class_token=False)
    np.testing.assert_array_equal(inputs.importance, inputs.received_attention)


def test_importance_norm_and_shift_are_shares_of_the_norms():
    inputs, tokens, _ = make_inputs('norm')
    norms = np.linalg.norm(tokens.patches, axis=-1)
    np.testing.assert_allclose(inputs.importance, norms / norms.sum(1, keepdims=True), rtol=1e-5)
    inputs, _, _ = make_inputs('shift')
    norms = np.linalg.norm(inputs._attention.out[:, 1:], axis=-1)
    np.testing.assert_allclose(inputs.importance, norms / norms.sum(1, keepdims=True), rtol=1e-5)


def test_importance_pool_is_the_pools_attention_or_mean_before_the_last_block():
    inputs, _, _ = make_inputs('pool', pool_attention=lambda tokens: tokens.patches[..., 0])
    np.testing.assert_array_equal(inputs.importance, inputs._tokens.patches[..., 0])
    inputs, _, _ = make_inputs('pool')
    np.testing.assert_array_equal(inputs.importance, inputs.received_attention)


@pytest.mark.parametrize('name', ['class_attention', 'class_attention_per_head'])
def test_class_attention_without_a_class_token_raises(name):
    inputs, _, _ = make_inputs(prefix=1, class_token=False)
    with pytest.raises(ValueError, match=f'inputs.{name} does not exist: the model has no class token'):
        getattr(inputs, name)


def test_importance_shift_before_the_block_raises():
    inputs, _, _ = make_inputs('shift', attention=False)
    with pytest.raises(ValueError, match='does not exist before block 3'):
        inputs.importance  # noqa: B018


@pytest.mark.parametrize('importance', IMPORTANCES)
def test_get_reducer_with_an_importance_gives_another_reducer_of_that_name(importance):
    reducer, name = get_reducer(f'evit:{importance}'), f'evit:{importance}'
    assert (str(reducer), reducer.importance) == (name, importance)
    assert reducer == get_reducer(name) != get_reducer('evit')
    assert get_reducer('evit').importance == ''


@pytest.mark.parametrize('name, problem', [
    ('evit:mass', "unknown importance 'mass'"), ('tome:mean', 'tome reads no importance'),
    ('evat:mean', 'did you mean evit')])
def test_get_reducer_with_an_importance_it_cannot_have_raises(name, problem):
    with pytest.raises(ValueError, match=problem):
        get_reducer(name)
