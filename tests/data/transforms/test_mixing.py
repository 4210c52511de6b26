"""Tests of erasing, mixup and cutmix: recorded batches and statistics of timm, and no communication."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.checkpoints.workdir import flat
from evit_jax.configs import base
from evit_jax.data.transforms import mixing
from evit_jax.data.transforms.mixing import Mixing
from evit_jax.runtime import sharding
from evit_jax.training import checks, limits

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden_recipe'
RECORDED = json.loads((GOLDEN / 'mixup.json').read_text())
ERASING = json.loads((GOLDEN / 'statistics.json').read_text())['random_erasing']
DEIT = Mixing(erase=0.25, mixup=0.8, cutmix=1.0, switch=0.5, smoothing=0.1)


@pytest.fixture(scope='module')
def batch():
    arrays = np.load(GOLDEN / 'mixup.npz')
    images = jnp.asarray(arrays['x_uint8'].transpose(0, 2, 3, 1), jnp.float32) / 255
    return arrays, images, mixing.smooth_targets(arrays['classes'], 10, 0.1)


def numbers(*values):
    return jnp.asarray(values)


def cut(row):
    return mixing.cut_boxes(numbers(row['lam']), numbers(row['cy']), numbers(row['cx']), row['height'], row['width'])


def assert_mean_like(got, recorded):
    """Compares means within 4 standard errors of the difference between two samples."""
    error = np.hypot(np.std(got) / np.sqrt(len(got)), recorded['stderr_of_mean'])
    np.testing.assert_allclose(np.mean(got, dtype=np.float64), recorded['mean'], rtol=0, atol=4 * error)
    np.testing.assert_allclose(np.std(got, dtype=np.float64), recorded['std'], rtol=0.03)


def test_blend_mixup_equals_the_recorded_batch(batch):
    arrays, images, targets = batch
    images, targets = mixing.blend(images, targets, numbers(0.3), jnp.full((1, 24, 20), 0.3))
    np.testing.assert_allclose(images.transpose(0, 3, 1, 2), arrays['mixup_x'], rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets, arrays['mixup_targets'], rtol=0, atol=1e-6)


def test_blend_cutmix_equals_the_recorded_batch(batch):
    arrays, images, targets = batch
    case = RECORDED['cutmix_golden']
    outside = 1.0 - cut(case | {'lam': case['lam_drawn']}).inside(24, 20)
    images, targets = mixing.blend(images, targets, outside.mean(axis=(1, 2)), outside)
    np.testing.assert_allclose(images.transpose(0, 3, 1, 2), arrays['cutmix_x'], rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets, arrays['cutmix_targets'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('number', range(6))
def test_blend_targets_equal_the_recorded_targets(batch, number):
    arrays, images, targets = batch
    lam = RECORDED['seeded_cases'][number]['lam_used']
    _, targets = mixing.blend(images, targets, numbers(lam), jnp.ones((1, 24, 20)))
    np.testing.assert_allclose(targets, arrays['seeded_targets'][number], rtol=0, atol=1e-6)


@pytest.mark.parametrize('row', RECORDED['box_table'])
def test_cut_boxes_equal_the_recorded_boxes(row):
    box = cut(row)
    assert [int(edge[0]) for edge in box] == row['box_y0_y1_x0_x1']
    outside = 1.0 - box.inside(row['height'], row['width'])
    np.testing.assert_allclose(outside.mean(), row['lam_corrected'], rtol=0, atol=1e-6)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def drawn(key, how, groups, side):
    return mixing.draw_shares(key, how, groups, side, side)


def test_draw_shares_lambdas_have_the_recorded_statistics():
    recorded = RECORDED['statistics']
    of_mixup = jax.jit(lambda key: mixing.draw_shares(key, DEIT._replace(cutmix=0.0), 20_000, 1, 1)[0])
    of_cutmix = jax.jit(lambda key: mixing.draw_shares(key, DEIT._replace(mixup=0.0), 5_000, 224, 224)[0])
    lam = np.asarray(of_mixup(jax.random.key(0)))
    assert_mean_like(lam, recorded['mixup_lam'])
    np.testing.assert_allclose((lam < 0.05).mean(), recorded['mixup_lam_below_0_05_share'], atol=0.012)
    assert_mean_like(np.asarray(of_cutmix(jax.random.key(1))), recorded['cutmix_lam_used_224'])


@pytest.mark.parametrize('a', [0.4, 0.8, 1.0, 3.0])
def test_symmetric_beta_has_the_beta_distribution(a):
    count = 100_000
    x = jnp.sort(mixing.symmetric_beta(*jax.random.uniform(jax.random.key(3), (2, count)), a))
    distance = jnp.abs(jax.scipy.special.betainc(a, a, x) - (jnp.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / np.sqrt(count)  # Kolmogorov-Smirnov test at p = 0.001


def test_symmetric_beta_of_extreme_draws_is_finite():
    ends = jnp.asarray([0.0, 1e-7, 0.5, 1 - 2**-24])
    radius, turn = (part.ravel() for part in jnp.meshgrid(ends, ends))
    for a in (0.1, 0.8, 1.0):
        lam = mixing.symmetric_beta(radius, turn, a)
        assert ((lam >= 0) & (lam <= 1)).all()


@pytest.mark.parametrize(('how', 'share'), [
    (DEIT, 0.5), (DEIT._replace(switch=0.1), 0.1), (DEIT._replace(mixup=0.0), 1.0), (DEIT._replace(cutmix=0.0), 0.0)])
def test_draw_shares_switches_to_cutmix_with_the_given_probability(how, share):
    own, pixels = (np.asarray(part) for part in drawn(jax.random.key(2), how, 4000, 16))
    cut_groups = np.isin(pixels, (0, 1)).all(axis=(1, 2))
    np.testing.assert_allclose(cut_groups.mean(), share, atol=4 * 0.5 / np.sqrt(4000) if 0 < share < 1 else 0)
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), own, atol=1e-6)


def test_mix_batch_mixes_images_and_targets_with_the_mirrored_position_of_the_group():
    number = jnp.arange(24)
    images = jnp.broadcast_to(number[:, None, None, None], (24, 16, 16, 3)).astype(jnp.float32)
    how = DEIT._replace(erase=0.0, smoothing=0.0)
    mixed, targets = mixing.mix_batch(images, number, jax.random.key(5), how, classes=24, groups=4)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), targets @ number, rtol=1e-5)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    partner = number.reshape(4, 6)[:, ::-1].ravel()
    np.testing.assert_allclose(targets[number, number] + targets[number, partner], 1, rtol=1e-6)
    own = targets[number, number].reshape(4, 6)
    np.testing.assert_array_equal(own, own[:, :1].repeat(6, axis=1))
    assert len(set(own[:, 0].tolist())) == 4


def test_mix_batch_with_all_off_returns_the_images():
    images, labels = jax.random.normal(jax.random.key(0), (6, 8, 8, 3)), jnp.arange(6)
    same, targets = mixing.mix_batch(images, labels, jax.random.key(1), Mixing(0.0, 0.0, 0.0, 0.5, 0.0), classes=6)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(targets, np.eye(6))


def test_mix_batch_depends_on_the_key():
    images, labels = jax.random.normal(jax.random.key(0), (8, 16, 16, 3)), jnp.arange(8)
    mix = jax.jit(lambda key: mixing.mix_batch(images, labels, key, DEIT, classes=8, groups=2))
    once, again, other = mix(jax.random.key(1)), mix(jax.random.key(1)), mix(jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert not np.array_equal(once[0], other[0])
    assert not np.array_equal(once[1], other[1])


@pytest.mark.parametrize('run', ERASING['runs'][2:], ids=lambda run: f'{run["height"]}_{run["probability"]}')
def test_erasing_boxes_have_the_recorded_statistics(run):
    height, width, count = run['height'], run['width'], 100_000
    boxes = jax.jit(lambda key: mixing.erasing_boxes(key, run['probability'], count, height, width))(jax.random.key(7))
    top, bottom, left, right = (np.asarray(edge) for edge in boxes)
    erased = bottom > top
    share = run['share_of_images_erased']
    error = np.hypot(*(np.sqrt(share * (1 - share) / n) for n in (count, run['draws'])))
    np.testing.assert_allclose(erased.mean(), share, rtol=0, atol=4 * error)
    top, bottom, left, right = (edge[erased] for edge in (top, bottom, left, right))
    high, wide = bottom - top, right - left
    assert (high < height).all() and (wide < width).all()
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= height).all() and (right <= width).all()
    assert_mean_like(high * wide / (height * width), run['area_share'])
    assert_mean_like(np.log(high / wide), run['log_h_over_w'])
    assert_mean_like(high, run['height_px'])
    assert_mean_like(wide, run['width_px'])
    assert_mean_like(top / (height - high), run['top_over_range'])
    assert_mean_like(left / (width - wide), run['left_over_range'])


def test_random_erasing_fills_one_box_with_normal_noise():
    images = jnp.full((400, 32, 32, 3), 9.0)  # beyond the range of the noise
    erased = np.asarray(jax.jit(mixing.random_erasing)(images, jax.random.key(4), 0.5))
    noisy = (erased != 9).any(axis=-1)
    assert 0.4 < noisy.any(axis=(1, 2)).mean() < 0.6
    for mask in noisy:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns)
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2
    noise = erased[noisy]  # [pixels, 3]
    assert abs(noise.mean()) < 0.01
    np.testing.assert_allclose(np.cov(noise.T), np.eye(3), atol=0.03)


def test_mix_batch_of_a_sharded_batch_moves_no_images_between_devices():
    mesh = sharding.data_mesh(32)
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    mix = jax.jit(functools.partial(mixing.mix_batch, mixing=DEIT, classes=10, groups=8),
                  in_shardings=(split, split, whole), out_shardings=split)
    shapes = jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.int32)
    program = mix.lower(*shapes, jax.eval_shape(lambda: jax.random.key(0))).compile().as_text()
    assert 'f32[4,32,32,3]' in program  # each device holds its own images
    for word in ('all-gather', 'all-reduce', 'all-to-all', 'collective', 'reduce-scatter', 'f32[32,32,32,3]'):
        assert word not in program


MIXES = {'mixing.mixup': 0.8, 'mixing.cutmix': 1.0, 'data.token_labels': '', 'data.repeats': 1}


def config_of(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(MIXES | changes)
    return flat(config)


@pytest.mark.parametrize(('changes', 'devices', 'message'), [
    ({'batch_size': 8}, 8, r'config.batch_size=8 puts one image on each of 8 devices, and config.mixing.mixup=0.8, '
     r'config.mixing.cutmix=1.0 .* Give --config.batch_size=16 or .* or give --config.mixing.mixup=0'),
    ({'batch_size': 1, 'mixing.mixup': 0.0}, 1, 'one image on each of 1 devices'),
    ({'batch_size': 4, 'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'data.token_labels': 'maps'}, 4,
     r'config.data.token_labels=maps \(MixToken\)'),
    ({'batch_size': 2, 'data.repeats': 3}, 1, r'puts 2 copies \(config.data.repeats=3\) of one image on each of 1 '
     r'devices.* Give --config.batch_size=6 or a larger multiple of it, --config.data.repeats=1, '),
    ({'batch_size': 24, 'data.repeats': 3}, 8, r'puts 3 copies .* on each of 8 devices.* Give --config.batch_size=48')])
def test_check_mixing_one_image_per_device_raises(changes, devices, message):
    with pytest.raises(ValueError, match=message):
        limits.check_mixing(config_of(**changes), devices)


def test_check_mixing_odd_number_per_device_warns_of_unmixed_images(caplog):
    limits.check_mixing(config_of(batch_size=24), 8)
    assert '8 of the 24 images of a batch are not mixed: on each of 8 devices there are 3' in caplog.text
    how = DEIT._replace(erase=0.0, smoothing=0.0)
    targets = mixing.mix_batch(jnp.zeros((24, 8, 8, 3)), jnp.arange(24), jax.random.key(0), how, classes=24,
                               groups=8)[1]
    alone = np.asarray(targets.max(axis=1) == 1).reshape(8, 3)
    assert alone[:, 1].all() and not alone[:, 0].all()


def test_check_mixing_copies_as_partners_warns_of_unmixed_images(caplog):
    limits.check_mixing(config_of(**{'batch_size': 18, 'data.repeats': 3}), 2)  # AAABBBCCC: B meets B
    assert ('6 of the 18 images of a batch are not mixed: on each of 2 devices there are 9, and the partner of one in '
            'the middle is a copy of it (config.data.repeats=3). --config.batch_size=12 or 24 mixes all') in caplog.text
    caplog.clear()
    for size in (12, 24):
        limits.check_mixing(config_of(**{'batch_size': size, 'data.repeats': 3}), 2)
    assert not caplog.text


@pytest.mark.parametrize('changes', [
    {'batch_size': 16}, {'batch_size': 8, 'mixing.mixup': 0.0, 'mixing.cutmix': 0.0}])
def test_check_mixing_all_or_none_mixed_does_not_warn(changes, caplog):
    limits.check_mixing(config_of(**changes), 8)
    assert caplog.text == ''


def test_check_training_one_image_per_device_raises_and_check_does_not():
    config = config_of(batch_size=len(jax.devices()))
    checks.check(config)
    with pytest.raises(ValueError, match='puts one image on each'):
        checks.check_training(config)
