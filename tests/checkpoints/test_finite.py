"""NaN and infinity: weights that contain them are refused by name, and such outputs are never returned as results."""

import json

import numpy as np
import pytest

from evit_jax.benchmarks import report
from evit_jax.checkpoints.loaded import load_model
from evit_jax.data.token_labels import label_maps
from evit_jax.data.token_labels.label_maps import Entry, LabelMap, LabelMaps, LabelMapsMetadata
from evit_jax.inference.keep_rates import LabelledImage, predict_examples
from evit_jax.inference.model import VisionModel
from evit_jax.serving import artifact
from evit_jax.training import distillation
from evit_jax.training.evaluation import evaluate
from tests.helpers import layouts
from tests.helpers.saved_weights import save_weights


def noise(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_weights_not_finite_are_refused_by_name_by_every_reader(tmp_path, bad):
    save_weights(tmp_path, bad)
    run = layouts.setup(init_from=str(tmp_path))
    for read in (lambda: load_model(tmp_path), lambda: run.trained_state(tmp_path), run.new_state,
                 lambda: distillation.load_teacher(tmp_path, ema=False, dense=True, image_size=16, dtype=np.float32,
                                                   class_names=('red', 'green', 'blue'))):
        with pytest.raises(ValueError, match=r'NaN or infinity stands in 1 of \d+ arrays: blocks.1.norm1.bias \('):
            read()


@pytest.fixture(scope='module')
def overflowing(tmp_path_factory):
    """Finite weights whose logits overflow."""
    return save_weights(tmp_path_factory.mktemp('large'), scale=1e30)


def test_predict_with_logits_not_finite_reports_a_problem(overflowing):
    model = VisionModel(load_model(overflowing), batch_size=2)
    predictions = model.predict(noise(3))
    assert [prediction.top for prediction in predictions] == [()] * 3
    assert all('outputs are not finite' in prediction.problem for prediction in predictions)
    with pytest.raises(ValueError, match='has no prediction'):
        model.draw(predictions[0])
    examples, _, problems = predict_examples(model, [LabelledImage('a', noise(1)[0], None)], [0.5, 1.0])
    assert not examples and 'a: its outputs are not finite' in problems[0]


def test_export_with_logits_not_finite_is_refused(overflowing, tmp_path):
    trained = load_model(overflowing)
    plans = {'trained': trained.plan()}
    artifact.write(tmp_path, trained, plans, platforms=('cpu',), kept=False)
    with pytest.raises(ValueError, match=r'its outputs are not finite.*the export is discarded'):
        list(artifact.check(tmp_path, trained, plans))


@pytest.mark.parametrize('loss', [np.nan, np.inf])
def test_evaluate_with_a_loss_not_finite_is_refused(loss):
    def step(batch):
        return {'loss': np.array([1.0, loss, loss]), 'right': np.ones(3), 'right5': np.ones(3),
                'prediction': np.zeros(3), 'kept': (), 'token_of_patch': ()}

    batch = {'image': np.zeros((3, 4, 4, 3), np.uint8), 'label': np.zeros(3, int)}
    with pytest.raises(FloatingPointError, match='the logits of 1 of 2 images are not finite'):
        evaluate(step, [batch | {'weight': np.array([1.0, 1.0, 0.0])}], lambda batch: batch, patches=4)
    found = evaluate(step, [batch | {'weight': np.array([1.0, 0.0, 0.0])}], lambda batch: batch, patches=4)
    assert found.metrics == {'images': 1, 'loss': 1, 'top1': 1, 'top5': 1}


def test_label_map_with_a_value_not_finite_is_not_written(tmp_path, caplog):
    metadata = LabelMapsMetadata('by hand', 'data', (), classes=3, examples=3, top=1, grid=(1, 1))
    values = [1.0, np.nan, np.inf]
    entries = [Entry(str(row), LabelMap(np.full((1, 1, 1), value, np.float32), np.zeros((1, 1, 1), int)))
               for row, value in enumerate(values)]
    assert label_maps.write(tmp_path / 'some', metadata, lambda start: iter(entries[start:])) == 2
    assert 'no label map of 1: its values are not finite' in caplog.text
    maps = LabelMaps(tmp_path / 'some')
    assert ['0' in maps, '1' in maps, '2' in maps] == [True, False, False]
    with pytest.raises(ValueError, match='none of the 3 examples has a label map'):
        label_maps.write(tmp_path / 'none', metadata, lambda start: iter([entries[1]] * 3))


def test_report_json_holds_null_for_values_not_finite(tmp_path):
    report.write_json(tmp_path / 'x.json', {'rows': [{'a': float('nan'), 'b': (float('inf'), 1.5)}]})
    assert json.loads((tmp_path / 'x.json').read_text())['rows'] == [{'a': None, 'b': [None, 1.5]}]


def test_predict_with_finite_weights_returns_finite_logits(tmp_path):
    prediction, = VisionModel(load_model(save_weights(tmp_path)), batch_size=1).predict(noise(1))
    assert not prediction.problem and np.isfinite(prediction.logits).all()
