"""MACs and parameters of models, against the papers, the compiler and the initialised parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from evit_jax.models import CONFIGS, create, get_config
from evit_jax.models.config import ViTConfig
from evit_jax.models.costs import block_macs
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.reducers import DYNAMICVIT

RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
MACS = {'deit_t': (1.25, 1.09, 0.94, 0.82, 0.72, 0.63), 'deit_s': (4.60, 4.02, 3.48, 3.03, 2.64, 2.31),
        'deit_b': (17.56, 15.40, 13.33, 11.61, 10.09, 8.82)}


@pytest.mark.parametrize('name', MACS)
@pytest.mark.parametrize('column', range(len(RATES)), ids=map(str, RATES))
def test_macs_with_a_rate_are_those_of_the_paper(name, column):
    plan = make_plan(196, 12, rate=RATES[column])
    assert round(get_config(name).macs(plan) / 1e9, 2) == MACS[name][column]


@pytest.mark.parametrize('rate, saved', [(1.0, 0.063), (0.7, 0.032), (0.5, 0.016)])
def test_executed_macs_without_patch_heads_omit_part_of_the_last_block(rate, saved):
    config, plan = get_config('deit_s'), make_plan(196, 12, rate=rate)
    assert 1 - config.executed_macs(plan) / config.macs(plan) == pytest.approx(saved, abs=5e-4)
    lvvit = get_config('lvvit_t')
    assert lvvit.executed_macs(plan) == lvvit.macs(plan)


def test_executed_macs_with_a_reduction_before_the_last_block_count_the_kept_tokens_in_it():
    config = get_config('deit_s')
    plan = TokenPlan(196, (None,) * 11 + (100,), False, DYNAMICVIT)
    whole, short = block_macs(101, 101, 384, 8 * 384**2), block_macs(101, 1, 384, 8 * 384**2, num_queries=1)
    assert config.macs(plan) - config.executed_macs(plan) == whole - short
    assert short == (3 * 101 + 1 + 8) * 384**2 + 2 * 101 * 384


@pytest.mark.parametrize('keep', [(None, None), (30, None), (30, 20)])
def test_executed_macs_equal_the_flops_of_the_compiler(keep):
    config = ViTConfig(image_size=64, patch_size=8, width=128, depth=2, heads=2)
    model, plan = create(config), TokenPlan(64, keep, False)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    program = jax.jit(lambda params, images: model.apply(params, images, plan)[0]).lower(
        jax.eval_shape(model.init, jax.random.key(0)), images).compile()
    # Only the compiler counts norms, softmax and GELU.
    assert program.cost_analysis()['flops'] / 2 / 2 == pytest.approx(config.executed_macs(plan), rel=0.08)
    assert config.macs(plan) > 1.15 * config.executed_macs(plan)


@pytest.mark.parametrize('rate, size, macs', [(0.7, 272, 4.56), (0.6, 288, 4.50), (0.5, 304, 4.44)])
def test_macs_at_a_higher_resolution_are_those_of_the_paper(rate, size, macs):
    config = get_config('deit_s')
    assert round(config.macs(make_plan(config.patches(size), config.depth, rate=rate)) / 1e9, 2) == macs


@pytest.mark.parametrize('distilled', [False, True], ids=['plain', 'distilled'])
@pytest.mark.parametrize('name', [name for name, config in CONFIGS.items() if type(config) is ViTConfig])
def test_parameters_equal_the_size_of_the_initialised_tree(name, distilled):
    config = dataclasses.replace(CONFIGS[name], distilled=distilled)
    params = jax.eval_shape(create(config).init, jax.random.key(0))
    assert config.parameters() == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
