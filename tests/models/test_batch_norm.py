"""Batch normalisation of LV-ViT: batch statistics, running statistics, and folding into the convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.models import create, fold_batchnorm, with_statistics
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime import sharding
from evit_jax.training import optimizer as optimizers

CONFIG = LVViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, classes=5, stem_width=4)
PLAN = make_plan(4, 1, rate=0.5, reduce_at=(0,))
KEY = jax.random.key(7)
MODEL = create(CONFIG)
apply = jax.jit(MODEL.apply, static_argnums=2)


@pytest.fixture(scope='module')
def params():
    """Parameters of which none is zero and no variance is negative."""
    rng = np.random.default_rng(1)

    def values(path, leaf):
        drawn = rng.normal(size=leaf.shape, scale=0.5).astype(leaf.dtype)
        return abs(drawn) + 1 if path[-1].key == 'var' else drawn

    return jax.tree_util.tree_map_with_path(values, jax.eval_shape(MODEL.init, jax.random.key(0)))


def images_of(batch=16, seed=0):
    return np.random.default_rng(seed).normal(1.0, 3.0, (batch, 8, 8, 3)).astype(np.float32)


def first_convolution(params, images):
    """Computes the first convolution in numpy: 7 x 7, stride 2, three zeros at the border."""
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    kernel = np.asarray(params['patch_embed']['conv1']['kernel'])
    corners = [(row, column) for row in range(0, 8, 2) for column in range(0, 8, 2)]
    return np.stack([np.einsum('bhwc,hwcd->bd', padded[:, row:row + 7, column:column + 7], kernel)
                     for row, column in corners], axis=1)  # [B, 16, 4]


def is_running(path):
    return path[-1].key in ('mean', 'var')


def test_running_statistics_in_training_move_by_a_tenth_as_in_pytorch(params):
    images = images_of()
    _, intermediates = apply(params, images, PLAN, KEY)
    values, before = first_convolution(params, images), params['patch_embed']['bn1']
    updated = intermediates['statistics']['patch_embed']['bn1']
    np.testing.assert_allclose(updated['mean'], 0.9 * before['mean'] + 0.1 * values.mean((0, 1)), rtol=1e-4, atol=1e-5)
    unbiased = values.reshape(-1, 4).var(0, ddof=1)
    np.testing.assert_allclose(updated['var'], 0.9 * before['var'] + 0.1 * unbiased, rtol=1e-4)
    assert np.abs(unbiased - values.reshape(-1, 4).var(0)).max() > 1e-2 * 0.1


def test_evaluation_uses_the_running_statistics_and_updates_none(params):
    images = images_of()
    logits, intermediates = apply(params, images, PLAN)
    assert 'statistics' not in intermediates
    np.testing.assert_allclose(apply(params, images[:4], PLAN)[0], logits[:4], rtol=1e-4, atol=1e-5)
    other = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + 1 if is_running(path) else leaf, params)
    assert np.abs(apply(other, images, PLAN)[0] - logits).max() > 1e-3
    np.testing.assert_array_equal(apply(other, images, PLAN, KEY)[0], apply(params, images, PLAN, KEY)[0])


def test_running_statistics_after_many_steps_give_the_activations_of_training(params):
    for _ in range(150):
        params = with_statistics(params, apply(params, images_of(), PLAN, KEY)[1])
    evaluation, training = (apply(params, images_of(), PLAN, key)[1]['patch_embed'] for key in (None, KEY))
    np.testing.assert_allclose(evaluation, training, rtol=0.02, atol=0.02)  # only the running variance is unbiased


def test_with_statistics_replaces_the_running_statistics_alone(params):
    _, intermediates = apply(params, images_of(), PLAN, KEY)
    after = with_statistics(params, intermediates)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(params)):
        assert (np.asarray(new) != old).any() == is_running(path)
    assert after['patch_embed']['bn3']['var'] is intermediates['statistics']['patch_embed']['bn3']['var']
    assert with_statistics(params, {'kept': ()}) == params


@pytest.mark.parametrize('key', [KEY, None], ids=['training', 'running'])
def test_running_statistics_get_neither_gradient_nor_weight_decay(params, key):
    def loss_of(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            MODEL.apply(params, images_of(), PLAN, key=key)[0], jnp.arange(16) % 5).mean()

    gradient = jax.jit(jax.grad(loss_of))(params)
    optimizer = optimizers.adamw(lambda _: 0.1, weight_decay=0.5)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert not update.any() if is_running(path) else update.any(), path


@pytest.mark.parametrize('name', sharding.SHARDINGS)
def test_step_on_eight_devices_equals_the_step_on_one(params, name):
    images, labels = images_of(), jnp.arange(16) % 5

    def step(params, images, labels):
        def loss_of(params):
            logits, intermediates = MODEL.apply(params, images, PLAN, key=KEY)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (logits, with_statistics(params, intermediates))

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    results = []
    for devices in jax.devices()[:1], jax.devices():
        mesh = sharding.data_mesh(16, devices)
        batch, state = sharding.batch_sharding(mesh), sharding.state_shardings(params, mesh, name)
        jitted = jax.jit(sharding.with_mesh(mesh, step), in_shardings=(state, batch, batch))
        results.append(jax.device_get(jitted(params, images, labels)))
        assert mesh.size == len(devices)
    jax.tree.map(lambda one, eight: np.testing.assert_allclose(one, eight, rtol=1e-3, atol=1e-5), *results)


def test_bfloat16_model_has_float32_statistics(params):
    bfloat16 = jax.jit(create(CONFIG, dtype=jnp.bfloat16).apply, static_argnums=2)
    values = [model(params, images_of(256), PLAN, KEY)[1]['statistics'] for model in (apply, bfloat16)]
    for one, other in zip(*map(jax.tree.leaves, values)):
        assert other.dtype == jnp.float32
        assert (other.astype(jnp.bfloat16).astype(jnp.float32) != other).any()
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02)


def count_operations(config, params):
    """Counts operations in the lowered program of an evaluation."""
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    program = jax.jit(create(config).apply, static_argnums=2).lower(params, images, PLAN).as_text()
    return {name: program.count(f'stablehlo.{name} ') for name in ('rsqrt', 'subtract', 'multiply')}


@pytest.mark.parametrize('asarray', [np.asarray, jnp.asarray], ids=['numpy', 'jax'])
def test_fold_batchnorm_keeps_the_logits_and_the_array_type(params, asarray):
    config, folded = fold_batchnorm(CONFIG, jax.tree.map(asarray, params))
    assert all(isinstance(leaf, type(asarray(0.0))) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(folded))
    logits, expected = (jax.jit(create(config).apply, static_argnums=2)(values, images_of(), PLAN)[0]
                        for config, values in ((config, folded), (CONFIG, params)))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 1e-3


def test_fold_batchnorm_removes_the_operations_and_the_parameters(params):
    config, folded = fold_batchnorm(CONFIG, params)
    before, after = count_operations(CONFIG, params), count_operations(config, folded)
    assert {name: before[name] - after[name] for name in before} == {'rsqrt': 3, 'subtract': 3, 'multiply': 6}
    assert not any(is_running(path) for path, _ in jax.tree_util.tree_leaves_with_path(folded))
    assert jax.tree.map(np.shape, folded) == jax.tree.map(np.shape, jax.eval_shape(create(config).init, KEY))
    assert config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(folded)) == CONFIG.parameters() - 12
    assert config.macs(PLAN) == CONFIG.macs(PLAN)


def test_fold_batchnorm_leaves_its_arguments_unchanged_and_folds_once(params):
    before = jax.tree.map(np.copy, params)
    once = fold_batchnorm(CONFIG, params)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert fold_batchnorm(*once) == once
    other = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, classes=5)
    assert fold_batchnorm(other, params) == (other, params)
