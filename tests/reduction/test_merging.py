"""Merging: ToMe against its PyTorch code, pooling against a loop, and how they go through a model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import create, get_config
from evit_jax.reduction.merging import merge_matched, merge_runs
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.reducer import FunctionReducer
from evit_jax.reduction.reducers import POOL, TOME
from evit_jax.reduction.tokens import Tokens
from tests.models.test_golden import GOLDEN, images_of, reference_model

CASES = {case['name']: case for case in json.loads((GOLDEN / 'tome.json').read_text())['cases']}
UNWEIGHTED = FunctionReducer(TOME.reduce, name='tome without sizes', every_block=True, min_kept=TOME.min_kept)
MERGES = {'matched': lambda tokens, keep: merge_matched(tokens, tokens.x[:, 1:, :5], keep), 'runs': merge_runs}
each_merge = pytest.mark.parametrize('merge', MERGES.values(), ids=MERGES)


def make_tokens(batch=3, n=9, width=6, patches=12, num_prefix_tokens=1):
    """Tokens of some of the patches, of one or two each, behind those in front."""
    rng = np.random.default_rng(0)
    token_of_patch = np.stack([rng.permutation([*range(n), 0, 3, -1]) for _ in range(batch)]).astype(np.int32)
    patch = np.stack([[row.tolist().index(token) for token in range(n)] for row in token_of_patch]).astype(np.int32)
    size = np.stack([np.bincount(row[row >= 0], minlength=n) for row in token_of_patch]).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(batch, num_prefix_tokens + n, width)), jnp.float32)
    return Tokens(x, jnp.asarray(patch), jnp.asarray(token_of_patch), jnp.asarray(size))


def matched_in_a_loop(keys, keep, num_prefix_tokens):
    """Of one image: groups of tokens, the destination first, in the order of what comes out."""
    n, unit = len(keys), keys / np.linalg.norm(keys, axis=1, keepdims=True)
    a = [token for token in range(n) if (token + num_prefix_tokens) % 2 == 0]
    b = [token for token in range(n) if (token + num_prefix_tokens) % 2]
    best = {token: max(b, key=lambda other, token=token: unit[token] @ unit[other]) for token in a}
    gone = sorted(a, key=lambda token: -unit[token] @ unit[best[token]])[:n - keep]
    return [[token] for token in a if token not in gone] + [
        [token, *(source for source in gone if best[source] == token)] for token in b]


def check_groups(tokens, got, groups):
    """What comes out of one reduction holds these groups, image by image, behind what was in front."""
    np.testing.assert_array_equal(got.x[:, :got.num_prefix_tokens], tokens.x[:, :tokens.num_prefix_tokens])
    x, merged = tokens.x[:, tokens.num_prefix_tokens:], got.x[:, got.num_prefix_tokens:]
    for image, of_image in enumerate(groups):
        for place, group in enumerate(of_image):
            weight = np.asarray(tokens.size)[image, group]
            mean = (weight[:, None] * np.asarray(x)[image, group]).sum(0) / weight.sum()
            np.testing.assert_allclose(merged[image, place], mean, rtol=1e-5, atol=1e-6)
            assert got.size[image, place] == weight.sum()
            assert got.patch_ids[image, place] == tokens.patch_ids[image, group[0]]
            was = np.isin(tokens.token_of_patch[image], group)
            np.testing.assert_array_equal(np.asarray(got.token_of_patch[image]) == place, was)


@pytest.mark.parametrize('name', CASES)
def test_groups_sizes_and_logits_are_those_of_the_reference(name):
    case, want = CASES[name], np.load(GOLDEN / f'{name}.npz')
    model, params = reference_model(case['model'])
    reducer = TOME if case['prop_attn'] else UNWEIGHTED
    plan = merge_plan(196, 12, r=case['r'])._replace(reducer=reducer)
    logits, seen = jax.jit(model.apply, static_argnames='plan')(params, images_of(case), plan=plan)

    assert [count + 1 for count in plan.counts] == want['token_counts_incl_cls'].tolist()
    np.testing.assert_allclose(logits, want['logits'], rtol=0, atol=1e-4)
    for block, token_of_patch in enumerate(seen['token_of_patch']):
        for ours, theirs in zip(np.asarray(token_of_patch), want['groups'][:, block, 1:]):
            pairs = set(zip(ours.tolist(), theirs.tolist()))
            assert len(pairs) == len(set(ours.tolist())) == len(set(theirs.tolist())) == plan.counts[block]
    sizes = [np.bincount(token_of_patch) for token_of_patch in np.asarray(seen['token_of_patch'][-1])]
    np.testing.assert_array_equal(sizes, want['size_final'][:, 1:])


@pytest.mark.parametrize('num_prefix_tokens', [1, 2], ids=['class', 'class and distillation'])
@pytest.mark.parametrize('keep', [5, 7, 9])
def test_matching_merges_what_a_loop_merges(keep, num_prefix_tokens):
    tokens = make_tokens(num_prefix_tokens=num_prefix_tokens)
    keys = np.random.default_rng(1).normal(size=(3, 9, 5)).astype(np.float32)
    got = merge_matched(tokens, jnp.asarray(keys), keep)
    assert got.x.shape[1] == num_prefix_tokens + keep
    if keep == 9:  # nothing is merged, and nothing moved
        jax.tree.map(np.testing.assert_array_equal, got, tokens)
    else:
        check_groups(tokens, got, [matched_in_a_loop(of_image, keep, num_prefix_tokens) for of_image in keys])


@pytest.mark.parametrize('keep', [1, 4, 6, 9])
def test_pooling_takes_the_mean_of_runs(keep):
    tokens = make_tokens()
    runs = [[token for token in range(9) if token * keep // 9 == run] for run in range(keep)]
    check_groups(tokens, merge_runs(tokens, keep), [runs] * 3)


@each_merge
def test_sizes_that_nobody_counts_are_those_of_the_homes(merge):
    tokens = make_tokens()
    counted, found = merge(tokens, 5), merge(tokens.replace(size=None), 5)
    assert found.size is None
    np.testing.assert_allclose(found.x, counted.x, rtol=1e-6)


@each_merge
def test_no_patch_is_lost_and_the_mean_over_patches_stays(merge):
    tokens = make_tokens()
    got = merge(tokens, 6)
    np.testing.assert_array_equal(np.asarray(got.token_of_patch) < 0, np.asarray(tokens.token_of_patch) < 0)
    totals = [jnp.einsum('bn,bnd->bd', of.size, of.x[:, 1:]) for of in (tokens, got)]
    np.testing.assert_allclose(*totals, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.size.sum(1), tokens.size.sum(1))


@each_merge
def test_merged_tokens_keep_their_dtype_and_images_do_not_mix(merge):
    tokens = make_tokens()
    assert merge(tokens.replace(x=tokens.x.astype(jnp.bfloat16)), 6).x.dtype == jnp.bfloat16
    whole, alone = merge(tokens, 6), merge(jax.tree.map(lambda rows: rows[1:2], tokens), 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:2], b, rtol=1e-6), whole, alone)


@pytest.mark.parametrize('n, keep, said', [
    (9, 4, 'r=5 of 9 tokens cannot be merged: r is at most 4'), (9, 10, 'r=-1 of 9 tokens')])
def test_more_than_half_cannot_be_matched(n, keep, said):
    with pytest.raises(ValueError, match=said):
        MERGES['matched'](make_tokens(n=n), keep)


@pytest.mark.parametrize('keep', [0, 10])
def test_pooling_to_none_or_to_more_is_an_error(keep):
    with pytest.raises(ValueError, match=rf'keep={keep} is outside \[1, 9\]'):
        merge_runs(make_tokens(), keep)


@functools.cache
def tiny():
    config = dataclasses.replace(get_config('deit_t'), image_size=32, patch_size=8, width=32, heads=2, depth=3,
                                classes=5, init_std=0.2)
    model = create(config)
    images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 32, 32, 3)), jnp.float32)
    return model, model.init(jax.random.key(0)), images


@pytest.mark.parametrize('reducer', [TOME, POOL], ids=str)
def test_every_weight_gets_a_gradient_through_merged_tokens(reducer):
    model, params, images = tiny()
    plan = merge_plan(16, 3, r=4, reducer=reducer)

    def loss(params):
        return (model.apply(params, images, plan, jax.random.key(1))[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize('reducer', [TOME, POOL], ids=str)
def test_what_is_not_visible_is_in_no_token(reducer):
    model, params, images = tiny()
    visible = jnp.asarray([[0, 3, 5, 6, 9, 12, 14, 15], [1, 2, 4, 7, 8, 10, 11, 13]], jnp.int32)
    apply = jax.jit(functools.partial(model.apply, plan=merge_plan(8, 3, r=2, reducer=reducer)))
    _, seen = apply(params, images, visible=visible)
    for token_of_patch, left in zip(seen['token_of_patch'], (6, 4, 2), strict=True):
        for row, there in zip(np.asarray(token_of_patch), visible):
            assert set(np.flatnonzero(row >= 0)) == set(there.tolist()) and set(row[there]) == set(range(left))


def test_attention_counts_a_merged_token_by_its_size():
    model, params, images = tiny()
    plan = make_plan(16, 3, tokens=(8,), reduce_at=(0,), reducer=TOME)
    apply = jax.jit(model.apply, static_argnames='plan')
    with_size, without = (apply(params, images, plan=plan._replace(reducer=reducer))[0]
                          for reducer in (TOME, UNWEIGHTED))
    assert np.abs(with_size - without).max() > 1e-4


def test_alike_tokens_merged_with_their_sizes_are_seen_as_before():
    model, params, _ = tiny()
    params = params | {'pos_embed': jnp.zeros_like(params['pos_embed'])}
    images = jnp.broadcast_to(jnp.asarray(np.random.default_rng(3).normal(size=3), jnp.float32), (1, 32, 32, 3))
    apply = jax.jit(model.apply, static_argnames='plan')
    dense, merged = (apply(params, images, plan=merge_plan(16, 3, r=r))[0] for r in (0, 4))
    np.testing.assert_allclose(merged, dense, rtol=1e-4, atol=1e-5)
