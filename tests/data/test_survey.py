"""Tests of the survey of a source: image sizes, classes and unreadable examples."""

import numpy as np
import pytest

from evit_jax.data.survey import describe_classes, describe_sizes, survey
from tests.helpers.encoded import grey_png


class Some:
    """Example i is 10 + i pixels wide and of class i % 3; every seventh is unreadable."""
    num_classes, class_names, image_size = 3, ('cat', 'dog', 'eel'), None

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = b'torn' if index % 7 == 6 else grey_png(10 + index, 20)
        return {'image': image, 'label': index % 3, 'id': f'{index}.png', 'mask': np.zeros((20, 10 + index), np.uint8)}


@pytest.mark.parametrize('workers', [0, 1])
def test_survey_of_all_returns_sizes_labels_and_failures(workers):
    result = survey(Some(100), workers=workers)
    good = [i for i in range(100) if i % 7 != 6]
    assert result.num_surveyed == 100
    assert result.sizes.tolist() == [[10 + i, 20] for i in good]
    assert result.labels.tolist() == [i % 3 for i in good]
    assert [message.split(':')[0] for message in result.failed] == [f'{i}.png' for i in range(6, 100, 7)]


def test_survey_of_a_sample_is_evenly_spaced():
    result = survey(Some(1000), 10)
    assert result.num_surveyed == 10 and len(result.sizes) + len(result.failed) == 10
    assert result.sizes[0].tolist() == [10, 20]
    assert np.diff(result.sizes[:, 0]).min() >= 100
    assert survey(Some(4), 10).num_surveyed == 4


def test_describe_classes_lists_the_rarest_and_counts_the_empty():
    labels = np.array([0] * 9 + [1] * 2 + [3] * 5)
    assert describe_classes(labels, ('cat', 'dog', 'eel', 'fox'), rarest=2) == (
        '0 to 9, median 3; fewest: eel 0, dog 2; 1 classes have none')
    assert describe_classes(np.arange(4), tuple('abcd'), rarest=1) == '1 to 1, median 1; fewest: a 1'


@pytest.mark.parametrize('wrong', [-1, 3])
def test_describe_classes_label_outside_the_classes_raises(wrong):
    with pytest.raises(ValueError, match=rf'label {wrong} is outside \[0, 2\]'):
        describe_classes(np.array([0, wrong]), tuple('abc'))


def test_describe_sizes_returns_minimum_maximum_and_median():
    text = describe_sizes(np.array([[10, 7], [20, 7], [4000, 9]]))
    assert text == 'width 10 to 4,000, median 20; height 7 to 9, median 7'
