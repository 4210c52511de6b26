"""Activations made again in the backward pass: the same loss and gradients, and nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax import models
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import NO_MODULES, Modules
from evit_jax.reduction.reducers import DYNAMICVIT, EVIT, TOME
from evit_jax.training import experiment
from tests.helpers import layouts

SMALL = {'image_size': 16, 'patch_size': 4, 'width': 16, 'depth': 4, 'heads': 2, 'classes': 3, 'init_std': 0.3}
VIT = ViTConfig(**SMALL)
BARRIER = 'optimization_barrier'  # keeps XLA from making one of what is computed twice

least = layouts.least


def training_loss(config, reducer, remat):
    """The loss of a batch in training, in which drop path draws, as a function of the parameters; and these."""
    modules = Modules(reducer, 2) if reducer.is_learned else NO_MODULES
    model = models.create(config, drop_path=0.5, remat=remat, modules=modules)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape, scale=0.1).astype(np.float32),
                          model.init(jax.random.key(0)))
    plan = make_plan(16, config.depth, rate=0.6, reduce_at=(1, 2), reducer=reducer).in_training()
    images = jnp.asarray(rng.normal(size=(6, 16, 16, 3)), jnp.float32)

    def loss_of(params):
        logits, seen = model.apply(params, images, plan, jax.random.key(3))
        tokens = seen.get('token_logits', jnp.zeros(()))
        return (logits**2).mean() + jnp.abs(tokens).mean() + sum(decided.mean() for decided in seen['mask'])

    return loss_of, params


def loss_and_gradients(*asked):
    loss_of, params = training_loss(*asked)
    return jax.jit(jax.value_and_grad(loss_of))(params)


def kept_bytes(*asked):
    """What the backward pass is given, but for the parameters themselves."""
    loss_of, params = training_loss(*asked)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return size(jax.eval_shape(lambda params: jax.vjp(loss_of, params)[1], params)) - size(params)


@pytest.mark.parametrize(('shape', 'reducer'), [
    (VIT, EVIT), (VIT, TOME), (dataclasses.replace(VIT, distilled=True), EVIT),
    (VIT, DYNAMICVIT), (LVViTConfig(**SMALL, stem_width=4), EVIT)],
    ids=['evit', 'tome', 'distilled', 'dynamicvit', 'lvvit'])
def test_loss_and_gradients_are_the_same(shape, reducer):
    (loss, gradients), (loss_again, gradients_again) = (loss_and_gradients(shape, reducer, remat)
                                                        for remat in (False, True))
    np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest), gradients_again, gradients)
    assert np.abs(gradients['blocks'][0]['mlp']['fc1']['kernel']).max() > 1e-6 * largest


def test_of_a_block_little_is_kept():
    deep, deeper = (dataclasses.replace(VIT, depth=depth) for depth in (4, 8))
    without, with_it = (kept_bytes(deeper, EVIT, remat) - kept_bytes(deep, EVIT, remat) for remat in (False, True))
    assert 0 < with_it < without / 10


@pytest.fixture(scope='module')
def steps():
    """Whether activations are made again -> the programs, lowered, of a training step and of an evaluation."""
    lowered = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CONFIGS, 'vit_layouts', dataclasses.replace(layouts.SHAPE, depth=5))
        for remat in (False, True):
            run = experiment.setup(layouts.config_of(remat=remat, model__drop_path=0.1))
            state, batch = run.abstract_state(), run.abstract_batch()
            lowered[remat] = (run.train_step().lower(state, batch, run.plan.in_training()),
                              run.eval_step().lower(state.params, batch, run.plan))
    return lowered


def test_where_it_is_not_asked_for_and_in_evaluation_nothing_is_made_again(steps):
    assert BARRIER in steps[True][0].as_text() and BARRIER not in steps[False][0].as_text()
    assert steps[True][1].as_text() == steps[False][1].as_text()


@pytest.mark.parametrize('wrong', ['yes', 1, 0.5])
def test_what_is_neither_true_nor_false_is_refused(wrong):
    with pytest.raises(TypeError, match='remat'):
        layouts.config_of(remat=wrong)
