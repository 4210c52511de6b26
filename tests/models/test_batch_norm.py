"""The batch normalisation of LV-ViT: its statistics are the whole batch's, and no optimizer's business."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.models import create, folded, with_statistics
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime import sharding
from evit_jax.training import optimizer as optimizers

SHAPE = LVViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, classes=5, stem_width=4)
PLAN = make_plan(4, 1, rate=0.5, reduce_at=(0,))
KEY = jax.random.key(7)
MODEL = create(SHAPE)
apply = jax.jit(MODEL.apply, static_argnums=2)


@pytest.fixture(scope='module')
def params():
    """None is zero, no variance negative."""
    rng = np.random.default_rng(1)

    def values(path, leaf):
        drawn = rng.normal(size=leaf.shape, scale=0.5).astype(leaf.dtype)
        return abs(drawn) + 1 if path[-1].key == 'var' else drawn

    return jax.tree_util.tree_map_with_path(values, jax.eval_shape(MODEL.init, jax.random.key(0)))


def images_of(batch=16, seed=0):
    return np.random.default_rng(seed).normal(1.0, 3.0, (batch, 8, 8, 3)).astype(np.float32)


def stem_of(params, images):
    """What comes out of the first convolution, by hand: 7 x 7, every second place, three zeros at the border."""
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    kernel = np.asarray(params['patch_embed']['conv1']['kernel'])
    places = [(row, column) for row in range(0, 8, 2) for column in range(0, 8, 2)]
    return np.stack([np.einsum('bhwc,hwcd->bd', padded[:, row:row + 7, column:column + 7], kernel)
                     for row, column in places], axis=1)  # [B, 16, 4]


def is_running(path):
    return path[-1].key in ('mean', 'var')


def test_running_values_go_a_tenth_of_the_way_to_those_of_the_batch_as_in_pytorch(params):
    images = images_of()
    _, seen = apply(params, images, PLAN, KEY)
    values, before = stem_of(params, images), params['patch_embed']['bn1']
    found = seen['statistics']['patch_embed']['bn1']
    np.testing.assert_allclose(found['mean'], 0.9 * before['mean'] + 0.1 * values.mean((0, 1)), rtol=1e-4, atol=1e-5)
    unbiased = values.reshape(-1, 4).var(0, ddof=1)
    np.testing.assert_allclose(found['var'], 0.9 * before['var'] + 0.1 * unbiased, rtol=1e-4)
    assert np.abs(unbiased - values.reshape(-1, 4).var(0)).max() > 1e-2 * 0.1


def test_evaluation_takes_the_running_values_and_changes_none(params):
    images = images_of()
    logits, seen = apply(params, images, PLAN)
    assert 'statistics' not in seen
    np.testing.assert_allclose(apply(params, images[:4], PLAN)[0], logits[:4], rtol=1e-4, atol=1e-5)
    other = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + 1 if is_running(path) else leaf, params)
    assert np.abs(apply(other, images, PLAN)[0] - logits).max() > 1e-3
    np.testing.assert_array_equal(apply(other, images, PLAN, KEY)[0], apply(params, images, PLAN, KEY)[0])


def test_running_values_come_to_be_those_that_training_sees(params):
    for _ in range(150):
        params = with_statistics(params, apply(params, images_of(), PLAN, KEY)[1])
    evaluated, trained = (apply(params, images_of(), PLAN, key)[1]['patch_embed'] for key in (None, KEY))
    np.testing.assert_allclose(evaluated, trained, rtol=0.02, atol=0.02)  # the rest: one variance is unbiased


def test_statistics_are_put_where_they_belong_and_nowhere_else(params):
    _, seen = apply(params, images_of(), PLAN, KEY)
    after = with_statistics(params, seen)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(params)):
        assert (np.asarray(new) != old).any() == is_running(path)
    assert after['patch_embed']['bn3']['var'] is seen['statistics']['patch_embed']['bn3']['var']
    assert with_statistics(params, {'kept': ()}) == params


@pytest.mark.parametrize('key', [KEY, None], ids=['training', 'running'])
def test_no_gradient_reaches_running_values_and_no_decay(params, key):
    def loss_of(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            MODEL.apply(params, images_of(), PLAN, key=key)[0], jnp.arange(16) % 5).mean()

    gradient = jax.jit(jax.grad(loss_of))(params)
    optimizer = optimizers.adamw(lambda _: 0.1, weight_decay=0.5)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert not update.any() if is_running(path) else update.any(), path


@pytest.mark.parametrize('how', sharding.SHARDINGS)
def test_eight_devices_find_what_one_finds(params, how):
    images, labels = images_of(), jnp.arange(16) % 5

    def step(params, images, labels):
        def loss_of(params):
            logits, seen = MODEL.apply(params, images, PLAN, key=KEY)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (logits, with_statistics(params, seen))

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    found = []
    for devices in jax.devices()[:1], jax.devices():
        mesh = sharding.data_mesh(16, devices)
        batch, placed = sharding.batch_sharding(mesh), sharding.state_shardings(params, mesh, how)
        jitted = jax.jit(sharding.with_mesh(mesh, step), in_shardings=(placed, batch, batch))
        found.append(jax.device_get(jitted(params, images, labels)))
        assert mesh.size == len(devices)
    jax.tree.map(lambda one, eight: np.testing.assert_allclose(one, eight, rtol=1e-3, atol=1e-5), *found)


def test_bfloat16_has_its_statistics_in_float32(params):
    rounded = jax.jit(create(SHAPE, dtype=jnp.bfloat16).apply, static_argnums=2)
    values = [model(params, images_of(256), PLAN, KEY)[1]['statistics'] for model in (apply, rounded)]
    for one, other in zip(*map(jax.tree.leaves, values)):
        assert other.dtype == jnp.float32
        assert (other.astype(jnp.bfloat16).astype(jnp.float32) != other).any()
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02)


def operations(shape, params):
    """How often each operation stands in the program of an evaluation."""
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    program = jax.jit(create(shape).apply, static_argnums=2).lower(params, images, PLAN).as_text()
    return {name: program.count(f'stablehlo.{name} ') for name in ('rsqrt', 'subtract', 'multiply')}


@pytest.mark.parametrize('how', [np.asarray, jnp.asarray], ids=['numpy', 'jax'])
def test_folded_into_the_convolutions_it_gives_the_same_logits(params, how):
    shape, less = folded(SHAPE, jax.tree.map(how, params))
    assert all(isinstance(leaf, type(how(0.0))) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(less))
    got, want = (jax.jit(create(of).apply, static_argnums=2)(values, images_of(), PLAN)[0]
                 for of, values in ((shape, less), (SHAPE, params)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert np.ptp(want, axis=0).min() > 1e-3


def test_folded_there_is_nothing_left_of_it_to_compute_or_to_keep(params):
    config, less = folded(SHAPE, params)
    before, after = operations(SHAPE, params), operations(config, less)
    assert {name: before[name] - after[name] for name in before} == {'rsqrt': 3, 'subtract': 3, 'multiply': 6}
    assert not any(is_running(path) for path, _ in jax.tree_util.tree_leaves_with_path(less))
    assert jax.tree.map(np.shape, less) == jax.tree.map(np.shape, jax.eval_shape(create(config).init, KEY))
    assert config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(less)) == SHAPE.parameters() - 12
    assert config.macs(PLAN) == SHAPE.macs(PLAN)


def test_folding_leaves_what_was_trained_as_it_is_and_has_nothing_more_to_do_the_second_time(params):
    before = jax.tree.map(np.copy, params)
    once = folded(SHAPE, params)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert folded(*once) == once
    other = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, classes=5)
    assert folded(other, params) == (other, params)
