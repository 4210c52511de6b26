"""Where metrics go: a JSONL file, TensorBoard events, the log.

The interface is that of `clu.metric_writers.MetricWriter`, whose own writers need TensorFlow to import: the methods
used here have the same names and arguments, so either may be handed to the training loop.
"""

import json
import math
import os
import socket
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from evit_jax.metrics import append_file
from evit_jax.runtime import storage

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD_DIR = 'tensorboard'
KINDS = ('default', 'clu')
_NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


class MetricWriter(Protocol):
    """What the training loop asks of a writer."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes values that belong to `step`; anything that `float` takes."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images: [B, H, W, C] or [H, W, C], uint8, or float in 0..1; C is 1, 3 or 4."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a flat mapping of settings, once a run."""

    def flush(self) -> None:
        """Returns when everything written so far is on disk."""

    def close(self) -> None:
        """Flushes and lets go. Nothing may be written afterwards."""


class JsonlWriter:
    """Appends one JSON object a line: `{"step": 20, "train/loss": 1.5}`, or `{"hparams": {...}}`. Takes no images.

    In a folder, a killed process loses at most the line it was writing; opening the file again removes such a half
    line. In a bucket it loses at most the lines of the last 30 s, and long files go on in `metrics.00001.jsonl` and so
    forth. JSON has no number for a value that is not finite: it is written as the string "NaN", "Infinity" or
    "-Infinity", which `float` (and `read_metrics`) turns back.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = storage.as_path(path)
        self._file = append_file.open_append_file(_parts_of(self._path), mend=_whole_lines)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if 'step' in scalars:
            raise ValueError(f"a metric named 'step' would hide the step in {self._path}: give it another name")
        self._write({'step': int(step)} | {name: float(value) for name, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        pass

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._write({'hparams': dict(hparams)})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(to_json(record), allow_nan=False, default=str).encode() + b'\n')


class TensorboardWriter:
    """Writes TensorBoard events, a new file in `logdir` for every writer, and in a bucket another for every MiB.

    The events are tensorboardX's, the files are not: its `SummaryWriter` passes events through a queue that its `flush`
    does not wait for, two of them made within a second take the same file, and in a bucket it writes everything anew
    each time.

    Args:
      resumed_at: step of the checkpoint that a run continues from; TensorBoard then hides what earlier files hold of
        later steps, which this run writes again.
    """

    def __init__(self, logdir: str | os.PathLike, resumed_at: int = 0):
        # TensorBoard reads files in the order of their names.
        name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}'
        folder, version = storage.as_path(logdir), event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2')
        self._file = append_file.open_append_file(lambda part: folder / f'{name}.{part:05d}', head=_record(version))
        if resumed_at:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(session_log=start), resumed_at + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._write(event_pb2.Event(summary=Summary(value=values)), step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            batch = _to_uint8(name, batch)
            for number, image in enumerate(batch):
                tag = name if len(batch) == 1 else f'{name}/{number}'
                self._write(event_pb2.Event(summary=summary.image(tag, image, dataformats='HWC')), step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        plain = {name: value if isinstance(value, bool | int | float | str) else str(value)
                 for name, value in hparams.items()}
        for part in summary.hparams(plain, {}):
            self._write(event_pb2.Event(summary=part), 0)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: event_pb2.Event, step: int) -> None:
        event.wall_time, event.step = time.time(), int(step)
        self._file.write(_record(event))


class ConsoleWriter:
    """Logs scalars as one short line: `[20] train/loss=1.5, train/lr=0.0005`."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        logging.info('[%d] %s', step, ', '.join(f'{name}={float(value):.4g}' for name, value in scalars.items()))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        pass

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        logging.info('settings: %s', ', '.join(f'{name}={value}' for name, value in hparams.items()))

    def flush(self) -> None:
        logging.flush()

    def close(self) -> None:
        self.flush()


class MultiWriter:
    """Passes everything on to each of its writers, in order."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for writer in self._writers:
            writer.write_images(step, images)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def create_writer(workdir: str | os.PathLike | None, kind: str = 'default', *, console: bool = False,
                  resumed_at: int = 0) -> MetricWriter:
    """A writer of `metrics.jsonl` and of TensorBoard events in `tensorboard/`, both in `workdir`.

    Args:
      workdir: a folder, or one in a bucket (`gs://...`); None writes no file (every process of a distributed run but
        the first).
      kind: who writes the events: 'default' is this module, 'clu' is `clu.metric_writers.create_default_writer`, which
        also logs.
      console: log every line of scalars too.
      resumed_at: see `TensorboardWriter`; 'clu' has no such thing.

    Raises:
      ValueError: no such kind; 'clu' without TensorFlow.
    """
    if kind not in KINDS:
        raise ValueError(f'unknown writer {kind!r}: there are {", ".join(KINDS)}')
    writers: list[MetricWriter] = []
    if workdir is not None:
        folder = storage.as_path(workdir)
        writers.append(JsonlWriter(folder / METRICS_FILE))
        if kind == 'default':
            writers.append(TensorboardWriter(folder / TENSORBOARD_DIR, resumed_at))
    if kind == 'clu':
        writers.append(_clu_writer(workdir))
    elif console:
        writers.append(ConsoleWriter())
    return MultiWriter(writers)


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """What a `JsonlWriter` wrote: one dict a step, in order of `step`, with the last value written for each name.

    A run that was killed and resumed writes some steps twice: the later value counts. A last line that was cut is
    left out.

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: a line before the last is no JSON object; names it.
    """
    steps: dict[int, dict[str, float]] = {}
    path = storage.as_path(path)
    for part in list(append_file.parts(_parts_of(path))) or [path]:
        lines = part.read_bytes().split(b'\n')
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None and line.strip() and number < len(lines):
                raise ValueError(f'line {number} of {part} is not a JSON object: {line[:80]!r}; remove it to read the '
                                 'rest')
            if record and 'step' in record:
                steps.setdefault(record['step'], {}).update(
                    {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value
                     for name, value in record.items()})
    return [steps[step] for step in sorted(steps)]


def _parts_of(path):
    return lambda part: path.with_name(f'{path.stem}.{part:05d}{path.suffix}') if part else path


def _clu_writer(workdir: str | os.PathLike | None) -> MetricWriter:
    try:
        from clu import metric_writers  # imports TensorFlow, which the default install has not
    except ImportError as error:
        raise ValueError("the writer 'clu' needs TensorFlow: pip install 'evit_jax[tf]', or take the writer "
                         f"'default' ({error})") from error
    return metric_writers.create_default_writer(None if workdir is None else os.path.join(workdir, TENSORBOARD_DIR))


def _whole_lines(content: bytes) -> bytes:
    """The same to the end of a line: a record that lacks only that is kept, a part of one is removed."""
    whole = content.rfind(b'\n') + 1
    if whole < len(content) and _parse(content[whole:]) is not None:
        return content + b'\n'
    return content[:whole]


def _record(event: event_pb2.Event) -> bytes:
    """As it stands in a file of events."""
    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    return length + struct.pack('<I', masked_crc32c(length)) + data + struct.pack('<I', masked_crc32c(data))


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or cut inside a character
        return None
    return record if isinstance(record, dict) else None


def to_json(value: Any) -> Any:
    """The same with strings for the floats that JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
    return value


def _to_uint8(name: str, images: np.ndarray) -> np.ndarray:
    """[B, H, W, C] uint8 from what `write_images` takes."""
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(f'image {name!r} has shape {images.shape}: give [B, H, W, C] or [H, W, C], with C 1, 3 or 4')
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return images
