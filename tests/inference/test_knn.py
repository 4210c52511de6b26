"""k-NN classification of features: against a loop, on images, and wrong arguments."""

import numpy as np
import pytest

import evit_jax
from evit_jax.data.sources import ArraySource
from evit_jax.inference import knn
from tests.helpers import tiny


def unit(shape, seed):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def loop(gallery, labels, query, *, k, temperature, classes):
    """Classifies one query in float64, as the definition says."""
    votes = np.zeros(classes)
    similarity = gallery.astype(float) @ query.astype(float)
    for index in np.argsort(-similarity)[:k]:
        votes[labels[index]] += np.exp(similarity[index] / temperature)
    return votes.argmax()


@pytest.mark.parametrize('temperature', [0.07, 1.0])
def test_classify_equals_a_loop(temperature):
    gallery, queries = unit((60, 5), 1), unit((40, 5), 2)
    labels = np.random.default_rng(3).integers(0, 7, 60).astype(np.int32)
    predicted = knn.classify(gallery, labels, queries, k=(1, 4, 20), temperature=temperature, classes=7)
    for row, k in zip(predicted, (1, 4, 20), strict=True):
        wanted = [loop(gallery, labels, query, k=k, temperature=temperature, classes=7) for query in queries]
        np.testing.assert_array_equal(row, wanted)


def test_classify_with_a_small_temperature_does_not_overflow():
    gallery = unit((6, 3), 0)
    predicted = knn.classify(gallery, np.arange(6), gallery, k=(6,), temperature=1e-3, classes=6)
    np.testing.assert_array_equal(predicted[0], np.arange(6))


def test_accuracies_in_chunks_equal_those_at_once(monkeypatch):
    gallery, queries = (knn.Features(unit((30, 4), seed), np.arange(30) % 3, seed) for seed in (1, 2))
    at_once = knn.accuracies(gallery, queries, 3, k=(1, 5), temperature=0.07)
    monkeypatch.setattr(knn, '_CELLS', 100)
    assert knn.accuracies(gallery, queries, 3, k=(1, 5), temperature=0.07) == at_once
    assert at_once['left_out'] == 3 and (at_once['gallery'], at_once['queries']) == (30, 30)


def test_knn_of_the_gallery_itself_finds_each_image():
    pixels, labels = tiny.stripes(24)
    result = evit_jax.knn(tiny.model(), (pixels, labels), (pixels, labels), k=(1,), batch_size=16)
    assert result == {'top1_k1': 1.0, 'gallery': 24, 'queries': 24, 'left_out': 0}


def test_knn_features_are_those_of_forward_under_the_plan():
    model, pixels = tiny.model(), tiny.images(6)
    dense = model.with_plan(keep_rate=1.0)
    source = ArraySource(pixels, np.arange(6) % 3, tiny.NAMES)
    for each in (model, dense):
        features = knn.compute_features(each, source, 'gallery', batch_size=4)
        wanted = np.asarray(each.forward(pixels).features)
        np.testing.assert_allclose(features.values, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), rtol=1e-5,
                                   atol=1e-6)
    result = evit_jax.knn(model, (pixels, np.arange(6) % 3), (pixels, np.arange(6) % 3), k=(1,), gallery_model=dense)
    assert 0 <= result['top1_k1'] <= 1


def test_knn_leaves_out_unreadable_images():
    records = [{'image': image, 'label': number % 3} for number, image in enumerate(tiny.images(6))]
    broken = [records[0] | {'image': b'no image'}, *records[1:]]
    result = evit_jax.knn(tiny.model(), records, broken, k=(1, 2))
    assert (result['queries'], result['left_out'], result['top1_k1']) == (5, 1, 1.0)
    with pytest.raises(ValueError, match='none of the 1 images of the queries can be read'):
        knn.compute_features(tiny.model(), evit_jax.as_source([broken[0]], tiny.NAMES), 'queries', batch_size=2)


@pytest.mark.parametrize(('options', 'message'), [
    ({'k': (0, 3)}, r'k=\(0, 3\) is outside \[1, 6\]'), ({'k': (7,)}, r'k=\(7,\) is outside'), ({'k': ()}, 'k='),
    ({'k': (1,), 'temperature': 0.0}, r'temperature=0.0 is not positive')])
def test_knn_with_a_value_out_of_range_is_refused(options, message):
    data = tiny.images(6), np.arange(6) % 3
    with pytest.raises(ValueError, match=message):
        evit_jax.knn(tiny.model(), data, data, **options)


def test_knn_with_other_classes_in_the_queries_is_refused():
    sources = [ArraySource(tiny.images(6), np.arange(6) % 3, names) for names in (tiny.NAMES, ('a', 'b', 'c'))]
    with pytest.raises(ValueError, match='or their names differ'):
        evit_jax.knn(tiny.model(), *sources, k=(1,))
