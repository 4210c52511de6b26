"""DeiT's recipe against values recorded from timm: learning and keep rates, decay groups, AdamW, EMA."""

import dataclasses
import importlib
import json
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.checkpoints.state import create_state, update_ema
from evit_jax.checkpoints.workdir import flat
from evit_jax.configs import base
from evit_jax.interchange.torch_weights import to_torch
from evit_jax.models import create, get_config
from evit_jax.reduction import registry
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.schedule import KeepSchedule, progress
from evit_jax.training import optimizer as optimizers
from evit_jax.training import step as steps
from evit_jax.training.objectives import Targets, classification_loss

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parents[1] / 'golden_recipe'
SCHEDULES = np.load(GOLDEN / 'schedules.npz')
OPTIMISER = np.load(GOLDEN / 'optimiser.npz')
RULES = json.loads((GOLDEN / 'optimiser.json').read_text())
RECIPES = sorted(file.stem for file in (ROOT / 'configs').glob('*.py')
                 if file.stem != 'base' and not file.stem.startswith('compare_'))

every_precision = pytest.mark.parametrize(('x64', 'tolerance'), [(False, 1e-6), (True, 1e-12)], ids=['f32', 'f64'])


def in_precision(tree, x64):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64 if x64 else jnp.float32), tree)


def recipe(name):
    return importlib.import_module(f'configs.{name}').get_config()


@every_precision
@pytest.mark.parametrize(('recorded', 'rule'), [
    ('lr_300', {'lr': 5e-4, 'batch_size': 1024, 'warmup_lr': 1e-6, 'min_lr': 1e-5, 'warmup_epochs': 5}),
    ('lr_finetune_30', {'lr': 2e-5, 'batch_size': 2048, 'warmup_lr': 1e-6, 'min_lr': 2e-6, 'warmup_epochs': 0})])
def test_learning_rate_of_an_epoch_equals_the_recorded_one_of_the_next_epoch(recorded, rule, x64, tolerance):
    """The reference updates the learning rate at the end of epoch e to lr(e), so epoch e + 1 uses lr(e)."""
    want, epoch_steps = SCHEDULES[recorded], 1251
    with jax.enable_x64(x64):
        schedule = optimizers.learning_rate(
            total_steps=len(want) * epoch_steps, warmup_steps=rule['warmup_epochs'] * epoch_steps,
            **{key: value for key, value in rule.items() if key != 'warmup_epochs'})
        got = [float(schedule(jnp.asarray(epoch * epoch_steps))) for epoch in range(len(want) - 1)]
    np.testing.assert_allclose(got, want[1:], rtol=tolerance)
    assert want[0] == want[1]


@pytest.mark.parametrize('recorded', ['keep', 'keep_edge'])
def test_keep_rate_equals_the_recorded_one_at_every_iteration(recorded):
    schedule = KeepSchedule(start=10 * 100, length=100 * 100, levels=8)  # epochs 10 to 110 of 100 iterations
    got = [1 - (1 - 0.7) * progress(schedule, int(step)) for step in SCHEDULES[f'{recorded}_iteration']]
    np.testing.assert_allclose(got, SCHEDULES[f'{recorded}_rate'], rtol=0, atol=1e-12)


def test_decays_selects_the_recorded_groups():
    want = json.loads((GOLDEN / 'param_groups.json').read_text())['deit_small']
    config = get_config('deit_s')
    params = jax.eval_shape(create(config).init, jax.random.key(0))
    masks = jax.tree.map(lambda leaf, decays: np.broadcast_to(decays, leaf.shape), params, optimizers.decays(params))
    groups = {True: set(), False: set()}
    for name, mask in to_torch(masks, config).items():
        groups[bool(mask.flat[0])].add(name)
    assert groups[False] == set(want['no_decay'])
    assert groups[True] == set(want['decay'])


@every_precision
def test_adamw_equals_the_recorded_five_steps(x64, tolerance):
    rule, precision = RULES['adamw'], 'f64' if x64 else 'f32'
    adamw = optimizers.adamw(lambda _: rule['lr'], weight_decay=rule['weight_decay_weight'])
    with jax.enable_x64(x64):
        params = in_precision({'weight': OPTIMISER['weight0'], 'bias': OPTIMISER['bias0']}, x64)
        state = adamw.init(params)
        for step in range(rule['steps']):
            gradient = {'weight': OPTIMISER['grads'][step], 'bias': OPTIMISER['bias_grads'][step]}
            updates, state = adamw.update(in_precision(gradient, x64), state, params)
            params = optax.apply_updates(params, updates)
            for name, value in params.items():
                want = OPTIMISER[f'adamw_{name}_{precision}'][step]
                np.testing.assert_allclose(value, want, rtol=tolerance, atol=tolerance)


