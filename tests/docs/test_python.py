"""The Python code on the pages of the documentation, run with tiny models and images in an empty folder."""

import inspect
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax import api
from evit_jax.reduction import registry
from evit_jax.serving import artifact
from tests.helpers import pages, tiny

BLOCKS = [pytest.param(block.text, id=f'{page.stem}-{number}') for page in pages.PAGES
          for number, block in enumerate(block for block in pages.blocks(page.read_text())
                                         if block.language == 'python')]
FEATURES = evit_jax.ViTConfig(image_size=224, patch_size=14, width=32, depth=12, heads=2, classes=0)
CLASSIFIER = evit_jax.ViTConfig(image_size=224, patch_size=16, width=32, depth=12, heads=2, classes=3)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the models and images that the pages name."""
    folder = tmp_path_factory.mktemp('pages')
    digits = evit_jax.create_model('vit_digits')
    digits.save(folder / 'runs' / 'digits')
    (folder / 'served' / 'digits').mkdir(parents=True)
    artifact.write(folder / 'served' / 'digits', digits.loaded, {'0.5': digits.loaded.plan(keep_rate=0.5)},
                   platforms=('cpu',), kept=True)
    evit_jax.create_model(FEATURES).save(folder / 'weights' / 'dinov2_s')
    evit_jax.create_model(CLASSIFIER, class_names=tiny.NAMES).save(folder / 'weights' / 'deit')
    for name in ('photos', 'shots'):
        (folder / name).mkdir()
    for number, pixels in enumerate(tiny.images(12, size=64)):
        Image.fromarray(pixels).save(folder / 'photos' / f'{number}.png')
    for name in ('cat.jpg', 'dog.jpg', 'shots/digit_3.png'):
        Image.fromarray(tiny.images(1, size=64)[0]).save(folder / name)
    return folder


@pytest.fixture
def short(monkeypatch):
    """Loads models of the Hub from the folder, trains for one epoch, and ends searches early.

    Checks the arguments of the page.
    """
    def load(path, **options):
        path = {'facebook/dinov2-small': 'weights/dinov2_s', 'timm/deit_small_patch16_224.fb_in1k': 'weights/deit'}.get(
            path.removeprefix('hf-hub:'), path)
        return api.load(path, **options)

    def speed_up(*args, **options):
        bound = inspect.signature(api.speed_up).bind(*args, **options).arguments
        return api.speed_up(**bound | {'target': '0.7MACs', 'minutes': 0.05, 'num_images': 4})

    def train(config, **options):
        config = api._read_config(config)
        config.epochs = 1
        return api.train(config, **options)

    monkeypatch.setattr(evit_jax, 'load', load)
    monkeypatch.setattr(evit_jax, 'train', train)
    monkeypatch.setattr(evit_jax, 'speed_up', speed_up)


@pytest.mark.parametrize('text', BLOCKS)
def test_python_block_is_valid(text):
    compile(text, 'page', 'exec')


@pytest.mark.slow
@pytest.mark.parametrize('text', BLOCKS)
def test_python_block_runs(text, folder, short, monkeypatch):
    if 'onnx_artifact' in text:
        pytest.skip('tests/serving/test_onnx_artifact.py runs it')
    registry.list_reducers()
    monkeypatch.setattr(registry, '_REDUCERS', dict(registry._REDUCERS))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    shutil.rmtree('weights/fast', ignore_errors=True)  # several pages save a model there
    exec(compile(text, 'page', 'exec'), {'images': np.zeros((2, 224, 224, 3), np.uint8)})
