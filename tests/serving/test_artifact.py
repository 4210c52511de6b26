"""Folders of StableHLO programs of models without classes, and of reducers that merge."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax.serving import artifact, loader
from evit_jax.serving.engines import EngineOptions, open_served
from tests.helpers import tiny

HEADS = {'features': {'classes': 0}, 'embedding': {'classes': 5, 'projection': True}}


def model_of(**changes):
    return evit_jax.create_model(dataclasses.replace(tiny.CONFIG, **changes), keep_rate=0.5, reduce_at=(0,))


def write(folder, model, kept=True, **plans):
    plans = plans or {'0.5': model.plan}
    artifact.write(folder, model.loaded, plans, platforms=('cpu',), kept=kept)
    return plans


@pytest.fixture(scope='module')
def headless(tmp_path_factory):
    """A model without a head, and the folder of its export."""
    folder, model = tmp_path_factory.mktemp('headless'), model_of(classes=0)
    write(folder, model)
    return model, folder


@pytest.mark.parametrize('result', HEADS)
def test_served_of_a_model_without_classes_gives_its_result_first(tmp_path, result):
    model = model_of(**HEADS[result])
    plans = write(tmp_path, model, kept=False)
    served = loader.Served(tmp_path)
    outputs, want = served(tiny.images(2)), model.forward(tiny.images(2))
    assert set(outputs) == {*served.manifest['outputs']} == {result, 'features'}
    assert served.manifest['outputs'][0] == result and served.manifest['model']['classes'] == 0
    np.testing.assert_allclose(outputs[result], want.logits, atol=1e-5)
    np.testing.assert_allclose(outputs['features'], want.features, atol=1e-5)
    (_, difference), = artifact.check(tmp_path, model.loaded, plans)
    assert difference < 1e-5


def test_check_of_other_features_is_refused(headless):
    model, folder = headless
    other = model.loaded._replace(params=jax.tree.map(lambda array: array * 1.1, model.params))
    with pytest.raises(ValueError, match=r"the outputs of plan 0.5 differ from the model's by up to .* explains 1e-04"):
        list(artifact.check(folder, other, {'0.5': model.plan}))


def test_readme_of_a_model_without_a_head_describes_features(headless):
    text = (headless[1] / 'README.md').read_text(encoding='utf-8')
    assert '\nComputes features of images. Runs on cpu' in text and 'classes.' not in text.partition('## Plans')[2]
    assert '\n- `features`: float32 [b, D], the input of the head;\n- `kept`: int32 [b, K], a list with one' in text


def test_loader_prints_features_as_json(headless, tmp_path):
    model, folder = headless
    pixels, = tiny.images(1)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    done = subprocess.run([sys.executable, folder / 'serve.py', 'a.png'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, _, values = done.stdout.partition(': ')
    pixels = loader.Served(folder).read(tmp_path / 'a.png')
    assert name == 'a.png'
    np.testing.assert_allclose(json.loads(values), np.asarray(model(pixels[None]))[0], atol=1e-5)


def test_stablehlo_engine_of_a_model_without_a_head_gives_features(headless):
    model, folder = headless
    served, engine = open_served(str(folder), EngineOptions())
    outputs, want = engine('0.5', tiny.images(2)), model.forward(tiny.images(2))
    np.testing.assert_allclose(outputs.logits, want.features, atol=1e-5)
    assert served.class_names == () and served.returns_kept


def test_programs_of_a_reducer_that_merges_return_the_token_of_each_patch(tmp_path):
    model = model_of().with_reducer('tome')
    write(tmp_path, model, merged=model.plan, dense=model.with_plan(keep_rate=1).plan)
    served = loader.Served(tmp_path)
    outputs, want = served(tiny.images(2), 'merged'), model.forward(tiny.images(2))
    np.testing.assert_array_equal(outputs['token_of_patch'][0], want.token_of_patch[0])
    assert set(served(tiny.images(2), 'dense')) == {'probabilities', 'features'}
