"""Weights in wrappers: prefixes, dicts within dicts, and files that hold more than one model."""

import logging

import numpy as np
import pytest

from evit_jax.interchange import layouts
from evit_jax.interchange.stored import Stored

MODEL = ('cls_token', 'pos_embed', 'blocks.0.norm1.bias', 'head.bias')
HUGGING_FACE = ('vit.embeddings.cls_token', 'vit.embeddings.position_embeddings', 'classifier.bias')


def stored(value=1.0):
    return Stored((), np.dtype(np.float32), lambda: np.array(value, np.float32))


def state(prefix='', names=MODEL, value=1.0, **others):
    return {prefix + name: stored(value) for name in names} | {key.replace('__', '.'): stored() for key in others}


def taken(tree, ema=False, key=''):
    return layouts.find(tree, ema=ema, key=key)


@pytest.mark.parametrize('tree', [
    state('module.') | {'n_averaged': stored()},
    {'state_dict': state('model.', criterion__weight=1, ema_decay=1)},
    {'state_dict': state('net.', loss__weight=1)}, {'state_dict': state('model.backbone.', head__0__weight=1)},
    {'model': state('module.backbone.'), 'optimizer': {'state': {0: {'exp_avg': stored()}}}},
    {'module': state('encoder.'), 'epoch': 1}, {'anything': {'at': {'all': state()}}},
    state('_orig_mod.module.', other__bias=1), state('backbone.') | {'head.weight': stored()}])
def test_a_prefix_is_stripped_where_a_vision_transformer_remains(tree):
    assert {*taken(tree).arrays} == {*MODEL}


@pytest.mark.parametrize('prefix', ['model.', 'module.net.', ''])
def test_a_prefix_of_hugging_faces_names_is_stripped(prefix):
    others = {'criterion__weight': 1} if prefix else {}
    found = taken({'state_dict': state(prefix, HUGGING_FACE, **others)})
    assert {*found.arrays} == {'cls_token', 'pos_embed', 'head.bias'} and found.layout == 'Hugging Face'


def test_arrays_beside_the_prefix_are_listed(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        taken({'state_dict': state('model.', criterion__weight=1), 'epoch': 1})
    assert 'took state_dict.model; there are: state_dict, epoch' in caplog.text
    assert 'left out 1 arrays that are not behind the prefix model.: criterion.weight' in caplog.text


def backbone(prefix='net.backbone.', **others):
    """A backbone without a head, 8 wide, and arrays of given shapes elsewhere."""
    shapes = {f'{prefix}cls_token': (1, 1, 8), f'{prefix}norm.bias': (8,)}
    shapes |= {key.replace('__', '.'): shape for key, shape in others.items()}
    return {key: Stored(shape, np.dtype(np.float32), lambda: None) for key, shape in shapes.items()}


@pytest.mark.parametrize('prefix, parent', [('net.backbone.', 'net__'), ('backbone.', '')])
def test_find_head_beside_a_backbone_is_taken_with_a_warning(caplog, prefix, parent):
    found = taken(backbone(prefix, **{f'{parent}fc__weight': (5, 8), f'{parent}fc__bias': (5,)}))
    assert found.arrays['head.weight'].shape == (5, 8) and found.arrays['head.bias'].shape == (5,)
    assert 'fc.weight' in caplog.text and 'as the head' in caplog.text


@pytest.mark.parametrize('others', [{'net__head__0__weight': (5, 8)}, {'net__head__weight': (5, 16)},
                                    {'net__head__weight': (5, 8), 'net__fc__weight': (5, 8)}])
def test_find_head_that_may_be_lost_is_named_in_a_warning(caplog, others):
    assert 'head.weight' not in taken(backbone(**others)).arrays
    warning, = (record.getMessage() for record in caplog.records if record.levelname == 'WARNING')
    assert 'net.head' in warning and 'it is lost' in warning


def test_find_head_behind_the_prefix_is_kept():
    found = taken(backbone(net__backbone__head__weight=(3, 8), net__head__weight=(5, 8)))
    assert found.arrays['head.weight'].shape == (3, 8)


DINO = {'student': state('module.backbone.', value=1), 'teacher': state('backbone.', value=2), 'epoch': 1}
MOCO = {'state_dict': state('module.base_encoder.', value=1) | state('module.momentum_encoder.', value=2)}
NESTED = state('', value=1) | state('teacher.', value=2)


@pytest.mark.parametrize('tree, labels', [
    (DINO, 'student.module.backbone, teacher.backbone'),
    (MOCO, 'state_dict.module.base_encoder, state_dict.module.momentum_encoder'), (NESTED, r'\., teacher')])
def test_of_two_models_none_is_chosen_silently(tree, labels):
    with pytest.raises(ValueError, match=rf'weights of 2 models, in {labels}: give one of these as --key'):
        taken(tree)


@pytest.mark.parametrize('tree, key, value', [
    (DINO, 'student', 1), (DINO, 'teacher.backbone', 2), (MOCO, 'base_encoder', 1), (NESTED, '.', 1),
    (MOCO, 'state_dict.module.momentum_encoder', 2), (NESTED, 'teacher', 2)])
def test_a_key_chooses_the_model(tree, key, value):
    found = taken(tree, key=key)
    assert {*found.arrays} == {*MODEL} and float(np.asarray(found.arrays['cls_token'])) == value


def test_a_key_that_names_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r'--key=base: there are no weights .* some in student.module.backbone, teach'):
        taken(DINO, key='base')
    with pytest.raises(ValueError, match=r'--key=b: there is no dict b; there are: a'):
        taken({'a': {'weight': stored()}}, key='b')


def test_the_average_is_told_from_the_weights_behind_prefixes():
    tree = {'state_dict': state('model.', value=1) | state('ema_model.', value=2)}
    assert float(np.asarray(taken(tree).arrays['cls_token'])) == 1
    assert float(np.asarray(taken(tree, ema=True).arrays['cls_token'])) == 2
    averaged = state('module.', value=3) | {'n_averaged': stored()}
    assert float(np.asarray(taken(averaged, ema=True).arrays['cls_token'])) == 3
    with pytest.raises(ValueError, match='no moving average'):
        taken(DINO, ema=True)


def test_one_dict_under_two_names_is_one_model():
    shared = state()
    assert {*taken({'model': shared, 'state_dict': shared}).arrays} == {*MODEL}


def test_position_embeddings_of_a_decoder_are_no_second_model():
    tree = {'model': state() | {'decoder_pos_embed': stored(), 'decoder.pos_embed': stored()}}
    assert {*MODEL} < {*taken(tree).arrays}
