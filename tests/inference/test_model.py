"""VisionModel: logits and features of batches, plans and reducers, and saving."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evit_jax
from evit_jax.models import vit
from evit_jax.reduction.plan import make_plan
from evit_jax.training import step
from tests.helpers import tiny


@pytest.fixture(scope='module')
def model():
    return tiny.model(batch_size=8)


@pytest.fixture
def traced(monkeypatch):
    """The plans of the programs that are traced."""
    plans, call = [], vit.ViT.__call__

    def record(self, images, plan, **options):
        plans.append(plan)
        return call(self, images, plan, **options)

    monkeypatch.setattr(vit.ViT, '__call__', record)
    return plans


def untraced_model(norm_epsilon, **options):
    """Returns a model that no other test uses, so that none of its programs is traced."""
    return tiny.model(dataclasses.replace(tiny.CONFIG, norm_epsilon=norm_epsilon), **options)


def normalised(images, model):
    return np.asarray(step.normalise(images, model.loaded.mean, model.loaded.std))


def test_call_with_uint8_and_with_normalised_floats_gives_the_same_logits(model):
    images = tiny.images(3)
    logits = model(images)
    assert logits.shape == (3, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(model(normalised(images, model)), logits, atol=1e-5)
    np.testing.assert_allclose(model(jnp.asarray(images)), logits, atol=1e-5)


def test_call_compiles_once_for_each_plan_and_batch_shape(traced):
    model = untraced_model(2e-6)
    half = model.with_plan(keep_rate=0.5)
    for _ in range(3):
        model(tiny.images(8)), half(tiny.images(8)), model.with_plan(keep_rate=0.5)(tiny.images(8, seed=1))
    assert len(traced) == 1  # 0.5 is the model's own plan
    model(tiny.images(16))
    assert len(traced) == 2
    model.with_plan(keep_rate=0.25)(tiny.images(16))
    model.with_reducer('tome')(tiny.images(16))
    model.with_plan(keep_rate=0.25)(tiny.images(16))
    assert [plan.counts[-1] for plan in traced] == [9, 9, 5, 8]


def test_predict_compiles_once_for_each_plan_and_any_number_of_images(traced):
    model = untraced_model(3e-6, batch_size=4)
    for count in (1, 4, 6, 4):
        assert len(model.predict(tiny.images(count))) == count
    assert len(traced) == 1
    model.with_plan(keep_rate=1.0).predict(tiny.images(2))
    assert len(traced) == 2


@pytest.mark.parametrize('images, message', [
    (np.zeros((2, 32, 32, 3), np.uint8), r'32 x 32, the model takes 16 x 16: resize them, or use .*_size\(32\)'),
    (np.zeros((2, 16, 24, 3), np.uint8), '16 x 24'), (np.zeros((16, 16, 3), np.uint8), r'shape \[16, 16, 3\]'),
    (np.zeros((2, 16, 16, 3), int), 'images are int64: give uint8, or normalised floats'),
    (np.zeros((0, 16, 16, 3), np.uint8), 'no images')])
def test_call_with_wrong_images_is_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        model(images)


def test_forward_gives_features_that_the_head_maps_to_the_logits(model):
    images = tiny.images(2)
    output = model.forward(images)
    head = model.params['head']
    np.testing.assert_allclose(output.features @ head['kernel'] + head['bias'], output.logits, atol=1e-5)
    np.testing.assert_allclose(output.logits, model(images), atol=1e-5)
    assert output.features.shape == (2, 32) and output.patch_tokens.shape == (2, 9, 32)
    assert [array.shape for array in (output.kept[0], output.class_attention[0], output.token_of_patch[0])] == [
        (2, 9), (2, 16), (2, 16)]


def test_apply_is_differentiable_and_calls_trace_within_jit(model):
    images = normalised(tiny.images(2), model)
    gradient = jax.jit(jax.grad(lambda x: model.apply(model.params, x).logits[:, 0].sum()))(images)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    np.testing.assert_allclose(jax.jit(model)(images), model(images), atol=1e-5)


def test_unpool_gives_each_patch_the_token_that_holds_it(model):
    output = model.forward(tiny.images(2))
    dense = model.unpool(output.patch_tokens, output.token_of_patch)
    assert dense.shape == (2, 4, 4, 32)
    for row, kept in enumerate(np.asarray(output.kept[0])):
        patches = dense[row].reshape(16, 32)
        for index, patch in enumerate(kept[:-1]):
            np.testing.assert_array_equal(patches[patch], output.patch_tokens[row, index])
        dropped = np.setdiff1d(np.arange(16), kept)
        np.testing.assert_array_equal(patches[dropped], np.broadcast_to(output.patch_tokens[row, -1], (8, 32)))


def test_unpool_of_dropped_patches_is_nan(model):
    output = model.with_plan(plan=make_plan(16, 2, rate=0.5, reduce_at=(1,), fuse=False)).forward(tiny.images(1))
    dense = np.asarray(model.unpool(output.patch_tokens, output.token_of_patch[0])).reshape(16, 32)
    absent = np.isnan(dense).all(1)
    assert set(np.flatnonzero(~absent)) == set(np.asarray(output.kept[0])[0].tolist()) and absent.sum() == 8


def test_unpool_without_reductions_reshapes_the_tokens(model):
    output = model.with_plan(keep_rate=1.0).forward(tiny.images(1))
    dense = model.unpool(output.patch_tokens, output.token_of_patch)
    np.testing.assert_array_equal(dense.reshape(1, 16, 32), output.patch_tokens)


@pytest.mark.parametrize('budget, counts', [
    ({'keep_rate': 0.25}, (16, 5)), ({'keep_rates': [0.75]}, (16, 13)), ({'tokens': (3,)}, (16, 4)),
    ({'macs': 0.8}, None), ({'plan': make_plan(16, 2, rate=0.5, reduce_at=(0,), fuse=False)}, (8, 8))])
def test_with_plan_takes_one_budget_of_any_kind(model, budget, counts):
    other = model.with_plan(**budget)
    assert counts is None or other.plan.counts == counts
    assert other.macs < model.with_plan(keep_rate=1.0).macs and other.params is model.params
    if 'macs' in budget:
        assert other.macs / model.with_plan(keep_rate=1.0).macs == pytest.approx(0.8, abs=0.03)


def test_with_reducer_keeps_the_budget_and_takes_names_and_reducers(model):
    by_name = model.with_plan(keep_rate=0.75).with_reducer('tome')
    assert by_name.plan.reducer.merges and by_name.plan.counts == (16, 12)
    assert model.with_reducer(by_name.plan.reducer).plan.reducer == by_name.plan.reducer
    assert by_name.with_plan(r=2).plan.counts == (14, 12)
    assert model.with_reducer(None) is model
    with pytest.raises(ValueError, match='unknown reducer'):
        model.with_reducer('nearest')


def test_repr_names_size_plan_and_cost(model):
    assert all(part in repr(model) for part in ('custom', 'M parameters', '3 classes', '16 > 9 tokens', 'MACs', '%'))


def test_with_image_size_takes_larger_images(model):
    larger = model.with_image_size(32)
    assert larger(tiny.images(2, size=32)).shape == (2, 3) and larger.plan.patches == 64
    prediction, = larger.predict(tiny.images(1)[0])
    assert prediction.image.shape == (32, 32, 3) and prediction.kept[0].shape == (33,)
    with pytest.raises(ValueError, match='image size 30 is not divisible'):
        model.with_image_size(30)


def test_batch_size_less_than_one_is_refused():
    with pytest.raises(ValueError, match='batch_size=0 is less than 1'):
        tiny.model(batch_size=0)


def test_save_and_load_of_a_custom_model_give_the_same_logits(tmp_path):
    config = evit_jax.ViTConfig(image_size=24, patch_size=6, width=48, depth=3, heads=4, classes=3, mlp_ratio=2.0)
    model = evit_jax.create_model(config, keep_rate=0.6, class_names=tiny.NAMES).with_plan(tokens=(12, 9, 5))
    model.save(tmp_path / 'saved')
    again = evit_jax.load(tmp_path / 'saved')
    images = tiny.images(2, size=24)
    np.testing.assert_array_equal(again(images), model(images))
    assert (again.config, again.plan, again.class_names) == (config, model.plan, tiny.NAMES)
    assert again.loaded._replace(path='', params={}) == model.loaded._replace(params={})
    with pytest.raises(ValueError, match='holds a checkpoint already'):
        model.save(tmp_path / 'saved')


def test_lvvit_computes_without_batch_norm_and_keeps_its_parameters():
    config = evit_jax.LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=3, stem_width=4)
    model = evit_jax.create_model(config, reduce_at=(1,))
    assert 'bn1' in model.params['patch_embed'] and not model.config.batchnorm_folded
    lowered = model.compiled(2)._jitted['logits'].lower(
        model.loaded.fold_batchnorm().params, tiny.images(2), model.plan)
    assert lowered.as_text().count('stablehlo.rsqrt ') == 2 * config.depth + 1  # only layer norms
    images = tiny.images(2)
    np.testing.assert_allclose(model(images), jax.jit(model.apply)(model.params, images).logits, atol=1e-5)
