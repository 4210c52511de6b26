"""The parts of a model, run as separate programs, give the output of the model."""

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.planning import cost_measurement, model_parts
from evit_jax.reduction.plan import make_plan
from tests.helpers import layouts
from tests.helpers.weights import random_params

# The heads of the second model read all tokens.
CONFIGS = [layouts.SHAPE, LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=5, stem_width=4)]


@pytest.mark.parametrize('config', CONFIGS, ids=['vit', 'lvvit'])
def test_final_part_gives_the_output_of_the_model(config):
    model, plan = models.create(config), make_plan(16, 2, tokens=(6,), reduce_at=(0,))
    params = random_params(model)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    @jax.jit
    def applied(params, images):
        logits, intermediates = model.apply(params, images, plan)
        return logits, {name: intermediates[name] for name in ('block00', 'block01', 'kept')}

    logits, intermediates = applied(params, images)
    if config is layouts.SHAPE:
        x = model_parts.last_block(config, 8, 2, 'float32').run(params['blocks'][1], intermediates['block00'])
        assert x.shape == (2, 1, 64)
        np.testing.assert_allclose(x, intermediates['block01'][:, :1], atol=1e-5)
    else:
        part = model_parts.heads(config, 8, 2, 'float32')
        logits_of_part = part.run(params | {'blocks': {}}, intermediates['block01'], intermediates['kept'][-1])
        np.testing.assert_allclose(logits_of_part, logits, atol=1e-5)


@pytest.mark.parametrize('config', CONFIGS, ids=['vit', 'lvvit'])
def test_final_part_repeated_continues_from_its_output(config):
    _, final_part = cost_measurement._final_part(config)
    once, twice = (final_part(config, 5, 2, 'float32', repeats) for repeats in (1, 2))
    arguments = once.random_arguments(0)
    first, second = jax.jit(once.run)(*arguments), jax.jit(twice.run)(*arguments)
    assert first.shape == second.shape and np.abs(first - second).max() > 1e-6


def test_whole_model_takes_rectangles():
    part = model_parts.whole_model(layouts.SHAPE, (16, 24), 2, 'float32')
    assert part.arguments[1].shape == (2, 16, 24, 3) and jax.eval_shape(part.run, *part.arguments).shape[0] == 2


def test_branches_repeat_and_reduction_keeps_half():
    config = layouts.SHAPE
    for name in model_parts.BRANCHES:
        once, twice = (model_parts.branch(config, name, 5, 2, 'float32', repeats) for repeats in (1, 2))
        params, x = once.random_arguments(0)
        np.testing.assert_allclose(jax.jit(twice.run)(params, x), once.run(params, once.run(params, x)), atol=1e-5)
    part = model_parts.reduction(config, 9, 2, 'float32', 'evit', fuse=True)
    _, x, score, qkv = part.random_arguments(0)
    assert part.run({}, x, score, qkv).shape == (2, 1 + 4 + 1, 64)
    np.testing.assert_array_equal(part.run({}, x, score, qkv)[0, 1], x[0, 1 + score[0, 1:].argmax()])


@pytest.mark.parametrize('name', ['ward', 'prune_merge:mean', 'tome', 'random', 'heuristic', 'pitome'])
def test_reduction_of_each_reducer_runs_repeatedly(name):
    part = model_parts.reduction(layouts.SHAPE, 9, 2, 'float32', name, fuse=True, repeats=2)
    assert np.isfinite(jax.jit(part.run)(*part.random_arguments(0))).all()
