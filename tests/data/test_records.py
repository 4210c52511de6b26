"""Tests of the source of records."""

import collections

import numpy as np
import pytest

from evit_jax.data.sources import RecordSource

IMAGE = np.zeros((4, 5, 3), np.uint8)
RECORDS = [{'image': IMAGE, 'label': 0, 'id': 'first'},
           {'image': b'a file', 'label': np.int32(1), 'mask': IMAGE[..., 0]}]


class Named(list):
    class_names = ('ape', 'bat', 'cat')
    fingerprint = 'a name of its own'


def test_record_source_returns_examples_with_default_ids():
    source = RecordSource(RECORDS)
    assert len(source) == 2 and source.class_names == ('0', '1') and source.num_classes == 2
    assert source[0]['id'] == 'first' and source[1]['id'] == '0000001'
    assert source[1]['image'] == b'a file' and type(source[1]['label']) is int
    assert 'mask' in source[1] and 'mask' not in source[0]
    for outside in (-1, 2):
        with pytest.raises(IndexError):
            source[outside]


def test_record_source_uses_names_and_fingerprint_of_the_sequence():
    source = RecordSource(Named(RECORDS))
    assert source.class_names == Named.class_names
    assert source.fingerprint == RecordSource(Named(RECORDS[::-1])).fingerprint != RecordSource(RECORDS).fingerprint


def test_record_source_fingerprint_with_an_unreadable_record_is_stable():
    records = [*RECORDS, {'image': np.zeros(3), 'label': 1}]
    assert RecordSource(records).fingerprint == RecordSource(records).fingerprint != RecordSource(RECORDS).fingerprint


def test_record_source_without_records_or_names_raises():
    with pytest.raises(ValueError, match='holds no records'):
        RecordSource([])
    with pytest.raises(ValueError, match='a deque has no class names: give class_names'):
        RecordSource(collections.deque(RECORDS))
    with pytest.raises(ValueError, match='there is 1 class'):
        RecordSource(RECORDS[:1])


@pytest.mark.parametrize('record, message', [
    ((IMAGE, 1), 'record 1 has type tuple: give a dict with image and label'),
    ({'pixels': IMAGE, 'label': 1}, 'record 1 has the keys pixels, label: give a dict'),
    ({'image': IMAGE, 'label': 'cat'}, "record 1: label 'cat' is not an integer"),
    ({'image': IMAGE, 'label': 3}, r'record 1: label 3 is outside \[0, 2\]'),
    ({'image': IMAGE[0], 'label': 1}, r'record 1: the image is uint8 \[5, 3\]: give uint8 \[H, W, 3\]'),
    ({'image': IMAGE / 255, 'label': 1}, 'record 1: the image is float64'),
])
def test_record_source_invalid_record_raises_when_it_is_read(record, message):
    source = RecordSource(Named([RECORDS[0], record]))
    source[0]
    with pytest.raises(ValueError, match=message):
        source[1]
