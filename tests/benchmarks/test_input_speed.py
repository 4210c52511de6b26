"""Benchmark of the input pipeline, with a few generated images."""

import pytest

from evit_jax.benchmarks import input_speed
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.data.transforms.geometry import TrainTransform


def measure(source, **changes):
    arguments = {'batch_size': 4, 'repeats': 3, 'workers': 0, 'seconds': 0.3, 'transform': TrainTransform(32)}
    return {tally.name: tally for tally in input_speed.measure(source, **arguments | changes)}


@pytest.mark.parametrize('size', [32, (32, 48)])
def test_measure_with_three_repeats_counts_a_third_of_a_decoding_per_image_shown(size):
    tallies = measure(GeneratedSource('train', 32, 5, encoded=(160, 120)), transform=TrainTransform(size))
    assert list(tallies) == ['read', 'decode', 'crop', 'augment', 'collate', 'pipeline, a thread', 'plain Pillow']
    for tally in tallies.values():
        assert tally.images > 0 and tally.seconds > 0
    decode = tallies['decode']
    assert decode.microseconds == pytest.approx(1e6 * decode.cpu_seconds / decode.images / 3)
    assert tallies['crop'].microseconds == pytest.approx(1e6 * tallies['crop'].cpu_seconds / tallies['crop'].images)


def test_measure_with_workers_counts_their_cpu_time(monkeypatch):
    monkeypatch.setattr(input_speed, '_ROUNDS', 1)
    tallies = measure(GeneratedSource('train', 32, 5, encoded=(160, 120)), workers=1, seconds=1.0)
    worker = tallies['pipeline, 1 workers']
    assert worker.images > 0 and worker.cpu_seconds > 0.1 * worker.seconds


def test_measure_arrays_has_no_pillow_pipeline():
    assert 'plain Pillow' not in measure(GeneratedSource('train', 32, 5))


def test_tally_minus_scales_the_other_to_the_same_images():
    both = input_speed.Tally('both', images=10, seconds=3.0, cpu_seconds=2.0)
    crop = input_speed.Tally('crop', 20, 2.0, 2.0)
    augment = both.minus(crop, 'augment')
    assert (augment.name, augment.images, augment.seconds, augment.cpu_seconds) == ('augment', 10, 2.0, 1.0)


class Unreadable:
    num_classes, class_names, image_size = 2, ('a', 'b'), None

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return {'image': b'', 'label': 0, 'id': str(index)}


def test_measure_without_a_readable_image_raises():
    with pytest.raises(ValueError, match='none of the 9 sampled examples can be read'):
        measure(Unreadable())
