"""Parity with the PyTorch DynamicViT, by reference cases in tests/golden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange.torch_weights import from_torch, to_torch
from evit_jax.models import create, get_config
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import Modules
from evit_jax.reduction.reducers import DYNAMICVIT
from evit_jax.training import losses
from tests.helpers import golden

CASES = golden.cases('dynamicvit.json')
EVALUATION = [name for name, case in CASES.items() if case['mode'] == 'eval']
TRAINING = CASES['dynamicvit_small_224_r70_train']
TARGETS = (0.7, 0.7**2, 0.7**3)


def make_weights():
    return golden.make_weights('dynamicvit_small_224', 'dynamicvit.json')


@functools.cache
def reference_model():
    model = create(get_config('deit_s'), modules=Modules(DYNAMICVIT, 3))
    return model, from_torch(make_weights(), model.config)


def plan_of(case):
    return make_plan(196, 12, rate=case['base_rate'], reducer=DYNAMICVIT)


@pytest.mark.parametrize('name', [EVALUATION[0], pytest.param(EVALUATION[1], marks=pytest.mark.slow)])
def test_dynamicvit_in_evaluation_has_the_tokens_scores_and_logits_of_the_reference(name):
    case, expected = CASES[name], golden.outputs(CASES[name])
    model, params = reference_model()
    plan = plan_of(case)
    logits, intermediates = jax.jit(model.apply, static_argnames='plan')(params, golden.make_images(case), plan=plan)

    assert [plan.counts[block] for block in plan.reductions] == expected['token_counts'].tolist()
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)
    entering = np.tile(np.arange(196), (case['batch'], 1))
    reductions = zip(*(intermediates[name] for name in ('patch_ids', 'kept', 'prediction')), strict=True)
    for stage, (ids, kept, prediction) in enumerate(reductions):
        ours, theirs = (np.zeros((case['batch'], 196)) for _ in range(2))
        np.put_along_axis(ours, np.asarray(ids), np.asarray(prediction[..., 0]), axis=1)
        np.put_along_axis(theirs, entering, expected[f'score_s{stage}'], axis=1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        entering = expected[f'kept_s{stage}'].astype(int)
        assert [set(row) for row in np.asarray(kept)] == [set(row) for row in entering]


@functools.cache
def training_outputs():
    """Computes loss, its parts, and the gradient by the reference's names, for the training case without noise."""
    model, params = reference_model()
    images, plan = golden.make_images(TRAINING), plan_of(TRAINING).in_training()
    targets = jax.nn.one_hot(jnp.asarray(TRAINING['labels']), 1000)

    def loss_of(params):
        logits, intermediates = model.apply(params, images, plan, patch_tokens=True)
        cross_entropy = losses.cross_entropy(logits, targets)
        keep_ratio = losses.keep_ratio(intermediates['mask'], TARGETS)
        return cross_entropy + 2 * keep_ratio, (logits, intermediates, cross_entropy, keep_ratio)

    (loss, parts), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    return loss, parts, to_torch(gradient, model.config, model.modules)


def test_dynamicvit_in_training_has_the_decisions_and_losses_of_the_reference():
    expected = golden.outputs(TRAINING)
    loss, (logits, intermediates, cross_entropy, keep_ratio), _ = training_outputs()
    stages = zip(intermediates['mask'], intermediates['prediction'], strict=True)
    for stage, (decision, prediction) in enumerate(stages):
        np.testing.assert_array_equal(decision, expected[f'decision_s{stage}'])
        np.testing.assert_allclose(jnp.exp(prediction[..., 0]), expected[f'keep_prob_s{stage}'], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(intermediates['mask'][-1], expected['final_decision'])
    np.testing.assert_allclose(intermediates['norm'][:, 1:, :8], expected['features_first8'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(cross_entropy, expected['loss_ce'], rtol=1e-5)
    np.testing.assert_allclose(3 * keep_ratio, expected['loss_ratio_sum'], rtol=1e-5)
    np.testing.assert_allclose(loss, TRAINING['loss'], rtol=1e-5)


def test_dynamicvit_in_training_has_the_gradients_of_the_reference():
    expected, (_, _, gradient) = golden.outputs(TRAINING), training_outputs()
    assert gradient.keys() == TRAINING['grad_norms'].keys()
    for key, norm in TRAINING['grad_norms'].items():
        np.testing.assert_allclose(np.linalg.norm(gradient[key]), norm, rtol=1e-3, err_msg=key)
        np.testing.assert_allclose(gradient[key].ravel()[:8], expected[f'grad8/{key}'], rtol=5e-3, atol=2e-4 * norm,
                                   err_msg=key)


def test_to_torch_after_from_torch_returns_the_same_weights():
    model, params = reference_model()
    weights = to_torch(params, model.config, model.modules)
    num_params = golden.manifest('dynamicvit.json')['models']['dynamicvit_small_224']['num_params']
    assert sum(value.size for value in weights.values()) == num_params == 22_774_414
    assert model.config.parameters(plan_of(CASES[EVALUATION[0]])) == 22_774_414
    for key, value in make_weights().items():
        np.testing.assert_array_equal(weights.pop(key), value, err_msg=key)
    assert not weights
