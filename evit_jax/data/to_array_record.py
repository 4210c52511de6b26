"""Copies a data set that tfds prepared as TFRecord into array_record, without TensorFlow."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from evit_jax.data import progress, tfds_source, tfrecord

_ARRAY_RECORD = tfds.core.file_adapters.ArrayRecordFileAdapter
_SPARE = 1.05  # room asked for, of the size of the source


class _Shard(NamedTuple):
    source: epath.Path
    copy: epath.Path
    count: int  # of records


def convert_to_array_record(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Makes `target`, which `tfds.builder_from_directory` and source 'tfds' read, from the TFRecord files in `source`.

    Works in `target` with '.incomplete' appended and renames that at the end. Begun again after an interruption, it
    goes on behind the last complete file. The checksum of every record is compared.

    Args:
      source: folder with the data set's dataset_info.json, or of the data set with one version in it; may be remote.
      target: not there yet.

    Raises:
      FileExistsError: `target` is there.
      ValueError: the source is no TFRecord data set, or damaged; there is no room; another conversion is under way.
    """
    if '://' in os.fspath(target):
        raise ValueError(f'{os.fspath(target)!r}: array_record files are written to mounted folders only')
    folder, target = tfds_source.locate(source), pathlib.Path(target).expanduser()
    if target.exists():
        raise FileExistsError(f'{os.fspath(target)!r} is there already: remove it, or name another folder')
    info = tfds_source.load_builder(folder).info
    if info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise ValueError(f'{os.fspath(folder)!r} is stored as {info.file_format.value}, not as tfrecord')
    work = target.with_name(f'{target.name}.incomplete')
    shards = [_Shard(path, copy, count) for split in info.splits.values()
              for path, copy, count in zip(split.filepaths, _copies(split, work), split.shard_lengths)]
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work):
        _copy_the_rest(folder, work, {shard.source.name for shard in shards})
        _convert(shards, work)
        os.rename(work, target)
    logging.info('%s: %s records in %d files', target, f'{sum(shard.count for shard in shards):,}', len(shards))


def _copies(split: tfds.core.SplitInfo, work: pathlib.Path) -> list[epath.Path]:
    template = split.filename_template.replace(data_dir=work, filetype_suffix=_ARRAY_RECORD.FILE_SUFFIX)
    return template.sharded_filepaths(split.num_shards)


@contextlib.contextmanager
def _alone(work: pathlib.Path) -> Iterator[None]:
    """Keeps a second conversion out; the system lets go of the lock when a process dies."""
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'another conversion is at work in {os.fspath(work)!r}: wait for it') from None
        yield
    finally:
        os.close(handle)


def _copy_the_rest(folder: epath.Path, work: pathlib.Path, shards: set[str]) -> None:
    """Copies features, names of labels and the like; the info says where the copy differs."""
    info = json.loads((folder / 'dataset_info.json').read_text()) | {'fileFormat': 'array_record'}
    info.pop('alternativeFileFormats', None)
    text = json.dumps(info, indent=2)
    copied = work / 'dataset_info.json'
    if copied.exists() and copied.read_text() != text:
        raise ValueError(f'{os.fspath(work)!r} was begun from other data than {os.fspath(folder)!r}: remove it')
    copied.write_text(text)
    for path in folder.iterdir():
        if path.name not in shards and path.name != copied.name and not path.name.startswith('.') and path.is_file():
            (work / path.name).write_bytes(path.read_bytes())


def _convert(shards: list[_Shard], work: pathlib.Path) -> None:
    missing = [shard for shard in shards if not _is_whole(shard)]
    total, left = (sum(shard.source.stat().length for shard in some) for some in (shards, missing))
    free = shutil.disk_usage(work).free
    if left * _SPARE > free:
        raise ValueError(f'{os.fspath(work)!r} has {free / 1e9:.1f} GB of room, and {left * _SPARE / 1e9:.1f} GB are '
                         'needed: name a folder on a larger disk')
    said = progress.Progress('converting', total / 1e6, 'MB', done=(total - left) / 1e6)
    for shard in missing:
        part = shard.copy.with_name(f'{shard.copy.name}.part')
        _ARRAY_RECORD.write_examples(part, _numbered(shard, said))
        os.replace(part, shard.copy)


def _numbered(shard: _Shard, said: progress.Progress) -> Iterator[tuple[int, bytes]]:
    for number, record in enumerate(tfrecord.read_all(os.fspath(shard.source), shard.count)):
        yield number, record
        said.add(len(record) / 1e6)


def _is_whole(shard: _Shard) -> bool:
    """Whether an earlier conversion finished the file, and nothing happened to it since."""
    try:
        return _ARRAY_RECORD.num_examples(shard.copy) == shard.count if shard.copy.exists() else False
    except RuntimeError:  # of the reader
        return False
