"""The shapes of arrays decide the model, its image size and number of classes."""

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.interchange import architecture, torch_weights
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.models import get_config
from evit_jax.models.config import ViTConfig

TOY = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, classes=5)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_toy', TOY)


def lazy(*shape):
    return LazyArray(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


def of_model(name):
    """Returns the arrays of a named model by timm's names."""
    config = get_config(name)
    tree = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), torch_weights.template(config))
    return {key: lazy(*value.shape) for key, value in torch_weights.to_torch(tree, config).items()}


@pytest.mark.parametrize('name', [*models.CONFIGS, 'vit_toy'])
def test_detect_arrays_of_a_model_return_its_name_and_config(name):
    assert architecture.detect(of_model(name), default_classes=7) == (name, get_config(name))


def test_detect_without_a_head_has_the_default_number_of_classes():
    arrays = {key: value for key, value in of_model('deit_t').items() if not key.startswith('head')}
    assert architecture.detect(arrays, default_classes=7)[1].classes == 7


@pytest.mark.parametrize('change, message', [
    ({'pos_embed': (1, 198, 192)}, '198 positions, which are not those of 1 token and a square'),
    ({'pos_embed': (1, 198, 192), 'dist_token': (1, 1, 192), 'head.weight': (0, 192)}, r'head.weight has shape \(0'),
    ({'pos_embed': (1, 3, 192)}, '3 positions'), ({'pos_embed': (192,)}, 'pos_embed has shape'),
    ({'blocks.13.norm1.bias': (192,)}, '13 blocks are numbered up to 13, and block 12 is missing'),
    ({'patch_embed.proj.weight': (192, 3, 32, 16)}, 'wanted square patches'),
    ({'patch_embed.proj.weight': (192, 1, 16, 16)}, 'images with 3 channels'),
    ({'cls_token': None}, '197 positions, which are not those of 0 tokens'),
    ({'blocks.0.mlp.fc1.weight': None}, r'no blocks.0.mlp.fc1.weight among 15\d arrays')])
def test_detect_unsupported_shapes_are_named(change, message):
    arrays = of_model('deit_t') | {key: shape and lazy(*shape) for key, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        architecture.detect({key: value for key, value in arrays.items() if value}, default_classes=7)
