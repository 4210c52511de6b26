"""Weights in the layout of every supported program are found, renamed, and give the logits of that program."""

import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax import models
from evit_jax.interchange import architecture, torch_weights, weight_files
from evit_jax.interchange.checkpoint_layouts import find_weights
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.restricted_pickle import InertObject
from evit_jax.models import create
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import make_plan

FILES = pathlib.Path(__file__).parents[1] / 'golden_files'
LOGITS = json.loads((FILES / 'manifest.json').read_text())['logits']
TOY = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, classes=5)
DISTILLED = {'evit.pth', 'hugging_face_deit.safetensors', 'hugging_face_5.pth'}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_toy', TOY)


def lazy(*shape, value=0.0):
    return LazyArray(shape, np.dtype(np.float32), lambda: np.full(shape, value, np.float32))


@pytest.mark.parametrize('name', LOGITS)
def test_find_weights_golden_file_gives_the_logits_of_its_program(name):
    with weight_files.opened(FILES / name) as (tree, _):
        weights = find_weights(tree, ema=False)
        model, config = architecture.detect(weights.arrays, default_classes=1)
        params = torch_weights.from_torch(weights.arrays, config)
    assert (model, config.image_size, config.classes, config.distilled) == ('vit_toy', 8, 5, name in DISTILLED)
    assert weights.layout == ('Hugging Face' if 'hugging' in name else 'timm')
    images = (np.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8) * 0.37 % 1).transpose(0, 2, 3, 1)
    plan = make_plan(4, 2, rate=1.0, reduce_at=(0,), fuse=False)
    logits, _ = jax.jit(create(config).apply, static_argnums=2)(params, jnp.asarray(images, jnp.float32), plan)
    np.testing.assert_allclose(logits, LOGITS[name], rtol=0, atol=1e-5)


def test_find_weights_ema_selects_the_average():
    with weight_files.opened(FILES / 'evit.pth') as (tree, _):
        weights, average = (find_weights(tree, ema=ema) for ema in (False, True))
        assert weights.arrays.keys() == average.arrays.keys()
        np.testing.assert_array_equal(np.asarray(weights.arrays['head.bias']) / 2, average.arrays['head.bias'])
        assert weights.training_arguments['drop_loc'] == '(0, 1)'


@pytest.mark.parametrize('tree, ema, want', [
    ({'a': 1.0}, False, 1), ({'model': {'a': 1.0}, 'rng': 2.0}, False, 1), ({'state_dict': {'a': 1.0}}, False, 1),
    ({'model': {'state_dict': {'a': 1.0}, 'state_dict_ema': {'a': 2.0}}}, False, 1),
    ({'model': {'state_dict': {'a': 1.0}, 'state_dict_ema': {'a': 2.0}}}, True, 2),
    ({'model_ema': {'a': 2.0}, 'epoch': 1}, False, 2),
    ({'model_ema': {'state_dict': {'a': 2.0}}, 'model': {'a': 1.0}}, True, 2),
    ({'state_dict': {'module.model.a': 1.0, 'module.model.b': 1.0}}, False, 1),
    ({'module._orig_mod.a': 1.0}, False, 1)])
def test_find_weights_usual_nested_dicts_are_searched(tree, ema, want):
    def with_arrays(node):
        return {key: with_arrays(value) if isinstance(value, dict) else
                lazy(value=value) if isinstance(value, float) else value for key, value in node.items()}

    assert float(np.asarray(find_weights(with_arrays(tree), ema=ema).arrays['a'])) == want


def test_find_weights_prefix_of_some_arrays_is_kept():
    assert set(find_weights({'module.a': lazy(), 'b': lazy()}, ema=False).arrays) == {'module.a', 'b'}


def test_find_weights_entries_that_are_left_out_are_logged(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        find_weights({'state_dict': {'a': lazy(), 'version': 3}, 'epoch': 1}, ema=False)
    assert 'took state_dict; there are: state_dict, epoch' in caplog.text
    assert 'left out entries that are not arrays: version' in caplog.text


@pytest.mark.parametrize('tree, ema, message', [
    ({}, False, 'no weights by name, but nothing'), ({'epoch': 1, 'best': 2}, False, 'but epoch, best'),
    ([1], False, 'but one list'), (InertObject('argparse.Namespace', ()), False, 'but one InertObject'),
    ({'model': {'a': lazy()}}, True, 'no moving average'), ({'a': lazy()}, True, 'no moving average'),
    ({'vit.embeddings.cls_token': lazy(), 'deit.embeddings.cls_token': lazy()}, False,
     'two arrays have the timm name cls_token')])
def test_find_weights_without_weights_is_refused_with_the_contents(tree, ema, message):
    with pytest.raises(ValueError, match=message):
        find_weights(tree, ema=ema)


def test_find_weights_dict_that_contains_itself_is_refused():
    tree = {}
    tree['model'] = tree
    with pytest.raises(ValueError, match='more than 8 deep'):
        find_weights(tree, ema=False)


def test_find_weights_incomplete_attention_keeps_its_names():
    arrays = {'vit.embeddings.cls_token': lazy(1, 1, 8), 'vit.layers.0.attention.q_proj.bias': lazy(8),
              'vit.pooler.dense.weight': lazy(8, 8)}
    assert set(find_weights(arrays, ema=False).arrays) == {'cls_token', 'blocks.0.attn.q.bias'}


@pytest.mark.parametrize('key, layout', [('aux_head.weight', 'LV-ViT'), ('patch_embed.conv1.weight', 'LV-ViT'),
                                         ('score_predictor.0.in_conv.0.weight', 'DynamicViT'), ('norm.bias', 'timm')])
def test_find_weights_layout_is_known_by_array_names(key, layout):
    assert find_weights({'model': {'cls_token': lazy(), key: lazy()}}, ema=False).layout == layout
