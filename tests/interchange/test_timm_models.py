"""Reads timm's models by name: heads, activation, pooling and preprocessing are those that timm's registry gives.

The arrays are only as large as on disk: files with a header and no values.
"""

import json
import logging
import math

import numpy as np
import pytest

from evit_jax.interchange import architecture, conversion, names_timm, timm_models
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.models.config import ViTConfig
from tests.helpers import families

TABLE = families.timm_table()
SUPPORTED = {name: entry for name, entry in TABLE['models'].items() if 'config' in entry}
# The first tag of each model, and the tags with another head.
TAGS = [(name, tag) for name, entry in SUPPORTED.items() for number, (tag, values) in enumerate(entry['tags'].items())
        if not number or 'config' in values]


def expected_config(name, tag):
    return SUPPORTED[name]['config'] | SUPPORTED[name]['tags'][tag].get('config', {})


def lazy(shape):
    return LazyArray(tuple(shape), np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


def body_of(name, depth):
    """Returns the shapes of a model's arrays without heads."""
    shapes = {}
    for key, shape in TABLE['layouts'][TABLE['models'][name]['layout']].items():
        shapes |= {key.replace('*', str(block)): shape for block in range(depth if '*' in key else 1)}
    return {key: shape for key, shape in shapes.items() if not key.startswith(('head.', 'head_dist.'))}


def shapes_of(name, config):
    """Returns the shapes of a model's arrays, with the classes of a config."""
    head = {'head.weight': [config['classes'], config['width']], 'head.bias': [config['classes']]}
    if config['distilled']:
        head |= {key.replace('head', 'head_dist'): shape for key, shape in head.items()}
    return body_of(name, config['depth']) | (head if config['classes'] else {})


def write(folder, name, tag, shapes, config, values):
    """Writes config.json as on the Hub, and a sparse safetensors file."""
    size = config['image_size']
    cfg = {'tag': tag, 'custom_load': False, 'input_size': [3, *(size if isinstance(size, list) else (size, size))],
           'interpolation': values['interpolation'], 'crop_pct': values['crop'], 'crop_mode': values['crop_mode'],
           'mean': values['mean'], 'std': values['std'], 'num_classes': config['classes'], 'pool_size': None,
           'first_conv': 'patch_embed.proj', 'classifier': 'head'}
    pool = config['pooling'].removesuffix('_fc_norm')
    (folder / 'config.json').write_text(json.dumps({
        'architecture': name, 'num_classes': config['classes'], 'num_features': config['width'], 'global_pool': pool,
        'pretrained_cfg': cfg}))
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, end]}
    text = json.dumps(header).encode()
    with open(folder / 'model.safetensors', 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def no_values(monkeypatch):
    """Makes `read_pretrained` skip the values of the arrays."""
    monkeypatch.setattr(conversion.torch_weights, 'from_torch', lambda *args, **options: {})
    monkeypatch.setattr(conversion.torch_weights, 'to_torch', lambda *args: {})


@pytest.mark.parametrize(('name', 'tag'), TAGS)
def test_read_pretrained_of_a_timm_name_gives_the_config_of_timm(tmp_path, no_values, caplog, name, tag):
    config, values = expected_config(name, tag), SUPPORTED[name]['tags'][tag]
    write(tmp_path, name, tag, shapes_of(name, config), config, values)
    model = conversion.read_pretrained(tmp_path)
    assert families.differences(model.config, config) == {}
    data = model.metadata['config']['data']
    crop = 0.0 if values['crop_mode'] == 'squash' else values['crop']
    assert (list(data['mean']), list(data['std']), data['eval_crop']) == (values['mean'], values['std'], crop)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in warnings if 'assumed' in text]


@pytest.mark.parametrize('name', sorted(TABLE['models'].keys() - SUPPORTED.keys()))
def test_read_pretrained_of_an_unsupported_timm_name_is_refused(tmp_path, name):
    config, values = expected_config('deit_tiny_patch16_224', 'fb_in1k'), SUPPORTED['deit_tiny_patch16_224']['tags']
    write(tmp_path, name, '', body_of(name, config['depth']), config, values['fb_in1k'])
    with pytest.raises(ValueError, match='this is '):
        conversion.read_pretrained(tmp_path)


def test_unsupported_twin_names_only_models_without_distinct_arrays():
    shapes = {name: body_of(name, 1) for name in TABLE['models']}
    twins = {}
    for name, arrays in shapes.items():
        renamed, layout = names_timm.from_timm({key: lazy(shape) for key, shape in arrays.items()})
        try:
            config = architecture.detect(renamed)[1]
        except ValueError:
            continue
        twins[name] = timm_models.unsupported_twin(config, layout == names_timm.EVA)
    assert {name: twin for name, twin in twins.items() if twin} == {
        name: name for name in ('eva02_enormous_patch14_clip_224', 'vit_base_patch16_rpn_224')}


def test_read_pretrained_of_renamed_weights_warns_of_an_unsupported_model(tmp_path, no_values, caplog):
    config, values = expected_config('deit_tiny_patch16_224', 'fb_in1k'), SUPPORTED['deit_tiny_patch16_224']['tags']
    write(tmp_path, 'mine', '', body_of('vit_base_patch16_rpn_224', 12), config | {'pooling': 'avg'},
          values['fb_in1k'])
    conversion.read_pretrained(tmp_path)
    assert 'shapes of vit_base_patch16_rpn_224 of timm too: its norms follow the branches' in caplog.text


@pytest.mark.parametrize('name, bare', [
    ('hf-hub:timm/vit_base_patch16_224.augreg_in21k', 'vit_base_patch16_224'), ('timm/deit_s', 'deit_s'),
    ('vit_small_patch14_dinov2.lvd142m', 'vit_small_patch14_dinov2')])
def test_bare_name_has_no_source_and_no_tag(name, bare):
    assert timm_models.bare_name(name) == bare


@pytest.mark.parametrize('name, width, heads', [
    ('', 384, 6), ('vit_so400m_patch14_siglip_384', 1152, 16), ('vit_giantopt_patch16_siglip_256', 1536, 16),
    ('vit_huge_plus_patch16_dinov3', 1280, 20), ('vit_huge_patch14_224', 1280, 16), ('', 100, 1)])
def test_default_heads_follow_the_width_and_the_name(name, width, heads):
    assert timm_models.default_heads(width, name) == heads


def test_facts_name_of_another_size_gives_no_heads():
    config = ViTConfig(width=64, heads=1)
    assert 'heads' not in timm_models.facts('vit_base_patch16_clip_quickgelu_224', config)
    assert timm_models.facts('vit_base_patch16_clip_quickgelu_224', config)['activation'] == 'quick_gelu'
    assert timm_models.facts('vit_small', config) == {} == timm_models.facts('resnet50', config)
