import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.kernels import attention
from evit_jax.models import create, layers
from evit_jax.models.config import ViTConfig
from evit_jax.reduction import apply
from evit_jax.reduction.plan import make_plan

SMALL = {'image_size': 16, 'patch_size': 4, 'width': 8, 'depth': 3, 'heads': 2, 'classes': 5}


@functools.cache
def small_model(dtype=jnp.float32, distilled=False):
    """A jitted model and parameters none of which is zero."""
    model, rng = create(ViTConfig(**SMALL, distilled=distilled), dtype=dtype), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype),
                          jax.eval_shape(model.init, jax.random.key(0)))
    return jax.jit(model.apply, static_argnums=2, static_argnames='patch_tokens'), params


def make_images(batch=4, height=16, width=16):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, height, width, 3)), jnp.float32)


def cubic(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def resized_in_a_loop(grid, old, new):
    """One pixel at a time: 4 x 4 taps around its place, with pixels of the border for those outside."""
    out = np.zeros((new, new, grid.shape[1]))
    for row in range(new):
        for column in range(new):
            y, x = (row + 0.5) * old / new - 0.5, (column + 0.5) * old / new - 0.5
            for v in range(math.floor(y) - 1, math.floor(y) + 3):
                for u in range(math.floor(x) - 1, math.floor(x) + 3):
                    source = min(max(v, 0), old - 1) * old + min(max(u, 0), old - 1)
                    out[row, column] += cubic(y - v) * cubic(x - u) * grid[source]
    return out.reshape(new * new, -1)


@pytest.mark.parametrize('old, new', [(4, 7), (7, 4), (5, 6), (3, 9), (2, 1)])
def test_positions_are_resized_as_by_a_loop_over_pixels(old, new):
    grid = np.random.default_rng(0).normal(size=(old * old, 3)).astype(np.float32)
    got = layers.resize_positions(jnp.asarray(grid), new)
    assert got.shape == (new * new, 3)
    np.testing.assert_allclose(got, resized_in_a_loop(grid, old, new), rtol=0, atol=2e-6)


def test_positions_of_the_same_size_are_left_alone():
    grid = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    np.testing.assert_array_equal(layers.resize_positions(grid, 4), grid)


def test_the_class_row_is_that_of_the_softmax_and_the_keys_are_the_means_over_heads():
    qkv = np.random.default_rng(0).normal(size=(3, 6, 24)).astype(np.float32)
    q, k, v = qkv.reshape(3, 6, 3, 2, 4).transpose(2, 0, 3, 1, 4)
    weights = np.exp(np.einsum('bhqd,bhkd->bhqk', q / 2, k))
    weights /= weights.sum(axis=-1, keepdims=True)
    output = attention.multi_head_attention(jnp.asarray(qkv), 2)
    np.testing.assert_allclose(output.class_attention, weights.mean(axis=1)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(output.class_attention_per_head(), weights[:, :, 0], rtol=1e-5)
    np.testing.assert_allclose(output.received_attention(), weights.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(output.mean_keys(), k.mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(output.keys(), k)
    np.testing.assert_array_equal(output.values(), v)


def test_drop_path_without_a_key_or_a_rate_is_the_identity():
    x = make_images()
    assert layers.drop_path(x, 0.5, None) is x
    assert layers.drop_path(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize('rate', [0.25, 0.5])
def test_drop_path_drops_whole_images_and_keeps_the_expectation(rate):
    out = np.asarray(layers.drop_path(jnp.ones((8192, 2, 3)), rate, jax.random.key(0)))
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - rate)], rtol=1e-6)
    assert out[:, 0, 0].mean() == pytest.approx(1, abs=5 * math.sqrt(rate / (1 - rate) / 8192))


def silenced(params):
    """Parameters under which every token leaves a block as it came."""
    params = jax.tree.map(np.copy, params)
    for block in params['blocks'].values():
        for leaf in jax.tree.leaves((block['attn']['proj'], block['mlp']['fc2'])):
            leaf[...] = 0
    return params


@pytest.mark.parametrize('fuse', [True, False], ids=['fused', 'dropped'])
@pytest.mark.parametrize('distilled', [True, False], ids=['distilled', 'plain'])
def test_prefix_tokens_are_never_dropped_fused_or_ranked(distilled, fuse):
    apply, params = small_model(distilled=distilled)
    prefix = 1 + distilled
    params = silenced(params)
    plan = make_plan(16, 3, tokens=(3, 1), reduce_at=(0, 2), fuse=fuse)
    _, seen = apply(params, make_images(), plan, patch_tokens=True)
    for block in range(3):
        assert seen[f'block{block:02d}'].shape == (4, prefix + plan.counts[block], 8)
        np.testing.assert_array_equal(seen[f'block{block:02d}'][:, :prefix], seen['pos'][:, :prefix])
    first = np.asarray(seen['kept'][0])[:, :3]
    assert first.min() >= 0 and first.max() < 16
    assert seen['class_attention'][0].shape == (4, 16)
    assert seen['class_attention'][1].shape == (4, plan.counts[0])
    assert all((row.sum(1) < 1).all() for row in seen['class_attention'])  # those in front took their part
    came_from = np.take_along_axis(np.asarray(seen['pos'])[:, prefix:], first[..., None], axis=1)
    np.testing.assert_array_equal(seen['block00'][:, prefix:prefix + 3], came_from)


@pytest.mark.parametrize('distilled', [True, False], ids=['distilled', 'plain'])
def test_what_a_fused_token_is_made_of_is_known_patch_by_patch(distilled):
    apply, params = small_model(distilled=distilled)
    plan, prefix = make_plan(16, 3, tokens=(9, 4, 1), reduce_at=(0, 1, 2)), 1 + distilled
    _, seen = apply(silenced(params), make_images(), plan, patch_tokens=True)
    whole = seen['pos'][:, prefix:]
    for block, origin in enumerate(seen['fused_weights']):
        made = jnp.einsum('bn,bnd->bd', origin, whole)
        np.testing.assert_allclose(seen[f'block{block:02d}'][:, -1], made, rtol=1e-4, atol=1e-6)
    went = seen['class_attention'][0].sum(1) - jnp.sort(seen['class_attention'][0])[:, -9:].sum(1)
    np.testing.assert_allclose(seen['fused_weights'][0].sum(1), went, rtol=1e-4)
    every, one = seen['kept'][0][:, :9], (seen['fused_weights'][0] > 0).sum(1)
    assert (one == 7).all() and every.min() >= 0  # each patch is kept or fused, none both, none neither


def test_a_model_that_fuses_nothing_has_no_origins():
    apply, params = small_model()
    plan = make_plan(16, 3, rate=0.5, reduce_at=(1,), fuse=False)
    assert apply(params, make_images(), plan)[1]['fused_weights'] == ()


def test_origins_that_nobody_asks_for_cost_nothing(monkeypatch):
    model = create(ViTConfig(**SMALL))
    params, plan = jax.eval_shape(model.init, jax.random.key(0)), make_plan(16, 3, rate=0.5, reduce_at=(0, 2))

    def work_of(name):
        def asked(params, images):
            logits, seen = model.apply(params, images, plan)
            return logits, seen[name]

        return jax.jit(asked).lower(params, make_images()).compile().cost_analysis()

    with_origins, kept = work_of('fused_weights'), work_of('kept')
    monkeypatch.setattr(apply, 'fused_weights', lambda *_: ())
    assert work_of('kept') == kept
    assert with_origins['bytes accessed'] > kept['bytes accessed']


@pytest.mark.parametrize('distilled', [True, False], ids=['distilled', 'plain'])
@pytest.mark.parametrize('key', [None, jax.random.key(3)], ids=['evaluation', 'training'])
def test_logits_are_those_of_a_whole_last_block_for_a_part_of_its_work(key, distilled):
    model = create(ViTConfig(**SMALL, distilled=distilled), drop_path=0.5)
    params, plan = small_model(distilled=distilled)[1], make_plan(16, 3, rate=0.5, reduce_at=(0, 2))

    def compiled(of, patch_tokens):
        return jax.jit(lambda params, images: of(*model.apply(params, images, plan, key, patch_tokens=patch_tokens))
                       ).lower(params, make_images()).compile()

    alone = compiled(lambda logits, seen: logits, False)
    whole = compiled(lambda logits, seen: (logits, seen['norm']), True)
    logits, norm = whole(params, make_images())
    heads = [params[name] for name in ('head', 'head_dist')[:1 + distilled]]
    want = sum(norm[:, row] @ head['kernel'] + head['bias'] for row, head in enumerate(heads)) / len(heads)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone(params, make_images()), want, rtol=1e-5, atol=1e-5)
    spared = 2 * 2 * 4 * plan.counts[2] * 8 * 32  # in the MLP alone
    assert alone.cost_analysis()['flops'] < whole.cost_analysis()['flops'] - spared


def test_only_the_visible_patches_are_seen():
    apply, params = small_model()
    images, visible = make_images(), jnp.asarray(np.random.default_rng(2).permuted(np.tile(range(16), (4, 1)), axis=1))
    plan = make_plan(6, 3, rate=0.5, reduce_at=(1,))
    logits, seen = apply(params, images, plan, visible=visible[:, :6])
    assert seen['block00'].shape == (4, 7, 8) and seen['fused_weights'][0].shape == (4, 16)
    np.testing.assert_array_equal(jnp.sort(seen['patch_ids'][0]), jnp.sort(visible[:, :6]))
    hidden = np.repeat(np.repeat(~np.isin(np.arange(16), visible[0, :6]).reshape(4, 4), 4, 0), 4, 1)
    others = images.at[0].set(jnp.where(hidden[..., None], 9.0, images[0]))
    np.testing.assert_array_equal(apply(params, others, plan, visible=visible[:, :6])[0], logits)
    every, _ = apply(params, images, make_plan(16, 3, reduce_at=()), visible=visible)
    np.testing.assert_allclose(every, apply(params, images, make_plan(16, 3, reduce_at=()))[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='the plan is for 16 patches and 3 blocks; this input has 6'):
        apply(params, images, make_plan(16, 3, reduce_at=()), visible=visible[:, :6])


def test_logits_of_a_distilled_model_are_the_mean_of_both_heads():
    apply, params = small_model(distilled=True)
    logits, seen = apply(params, make_images(), make_plan(16, 3, rate=0.5, reduce_at=(1,)))
    cls = seen['norm'][:, 0] @ params['head']['kernel'] + params['head']['bias']
    dist = seen['norm'][:, 1] @ params['head_dist']['kernel'] + params['head_dist']['bias']
    np.testing.assert_allclose(seen['cls_logits'], cls, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen['dist_logits'], dist, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, (cls + dist) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(cls - dist).max() > 1e-3


@pytest.mark.parametrize('height, width, patches, depth, message', [
    (16, 12, 12, 3, r'images are 16 x 12: they must be square'),
    (24, 24, 16, 3, r'the plan is for 16 patches and 3 blocks; this input has 36, this model 3'),
    (16, 16, 16, 4, r'the plan is for 16 patches and 4 blocks; this input has 16, this model 3'),
    (18, 18, 16, 3, r'image size 18 is not divisible by the patch size 4: use 16 or 20'),
])
def test_input_that_the_plan_is_not_for_is_an_error(height, width, patches, depth, message):
    apply, params = small_model()
    with pytest.raises(ValueError, match=message):
        apply(params, make_images(height=height, width=width), make_plan(patches, depth, reduce_at=()))


def test_bfloat16_model_ranks_and_answers_in_float32():
    apply, params = small_model(dtype=jnp.bfloat16)
    logits, seen = apply(params, make_images(), make_plan(16, 3, rate=0.5, reduce_at=(1,)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert seen['block00'].dtype == seen['block02'].dtype == jnp.bfloat16
    for value in (logits, seen['class_attention'][0]):
        assert value.dtype == jnp.float32
        assert (value.astype(jnp.bfloat16).astype(jnp.float32) != value).any()  # not rounded on the way


@pytest.mark.parametrize('num_queries', [None, 1])
@pytest.mark.parametrize('known', [(), ('size',), ('mask',)], ids=['plain', 'size', 'mask'])
def test_attention_head_by_head_is_that_of_all_heads_at_once(num_queries, known):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(2, 7, 36)), jnp.float32)
    of_tokens = {'size': rng.integers(1, 4, (2, 7)), 'mask': rng.integers(0, 2, (2, 7))}
    size, mask = (jnp.asarray(of_tokens[name], jnp.float32) if name in known else None for name in of_tokens)
    got, want = (attend(qkv, size, mask, num_heads=3, num_queries=num_queries)
                 for attend in (attention._head_by_head, attention._heads_at_once))
    assert want[0].shape == (2, num_queries or 7, 12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
