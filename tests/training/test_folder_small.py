"""The recipe configs/folder_small.py: small folders of images, trained on a CPU."""

import dataclasses
import json

import pytest

from evit_jax.checkpoints.workdir import flat
from evit_jax.configs import folder_small
from evit_jax.training import checks, experiment, loop
from tests.helpers import tiny_run
from tests.helpers.folders import draw_stripes


def recipe(path, **changes):
    config = folder_small.get_config()
    config.update_from_flattened_dict({'data.path': str(path), 'compilation_cache': '', 'model.reduce_at': (1,)} | {
        key.replace('__', '.'): value for key, value in changes.items()})
    return config


def test_folder_small_needs_only_a_folder(tmp_path):
    config = recipe(draw_stripes(tmp_path))
    assert (config.init_from, config.model.dtype, config.data.workers) == ('', 'auto', -1)
    run = experiment.setup(config)
    assert (run.config.model.dtype, run.config.model.classes, len(run.test_source)) == ('float32', 2, 8)


@pytest.mark.parametrize('size', [32, 48, 96])
def test_folder_small_accepts_image_sizes_from_32_to_96(tmp_path, size):
    config = recipe(draw_stripes(tmp_path), model__image_size=size)
    checks.check(flat(config))
    assert experiment.setup(config).patches == (size // 8)**2


def test_folder_small_trains_on_fewer_images_than_a_batch_without_val(tmp_path):
    """Trains one step, which is less than the warm-up; its batch contains each image several times."""
    images = draw_stripes(tmp_path / 'images')
    (images / 'val').rename(tmp_path / 'elsewhere')
    config = recipe(images, epochs=4)
    model_config = dataclasses.replace(tiny_run.NARROW, classes=2, image_size=config.model.image_size)
    metrics = loop.train(config, tmp_path / 'run', model_config=model_config)
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert (saved['model.dtype'], saved['class_names']) == ('float32', ['oak', 'pine'])
    assert metrics['images'] < 12 and 0 <= metrics['top1'] <= 1
