"""Measures the input pipeline, its stages, and a simple Pillow pipeline, all interleaved.

CPU-seconds include this process and its workers. They measure the cost of the work even if the cores are shared or
partly idle.
"""

import dataclasses
import io
import itertools
import math
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from evit_jax.data import pipeline
from evit_jax.data.order import SampleOrder
from evit_jax.data.sources import Source
from evit_jax.data.transforms import augment
from evit_jax.data.transforms.decode import decode
from evit_jax.data.transforms.geometry import TrainTransform, height_and_width, random_crop

_ROUNDS = 3
_SAMPLE = 48    # number of examples for the stages
_WARM_UP = 2    # number of batches per worker that do not count: workers start up and fill their queues
_EPOCHS = 10**6  # no measurement reaches the end of the last epoch


@dataclasses.dataclass
class Tally:
    """Accumulated measurements of one stage or pipeline."""

    name: str
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # CPU time of all processes; NaN if the system does not report it
    shown: int = 1            # number of training samples per processed image

    def add(self, images: int, seconds: float, cpu_seconds: float) -> None:
        """Adds one measurement."""
        self.images += images
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds

    def minus(self, other: 'Tally', name: str) -> 'Tally':
        """Returns the difference of the times of two tallies, for the same number of images."""
        share = self.images / other.images
        return Tally(name, self.images, max(self.seconds - share * other.seconds, 1e-9),
                     max(self.cpu_seconds - share * other.cpu_seconds, 1e-9), self.shown)

    @property
    def microseconds(self) -> float:
        """CPU time per training sample."""
        return 1e6 * self.cpu_seconds / self.images / self.shown


def measure(source: Source, transform: TrainTransform, *, batch_size: int, repeats: int, workers: int,
            seconds: float) -> list[Tally]:
    """Measures all stages and pipelines interleaved, so that a busy machine affects all of them equally.

    Args:
      source: examples to read.
      transform: augmentation; also applied in the simple pipeline.
      batch_size: batch size of this process.
      repeats: number of augmented copies of each decoded image. The simple pipeline decodes the image for every copy.
      workers: number of worker processes of the pipeline. The pipeline is also measured with a thread.
      seconds: total time of the measurements, without the time to start the workers.

    Returns:
      Tallies of read, decode, crop (including resize and flip), augment, collate, the pipelines and, if the source has
      encoded images, the simple pipeline.

    Raises:
      ValueError: no image can be read.
    """
    examples, stages = _readable(source), []
    bare = dataclasses.replace(transform, policy='none', colour_jitter=0.0)
    rows = np.empty((batch_size, *height_and_width(transform.size), 3), np.uint8)
    shown = np.zeros(rows.shape[1:], np.uint8)

    def stage(name: str, work: Callable[[int, EncodedImage], object], images: int = 1) -> Tally:
        stages.append((Tally(name, shown=images), lambda i: work(i, examples[i % len(examples)])))
        return stages[-1][0]

    read = stage('read', lambda i, example: source[i % len(source)], repeats)
    decoded = stage('decode', lambda i, example: decode(example.encoded), repeats)
    crop = stage('crop', lambda i, example: bare(example.image, np.random.default_rng(i)))
    both = stage('crop and augment', lambda i, example: transform(example.image, np.random.default_rng(i)))
    collate = stage('collate', lambda i, example: np.copyto(rows[i % batch_size], shown))
    pillow = stage('plain Pillow', _pillow(transform)) if isinstance(examples[0].encoded, bytes) else None
    pipelines = {0: Tally('pipeline, a thread')} | ({workers: Tally(f'pipeline, {workers} workers')} if workers else {})
    each = seconds / _ROUNDS / (len(stages) + 3 * len(pipelines))  # a pipeline gets 3 times as long: it yields batches
    for turn in range(_ROUNDS):
        for tally, work in stages:
            _time(tally, work, each, turn)
        for processes, tally in pipelines.items():
            _time_pipeline(tally, source, transform, batch_size, repeats, processes, 3 * each)
    return [read, decoded, crop, both.minus(crop, 'augment'), collate, *pipelines.values(),
            *([pillow] if pillow else [])]


class EncodedImage(NamedTuple):
    """An image for the stages, encoded and decoded."""

    encoded: bytes | np.ndarray
    image: np.ndarray  # decoded


def _readable(source: Source) -> list[EncodedImage]:
    """Returns the readable examples of an evenly spaced sample."""
    examples, sampled = [], min(_SAMPLE, len(source))
    for index in np.linspace(0, len(source) - 1, sampled).astype(int).tolist():
        try:
            encoded = source[index]['image']
            examples.append(EncodedImage(encoded, decode(encoded)))
        except (ValueError, OSError):
            continue
    if not examples:
        raise ValueError(f'none of the {sampled} sampled examples can be read')
    return examples


def _pillow(transform: TrainTransform) -> Callable[[int, EncodedImage], np.ndarray]:
    """Returns the function that a simple loader applies to one image: decode, crop, resize, flip, augment."""
    policy = augment.from_policy(transform.policy, transform.colour_jitter)

    def show(i: int, example: EncodedImage) -> np.ndarray:
        rng = np.random.default_rng(i)
        picture = Image.open(io.BytesIO(example.encoded)).convert('RGB')
        if transform.scale:
            top, left, height, width = random_crop(rng, picture.height, picture.width, transform.scale, transform.ratio)
            picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize(height_and_width(transform.size)[::-1], Image.Resampling.BICUBIC)
        if rng.random() < transform.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(policy(picture, rng))

    return show


def _time(tally: Tally, work: Callable[[int], object], seconds: float, turn: int) -> None:
    cpu, begin = time.process_time(), time.perf_counter()
    for count in itertools.count(1):
        work(turn + count * _ROUNDS)  # each turn uses other images
        if (passed := time.perf_counter() - begin) >= seconds:
            break
    tally.add(count, passed, time.process_time() - cpu)


def _time_pipeline(tally: Tally, source: Source, transform: TrainTransform, batch_size: int, repeats: int, workers: int,
                   seconds: float) -> None:
    sample_order = SampleOrder(batch_size, _EPOCHS, seed=0, repeats=repeats)
    batches = pipeline.train_batches(source, sample_order, transform, num_workers=workers)
    try:
        for _ in range(max(workers, 1) * _WARM_UP):
            next(batches)
        cpu, begin, images = _cpu_seconds(), time.perf_counter(), 0
        while (passed := time.perf_counter() - begin) < seconds:
            images += len(next(batches)['label'])
        tally.add(images, passed, _cpu_seconds() - cpu)
    finally:
        batches.close()


def _cpu_seconds() -> float:
    """Returns the CPU-seconds that this process and its children have used; NaN on a system without /proc."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = pathlib.Path(f'/proc/{child.pid}/stat').read_text().rpartition(')')[2].split()
        except OSError:
            return math.nan
        total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')  # user and system time
    return total


def json_rows(tallies: list[Tally]) -> list[dict[str, Any]]:
    """Returns the rates of each tally, and its CPU time per training sample."""
    return [{'name': tally.name, 'images_per_second': tally.images / tally.seconds,
             'images_per_cpu_second': tally.images / tally.cpu_seconds,
             'cpu_microseconds_per_image_shown': tally.microseconds} for tally in tallies]
