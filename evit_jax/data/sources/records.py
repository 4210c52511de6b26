"""Source of records from a random-access sequence, such as a list or a Grain data source."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evit_jax.data.fingerprint import digest, evenly_spaced
from evit_jax.data.names import in_one_line
from evit_jax.data.sources.arrays import names_of_labels
from evit_jax.data.sources.base import check_index

_NUM_SAMPLED = 16  # records in a fingerprint


class RecordSource:
    """Examples from a sequence of records. It has `__len__` and `__getitem__`, like Grain's RandomAccessDataSource.

    A record is a mapping with 'image' (uint8 [H, W, 3], or the bytes of an image file) and 'label' (int), and
    optionally 'id' (str, unique) and 'mask'. The default id is the number of the record. Worker processes receive the
    pickled sequence.

    Args:
      records: the sequence.
      class_names: names of the classes in the order of their labels. If empty, the attribute `class_names` of the
        sequence is used. The classes of a list or tuple without names are numbered from '0' to the largest label.

    Raises:
      ValueError: there are no records or no class names, a label is outside the classes, there are fewer than two
        classes, or, when an example is read, its record is invalid.
    """
    image_size = None

    def __init__(self, records: Sequence[Mapping[str, Any]], class_names: Sequence[str] = ()):
        if not len(records):
            raise ValueError('the sequence holds no records: give at least one with image and label')
        self._records = records
        class_names = tuple(class_names or getattr(records, 'class_names', ()))
        if class_names:
            self.class_names = names_of_labels(np.zeros(0, int), class_names)
        elif isinstance(records, list | tuple):
            labels = [_label_of(record, index) for index, record in enumerate(records)]
            self.class_names = names_of_labels(np.array(labels))
        else:
            raise ValueError(f'a {type(records).__name__} has no class names: give class_names, in the order of the '
                             'labels')
        self.num_classes = len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Digest of the sequence's own fingerprint, or else of its length and 16 records; and of the class names."""
        own = getattr(self._records, 'fingerprint', None)
        if own is not None:
            return digest(str(own), *self.class_names)
        samples = (text for row in evenly_spaced(len(self), _NUM_SAMPLED) for text in self._sample(row))
        return digest('records', str(len(self)), *self.class_names, *samples)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        record = self._records[index]
        label = _label_of(record, index)
        if not 0 <= label < self.num_classes:
            raise ValueError(f'record {index}: label {label} is outside [0, {self.num_classes - 1}]')
        image = record.get('image')
        if not isinstance(image, bytes):
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(f'record {index}: the image is {image.dtype} {list(image.shape)}: give uint8 '
                                 '[H, W, 3], or the bytes of an image file')
        name = record.get('id', f'{index:07d}')
        name = os.fsdecode(name) if isinstance(name, bytes) else str(name)
        mask = {'mask': record['mask']} if record.get('mask') is not None else {}
        return {'image': image, 'label': label, 'id': in_one_line(name)} | mask

    def _sample(self, index: int) -> tuple[str | bytes, ...]:
        try:
            example = self[index]
        except (ValueError, OSError):
            return (f'unreadable {index}',)
        image = example['image']
        return example['id'], str(example['label']), image if isinstance(image, bytes) else image.tobytes()


def _label_of(record: Any, index: int) -> int:
    if not isinstance(record, Mapping) or not {'image', 'label'} <= record.keys():
        keys = ', '.join(map(str, record)) if isinstance(record, Mapping) else ''
        kind = f'the keys {keys}' if keys else f'type {type(record).__name__}'
        raise ValueError(f'record {index} has {kind}: give a dict with image and label')
    label = np.asarray(record['label'])
    if label.ndim or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f'record {index}: label {record["label"]!r} is not an integer')
    return int(label)
