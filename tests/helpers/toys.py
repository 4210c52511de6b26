"""Sources and transforms that make every example identifiable, for tests of the pipeline."""

from typing import NamedTuple

import numpy as np

from evit_jax.data import pipeline
from evit_jax.data.order import SampleOrder
from evit_jax.data.transforms import geometry

SIDE = 8


class Numbered:
    """Example i has label i and an image of noise from seed i."""
    num_classes, class_names, image_size = 1000, (), SIDE

    def __init__(self, size, masked=False):
        self.size, self.masked = size, masked

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        image = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        mask = {'mask': np.where(image[..., 0] > 99, np.uint8(255), np.uint8(100))} if self.masked else {}
        return {'image': image, 'label': index, 'id': f'number {index}'} | mask


class Broken(Numbered):
    """Examples 2, 7, 12, ... are not images; reading examples 3, 8, 13, ... raises an error."""

    def __getitem__(self, index):
        if index % 5 == 3:
            raise OSError(f'disk error at {index}')
        return super().__getitem__(index) | ({'image': b'\xff\xd8no'} if index % 5 == 2 else {})


class Counting(Numbered):
    def __init__(self, size):
        super().__init__(size)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


class Jitter(NamedTuple):
    """A training transform: resizes and augments."""
    size: int = SIDE

    def __call__(self, image, rng):
        return geometry.jitter(geometry.resize(image, self.size), rng, shift=2)


class Plain(NamedTuple):
    """An evaluation transform: resizes."""
    size: int = SIDE

    def __call__(self, image):
        return geometry.resize(image, self.size)

    def mask(self, mask):
        return geometry.decode_mask(mask, (self.size, self.size))


def marked(image, rng):
    """Returns random bytes with the first pixel of the image, which identifies it."""
    noise = np.frombuffer(rng.bytes(3 * SIDE * SIDE), np.uint8).reshape(SIDE, SIDE, 3).copy()
    noise[0, 0] = image[0, 0]
    return noise


def read_all(batches):
    try:
        return list(batches)
    finally:
        batches.close()


def train(source, start_step=0, **changes):
    """Returns all batches of a training; `changes` are fields of `SampleOrder` or arguments of `train_batches`."""
    source = Numbered(source) if isinstance(source, int) else source
    fields = {name: changes.pop(name) for name in SampleOrder._fields if name in changes}
    sample_order = SampleOrder(**{'batch_size': 4, 'epochs': 3, 'seed': 7} | fields)
    return read_all(pipeline.train_batches(source, sample_order, changes.pop('transform', Jitter()),
                                           start_step=start_step, **changes))


def evaluate(source, **arguments):
    return read_all(pipeline.eval_batches(source, **{'batch_size': 4, 'transform': Plain()} | arguments))


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def joined(batches, key='label'):
    return np.concatenate([batch[key] for batch in batches])


def labels(batches):
    return joined(batches).tolist()
