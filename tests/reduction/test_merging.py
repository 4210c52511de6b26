"""Merging: ToMe against its PyTorch code, merging and pooling against loops, and both in a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import create, get_config
from evit_jax.reduction.merging import merge_groups, merge_matched, merge_runs
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.reducer import FunctionReducer
from evit_jax.reduction.reducers import POOL, TOME
from tests.helpers import golden
from tests.helpers.merged_tokens import assert_merges_groups, make_tokens, match_in_a_loop
from tests.helpers.weights import random_params

CASES = golden.cases('tome.json')
UNWEIGHTED = FunctionReducer(TOME.reduce, name='tome without sizes', every_block=True, min_kept=TOME.min_kept)
MERGES = {'matched': lambda tokens, keep: merge_matched(tokens, tokens.x[:, 1:, :5], keep), 'runs': merge_runs,
          'groups': lambda tokens, keep: merge_groups(tokens, *random_groups(*tokens.patch_ids.shape, keep))}
each_merge = pytest.mark.parametrize('merge', MERGES.values(), ids=MERGES)


def random_groups(batch, n, keep):
    """Returns the group of each token, equal for all images, and the last token of each group as its centre."""
    group = np.random.default_rng(4).permutation(np.arange(n) % keep).astype(np.int32)
    centres = np.asarray([np.flatnonzero(group == index)[-1] for index in range(keep)], np.int32)
    return tuple(jnp.broadcast_to(jnp.asarray(array), (batch, len(array))) for array in (group, centres))


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (not case['prop_attn']))
                                  for name, case in CASES.items()])
def test_tome_on_reference_images_has_the_same_groups_sizes_and_logits(name):
    case, expected = CASES[name], golden.outputs(CASES[name])
    model, params = golden.deit(case['model'])
    reducer = TOME if case['prop_attn'] else UNWEIGHTED
    plan = merge_plan(196, 12, r=case['r'])._replace(reducer=reducer)
    logits, intermediates = jax.jit(model.apply, static_argnames='plan')(params, golden.make_images(case), plan=plan)

    assert [count + 1 for count in plan.counts] == expected['token_counts_incl_cls'].tolist()
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)
    for block, token_of_patch in enumerate(intermediates['token_of_patch']):
        for ours, theirs in zip(np.asarray(token_of_patch), expected['groups'][:, block, 1:]):
            pairs = set(zip(ours.tolist(), theirs.tolist()))
            assert len(pairs) == len(set(ours.tolist())) == len(set(theirs.tolist())) == plan.counts[block]
    sizes = [np.bincount(token_of_patch) for token_of_patch in np.asarray(intermediates['token_of_patch'][-1])]
    np.testing.assert_array_equal(sizes, expected['size_final'][:, 1:])


@pytest.mark.parametrize('num_prefix_tokens', [1, 2], ids=['class', 'class and distillation'])
@pytest.mark.parametrize('keep', [5, 7, 9])
def test_merge_matched_merges_the_groups_of_a_loop(keep, num_prefix_tokens):
    tokens = make_tokens(num_prefix_tokens=num_prefix_tokens)
    keys = np.random.default_rng(1).normal(size=(3, 9, 5)).astype(np.float32)
    output = merge_matched(tokens, jnp.asarray(keys), keep)
    assert output.x.shape[1] == num_prefix_tokens + keep
    if keep == 9:  # nothing is merged or reordered
        jax.tree.map(np.testing.assert_array_equal, output, tokens)
    else:
        assert_merges_groups(tokens, output, [match_in_a_loop(image, keep, num_prefix_tokens) for image in keys])


@pytest.mark.parametrize('keep', [1, 4, 6, 9])
def test_merge_runs_takes_the_mean_of_each_run(keep):
    tokens = make_tokens()
    runs = [[token for token in range(9) if token * keep // 9 == run] for run in range(keep)]
    assert_merges_groups(tokens, merge_runs(tokens, keep), [runs] * 3)


@pytest.mark.parametrize('keep', [1, 4, 9])
def test_merge_groups_takes_the_mean_of_each_group_and_drops_tokens_without_one(keep):
    tokens, rng = make_tokens(), np.random.default_rng(4)
    orders = [rng.permutation(9).tolist() for _ in range(3)]
    groups = [[order[index:9 - (keep < 9):keep] for index in range(keep)] for order in orders]  # drops the last token
    group = np.full((3, 9), -1, np.int32)
    for image, groups_of_image in enumerate(groups):
        for index, members in enumerate(groups_of_image):
            group[image, members] = index
    centres = jnp.asarray([[members[0] for members in groups_of_image] for groups_of_image in groups], jnp.int32)
    assert_merges_groups(tokens, merge_groups(tokens, jnp.asarray(group), centres), groups)


@each_merge
def test_merge_without_sizes_counts_the_patches_of_each_token(merge):
    tokens = make_tokens()
    with_size, without_size = merge(tokens, 5), merge(tokens.replace(size=None), 5)
    assert without_size.size is None
    np.testing.assert_allclose(without_size.x, with_size.x, rtol=1e-6)


@each_merge
def test_merge_keeps_every_patch_and_the_mean_over_patches(merge):
    tokens = make_tokens()
    output = merge(tokens, 6)
    np.testing.assert_array_equal(np.asarray(output.token_of_patch) < 0, np.asarray(tokens.token_of_patch) < 0)
    totals = [jnp.einsum('bn,bnd->bd', each.size, each.x[:, 1:]) for each in (tokens, output)]
    np.testing.assert_allclose(*totals, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.size.sum(1), tokens.size.sum(1))


@each_merge
def test_merge_keeps_the_dtype_and_does_not_mix_images(merge):
    tokens = make_tokens()
    assert merge(tokens.replace(x=tokens.x.astype(jnp.bfloat16)), 6).x.dtype == jnp.bfloat16
    whole, alone = merge(tokens, 6), merge(jax.tree.map(lambda rows: rows[1:2], tokens), 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:2], b, rtol=1e-6), whole, alone)


@pytest.mark.parametrize('n, keep, message', [
    (9, 4, 'r=5 of 9 tokens cannot be merged: r is at most 4'), (9, 10, 'r=-1 of 9 tokens')])
def test_merge_matched_of_more_than_half_raises(n, keep, message):
    with pytest.raises(ValueError, match=message):
        MERGES['matched'](make_tokens(n=n), keep)


@pytest.mark.parametrize('keep', [0, 10])
def test_merge_runs_with_keep_out_of_range_raises(keep):
    with pytest.raises(ValueError, match=rf'keep={keep} is outside \[1, 9\]'):
        merge_runs(make_tokens(), keep)


@functools.cache
def tiny_model():
    config = dataclasses.replace(get_config('deit_t'), image_size=32, patch_size=8, width=32, heads=2, depth=3,
                                classes=5, init_std=0.2)
    model = create(config)
    images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 32, 32, 3)), jnp.float32)
    return model, random_params(model), images


@pytest.mark.parametrize('reducer', [TOME, POOL], ids=str)
def test_merging_gives_every_parameter_a_gradient(reducer):
    model, params, images = tiny_model()
    plan = merge_plan(16, 3, r=4, reducer=reducer)

    def loss(params):
        return (model.apply(params, images, plan, jax.random.key(1))[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize('reducer', [TOME, POOL], ids=str)
def test_merging_with_visible_patches_puts_the_others_in_no_token(reducer):
    model, params, images = tiny_model()
    visible = jnp.asarray([[0, 3, 5, 6, 9, 12, 14, 15], [1, 2, 4, 7, 8, 10, 11, 13]], jnp.int32)
    apply = jax.jit(functools.partial(model.apply, plan=merge_plan(8, 3, r=2, reducer=reducer)))
    _, intermediates = apply(params, images, visible=visible)
    for token_of_patch, left in zip(intermediates['token_of_patch'], (6, 4, 2), strict=True):
        for row, ids in zip(np.asarray(token_of_patch), visible):
            assert set(np.flatnonzero(row >= 0)) == set(ids.tolist()) and set(row[ids]) == set(range(left))


def test_tome_weights_attention_by_the_sizes_of_merged_tokens():
    model, params, images = tiny_model()
    plan = make_plan(16, 3, tokens=(8,), reduce_at=(0,), reducer=TOME)
    apply = jax.jit(model.apply, static_argnames='plan')
    with_size, without = (apply(params, images, plan=plan._replace(reducer=reducer))[0]
                          for reducer in (TOME, UNWEIGHTED))
    assert np.abs(with_size - without).max() > 1e-4


def test_tome_with_equal_tokens_gives_the_logits_of_the_dense_model():
    model, params, _ = tiny_model()
    params = params | {'pos_embed': jnp.zeros_like(params['pos_embed'])}
    images = jnp.broadcast_to(jnp.asarray(np.random.default_rng(3).normal(size=3), jnp.float32), (1, 32, 32, 3))
    apply = jax.jit(model.apply, static_argnames='plan')
    dense, merged = (apply(params, images, plan=merge_plan(16, 3, r=r))[0] for r in (0, 4))
    np.testing.assert_allclose(merged, dense, rtol=1e-4, atol=1e-5)
