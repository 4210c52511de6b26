"""Surveys a source: image sizes, labels, and unreadable examples."""

from typing import NamedTuple

import numpy as np

from evit_jax.data import pipeline
from evit_jax.data.progress import Progress
from evit_jax.data.sources import Source

_BATCH = 64


class Survey(NamedTuple):
    """Result of `survey`, where n is the number of readable examples."""

    num_surveyed: int
    sizes: np.ndarray   # int32 [n, 2], width and height
    labels: np.ndarray  # int32 [n]
    failed: list[str]   # 'id: reason' for each unreadable example


def survey(source: Source, count: int | None = None, *, workers: int = 0) -> Survey:
    """Reads and decodes examples, and logs the progress.

    Args:
      count: number of evenly spaced examples to read; None reads all.
      workers: number of worker processes; 0 for a thread.
    """
    indices = np.arange(len(source))
    if count is not None and count < len(source):
        indices = np.linspace(0, len(source) - 1, count).astype(int)
    batches = pipeline.eval_batches(_Subset(source, indices), batch_size=_BATCH, transform=_size_of,
                                    num_workers=workers)
    sizes, labels, failed = [], [], []
    try:
        with Progress('reading', len(indices), 'images') as progress:
            for batch in batches:
                read = batch['weight'] > 0
                sizes.append(batch['image'].view(np.int32)[read])
                labels.append(batch['label'][read])
                failed += batch['failed'].tolist()
                progress.add(int((batch['index'] >= 0).sum()))
    finally:
        batches.close()
    return Survey(len(indices), np.concatenate(sizes), np.concatenate(labels), failed)


class _Subset(NamedTuple):
    """The examples of a source at some indices, without masks."""

    source: Source
    indices: np.ndarray

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        example = self.source[int(self.indices[index])]
        return {name: example[name] for name in ('image', 'label', 'id')}


def _size_of(image: np.ndarray) -> np.ndarray:
    """Encodes width and height as uint8 [8]. The pipeline batches this array instead of the image."""
    return np.array([image.shape[1], image.shape[0]], np.int32).view(np.uint8)


def describe_sizes(sizes: np.ndarray) -> str:
    """Describes sizes [n, 2] as 'width 60 to 4,288, median 500; height ...'."""
    return '; '.join(f'{name} {_range(sizes[:, axis])}' for axis, name in enumerate(('width', 'height')))


def describe_classes(labels: np.ndarray, names: tuple[str, ...], rarest: int = 5) -> str:
    """Describes the number of examples per class, for labels [n], as '732 to 1,300, median 1,300; fewest: ...'.

    Args:
      names: class names in the order of the labels.
      rarest: number of rarest classes to list.

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
