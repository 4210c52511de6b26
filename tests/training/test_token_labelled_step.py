"""A training step of an LV-ViT with token labels and MixToken: its targets and its running statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax import models
from evit_jax.checkpoints.state import create_state
from evit_jax.data.token_labels import mixtoken
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.training import objectives
from evit_jax.training import step as steps
from evit_jax.training.objectives import Targets
from tests.helpers import layouts

SHAPE = LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=5, stem_width=4)
PLAN = make_plan(16, 2, rate=0.5, reduce_at=(0,))
BATCH, GROUPS = 8, 2


def batch_of(rng):
    def labels(*shape):
        value = rng.dirichlet(np.ones(6), shape)[..., :5].astype(np.float16)
        return value, rng.permuted(np.tile(np.arange(5, dtype=np.int32), (*shape, 1)), axis=-1)

    batch = {'image': rng.normal(size=(BATCH, 16, 16, 3)).astype(np.float32), 'label': np.zeros(BATCH, np.int32)}
    for name, shape in (('label', (BATCH,)), ('token', (BATCH, 16))):
        batch[f'{name}_value'], batch[f'{name}_index'] = labels(*shape)
    return batch


def mix(images, batch, key):
    label, tokens, swap = mixtoken.mix_batch(batch, key, grid=(4, 4), classes=5, smoothing=0.1, groups=GROUPS)
    return steps.Mixed(images, Targets(label, tokens), {'swap': swap})


@pytest.fixture(scope='module')
def stepped():
    """Model, batch, state before and after a step, and the metrics of the step."""
    model, batch = models.create(SHAPE), batch_of(np.random.default_rng(0))
    optimizer = optax.sgd(0.1)
    step = jax.jit(steps.make_train_step(
        model, steps.UpdateRule(optimizer, lambda _: 0.1, 0.5), prepare=lambda images: images, mix=mix, seed=0,
        objective=lambda plan: objectives.token_label_loss(0.5)), static_argnums=2)
    before = create_state(model.init(jax.random.key(1)), optimizer, ema=True)
    after, metrics = step(before, batch, PLAN)
    return model, batch, before, after, metrics


def shown(model, batch, before):
    """Returns the model's intermediates for the images of the step, and the targets of the step."""
    drop_key, mix_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    mixed = mix(jnp.asarray(batch['image']), batch, mix_key)
    assert np.asarray(mixed.options['swap']).any()
    apply = jax.jit(model.apply, static_argnums=2)
    return apply(before.params, mixed.images, PLAN, drop_key, **mixed.options)[1], mixed.targets


def test_train_step_uses_the_labels_of_the_swapped_patches(stepped):
    model, batch, before, _, metrics = stepped
    seen, targets = shown(model, batch, before)
    full = np.asarray(mixtoken.dense(targets.tokens, 5))
    logs, patch = np.asarray(jax.nn.log_softmax(seen['token_logits'])), np.asarray(seen['token_patch'])
    assert (patch[:, -1] < 0).all() and (patch[:, :-1] >= 0).all()
    want = np.mean([-(full[b, patch[b, n]] * logs[b, n]).sum() for b in range(BATCH) for n in range(8)])
    np.testing.assert_allclose(metrics['loss/tokens'], want, rtol=1e-5)
    np.testing.assert_allclose(metrics['loss'], metrics['loss/labels'] + 0.5 * metrics['loss/tokens'], rtol=1e-6)


def test_train_step_updates_the_running_statistics_and_their_ema(stepped):
    model, batch, before, after, _ = stepped
    wanted = shown(model, batch, before)[0]['statistics']['patch_embed']
    for norm in ('bn1', 'bn2', 'bn3'):
        for name in ('mean', 'var'):
            old, new = (state.params['patch_embed'][norm][name] for state in (before, after))
            np.testing.assert_allclose(new, wanted[norm][name], rtol=1e-5, atol=1e-7)
            assert np.abs(np.asarray(new) - old).max() > 1e-4
            np.testing.assert_allclose(after.ema['patch_embed'][norm][name], (old + new) / 2, rtol=1e-5, atol=1e-7)


def test_train_step_on_8_devices_has_the_statistics_of_the_whole_batch():
    run = layouts.setup(dataclasses.replace(SHAPE, classes=3), mixing__erase=0.0)
    batches = run.train_batches(0)
    batch = next(batches)
    batches.close()
    state = run.new_state()
    images = run.prepare(jnp.asarray(batch['image']))
    apply = jax.jit(run.model.apply, static_argnums=2)
    want = apply(state.params, images, run.plan, jax.random.key(0))[1]['statistics']
    after, _ = run.train_step()(state, {name: batch[name] for name in ('image', 'label')}, run.plan)
    jax.tree.map(lambda new, wanted: np.testing.assert_allclose(new, wanted, rtol=1e-4, atol=1e-6),
                 {name: {part: norm[part] for part in ('mean', 'var')} for name, norm in
                  after.params['patch_embed'].items() if name.startswith('bn')}, want['patch_embed'])
