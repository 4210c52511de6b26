"""Converted models are compared with their original program."""

import importlib
import json
import logging
import types

import jax
import numpy as np
import pytest

from evit_jax.interchange import torch_weights, verification
from evit_jax.models import create
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import make_plan

TINY = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, classes=3)


@pytest.fixture(scope='module')
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), torch_weights.template(TINY))


def original(factor):
    """Returns a stand-in for the original program, whose outputs are ours times a factor."""
    def outputs(path, params, config, images):
        plan = make_plan(4, 1, reduce_at=())
        return 'a program', factor * np.asarray(create(config).apply(params, images, plan)[0])
    return outputs


def test_check_equal_outputs_log_the_difference(params, monkeypatch, caplog):
    monkeypatch.setattr(verification, '_original_outputs', original(1.0005))
    with caplog.at_level(logging.INFO, 'absl'):
        difference = verification.check(None, params, TINY)
    assert 4e-4 < difference < 6e-4
    assert 'the largest difference from the logits of a program is 5.0e-04 of the largest value' in caplog.text


@pytest.mark.parametrize('factor, message', [(1.1, 'the logits differ from those of a program by'),
                                             (np.nan, 'differ .* by nan'), (np.ones((1, 1, 1)), 'outputs of shape')])
def test_check_other_outputs_are_refused(params, monkeypatch, factor, message):
    monkeypatch.setattr(verification, '_original_outputs', original(factor))
    with pytest.raises(ValueError, match=f'--check: .*{message}'):
        verification.check(None, params, TINY)


class Tensor(np.ndarray):
    def numpy(self):
        return np.asarray(self)


class MaskedImageModel:
    """A stand-in for ViTForMaskedImageModeling of transformers, whose outputs have no tokens."""

    from_pretrained = classmethod(lambda cls, folder: cls())

    def eval(self):
        return self

    def __call__(self, pixel_values):
        return types.SimpleNamespace(reconstruction=pixel_values)

    def base_model(self, pixel_values):
        return types.SimpleNamespace(last_hidden_state=np.arange(12.0).reshape(2, 3, 2).view(Tensor))


def test_transformers_outputs_of_a_masked_image_model_are_those_of_its_base(monkeypatch):
    monkeypatch.setattr(verification, '_module', lambda name: types.SimpleNamespace(ViTForMasks=MaskedImageModel))
    settings = {'model_type': 'vit', 'architectures': ['ViTForMasks']}
    _, outputs = verification._transformers_outputs('folder', settings, np.zeros(1))
    np.testing.assert_array_equal(outputs, [[0, 1], [6, 7]])


@pytest.mark.parametrize('config, package', [({'model_type': 'vit'}, 'transformers'), ({'architecture': 'v'}, 'timm')])
def test_check_without_the_program_names_the_packages(params, monkeypatch, tmp_path, config, package):
    def absent(name):
        raise ImportError(name)

    (tmp_path / 'config.json').write_text(json.dumps(config))
    monkeypatch.setattr(importlib, 'import_module', absent)
    with pytest.raises(ValueError, match=rf'with {package}, .* not installed .*: pip install torch {package}, or'):
        verification.check(tmp_path, params, TINY)
