"""Rematerialisation: the same loss and gradients with fewer saved activations; evaluation does not change."""

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
from tests.helpers.weights import random_params

SMALL = {'image_size': 16, 'patch_size': 4, 'width': 16, 'depth': 2, 'heads': 2, 'classes': 3, 'init_std': 0.3}
VIT = ViTConfig(**SMALL)
BARRIER = 'optimization_barrier'  # keeps XLA from merging the two computations of an activation

least = layouts.least


def training_loss(config, reducer, remat):
    """Returns the training loss of a batch, with drop path, as a function of the parameters; and the parameters."""
    modules = Modules(reducer, 2) if reducer.is_learned else NO_MODULES
    model = models.create(config, drop_path=0.5, remat=remat, modules=modules)
    rng = np.random.default_rng(1)
    params = random_params(model)
    plan = make_plan(16, config.depth, rate=0.6, reduce_at=(0, 1), reducer=reducer).in_training()
    images = jnp.asarray(rng.normal(size=(6, 16, 16, 3)), jnp.float32)

    def loss_of(params):
        logits, intermediates = model.apply(params, images, plan, jax.random.key(3))
        token_logits = intermediates.get('token_logits', jnp.zeros(()))
        return (logits**2).mean() + jnp.abs(token_logits).mean() + sum(mask.mean() for mask in intermediates['mask'])

    return loss_of, params


def loss_and_gradients(config, reducer, remat):
    loss_of, params = training_loss(config, reducer, remat)
    return jax.jit(jax.value_and_grad(loss_of))(params)


def residual_bytes(config, reducer, remat):
    """Returns the bytes that are saved for the backward pass, without the parameters."""
    loss_of, params = training_loss(config, reducer, remat)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return size(jax.eval_shape(lambda params: jax.vjp(loss_of, params)[1], params)) - size(params)


@pytest.mark.parametrize(('config', 'reducer'), [
    pytest.param(VIT, EVIT, id='evit'), pytest.param(VIT, TOME, id='tome', marks=pytest.mark.slow),
    pytest.param(dataclasses.replace(VIT, distilled=True), EVIT, id='distilled', marks=pytest.mark.slow),
    pytest.param(VIT, DYNAMICVIT, id='dynamicvit', marks=pytest.mark.slow),
    pytest.param(LVViTConfig(**SMALL, stem_width=4), EVIT, id='lvvit')])
def test_remat_keeps_loss_and_gradients(config, reducer):
    (loss, gradients), (remat_loss, remat_gradients) = (
        loss_and_gradients(config, reducer, remat) for remat in (False, True))
    np.testing.assert_allclose(remat_loss, loss, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest), remat_gradients, gradients)
    assert np.abs(gradients['blocks'][0]['mlp']['fc1']['kernel']).max() > 1e-6 * largest


def test_remat_saves_less_than_a_tenth_of_the_bytes_of_a_block():
    deep, deeper = (dataclasses.replace(VIT, depth=depth) for depth in (2, 4))
    without_remat, with_remat = (residual_bytes(deeper, EVIT, remat) - residual_bytes(deep, EVIT, remat)
                                 for remat in (False, True))
    assert 0 < with_remat < without_remat / 10


@pytest.fixture(scope='module')
def steps():
    """The lowered programs of a training step and an evaluation step, by the value of `remat`."""
    lowered = {}
    for remat in (False, True):
        training = experiment.setup(layouts.config_of(remat=remat, model__drop_path=0.1))
        state, batch = training.abstract_state(), training.abstract_batch()
        lowered[remat] = (training.train_step().lower(state, batch, training.plan.in_training()),
                          training.eval_step().lower(state.params, batch, training.plan))
    return lowered


def test_remat_false_and_evaluation_rematerialise_nothing(steps):
    assert BARRIER in steps[True][0].as_text() and BARRIER not in steps[False][0].as_text()
    assert steps[True][1].as_text() == steps[False][1].as_text()


@pytest.mark.parametrize('value', ['yes', 1, 0.5])
def test_remat_that_is_no_bool_raises(value):
    with pytest.raises(TypeError, match='remat'):
        layouts.config_of(remat=value)
