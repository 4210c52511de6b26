"""The ways to move the tokens of a reduction mean the same; each platform gets its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import create
from evit_jax.reduction.gather import GATHERS, keep_top
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.tokens import Tokens
from tests.helpers import layouts


def keep_top_by(tokens, score, keep, gather_impl='', train=False):
    return keep_top(tokens.replace(gather_impl=gather_impl, train=train), score, keep)


def keep_top_and_fuse(tokens, score, keep, gather_impl='', train=False):
    return keep_top(tokens.replace(gather_impl=gather_impl, train=train), score, keep, fuse_weights=score)


REDUCERS = {'kept': keep_top_by, 'fused': keep_top_and_fuse}
each_other = pytest.mark.parametrize('gather_impl', [name for name in GATHERS if name != 'gather'])
each_reducer = pytest.mark.parametrize('reduce', REDUCERS.values(), ids=REDUCERS)


def make_tokens(batch=3, n=49, width=16, num_prefix_tokens=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    score = jnp.asarray(rng.dirichlet(np.ones(n + 1), batch)[:, 1:], jnp.float32)
    x = jnp.asarray(rng.normal(size=(batch, num_prefix_tokens + n, width)), dtype)
    return Tokens(x, jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))), score


@each_other
@each_reducer
def test_tokens_and_gradients_are_those_of_the_gather(reduce, gather_impl):
    tokens, score = make_tokens()
    toward = jnp.asarray(np.random.default_rng(1).normal(size=reduce(tokens, score, keep=20).x.shape), jnp.float32)

    def read(x, score, gather_impl):
        after = reduce(tokens.replace(x=x), score, keep=20, gather_impl=gather_impl)
        return (after.x * toward).sum(), after.replace(gather_impl='')

    read = jax.value_and_grad(read, (0, 1), has_aux=True)
    want, got = (read(tokens.x, score, name) for name in ('gather', gather_impl))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
    assert np.any(got[1][0][:, :2]) and np.any(got[1][1]) == (reduce is not keep_top_by)


@each_other
@each_reducer
def test_kept_tokens_are_moved_without_a_change_in_bfloat16_too(reduce, gather_impl):
    tokens, score = make_tokens(dtype=jnp.bfloat16)
    want, got = (reduce(tokens, score, keep=20, gather_impl=name) for name in ('gather', gather_impl))
    assert got.x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.x[:, :22], want.x[:, :22])
    wide = [np.asarray(of.x[:, 22:], np.float32) for of in (got, want)]
    np.testing.assert_allclose(*wide, rtol=0, atol=0.02)  # weights of 1 in 50, rounded to 8 bits


@each_other
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_a_model_keeps_the_same_patches(gather_impl, dtype):
    config = layouts.SHAPE
    images = jnp.asarray(np.random.default_rng(2).normal(size=(4, 16, 16, 3)), jnp.float32)
    plan = make_plan(16, config.depth, rate=0.7, reduce_at=(0, 1))
    params = create(config).init(jax.random.key(0))
    (logits, seen), (want, wanted) = (
        jax.jit(functools.partial(create(config, dtype=dtype, gather_impl=name).apply, plan=plan))(params, images)
        for name in (gather_impl, 'gather'))
    jax.tree.map(np.testing.assert_array_equal, seen['kept'], wanted['kept'])
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5 if dtype == jnp.float32 else 0.05)


def operations(reduce, tokens, score, platform, name):
    """The lines of the lowered program that have the name in them."""
    lowered = reduce.trace(tokens, score).lower(lowering_platforms=(platform,)).as_text()
    return [line for line in lowered.splitlines() if name in line]


@pytest.mark.parametrize(('keep', 'minor_to_major'), [(20, '2, 0, 1'), (125, '2, 1, 0')])
def test_on_a_tpu_tokens_lie_outermost_unless_they_fill_its_lanes(keep, minor_to_major):
    tokens, score = make_tokens(n=140)
    reduce = jax.jit(functools.partial(keep_top_and_fuse, keep=keep))
    told, = operations(reduce, tokens, score, 'tpu', '@LayoutConstraint')
    assert f'result_layouts = [dense<[{minor_to_major}]>' in told
    assert not operations(reduce, tokens, score, 'cpu', '@LayoutConstraint')


@pytest.mark.parametrize('training', [False, True])
def test_a_tpu_multiplies_where_others_look_up(training):
    tokens, score = make_tokens()
    reduce = jax.jit(functools.partial(keep_top_and_fuse, keep=20, train=training))

    def products(platform):
        return operations(reduce, tokens, score, platform, 'dot_general')

    wide = f'tensor<3x{22 if training else 23}x51x'
    assert any(wide in line for line in products('tpu'))
    assert not any(wide in line for platform in ('cpu', 'cuda') for line in products(platform))


def test_an_unknown_lowering_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="gather_impl 'gahter': did you mean gather"):
        keep_top_by(*make_tokens(), keep=3, gather_impl='gahter')
