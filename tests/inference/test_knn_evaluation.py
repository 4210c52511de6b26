"""k-NN evaluation through the program: data, plan and result file."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.workdir import flat
from evit_jax.inference import knn_evaluation
from evit_jax.inference.model import VisionModel
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from tests.helpers import few, layouts, program_modules

small_run = few.small_run
checkpoint = few.checkpoint
NAMED = 'data.source', 'data.workers'


def evaluate(checkpoint, out, *, explicit=(), plan_file=None, options=None, **changes):
    model = VisionModel(load_model(checkpoint))
    config = knn_evaluation.config_of(
        model, flat(layouts.config_of(data__source='folder', batch_size=8, **changes)), explicit=(*NAMED, *explicit),
        from_file=False, plan_file=plan_file)
    return knn_evaluation.evaluate(model, config, out, **{'k': (1, 3)} | (options or {}))


def result_of(folder):
    file, = folder.glob('*.json')
    return file.name, json.loads(file.read_text())


def test_evaluate_writes_what_decides_the_accuracy(checkpoint, tmp_path):
    metrics = evaluate(checkpoint, tmp_path)
    name, result = result_of(tmp_path)
    assert name == 'knn-evit-16-each-8-5-fused.json' and result['metrics'] == pytest.approx(metrics)
    assert result['knn'] == {'k': [1, 3], 'temperature': 0.07}
    assert result['data'] == {
        'source': 'folder', 'path': 'data', 'name': '', 'split': 'test', 'images': few.SIZE, 'classes': 3,
        'gallery_split': 'train', 'gallery_images': 8, 'gallery_plan': 'evit-16-each-8-5-fused'}
    assert result['preprocessing']['image_size'] == 16 and result['model']['dtype'] == 'float32'
    assert result['workdir'] == str(checkpoint) and metrics['macs'] < metrics['macs_dense']
    assert (metrics['gallery'], metrics['queries'], metrics['left_out']) == (8, few.SIZE, 0)


def test_main_with_a_new_workdir_with_a_dot_in_its_name_creates_it(checkpoint, tmp_path):
    config = layouts.config_of(data__source='folder', batch_size=8, init_from=str(checkpoint))
    with program_modules.load('main') as main, flagsaver.flagsaver():
        flags.FLAGS(['main', '--k=1'])
        main._evaluate_knn(config, str(tmp_path / 'knn.5'), ('init_from', *NAMED), False, None)
    assert 'top1_k1' in result_of(tmp_path / 'knn.5')[1]['metrics']


def test_evaluate_with_a_dense_gallery_reduces_the_queries_only(checkpoint, tmp_path):
    evaluate(checkpoint, tmp_path, options={'dense_gallery': True})
    data = result_of(tmp_path)[1]['data']
    assert data['gallery_plan'] == 'dense-16'


@pytest.mark.parametrize(('changes', 'name'), [
    ({'keep__rate': 1.0}, 'dense-16'), ({'reducer__name': 'tome', 'reducer__r': 2}, 'tome-16-each-14-12')])
def test_evaluate_takes_the_plan_of_explicit_keys(checkpoint, tmp_path, changes, name):
    explicit = [key.replace('__', '.') for key in changes]
    evaluate(checkpoint, tmp_path, explicit=explicit, **changes)
    assert result_of(tmp_path)[0] == f'knn-{name}.json'


def test_evaluate_takes_a_plan_file(checkpoint, tmp_path):
    plan = PlanFile.of(make_plan(16, 2, reduce_at=(1,), tokens=(5,), fuse=False), 'vit_layouts', 16)
    evaluate(checkpoint, tmp_path, plan_file=plan)
    assert result_of(tmp_path)[0] == 'knn-evit-16-5at1.json'


def test_evaluate_at_another_image_size_resizes_images(checkpoint, tmp_path):
    evaluate(checkpoint, tmp_path, explicit=('model.image_size',), model__image_size=24)
    assert result_of(tmp_path)[1]['plan']['patches'] == 36


def test_evaluate_with_more_neighbours_than_images_is_refused_before_images_are_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(few.Few, '__getitem__', lambda self, index: np.zeros(0))
    with pytest.raises(ValueError, match=r'k=\(9,\) is outside \[1, 8\]'):
        evaluate(checkpoint, tmp_path, options={'k': (9,)})


@pytest.mark.parametrize('explicit, batch_size', [(NAMED, 64), ((*NAMED, 'batch_size'), 8)])
def test_config_of_takes_the_batch_size_of_explicit_keys_only(checkpoint, explicit, batch_size):
    given = flat(layouts.config_of(data__source='folder', batch_size=8))
    model = VisionModel(load_model(checkpoint))
    assert knn_evaluation.config_of(model, given, explicit=explicit, from_file=False)['batch_size'] == batch_size
