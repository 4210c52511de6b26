"""Parity with timm and transformers: tiny models of every family, read from files, have the recorded outputs."""

import functools

import jax
import numpy as np
import pytest

import evit_jax
from evit_jax.interchange.pretrained_files import timm_files
from tests.helpers import families

CASES = families.cases()
LAYOUTS = [(name, layout) for name, case in CASES.items() for layout in case['other_names']]
TIMM = [name for name in CASES if not name.startswith('hf_')]
SIZES = ('native', 'square', 'rectangle')  # the order of the recorded sizes
# Cases at another image size in the fast suite: each kind of positions, from both libraries.
RESIZED = ('vit_gap', 'flexivit', 'deit_distilled', 'dinov3', 'eva02_base', 'hf_dinov2_classifier', 'hf_clip')
# Cases that reduce tokens in the fast suite: a file of each library. tests/models/test_architectures.py has all kinds.
REDUCED = ('dinov3', 'hf_dinov2_classifier')
# Cases whose architecture differs from that of a case in the fast suite in sizes only.
REPEATED = ('vit_patch8_dino', 'vit_patch32', 'deit', 'dinov2')


@pytest.fixture(scope='module')
def load(tmp_path_factory):
    """Returns a function that loads the model of a case from its folder."""
    return functools.cache(lambda name: evit_jax.load(families.write(tmp_path_factory.mktemp(name), name)))


def sizes_of(name):
    """Returns the sizes of a case; the fast suite has the native one and, for RESIZED, the rectangle."""
    fast = {'native': name not in REPEATED, 'square': False, 'rectangle': name in RESIZED}
    return [pytest.param(name, size, id=f'{size}-{name}', marks=[pytest.mark.slow] * (not fast[size]))
            for size in SIZES]


@pytest.mark.parametrize(('name', 'size'), [case for name in CASES for case in sizes_of(name)])
def test_load_of_a_family_gives_the_recorded_outputs(load, name, size):
    size = families.sizes(name)[SIZES.index(size)]
    output = load(name).with_plan(keep_rate=1.0).with_image_size(size).forward(families.images(name, size))
    for key, expected in families.outputs(name, size).items():
        actual = np.asarray(getattr(output, key))[:len(expected)]
        assert actual.shape == expected.shape, key
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max(), key


@pytest.mark.parametrize('name', CASES)
def test_load_of_a_family_reads_each_value_once(load, name):
    model = load(name)
    assert model.config.parameters() == families.num_values(name) == sum(
        value.size for value in jax.tree.leaves(model.params))


@pytest.mark.parametrize('name', TIMM)
def test_load_of_a_timm_model_gives_its_config(load, name):
    config, expected = load(name).config, CASES[name]['config']
    if not expected['absolute_positions']:  # no array depends on the image size
        expected = expected | {'image_size': config.image_size}
    assert families.differences(config, expected) == {}


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name not in REDUCED))
                                  for name in CASES])
@pytest.mark.parametrize(('reducer', 'budget'), [('evit', {'keep_rate': 0.7}), ('tome', {'r': 3})])
def test_load_of_a_family_under_a_plan_reduces_its_tokens(load, name, reducer, budget):
    model = load(name).with_reducer(reducer).with_plan(**budget)
    output = model.forward(families.images(name, families.sizes(name)[0]))
    num_tokens = output.patch_tokens.shape[1]
    assert num_tokens == model.plan.counts[-1] < model.plan.patches
    assert all(np.isfinite(value).all() for value in (output.logits, output.features, output.patch_tokens))
    assert output.token_of_patch[-1].max() == num_tokens - 1


@pytest.mark.parametrize(('name', 'layout'), LAYOUTS)
def test_load_of_other_array_names_gives_the_same_model(load, tmp_path, name, layout):
    model, other = load(name), evit_jax.load(families.write(tmp_path / 'model', name, layout))
    assert other.config == model.config
    jax.tree.map(np.testing.assert_array_equal, other.params, model.params)


@pytest.mark.parametrize('name', TIMM)
def test_timm_files_of_a_loaded_timm_model_have_the_same_arrays(load, name):
    arrays, expected = timm_files(load(name).loaded).arrays, families.arrays(name)
    assert arrays.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(arrays[key], value, err_msg=key)
