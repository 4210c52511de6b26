"""The weights of one model are found behind prefixes, in nested dicts, and among several models."""

import logging

import numpy as np
import pytest

from evit_jax.interchange.checkpoint_layouts import find_weights
from evit_jax.interchange.lazy_array import LazyArray

MODEL = ('cls_token', 'pos_embed', 'blocks.0.norm1.bias', 'head.bias')
HUGGING_FACE = ('vit.embeddings.cls_token', 'vit.embeddings.position_embeddings', 'classifier.bias')


def lazy(value=1.0):
    return LazyArray((), np.dtype(np.float32), lambda: np.array(value, np.float32))


def state_dict(prefix='', names=MODEL, value=1.0, **others):
    return {prefix + name: lazy(value) for name in names} | {key.replace('__', '.'): lazy() for key in others}


def find(tree, ema=False, key=''):
    return find_weights(tree, ema=ema, key=key)


@pytest.mark.parametrize('tree', [
    state_dict('module.') | {'n_averaged': lazy()},
    {'state_dict': state_dict('model.', criterion__weight=1, ema_decay=1)},
    {'state_dict': state_dict('net.', loss__weight=1)},
    {'state_dict': state_dict('model.backbone.', head__0__weight=1)},
    {'model': state_dict('module.backbone.'), 'optimizer': {'state': {0: {'exp_avg': lazy()}}}},
    {'module': state_dict('encoder.'), 'epoch': 1}, {'anything': {'at': {'all': state_dict()}}},
    state_dict('_orig_mod.module.', other__bias=1), state_dict('backbone.') | {'head.weight': lazy()}])
def test_find_weights_prefix_is_stripped_from_a_vision_transformer(tree):
    assert {*find(tree).arrays} == {*MODEL}


@pytest.mark.parametrize('prefix', ['model.', 'module.net.', ''])
def test_find_weights_prefix_of_hugging_face_names_is_stripped(prefix):
    others = {'criterion__weight': 1} if prefix else {}
    weights = find({'state_dict': state_dict(prefix, HUGGING_FACE, **others)})
    assert {*weights.arrays} == {'cls_token', 'pos_embed', 'head.bias'} and weights.layout == 'Hugging Face'


def test_find_weights_arrays_without_the_prefix_are_logged(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        find({'state_dict': state_dict('model.', criterion__weight=1), 'epoch': 1})
    assert 'took state_dict.model; there are: state_dict, epoch' in caplog.text
    assert 'left out 1 arrays without the prefix model.: criterion.weight' in caplog.text


def backbone(prefix='net.backbone.', **others):
    """Returns a backbone without a head, of width 8, and other arrays by name and shape."""
    shapes = {f'{prefix}cls_token': (1, 1, 8), f'{prefix}norm.bias': (8,)}
    shapes |= {key.replace('__', '.'): shape for key, shape in others.items()}
    return {key: LazyArray(shape, np.dtype(np.float32), lambda: None) for key, shape in shapes.items()}


@pytest.mark.parametrize('prefix, parent', [('net.backbone.', 'net__'), ('backbone.', '')])
def test_find_weights_head_beside_a_backbone_is_taken_with_a_warning(caplog, prefix, parent):
    weights = find(backbone(prefix, **{f'{parent}fc__weight': (5, 8), f'{parent}fc__bias': (5,)}))
    assert weights.arrays['head.weight'].shape == (5, 8) and weights.arrays['head.bias'].shape == (5,)
    assert 'fc.weight' in caplog.text and 'as the head' in caplog.text


@pytest.mark.parametrize('others', [{'net__head__0__weight': (5, 8)}, {'net__head__weight': (5, 16)},
                                    {'net__head__weight': (5, 8), 'net__fc__weight': (5, 8)}])
def test_find_weights_possibly_lost_head_is_named_in_a_warning(caplog, others):
    assert 'head.weight' not in find(backbone(**others)).arrays
    warning, = (record.getMessage() for record in caplog.records if record.levelname == 'WARNING')
    assert 'net.head' in warning and 'it is lost' in warning


def test_find_weights_head_with_the_prefix_is_kept():
    weights = find(backbone(net__backbone__head__weight=(3, 8), net__head__weight=(5, 8)))
    assert weights.arrays['head.weight'].shape == (3, 8)


DINO = {'student': state_dict('module.backbone.', value=1), 'teacher': state_dict('backbone.', value=2), 'epoch': 1}
MOCO = {'state_dict': state_dict('module.base_encoder.', value=1) | state_dict('module.momentum_encoder.', value=2)}
NESTED = state_dict('', value=1) | state_dict('teacher.', value=2)


@pytest.mark.parametrize('tree, labels', [
    (DINO, 'student.module.backbone, teacher.backbone'),
    (MOCO, 'state_dict.module.base_encoder, state_dict.module.momentum_encoder'), (NESTED, r'\., teacher')])
def test_find_weights_two_models_are_refused_without_a_key(tree, labels):
    with pytest.raises(ValueError, match=rf'weights of 2 models, in {labels}: give one of these as --key'):
        find(tree)


@pytest.mark.parametrize('tree, key, value', [
    (DINO, 'student', 1), (DINO, 'teacher.backbone', 2), (MOCO, 'base_encoder', 1), (NESTED, '.', 1),
    (MOCO, 'state_dict.module.momentum_encoder', 2), (NESTED, 'teacher', 2)])
def test_find_weights_key_selects_the_model(tree, key, value):
    weights = find(tree, key=key)
    assert {*weights.arrays} == {*MODEL} and float(np.asarray(weights.arrays['cls_token'])) == value


def test_find_weights_unknown_key_lists_the_models():
    with pytest.raises(ValueError, match=r'--key=base: there are no weights .* some in student.module.backbone, teach'):
        find(DINO, key='base')
    with pytest.raises(ValueError, match=r'--key=b: there is no dict b; there are: a'):
        find({'a': {'weight': lazy()}}, key='b')


def test_find_weights_ema_selects_the_average_by_its_prefix():
    tree = {'state_dict': state_dict('model.', value=1) | state_dict('ema_model.', value=2)}
    assert float(np.asarray(find(tree).arrays['cls_token'])) == 1
    assert float(np.asarray(find(tree, ema=True).arrays['cls_token'])) == 2
    averaged = state_dict('module.', value=3) | {'n_averaged': lazy()}
    assert float(np.asarray(find(averaged, ema=True).arrays['cls_token'])) == 3
    with pytest.raises(ValueError, match='no moving average'):
        find(DINO, ema=True)


def test_find_weights_one_dict_under_two_names_is_one_model():
    shared = state_dict()
    assert {*find({'model': shared, 'state_dict': shared}).arrays} == {*MODEL}


def test_find_weights_position_embeddings_of_a_decoder_are_not_a_second_model():
    tree = {'model': state_dict() | {'decoder_pos_embed': lazy(), 'decoder.pos_embed': lazy()}}
    assert {*MODEL} < {*find(tree).arrays}
