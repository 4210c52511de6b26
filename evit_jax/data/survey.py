"""What is in a source: how large the images are, what cannot be read, how many there are of each class."""

from typing import NamedTuple

import numpy as np

from evit_jax.data import pipeline
from evit_jax.data.progress import Progress
from evit_jax.data.sources import Source

_BATCH = 64


class Survey(NamedTuple):
    """What was found in the examples that were read."""

    asked: int
    sizes: np.ndarray   # [n, 2] int32, width and height, of the readable ones
    labels: np.ndarray  # [n] int32, likewise
    failed: list[str]   # 'id: why' of the others


def survey(source: Source, count: int | None = None, *, workers: int = 0) -> Survey:
    """Reads and decodes `count` examples at equal distances, or all; says in the log how far it is.

    Args:
      workers: processes that read; with 0 a thread.
    """
    indices = np.arange(len(source))
    if count is not None and count < len(source):
        indices = np.linspace(0, len(source) - 1, count).astype(int)
    batches = pipeline.eval_batches(_Chosen(source, indices), batch_size=_BATCH, transform=_size_of,
                                    num_workers=workers)
    progress, sizes, labels, failed = Progress('reading', len(indices), 'images'), [], [], []
    try:
        for batch in batches:
            read = batch['weight'] > 0
            sizes.append(batch['image'].view(np.int32)[read])
            labels.append(batch['label'][read])
            failed += batch['failed'].tolist()
            progress.add(int((batch['index'] >= 0).sum()))
    finally:
        batches.close()
    return Survey(len(indices), np.concatenate(sizes), np.concatenate(labels), failed)


class _Chosen(NamedTuple):
    """Some examples of a source; a mask, which none asks for here, is left out."""

    source: Source
    indices: np.ndarray

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        example = self.source[int(self.indices[index])]
        return {name: example[name] for name in ('image', 'label', 'id')}


def _size_of(image: np.ndarray) -> np.ndarray:
    """Width and height as 8 bytes, in the image's place in a batch."""
    return np.array([image.shape[1], image.shape[0]], np.int32).view(np.uint8)


def sizes_said(sizes: np.ndarray) -> str:
    """'width 60 to 4,288, median 500; height ...' of [n, 2]."""
    return '; '.join(f'{name} {_range(sizes[:, axis])}' for axis, name in enumerate(('width', 'height')))


def classes_said(labels: np.ndarray, names: tuple[str, ...], rarest: int = 5) -> str:
    """'732 to 1,300, median 1,300; fewest: ...' of the labels, and how many classes have none.

    Raises:
      ValueError: a label is outside the classes.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f'label {wrong} is outside [0, {len(names) - 1}], the {len(names)} classes: are the classes '
                         f'those of these data?')
    counts = np.bincount(labels, minlength=len(names))
    few = ', '.join(f'{names[label]} {counts[label]:,}' for label in np.argsort(counts, kind='stable')[:rarest])
    empty = int((counts == 0).sum())
    return f'{_range(counts)}; fewest: {few}' + (f'; {empty:,} classes have none' if empty else '')


def _range(values: np.ndarray) -> str:
    return f'{values.min():,} to {values.max():,}, median {int(np.median(values)):,}'
