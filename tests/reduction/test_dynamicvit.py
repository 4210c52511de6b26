"""DynamicViT: decisions of its predictors, as a mask in training and as a gather in evaluation; its losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evit_jax.models import create, get_config
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.inputs import ModelInputs, ReducerInputs
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.reducer import Modules
from evit_jax.reduction.reducers import DYNAMICVIT, EVIT
from evit_jax.reduction.reducers.dynamicvit import MASKED, ScorePredictor
from evit_jax.reduction.tokens import Tokens
from evit_jax.training import losses

SMALL = {'image_size': 16, 'patch_size': 4, 'width': 8, 'depth': 3, 'heads': 2, 'classes': 5}


@functools.cache
def small_model(modules=2, **changes):
    """Returns a jitted model and parameters."""
    model, rng = create(ViTConfig(**SMALL, **changes), modules=Modules(DYNAMICVIT, modules)), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.5).astype(leaf.dtype),
                          jax.eval_shape(model.init, jax.random.key(0)))
    # With these weights each predictor keeps some tokens and drops others.
    for predictor, bias in zip(params.get('reducer', {}).values(), (13, -13)):
        predictor['out_conv'][4] = {'kernel': np.asarray([[20, -20], [-20, 20]], np.float32),
                                    'bias': np.asarray([-bias, bias], np.float32)}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == model.config.parameters(
        plan_of(9, 4) if modules else None)
    return jax.jit(model.apply, static_argnums=2, static_argnames='patch_tokens'), params


def make_images(batch=6):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 16, 16, 3)), jnp.float32)


def plan_of(*tokens, at=(1, 2)):
    return make_plan(16, 3, tokens=tokens, reduce_at=at, reducer=DYNAMICVIT)


def decide(prediction, key=None, **fields):
    """Returns the tokens that the masked reducer makes of log-probabilities [B, N, 2]."""
    batch, n, _ = prediction.shape
    ids = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
    keys = jax.random.split(jax.random.key(0) if key is None else key, batch)
    tokens = Tokens(jnp.zeros((batch, n, 1)), ids, ids, train=key is not None, **fields)
    plan = TokenPlan(n, (n,), fused=False, reducer=MASKED)
    inputs = ReducerInputs(tokens, None, plan, 0, keys, ModelInputs(modules=[lambda x, mask: prediction]))
    return MASKED.reduce(tokens, inputs, n)


@pytest.mark.parametrize('distilled', [False, True], ids=['plain', 'distilled'])
def test_dynamicvit_in_evaluation_keeps_the_tokens_of_highest_score(distilled):
    apply, params = small_model(distilled=distilled)
    plan, prefix = plan_of(9, 4), 1 + distilled
    _, intermediates = apply(params, make_images(), plan, patch_tokens=True)
    assert plan.attending == plan.counts == (16, 9, 4)
    stages = zip(intermediates['prediction'], intermediates['patch_ids'], intermediates['kept'])
    for stage, (prediction, entering, kept) in enumerate(stages):
        rank = np.argsort(-np.asarray(prediction[..., 0]), axis=1)[:, :kept.shape[1]]
        np.testing.assert_array_equal(kept, np.take_along_axis(np.asarray(entering), rank, axis=1))
        assert intermediates[f'block{stage + 1:02d}'].shape == (6, prefix + plan.counts[stage + 1], 8)
        np.testing.assert_allclose(jnp.exp(prediction).sum(-1), 1, rtol=1e-5)
    assert intermediates['class_attention'] == intermediates['mask'] == intermediates['fused_weights'] == ()


def test_dynamicvit_with_a_mask_gives_the_logits_of_dropping():
    apply, params = small_model()
    images = make_images(32)
    masks = apply(params, images, plan_of(9, 4).in_training())[1]['mask']
    counts = np.asarray([mask.sum(1) for mask in masks]).astype(int)
    reduced_twice = [image for image, (first, second) in enumerate(counts.T) if 16 > first > second > 0]
    assert len(reduced_twice) > 2
    for image in reduced_twice[:2]:
        alone = images[image:image + 1]
        masked, intermediates = apply(params, alone, plan_of(9, 4).in_training())
        dropped, evaluation = apply(params, alone, plan_of(*counts[:, image].tolist()))
        np.testing.assert_allclose(masked, dropped, rtol=0, atol=1e-4)
        stages = zip(intermediates['mask'], intermediates['token_of_patch'], evaluation['kept'])
        for decision, token_of_patch, kept in stages:
            np.testing.assert_array_equal(np.flatnonzero(decision[0]), np.sort(kept[0]))
            np.testing.assert_array_equal(np.asarray(token_of_patch[0]) >= 0, np.asarray(decision[0]) > 0)


def test_mask_of_a_later_reduction_is_a_subset_of_the_one_before():
    apply, params = small_model()
    for seed in range(3):
        first, second = apply(params, make_images(), plan_of(9, 4).in_training(), jax.random.key(seed))[1]['mask']
        assert {*np.unique(first), *np.unique(second)} == {0, 1}
        assert (np.asarray(second) <= np.asarray(first)).all() and (np.asarray(second) < np.asarray(first)).any()


def test_mask_with_a_key_has_noise_and_without_a_key_has_none():
    apply, params = small_model()
    plan, images = plan_of(9, 4).in_training(), make_images()
    first, again, other = (np.asarray(apply(params, images, plan, jax.random.key(seed))[1]['mask'][0])
                           for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    _, intermediates = apply(params, images, plan)
    np.testing.assert_array_equal(intermediates['mask'][0], intermediates['prediction'][0][..., 0] >= np.log(0.5))


@pytest.mark.parametrize('probability', [0.1, 0.5, 0.8])
def test_mask_with_noise_keeps_tokens_with_the_predicted_probability(probability):
    prediction = jnp.broadcast_to(jnp.log(jnp.asarray([probability, 1 - probability])), (4, 5000, 2))
    mask = np.asarray(decide(prediction, jax.random.key(3)).mask)
    assert mask.mean() == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 20_000)**0.5)
    assert (mask[0] != mask[1]).any()  # each image has its own noise


def test_mask_has_the_gradient_of_the_probability():
    prediction = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 2)), jnp.float32))
    cotangent, before = np.random.default_rng(1).normal(size=(2, 5)), jnp.asarray([[1, 0, 1, 1, 0]] * 2, jnp.float32)
    result = jax.grad(lambda p: (decide(p, mask=before).mask * cotangent).sum())(prediction)
    expected = jax.grad(lambda p: (jax.nn.softmax(p)[..., 0] * before * cotangent).sum())(prediction)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert np.count_nonzero(result) == 2 * 3 * 2


def test_score_predictor_with_a_mask_ignores_masked_tokens():
    predict = nnx.jit(ScorePredictor(8, init_std=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
    mask = jnp.asarray([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]], jnp.float32)
    np.testing.assert_allclose(predict(x, mask)[0, [0, 2, 3, 5]], predict(x[:1, [0, 2, 3, 5]])[0], rtol=1e-5)
    assert np.isfinite(predict(x, mask)).all()


@pytest.mark.parametrize('rate, counts', [(0.7, (137, 96, 67)), (0.5, (98, 49, 24)), (0.01, (1, 1, 1))])
def test_plan_with_a_rate_has_the_counts_of_the_paper(rate, counts):
    plan = make_plan(196, 12, rate=rate, fuse=True, reducer=DYNAMICVIT)
    assert tuple(plan.counts[block] for block in plan.reductions) == counts and not plan.fused
    assert plan.kept_fractions == tuple(count / 196 for count in counts)


@pytest.mark.parametrize('rate, macs', [(0.7, 2.98), (0.5, 2.23)])  # the paper: 2.9 and 2.2
def test_macs_include_the_predictors_and_in_training_all_tokens(rate, macs):
    config, plan = get_config('deit_s'), make_plan(196, 12, rate=rate, reducer=DYNAMICVIT)
    assert config.macs(plan) / 1e9 == pytest.approx(macs, abs=0.01)
    training, dense = plan.in_training(), make_plan(196, 12)
    assert config.macs(training) - config.macs(dense) == 3 * DYNAMICVIT.module_macs(196, 384, 137)
    assert training.counts == training.attending == dense.counts and training.kept_fractions == plan.kept_fractions
    assert str(training).startswith(f'196 tokens, {plan.counts[3]} > {plan.counts[6]} > ')


def test_in_training_returns_the_same_plan_for_other_reducers_and_when_repeated():
    plan = make_plan(16, 3, rate=0.5, reduce_at=(1,), reducer=EVIT)
    assert plan.in_training() == plan
    assert plan_of(9, 4).in_training().in_training() == plan_of(9, 4).in_training() != plan_of(9, 4)


def test_plan_with_a_reduction_that_drops_nothing_still_numbers_its_module():
    assert make_plan(16, 3, rate=(1.0, 0.5), reduce_at=(1, 2), reducer=DYNAMICVIT).keep == (None, 16, 8)
    assert make_plan(16, 3, tokens=(7, 9), reduce_at=(0, 2), reducer=DYNAMICVIT).keep == (7, None, 7)
    assert make_plan(16, 3, rate=1.0, reduce_at=(1, 2), reducer=DYNAMICVIT).keep == (None,) * 3


@pytest.mark.parametrize('modules, message', [
    (0, r'reducer dynamicvit needs a learned module for each of the blocks \(1, 2\), and this model has 0 learned '
        r'modules: train one with config\.reducer\.name=dynamicvit'),
    (1, 'this model has 1 learned module:.*or fewer reductions')])
def test_model_with_too_few_modules_for_the_plan_raises(modules, message):
    model = create(ViTConfig(**SMALL), modules=Modules(DYNAMICVIT, modules))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(model.apply, plan=plan_of(9, 4)), jax.eval_shape(
            model.init, jax.random.key(0)), make_images())


def test_model_with_unused_modules_gives_the_logits_of_one_without():
    apply, params = small_model()
    plan = make_plan(16, 3, rate=0.5, reduce_at=(1,))
    without = {name: leaf for name, leaf in params.items() if name != 'reducer'}
    np.testing.assert_array_equal(apply(params, make_images(), plan)[0],
                                  small_model(modules=0)[0](without, make_images(), plan)[0])


def test_losses_equal_loops_over_images_and_tokens():
    rng = np.random.default_rng(0)
    decisions = [rng.integers(0, 2, (4, 6)).astype(np.float32) for _ in range(2)]
    keep_ratio = np.mean([(decision[image].mean() - target) ** 2 for decision, target in zip(decisions, (0.7, 0.4))
                          for image in range(4)])
    np.testing.assert_allclose(losses.keep_ratio(decisions, (0.7, 0.4)), keep_ratio, rtol=1e-5)
    assert losses.keep_ratio((), ()) == 0

    logits, teacher = rng.normal(size=(2, 4, 5)).astype(np.float32)
    p, q = (np.exp(row) / np.exp(row).sum(1, keepdims=True) for row in (teacher, logits))
    np.testing.assert_allclose(losses.divergence(logits, teacher), (p * np.log(p / q)).sum() / 4, rtol=1e-4)
    assert not np.any(jax.grad(losses.divergence, argnums=1)(logits, teacher))

    tokens, targets = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
    distances = [np.mean((tokens[image, n] - targets[image, n]) ** 2) for image in range(4) for n in range(6)
                  if decisions[0][image, n]]
    np.testing.assert_allclose(losses.token_distance(tokens, targets, decisions[0]), np.mean(distances), rtol=1e-5)
    assert losses.token_distance(tokens, targets, np.zeros((4, 6), np.float32)) == 0
    assert not np.any(jax.grad(losses.token_distance, argnums=2)(tokens, targets, decisions[0]))
