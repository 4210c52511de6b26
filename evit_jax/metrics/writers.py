"""Metric writers: a JSONL file and TensorBoard events.

The interface is that of `clu.metric_writers.MetricWriter`, so a training loop can use either. The writers of clu are
optional, because they import TensorFlow.
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
    """The interface of a metric writer."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step. Values can have any type that `float` accepts."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the flat config of the run, once."""

    def flush(self) -> None:
        """Waits until all data written so far is on disk."""

    def close(self) -> None:
        """Flushes and closes the writer. Do not write afterwards."""


class JsonlWriter:
    """Appends one JSON object per line: `{"step": 20, "train/loss": 1.5}`, or `{"hparams": {...}}`.

    Local folder: a killed process loses at most its last line; the next writer removes an incomplete line. Bucket: a
    killed process loses at most the lines of the last 30 s; a long file continues in `metrics.00001.jsonl` etc. NaN and
    infinity, which JSON lacks, are written as the strings "NaN", "Infinity" and "-Infinity". `float` and `read_metrics`
    parse these strings.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = storage.as_path(path)
        self._file = append_file.open_append_file(_part_path(self._path), repair=_complete_lines)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if 'step' in scalars:
            raise ValueError(f"a metric named 'step' would hide the step in {self._path}: give it another name")
        self._write({'step': int(step)} | {name: float(value) for name, value in scalars.items()})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._write({'hparams': dict(hparams)})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(to_json(record), allow_nan=False, default=str).encode() + b'\n')


class TensorboardWriter:
    """Writes TensorBoard events to a new file in `logdir`. In a bucket, a new object begins after each MiB.

    tensorboardX makes the events and checksums. Its `SummaryWriter` is not used, for three reasons. `flush` does not
    wait for the writer thread, so a killed process loses flushed events. Two writers that start within a second
    overwrite the same file. Each flush uploads the whole file to a bucket.

    Args:
      logdir: folder of the event files.
      resumed_at: step of the checkpoint from which the run resumes. TensorBoard then hides later steps of earlier
        files, because the resumed run writes these steps again.
    """

    def __init__(self, logdir: str | os.PathLike, resumed_at: int = 0):
        # TensorBoard reads files in the order of their names. The name therefore starts with the time.
        name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}'
        folder, version = storage.as_path(logdir), event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2')
        self._file = append_file.open_append_file(lambda part: folder / f'{name}.{part:05d}', header=_record(version))
        if resumed_at:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(session_log=start), resumed_at + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._write(event_pb2.Event(summary=Summary(value=values)), step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        scalars = {name: value if isinstance(value, bool | int | float | str) else str(value)
                 for name, value in hparams.items()}
        for part in summary.hparams(scalars, {}):
            self._write(event_pb2.Event(summary=part), 0)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: event_pb2.Event, step: int) -> None:
        event.wall_time, event.step = time.time(), int(step)
        self._file.write(_record(event))


class MultiWriter:
    """Forwards each call to several writers, in order."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def create_writer(workdir: str | os.PathLike | None, kind: str = 'default', *, resumed_at: int = 0) -> MetricWriter:
    """Creates a writer for `metrics.jsonl` and `tensorboard/` in the workdir.

    Args:
      workdir: local folder or `gs://bucket/run`; None writes no files (in all processes except process 0).
      kind: writer of the events: 'default' for `TensorboardWriter`, 'clu' for
        `clu.metric_writers.create_default_writer`, which also logs the scalars.
      resumed_at: see `TensorboardWriter`; not used by clu.

    Raises:
      ValueError: unknown kind, or 'clu' without TensorFlow.
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
        writers.append(_create_clu_writer(workdir))
    return MultiWriter(writers)


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """Reads the scalars that a `JsonlWriter` wrote.

    A run that was killed and resumed writes some steps twice. The result has the last value of each metric. An
    incomplete last line is ignored.

    Returns:
      One dict for each step, ordered by the key `step`.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: a line before the last is not a JSON object; the message names the line.
    """
    steps: dict[int, dict[str, float]] = {}
    path = storage.as_path(path)
    for part in list(append_file.existing_parts(_part_path(path))) or [path]:
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


def to_json(value: Any) -> Any:
    """Replaces NaN and infinity in a nested value by the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, Mapping):
        return {name: to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
    return value


def _part_path(path):
    return lambda part: path.with_name(f'{path.stem}.{part:05d}{path.suffix}') if part else path


def _create_clu_writer(workdir: str | os.PathLike | None) -> MetricWriter:
    try:
        from clu import metric_writers  # imports TensorFlow, which is not installed by default
    except ImportError as error:
        raise ValueError("the writer 'clu' needs TensorFlow: pip install 'evit_jax[tf]', or take the writer "
                         f"'default' ({error})") from error
    return metric_writers.create_default_writer(None if workdir is None else os.path.join(workdir, TENSORBOARD_DIR))


def _complete_lines(content: bytes) -> bytes:
    """Returns the content without an incomplete last line. Adds a missing line end to a complete last record."""
    end = content.rfind(b'\n') + 1
    if end < len(content) and _parse(content[end:]) is not None:
        return content + b'\n'
    return content[:end]


def _record(event: event_pb2.Event) -> bytes:
    """Returns the TFRecord of an event: length, CRC of the length, data, CRC of the data."""
    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    return length + struct.pack('<I', masked_crc32c(length)) + data + struct.pack('<I', masked_crc32c(data))


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:  # invalid JSON, or truncated within a character
        return None
    return record if isinstance(record, dict) else None