@every_precision
def test_update_ema_equals_the_recorded_average(x64, tolerance):
    rule, precision = RULES['ema'], 'f64' if x64 else 'f32'
    with jax.enable_x64(x64):
        ema = in_precision(OPTIMISER['weight0'], x64)
        for step, weight in enumerate(OPTIMISER[f'adamw_weight_{precision}']):
            ema = update_ema(ema, in_precision(weight, x64), rule['decay'])
            np.testing.assert_allclose(ema, OPTIMISER[f'ema_weight_{precision}'][step], rtol=tolerance)
        ema = in_precision(1.0, x64)
        for _ in range(100):
            ema = update_ema(ema, in_precision(2.0, x64), rule['decay'])
    want = rule['constant_model_2_from_ema_1']['float64' if x64 else 'float32']['100']
    np.testing.assert_allclose(ema, want, rtol=tolerance)


def fixed_model(logits):
    """Returns a model with constant logits, plus the sum of its input times a weight that starts at 0."""
    return SimpleNamespace(apply=lambda params, images, plan, key, **options: (
        jnp.asarray(logits) + 0 * params['w'].sum() + images.sum() * params['w'].sum(), {}))


def mixed(images, targets):
    return steps.Mixed(images, Targets(targets))


def one_step(mix, step=0, logits=((1.0, 0.0), (1.0, 0.0)), seed=0):
    optimizer = optax.sgd(1.0)
    train = steps.make_train_step(
        fixed_model(logits), steps.UpdateRule(optimizer, lambda _: 0.1, 0.9), prepare=jnp.float32, seed=seed,
        mix=lambda images, batch, key: mixed(*mix(images, batch['label'], key)),
        objective=lambda plan: classification_loss())
    state = create_state({'w': jnp.zeros(1)}, optimizer, ema=True)._replace(step=jnp.asarray(step))
    return train(state, {'image': jnp.ones((2, 4, 4, 3), jnp.uint8), 'label': jnp.asarray([0, 1])}, None)


def test_train_step_accuracy_of_mixed_images_counts_the_class_with_more_weight():
    targets = jnp.asarray([[0.7, 0.3], [0.4, 0.6]])
    _, metrics = one_step(lambda images, labels, key: (images, targets))
    assert metrics['accuracy'] == 0.5
    log_p = np.log([np.e / (np.e + 1), 1 / (np.e + 1)])
    np.testing.assert_allclose(metrics['loss'], -(targets @ log_p).mean(), rtol=1e-6)


def test_train_step_draws_depend_on_seed_and_step_alone():
    drawn = []
    for step, seed in ((3, 0), (3, 0), (4, 0), (3, 1)):
        one_step(lambda images, labels, key: (drawn.append(jax.random.key_data(key).tolist()) or images,
                                              jax.nn.one_hot(labels, 2)), step, seed=seed)
    assert drawn[0] == drawn[1]
    assert len({str(key) for key in drawn}) == 3


def test_train_step_updates_the_ema():
    state, _ = one_step(lambda images, labels, key: (images, jnp.asarray([[0.0, 1.0], [0.0, 1.0]])))
    np.testing.assert_allclose(state.ema['w'], 0.1 * state.params['w'], rtol=1e-6)


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_has_exactly_the_keys_of_the_base(name):
    config = recipe(name)
    assert config.is_locked
    assert flat(config.to_dict()).keys() == flat(base.get_config().to_dict()).keys()


@pytest.mark.parametrize('name', [name for name in RECIPES if name not in ('digits', 'finetune')])
def test_recipe_header_states_the_cost_of_its_model(name):
    config, header = recipe(name), importlib.import_module(f'configs.{name}').__doc__
    model_config = dataclasses.replace(get_config(config.model.name), classes=config.model.classes or 1000,
                                       distilled=config.model.distilled)
    parameters, macs = re.search(r'([\d.]+) M parameters.*?; ([\d.]+) G MACs', header).groups()
    plan = plan_of(config, model_config, config.model.image_size, config.keep.rate)
    assert parameters == f'{model_config.parameters(plan) / 1e6:.2f}'
    assert macs == f'{model_config.macs(plan) / 1e9:.2f}'
    for size, rate, stated in re.findall(r'image_size=(\d+) --config.keep.rate=(\S+) .* ([\d.]+) G', header):
        plan = plan_of(config, model_config, int(size), float(rate))
        assert stated == f'{model_config.macs(plan) / 1e9:.2f}'
    assert f'configs/{name}.py' in header


def plan_of(config, model_config, size, rate):
    return make_plan(model_config.patches(size), model_config.depth, rate=rate, reduce_at=config.model.reduce_at,
                     fuse=config.model.fuse, reducer=registry.get_reducer(config.reducer.name))
