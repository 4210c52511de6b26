"""The recipe for own images on a machine without an accelerator, from the first image to the last line."""

import json

import pytest

from configs import folder_small
from evit_jax import models
from evit_jax.training import checks, experiment, loop
from tests.programs.test_own_images import draw
from tests.training.test_finetuning import LEAST


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A model that compiles in seconds, in the place of the recipe's."""
    monkeypatch.setitem(models.CONFIGS, 'vit_digits', LEAST)


def recipe(path, **changes):
    config = folder_small.get_config()
    config.update_from_flattened_dict({'data.path': str(path), 'compilation_cache': '', 'model.reduce_at': (1,)} | {
        key.replace('__', '.'): value for key, value in changes.items()})
    return config


def test_folder_small_needs_a_folder_and_nothing_else(tmp_path):
    config = recipe(draw(tmp_path))
    assert (config.init_from, config.model.dtype, config.data.workers) == ('', 'auto', -1)
    run = experiment.setup(config)
    assert (run.config.model.dtype, run.config.model.classes, len(run.test_source)) == ('float32', 2, 8)


@pytest.mark.parametrize('size', [32, 48, 96])
def test_folder_small_takes_image_sizes_from_32_to_96(tmp_path, size):
    config = recipe(draw(tmp_path), model__image_size=size)
    checks.check(config)
    assert experiment.setup(config).patches == (size // 8)**2


def test_folder_small_trains_on_fewer_images_than_a_batch_without_val(tmp_path):
    """One step in all, fewer than those of the warm-up; a batch holds each image several times."""
    images = draw(tmp_path / 'images')
    (images / 'val').rename(tmp_path / 'elsewhere')
    metrics = loop.train(recipe(images, epochs=4), tmp_path / 'run')
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert (saved['model.dtype'], saved['class_names']) == ('float32', ['oak', 'pine'])
    assert metrics['images'] < 12 and 0 <= metrics['top1'] <= 1
