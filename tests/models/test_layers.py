"""The layers of a ViT, and its forward pass under token plans."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import create, layers
from evit_jax.models.config import ViTConfig
from evit_jax.models.positions import resize_positions
from evit_jax.reduction import apply
from evit_jax.reduction.plan import make_plan

SMALL = {'image_size': 16, 'patch_size': 4, 'width': 8, 'depth': 3, 'heads': 2, 'classes': 5}


@functools.cache
def small_model(dtype=jnp.float32, distilled=False):
    """Returns a jitted model, and parameters of which none is zero."""
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


def resize_in_a_loop(grid, old, new):
    """Resizes pixel by pixel, from 4 x 4 pixels around each position; repeats the border outside the grid."""
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
def test_resize_positions_equals_a_loop_over_pixels(old, new):
    grid = np.random.default_rng(0).normal(size=(old * old, 3)).astype(np.float32)
    resized = resize_positions(jnp.asarray(grid), (old, old), (new, new))
    assert resized.shape == (new * new, 3)
    np.testing.assert_allclose(resized, resize_in_a_loop(grid, old, new), rtol=0, atol=2e-6)


def test_resize_positions_to_the_same_size_returns_the_grid():
    grid = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    np.testing.assert_array_equal(resize_positions(grid, (4, 4), (4, 4)), grid)


def test_drop_path_without_key_or_rate_returns_its_input():
    x = make_images()
    assert layers.drop_path(x, 0.5, None) is x
    assert layers.drop_path(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize('rate', [0.25, 0.5])
def test_drop_path_with_a_rate_drops_whole_images_and_keeps_the_mean(rate):
    out = np.asarray(layers.drop_path(jnp.ones((8192, 2, 3)), rate, jax.random.key(0)))
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - rate)], rtol=1e-6)
    assert out[:, 0, 0].mean() == pytest.approx(1, abs=5 * math.sqrt(rate / (1 - rate) / 8192))


def without_branches(params):
    """Returns parameters for which attention and MLP add 0, so that a block does not change a token."""
    params = jax.tree.map(np.copy, params)
    for block in params['blocks'].values():
        for leaf in jax.tree.leaves((block['attn']['proj'], block['mlp']['fc2'])):
            leaf[...] = 0
    return params


@pytest.mark.parametrize('fuse', [True, False], ids=['fused', 'dropped'])
@pytest.mark.parametrize('distilled', [True, False], ids=['distilled', 'plain'])
def test_prefix_tokens_in_reducing_blocks_are_neither_dropped_fused_nor_ranked(distilled, fuse):
    apply, params = small_model(distilled=distilled)
    prefix = 1 + distilled
    params = without_branches(params)
    plan = make_plan(16, 3, tokens=(3, 1), reduce_at=(0, 2), fuse=fuse)
    _, intermediates = apply(params, make_images(), plan, patch_tokens=True)
    for block in range(3):
        assert intermediates[f'block{block:02d}'].shape == (4, prefix + plan.counts[block], 8)
        np.testing.assert_array_equal(intermediates[f'block{block:02d}'][:, :prefix], intermediates['pos'][:, :prefix])
    first = np.asarray(intermediates['kept'][0])[:, :3]
    assert first.min() >= 0 and first.max() < 16
    assert intermediates['class_attention'][0].shape == (4, 16)
    assert intermediates['class_attention'][1].shape == (4, plan.counts[0])
    # The rest of each row is the attention to the prefix tokens.
    assert all((row.sum(1) < 1).all() for row in intermediates['class_attention'])
    embedded = np.take_along_axis(np.asarray(intermediates['pos'])[:, prefix:], first[..., None], axis=1)
    np.testing.assert_array_equal(intermediates['block00'][:, prefix:prefix + 3], embedded)


@pytest.mark.parametrize('distilled', [True, False], ids=['distilled', 'plain'])
def test_fused_weights_of_all_reductions_are_the_weights_of_the_patches_in_each_fused_token(distilled):
    apply, params = small_model(distilled=distilled)
    plan, prefix = make_plan(16, 3, tokens=(9, 4, 1), reduce_at=(0, 1, 2)), 1 + distilled
    _, intermediates = apply(without_branches(params), make_images(), plan, patch_tokens=True)
    patches = intermediates['pos'][:, prefix:]
    for block, weights in enumerate(intermediates['fused_weights']):
        fused = jnp.einsum('bn,bnd->bd', weights, patches)
        np.testing.assert_allclose(intermediates[f'block{block:02d}'][:, -1], fused, rtol=1e-4, atol=1e-6)
    dropped = intermediates['class_attention'][0].sum(1) - jnp.sort(intermediates['class_attention'][0])[:, -9:].sum(1)
    np.testing.assert_allclose(intermediates['fused_weights'][0].sum(1), dropped, rtol=1e-4)
    kept, num_fused = intermediates['kept'][0][:, :9], (intermediates['fused_weights'][0] > 0).sum(1)
    assert (num_fused == 7).all() and kept.min() >= 0  # each of the 16 patches is either kept or fused


def test_fused_weights_of_a_plan_that_fuses_nothing_are_empty():
    apply, params = small_model()
    plan = make_plan(16, 3, rate=0.5, reduce_at=(1,), fuse=False)
    assert apply(params, make_images(), plan)[1]['fused_weights'] == ()


def test_fused_weights_that_are_not_read_cost_nothing(monkeypatch):
    model = create(ViTConfig(**SMALL))
    params, plan = jax.eval_shape(model.init, jax.random.key(0)), make_plan(16, 3, rate=0.5, reduce_at=(0, 2))

    def cost(name):
        def forward(params, images):
            logits, intermediates = model.apply(params, images, plan)
            return logits, intermediates[name]

        return jax.jit(forward).lower(params, make_images()).compile().cost_analysis()

    fused_weights, kept = cost('fused_weights'), cost('kept')
    monkeypatch.setattr(apply, 'fused_weights', lambda *_: ())
    assert cost('kept') == kept
    assert fused_weights['bytes accessed'] > kept['bytes accessed']


@pytest.mark.parametrize('distilled', [True, False], ids=['distilled', 'plain'])
@pytest.mark.parametrize('key', [None, jax.random.key(3)], ids=['evaluation', 'training'])
def test_last_block_for_prefix_tokens_alone_gives_the_same_logits_with_fewer_operations(key, distilled):
    model = create(ViTConfig(**SMALL, distilled=distilled), drop_path=0.5)
    params, plan = small_model(distilled=distilled)[1], make_plan(16, 3, rate=0.5, reduce_at=(0, 2))

    def compiled(select, patch_tokens):
        return jax.jit(lambda params, images: select(
            *model.apply(params, images, plan, key, patch_tokens=patch_tokens))).lower(params, make_images()).compile()

    short = compiled(lambda logits, intermediates: logits, False)
    whole = compiled(lambda logits, intermediates: (logits, intermediates['norm']), True)
    logits, norm = whole(params, make_images())
    heads = [params[name] for name in ('head', 'head_dist')[:1 + distilled]]
    expected = sum(norm[:, row] @ head['kernel'] + head['bias'] for row, head in enumerate(heads)) / len(heads)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(short(params, make_images()), expected, rtol=1e-5, atol=1e-5)
    saved = 2 * 2 * 4 * plan.counts[2] * 8 * 32  # flops of the MLP; attention saves more
    assert short.cost_analysis()['flops'] < whole.cost_analysis()['flops'] - saved


def test_visible_patches_alone_decide_the_logits():
    apply, params = small_model()
    images, visible = make_images(), jnp.asarray(np.random.default_rng(2).permuted(np.tile(range(16), (4, 1)), axis=1))
    plan = make_plan(6, 3, rate=0.5, reduce_at=(1,))
    logits, intermediates = apply(params, images, plan, visible=visible[:, :6])
    assert intermediates['block00'].shape == (4, 7, 8) and intermediates['fused_weights'][0].shape == (4, 16)
    np.testing.assert_array_equal(jnp.sort(intermediates['patch_ids'][0]), jnp.sort(visible[:, :6]))
    hidden = np.repeat(np.repeat(~np.isin(np.arange(16), visible[0, :6]).reshape(4, 4), 4, 0), 4, 1)
    changed = images.at[0].set(jnp.where(hidden[..., None], 9.0, images[0]))
    np.testing.assert_array_equal(apply(params, changed, plan, visible=visible[:, :6])[0], logits)
    permuted, _ = apply(params, images, make_plan(16, 3, reduce_at=()), visible=visible)
    np.testing.assert_allclose(permuted, apply(params, images, make_plan(16, 3, reduce_at=()))[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='the plan is for 16 patches and 3 blocks; this input has 6'):
        apply(params, images, make_plan(16, 3, reduce_at=()), visible=visible[:, :6])


def test_distilled_model_returns_the_mean_logits_of_both_heads():
    apply, params = small_model(distilled=True)
    logits, intermediates = apply(params, make_images(), make_plan(16, 3, rate=0.5, reduce_at=(1,)))
    cls = intermediates['norm'][:, 0] @ params['head']['kernel'] + params['head']['bias']
    dist = intermediates['norm'][:, 1] @ params['head_dist']['kernel'] + params['head_dist']['bias']
    np.testing.assert_allclose(intermediates['cls_logits'], cls, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(intermediates['dist_logits'], dist, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, (cls + dist) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(cls - dist).max() > 1e-3


@pytest.mark.parametrize('height, width, patches, depth, message', [
    (16, 10, 12, 3, r'image size 10 in 16 x 10 is not divisible by the patch size 4: use 8 or 12'),
    (24, 24, 16, 3, r'the plan is for 16 patches and 3 blocks; this input has 36, this model 3'),
    (16, 16, 16, 4, r'the plan is for 16 patches and 4 blocks; this input has 16, this model 3'),
    (18, 18, 16, 3, r'image size 18 is not divisible by the patch size 4: use 16 or 20'),
])
def test_model_with_images_or_a_plan_that_do_not_fit_raises(height, width, patches, depth, message):
    apply, params = small_model()
    with pytest.raises(ValueError, match=message):
        apply(params, make_images(height=height, width=width), make_plan(patches, depth, reduce_at=()))


def test_bfloat16_model_has_float32_scores_and_logits():
    apply, params = small_model(dtype=jnp.bfloat16)
    logits, intermediates = apply(params, make_images(), make_plan(16, 3, rate=0.5, reduce_at=(1,)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert intermediates['block00'].dtype == intermediates['block02'].dtype == jnp.bfloat16
    for value in (logits, intermediates['class_attention'][0]):
        assert value.dtype == jnp.float32
        assert (value.astype(jnp.bfloat16).astype(jnp.float32) != value).any()  # was never rounded to bfloat16
