"""Parity with the PyTorch DynamicViT: recorded outputs in tests/golden, weights and images rebuilt from names."""

import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange.vit import from_torch, to_torch
from evit_jax.models import create, get_config
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import Modules
from evit_jax.reduction.reducers import DYNAMICVIT
from evit_jax.training import losses
from tests.helpers import golden_rule

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
MANIFEST = json.loads((GOLDEN / 'dynamicvit.json').read_text())
CASES = {case['name']: case for case in MANIFEST['cases']}
ENTRY = MANIFEST['models']['dynamicvit_small_224']
EVALUATED = [name for name, case in CASES.items() if case['mode'] == 'eval']
TRAINED = 'dynamicvit_small_224_r70_train'
TARGETS = (0.7, 0.7**2, 0.7**3)


@functools.cache
def reference_model():
    model = create(get_config('deit_s'), modules=Modules(DYNAMICVIT, 3))
    return model, from_torch(golden_rule.make_weights(ENTRY['state_dict']), model.config)


def images_of(case):
    images = golden_rule.make_images(case['image_name'], case['batch'], case['image_size'])
    assert zlib.crc32(images.tobytes()) == case['images_crc32']
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def plan_of(case):
    return make_plan(196, 12, rate=case['base_rate'], reducer=DYNAMICVIT)


@pytest.mark.parametrize('name', EVALUATED)
def test_same_tokens_scores_and_logits_as_the_reference(name):
    case, want = CASES[name], np.load(GOLDEN / f'{name}.npz')
    model, params = reference_model()
    plan = plan_of(case)
    logits, seen = jax.jit(model.apply, static_argnames='plan')(params, images_of(case), plan=plan)

    assert [plan.counts[block] for block in plan.reductions] == want['token_counts'].tolist()
    np.testing.assert_allclose(logits, want['logits'], rtol=0, atol=1e-4)
    entering = np.tile(np.arange(196), (case['batch'], 1))
    stages = zip(seen['patch_ids'], seen['kept'], seen['prediction'], strict=True)
    for stage, (patch, kept, prediction) in enumerate(stages):
        ours, theirs = (np.zeros((case['batch'], 196)) for _ in range(2))
        np.put_along_axis(ours, np.asarray(patch), np.asarray(prediction[..., 0]), axis=1)
        np.put_along_axis(theirs, entering, want[f'score_s{stage}'], axis=1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        entering = want[f'kept_s{stage}'].astype(int)
        assert [set(row) for row in np.asarray(kept)] == [set(row) for row in entering]


@functools.cache
def trained():
    """Of the noise-free training case: loss, what it is made of, and the gradient by the reference's names."""
    case = CASES[TRAINED]
    model, params = reference_model()
    images, plan = images_of(case), plan_of(case).in_training()
    targets = jax.nn.one_hot(jnp.asarray(case['labels']), 1000)

    def loss_of(params):
        logits, seen = model.apply(params, images, plan, patch_tokens=True)
        found, share = losses.cross_entropy(logits, targets), losses.keep_ratio(seen['mask'], TARGETS)
        return found + 2 * share, (logits, seen, found, share)

    (loss, parts), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    return loss, parts, to_torch(gradient, model.config, model.modules)


def test_training_decides_and_loses_as_the_reference():
    want = np.load(GOLDEN / f'{TRAINED}.npz')
    loss, (logits, seen, cross_entropy, share), _ = trained()
    for stage, (decision, prediction) in enumerate(zip(seen['mask'], seen['prediction'], strict=True)):
        np.testing.assert_array_equal(decision, want[f'decision_s{stage}'])
        np.testing.assert_allclose(jnp.exp(prediction[..., 0]), want[f'keep_prob_s{stage}'], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(seen['mask'][-1], want['final_decision'])
    np.testing.assert_allclose(seen['norm'][:, 1:, :8], want['features_first8'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, want['logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(cross_entropy, want['loss_ce'], rtol=1e-5)
    np.testing.assert_allclose(3 * share, want['loss_ratio_sum'], rtol=1e-5)
    np.testing.assert_allclose(loss, CASES[TRAINED]['loss'], rtol=1e-5)


def test_training_has_the_gradients_of_the_reference():
    case, want, (_, _, gradient) = CASES[TRAINED], np.load(GOLDEN / f'{TRAINED}.npz'), trained()
    assert gradient.keys() == case['grad_norms'].keys()
    for key, norm in case['grad_norms'].items():
        np.testing.assert_allclose(np.linalg.norm(gradient[key]), norm, rtol=1e-3, err_msg=key)
        np.testing.assert_allclose(gradient[key].ravel()[:8], want[f'grad8/{key}'], rtol=5e-3, atol=2e-4 * norm,
                                   err_msg=key)


def test_conversion_round_trip_is_exact():
    model, params = reference_model()
    back = to_torch(params, model.config, model.modules)
    assert sum(value.size for value in back.values()) == ENTRY['num_params'] == 22_774_414
    assert model.config.parameters(plan_of(CASES[EVALUATED[0]])) == 22_774_414
    for key, value in golden_rule.make_weights(ENTRY['state_dict']).items():
        np.testing.assert_array_equal(back.pop(key), value, err_msg=key)
    assert not back
