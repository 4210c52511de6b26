"""Source of the cluttered digits, the embedded data set."""

import os

import tensorflow_datasets as tfds

from evit_jax.data import splits
from evit_jax.data.fingerprint import digest
from evit_jax.data.sources import digits
from evit_jax.data.transforms.decode import decode


class DigitsSource:
    """The cluttered digits. The data set is built under `path` on first use.

    Decoded examples are cached in memory. Reading and decoding a record costs five times as much as augmenting it, and
    the decoded training split takes 250 MB.

    Args:
      path: folder of the data set.
      split: 'train' or 'test', or slices of them.
      sizes: number of examples to build in 'train' and in 'test'; default `digits.SIZES`.
    """
    splits = ('train', 'test')
    num_classes = 10
    class_names = tuple('0123456789')
    image_size = digits.CANVAS

    def __init__(self, path: str | os.PathLike, split: str, sizes: dict[str, int] | None = None):
        self.split, self._arguments = split, (os.fspath(path), split, sizes)
        skip, builder = tfds.decode.SkipDecoding(), digits.prepare(path, sizes)
        self._records = builder.as_data_source(split, decoders={'image': skip, 'mask': skip})
        # The fingerprint is the same for every spelling of a slice.
        num_examples = {name: info.num_examples for name, info in builder.info.splits.items()}
        texts = [each.split if (each.start, each.stop) == (0, num_examples[each.split]) else f'{each.split}{each[1:]}'
                 for each in splits.slices(split, num_examples)]
        self.fingerprint = digest(builder.info.full_name, '+'.join(texts))
        self._decoded: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        example = self._decoded.get(index)
        if example is None:
            record = self._records[index]
            example = {'image': decode(record['image']), 'mask': record['mask'],
                       'label': int(record['label']), 'id': record['id'].decode()}
            example['image'].flags.writeable = False
            self._decoded[index] = example
        return dict(example)

    def __reduce__(self):
        return DigitsSource, self._arguments
