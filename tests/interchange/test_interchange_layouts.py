"""Weights in every layout become the same model, which is told from their shapes."""

import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax import models
from evit_jax.interchange import detect, files, layouts, vit
from evit_jax.interchange.pickles import Inert
from evit_jax.interchange.stored import Stored
from evit_jax.models import create, get_config
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import make_plan

FILES = pathlib.Path(__file__).parents[1] / 'golden_files'
LOGITS = json.loads((FILES / 'manifest.json').read_text())['logits']
TOY = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, classes=5)
DISTILLED = {'evit.pth', 'hugging_face_deit.safetensors', 'hugging_face_5.pth'}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_toy', TOY)


def stored(*shape, value=0.0):
    return Stored(shape, np.dtype(np.float32), lambda: np.full(shape, value, np.float32))


def of_model(name):
    """The weights of a named model in timm's layout, without values."""
    tree = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), vit.template(get_config(name)))
    return {key: stored(*value.shape) for key, value in vit.to_torch(tree, get_config(name)).items()}


@pytest.mark.parametrize('name', LOGITS)
def test_models_of_other_programs_give_the_logits_that_they_gave_there(name):
    with files.opened(FILES / name) as (tree, _):
        found = layouts.find(tree, ema=False)
        model, config = detect.detect(found.arrays, classes=1)
        params = vit.from_torch(found.arrays, config)
    assert (model, config.image_size, config.classes, config.distilled) == ('vit_toy', 8, 5, name in DISTILLED)
    assert found.layout == ('Hugging Face' if 'hugging' in name else 'timm')
    images = (np.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8) * 0.37 % 1).transpose(0, 2, 3, 1)
    plan = make_plan(4, 2, rate=1.0, reduce_at=(0,), fuse=False)
    np.testing.assert_allclose(create(config).apply(params, jnp.asarray(images, jnp.float32), plan)[0], LOGITS[name],
                               rtol=0, atol=1e-5)


def test_the_average_is_taken_only_where_it_is_asked_for():
    with files.opened(FILES / 'evit.pth') as (tree, _):
        weights, average = (layouts.find(tree, ema=ema) for ema in (False, True))
        assert weights.arrays.keys() == average.arrays.keys()
        np.testing.assert_array_equal(np.asarray(weights.arrays['head.bias']) / 2, average.arrays['head.bias'])
        assert weights.settings['drop_loc'] == '(0, 1)'


@pytest.mark.parametrize('tree, ema, want', [
    ({'a': 1.0}, False, 1), ({'model': {'a': 1.0}, 'rng': 2.0}, False, 1), ({'state_dict': {'a': 1.0}}, False, 1),
    ({'model': {'state_dict': {'a': 1.0}, 'state_dict_ema': {'a': 2.0}}}, False, 1),
    ({'model': {'state_dict': {'a': 1.0}, 'state_dict_ema': {'a': 2.0}}}, True, 2),
    ({'model_ema': {'a': 2.0}, 'epoch': 1}, False, 2),
    ({'model_ema': {'state_dict': {'a': 2.0}}, 'model': {'a': 1.0}}, True, 2),
    ({'state_dict': {'module.model.a': 1.0, 'module.model.b': 1.0}}, False, 1),
    ({'module._orig_mod.a': 1.0}, False, 1)])
def test_weights_are_found_in_whatever_they_are_wrapped(tree, ema, want):
    def with_arrays(node):
        return {key: with_arrays(value) if isinstance(value, dict) else
                stored(value=value) if isinstance(value, float) else value for key, value in node.items()}

    assert float(np.asarray(layouts.find(with_arrays(tree), ema=ema).arrays['a'])) == want


def test_a_prefix_that_not_all_have_is_part_of_the_names():
    assert set(layouts.find({'module.a': stored(), 'b': stored()}, ema=False).arrays) == {'module.a', 'b'}


def test_what_is_left_out_is_said(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        layouts.find({'state_dict': {'a': stored(), 'version': 3}, 'epoch': 1}, ema=False)
    assert 'took state_dict; there are: state_dict, epoch' in caplog.text
    assert 'left out what is no array: version' in caplog.text


@pytest.mark.parametrize('tree, ema, said', [
    ({}, False, 'no weights by name, but nothing'), ({'epoch': 1, 'best': 2}, False, 'but epoch, best'),
    ([1], False, 'but one list'), (Inert('argparse.Namespace', ()), False, 'but one Inert'),
    ({'model': {'a': stored()}}, True, 'no moving average'), ({'a': stored()}, True, 'no moving average'),
    ({'vit.embeddings.cls_token': stored(), 'deit.embeddings.cls_token': stored()}, False,
     'two arrays would be cls_token')])
def test_what_holds_no_weights_says_what_it_holds(tree, ema, said):
    with pytest.raises(ValueError, match=said):
        layouts.find(tree, ema=ema)


def test_weights_nested_in_themselves_are_an_error():
    tree = {}
    tree['model'] = tree
    with pytest.raises(ValueError, match='more than 8 deep'):
        layouts.find(tree, ema=False)


def test_an_incomplete_attention_keeps_its_names_so_that_they_are_listed():
    arrays = {'vit.embeddings.cls_token': stored(1, 1, 8), 'vit.layers.0.attention.q_proj.bias': stored(8),
              'vit.pooler.dense.weight': stored(8, 8)}
    assert set(layouts.find(arrays, ema=False).arrays) == {'cls_token', 'blocks.0.attn.q.bias',
                                                           'vit.pooler.dense.weight'}


@pytest.mark.parametrize('key, layout', [('aux_head.weight', 'LV-ViT'), ('patch_embed.conv1.weight', 'LV-ViT'),
                                         ('score_predictor.0.in_conv.0.weight', 'DynamicViT'), ('norm.bias', 'timm')])
def test_models_of_other_kinds_are_told_by_their_keys(key, layout):
    assert layouts.find({'model': {'cls_token': stored(), key: stored()}}, ema=False).layout == layout


@pytest.mark.parametrize('name', [*models.CONFIGS, 'vit_toy'])
def test_every_model_is_told_from_its_own_shapes(name):
    assert detect.detect(of_model(name), classes=7) == (name, get_config(name))


def test_classes_without_a_head_are_as_many_as_said():
    arrays = {key: value for key, value in of_model('deit_t').items() if not key.startswith('head')}
    assert detect.detect(arrays, classes=7)[1].classes == 7


@pytest.mark.parametrize('change, said', [
    ({'pos_embed': (1, 198, 192)}, '198 positions, which are not those of 1 token and a square'),
    ({'pos_embed': (1, 198, 192), 'dist_token': (1, 1, 192), 'head.weight': (0, 192)}, r'head.weight has shape \(0'),
    ({'pos_embed': (1, 1, 192)}, '1 positions'), ({'pos_embed': (192,)}, 'pos_embed has shape'),
    ({'pos_embed': (1, 197, 200)}, r'200 wide with 12 blocks.*none of these: deit_t 192 wide, 12 blocks'),
    ({'blocks.12.norm1.bias': (192,)}, '13 blocks'), ({'patch_embed.proj.weight': (192, 3, 32, 32)}, 'patches of 32'),
    ({'cls_token': None}, r'no cls_token among 15\d arrays')])
def test_shapes_of_no_model_here_are_named(change, said):
    arrays = of_model('deit_t') | {key: shape and stored(*shape) for key, shape in change.items()}
    with pytest.raises(ValueError, match=said):
        detect.detect({key: value for key, value in arrays.items() if value}, classes=7)
