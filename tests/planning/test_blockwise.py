"""The block-by-block model against the whole model."""

import dataclasses

import numpy as np
import pytest

import evit_jax
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.planning import blockwise as blockwise_module
from evit_jax.planning.blockwise import BlockwiseModel
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.registry import get_reducer
from tests.helpers import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, depth=4)


def whole(model, images, plan):
    """Returns features and logits of the whole model."""
    output = model.with_reducer(plan.reducer).with_plan(plan=plan).forward(images)
    return output.features, output.logits


def assert_equal_outputs(model, blockwise, images, plan):
    outputs = blockwise.outputs(plan)
    for got, expected in zip(outputs, whole(model, images, plan), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def plan_of(name, config=CONFIG, drop=()):
    reducer = get_reducer(name)
    return make_plan(config.patches(config.image_size), config.depth, tokens=(12, 9, 5), drop=drop, reduce_at=(0, 1, 3),
                     reducer=reducer)


@pytest.mark.parametrize('name', ['evit', 'ward', 'pitome', 'random', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('tome', 'prune_merge:mean', 'heuristic'))])
def test_blockwise_model_equals_the_whole_model(name):
    model, images = evit_jax.create_model(CONFIG, class_names=tiny.NAMES), tiny.images(3)
    blockwise = BlockwiseModel(model.loaded, images)
    assert_equal_outputs(model, blockwise, images, make_plan(16, 4, reduce_at=()))
    assert_equal_outputs(model, blockwise, images, plan_of(name))


def test_blockwise_model_that_continues_from_the_base_plan_equals_the_whole_model():
    model, images = evit_jax.create_model(CONFIG, class_names=tiny.NAMES), tiny.images(3)
    blockwise = BlockwiseModel(model.loaded, images)
    blockwise.set_base(plan_of('prune_merge', drop=(1, 0, 2)))
    for drop in ((1, 0, 2), (1, 0, 1), (0, 0, 2), ()):
        assert_equal_outputs(model, blockwise, images, plan_of('prune_merge', drop=drop))
    assert_equal_outputs(model, blockwise, images, merge_plan(16, 4, r=2))


def test_blockwise_model_frees_programs_beyond_the_limit(monkeypatch):
    blockwise_module._make_programs.cache_clear()  # other tests compiled programs for this model
    monkeypatch.setattr(blockwise_module, '_MOST_PROGRAMS', 2)
    model, images = evit_jax.create_model(CONFIG, class_names=tiny.NAMES), tiny.images(3)
    blockwise = BlockwiseModel(model.loaded, images)
    for name in ('ward', 'tome'):
        assert_equal_outputs(model, blockwise, images, plan_of(name))
        assert blockwise._programs._block._cache_size() <= 2


@pytest.mark.parametrize('changes', [
    {'class_token': False, 'pooling': 'map'}, {'registers': 2}, {'rope': 'dinov3', 'absolute_positions': False},
    *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
        {'class_token': False, 'pooling': 'avg'}, {'classes': 0}, {'image_size': (16, 24)}))], ids=str)
def test_blockwise_model_of_each_architecture_equals_the_whole_model(changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = evit_jax.create_model(config, class_names=tiny.NAMES if config.classes else ())
    height, width = (16, 24) if changes.get('image_size') else (16, 16)
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    assert_equal_outputs(model, BlockwiseModel(model.loaded, images), images, plan_of('ward', config))


def test_blockwise_model_of_an_lvvit_equals_the_whole_model():
    config = LVViTConfig(image_size=16, patch_size=4, width=8, depth=4, heads=2, classes=3, stem_width=4)
    model, images = evit_jax.create_model(config, class_names=tiny.NAMES), tiny.images(2)
    assert_equal_outputs(model, BlockwiseModel(model.loaded, images), images, plan_of('ward', config))


def test_blockwise_model_for_other_images_and_more_than_one_chunk_equals_the_whole_model():
    model, images = evit_jax.create_model(CONFIG, class_names=tiny.NAMES), tiny.images(40)
    blockwise = BlockwiseModel(model.loaded, images[:1])
    assert_equal_outputs(model, blockwise.for_images(images), images, plan_of('tome'))
    assert_equal_outputs(model, blockwise, images[:1], plan_of('tome'))
