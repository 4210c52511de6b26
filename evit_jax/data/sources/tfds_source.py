"""Data sets prepared by tensorflow_datasets, as array_record or as TFRecord. Reads both without TensorFlow."""

import os
import re
import resource
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from evit_jax.data import splits
from evit_jax.data.classes import display_name
from evit_jax.data.fingerprint import digest
from evit_jax.data.names import in_one_line
from evit_jax.data.sources import tfrecord

_ASKED = re.compile(r'(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?')
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_INFO = 'dataset_info.json'
_IDS = ('file_name', 'id')  # text features that name an example
_OPEN_FILES = 10_240        # asked of the system, which often allows more; macOS does not
_OWN_FILES = 128            # that are not the data's


class TfdsSource:
    """A split, or slices of splits, of a prepared data set with the features image and label (and mask, if it has one).

    Ids are the records' file names or, where they have none, the split and the number in it.

    Args:
      path: tfds' data_dir, or the data set's own folder in it.
      split: 'train' or 'auto' (see `splits.resolve`), or a split or slice as tfds writes it.
      dataset: 'imagenet2012', 'imagenet2012:5.1.0' or 'name/config:1.0.0', to be found in a data_dir.
      cache: folder for the index of TFRecord files where it cannot be kept beside them.
    """

    def __init__(self, path: str | os.PathLike, split: str, dataset: str = '', cache: str | None = None):
        builder = load_builder(locate(path, dataset))
        info = builder.info
        self._keys = _keys(info)
        self.class_names = tuple(display_name(name.lstrip('\ufeff')) for name in info.features['label'].names)
        self.num_classes = len(self.class_names)
        height, width, _ = info.features['image'].shape
        self.image_size = height if height == width else None
        self.split = splits.resolve(split, info.splits)
        self.parts = splits.parts(self.split, {
            name: of.num_examples for name, of in info.splits.items()})
        self._ends = np.cumsum([part.stop - part.start for part in self.parts])
        self._records = {part.split: _open(builder, part.split, cache) for part in self.parts}
        self.fingerprint = _fingerprint(info, self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        part = int(np.searchsorted(self._ends, index, 'right'))
        split, _, stop = self.parts[part]
        number = stop - int(self._ends[part]) + index
        name = f'{split}_{number:07d}'
        try:
            first = self._parse(self._records[split][number])
        except (ValueError, DecodeError) as error:
            raise ValueError(f'example {name!r}: {error}') from error
        image, label = first.get('image'), first.get('label')
        if not isinstance(image, bytes) or not isinstance(label, int):
            raise ValueError(f'example {name!r} has no image, or no label')
        name = next((in_one_line(os.fsdecode(first[key])) for key in _IDS if first.get(key)), name)
        if not 0 <= label < self.num_classes:
            raise ValueError(f'example {name!r}: label {label} is outside [0, {self.num_classes - 1}]'
                             + ('; are the labels of this split withheld?' if label == -1 else ''))
        mask = {'mask': first['mask']} if 'mask' in first else {}
        return {'image': image, 'label': label, 'id': name} | mask

    def _parse(self, record: bytes) -> dict[str, bytes | int]:
        """The first value of each feature that is read."""
        feature = tf_example_pb2.Example.FromString(record).features.feature
        return {key: values[0] for key in self._keys
                if (values := feature[key].bytes_list.value or feature[key].int64_list.value)}


class ArrayRecords:
    """The records of a split in array_record files, as bytes; errors name the file."""

    def __init__(self, records: Sequence[bytes], files: Sequence[str], counts: Sequence[int]):
        self._records, self._files, self._ends = records, tuple(files), np.cumsum(counts)

    def __getitem__(self, number: int) -> bytes:
        try:
            return self._records[number]
        except RuntimeError as error:
            file = self._files[np.searchsorted(self._ends, number, 'right')]
            raise ValueError(f'{file!r} is cut off or damaged, copy it or prepare it again ({error})') from error


def locate(path: str | os.PathLike, dataset: str = '') -> epath.Path:
    """The folder with the dataset_info.json of a prepared data set; of several versions the newest.

    Raises:
      ValueError: `dataset` is not written as tfds does, or several data sets fit.
      FileNotFoundError: it is not there, or not prepared.
    """
    root = epath.Path(path).expanduser()
    asked = _ASKED.fullmatch(dataset)
    if dataset and not asked:
        raise ValueError(f"data set {dataset!r}: write it like 'imagenet2012', 'imagenet2012:5.1.0' or "
                         "'name/config:1.0.0'")
    try:
        if not root.is_dir():
            raise FileNotFoundError(f'there is no folder {os.fspath(root)!r}')
    except ImportError as error:  # of what epath needs for gs://
        raise ValueError(f'{os.fspath(root)!r} cannot be reached: {error}') from error
    if (root / _INFO).exists():
        return root
    name, config, version = asked.group('name', 'config', 'version') if asked else (root.name, None, None)
    home = root if root.name == name else root / name
    homes = [home / config] if config else [home, *_folders(home)]
    found = {os.fspath(each.relative_to(root)): versions for each in homes if (versions := _versions(each, version))}
    if not found:
        raise FileNotFoundError(_missing(root, dataset, home))
    if len(found) > 1:
        raise ValueError(f'{os.fspath(root)!r} holds several data sets that fit ({", ".join(found)}): name one of them')
    (versions,) = found.values()
    return max(versions, key=lambda folder: [int(number) for number in folder.name.split('.')])


def load_builder(folder: epath.Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared data set, of which only the info and the files' places are used.

    Raises:
      ValueError: what describes the data set cannot be read.
    """
    try:
        return tfds.builder_from_directory(folder)
    except (ValueError, ParseError) as error:
        raise ValueError(f'{os.fspath(folder)!r}: dataset_info.json or features.json is damaged or too old; copy or '
                         f'prepare the data set again ({error})') from error


def _versions(folder: epath.Path, version: str | None) -> list[epath.Path]:
    """The prepared versions of a data set, or the one asked for."""
    inner = folder.iterdir() if folder.is_dir() else ()
    return [each for each in inner if _VERSION.fullmatch(each.name) and version in (None, each.name)
            and (each / _INFO).exists()]


def _folders(folder: epath.Path) -> list[epath.Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir()) if folder.is_dir() else []


def _missing(root: epath.Path, dataset: str, home: epath.Path) -> str:
    seen = home if home.is_dir() else root
    found = ', '.join(folder.name for folder in _folders(seen)[:10]) or 'no folders'
    return (f'{os.fspath(seen)!r} holds no prepared data set{f" {dataset!r}" if dataset else ""}, but {found}: name '
            f'one that is there, or prepare it with "tfds build {dataset or "NAME"} --data_dir={os.fspath(root)} '
            '--file_format=array_record" (this needs TensorFlow)')


def _keys(info: tfds.core.DatasetInfo) -> tuple[str, ...]:
    """The features that are read."""
    features = dict(info.features.items()) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    if not (isinstance(features.get('image'), tfds.features.Image)
            and isinstance(features.get('label'), tfds.features.ClassLabel) and features['label'].num_classes):
        kinds = ', '.join(f'{key} ({type(feature).__name__})' for key, feature in features.items()) or 'no named ones'
        raise ValueError(f'data set {info.full_name!r}: the features image (an Image) and label (a ClassLabel) are '
                         f'needed, it has {kinds}')
    texts = [key for key in _IDS if isinstance(features.get(key), tfds.features.Text)]
    return 'image', 'label', *texts, *(['mask'] if isinstance(features.get('mask'), tfds.features.Image) else [])


def _fingerprint(info: tfds.core.DatasetInfo, parts: Sequence[splits.Part]) -> str:
    """A digest of name, version, slices, and the sizes of the splits; the same as TFRecord and as array_record."""
    used = {name: info.splits[name] for name in dict.fromkeys(part.split for part in parts)}
    sizes = [f'{name} {split.shard_lengths} {split.num_bytes}' for name, split in used.items()]
    return digest(info.full_name, *(f'{part.split}[{part.start}:{part.stop}]' for part in parts), *sizes)


def _open(builder: tfds.core.DatasetBuilder, split: str, cache: str | None) -> ArrayRecords | tfrecord.TFRecords:
    """The records of a whole split."""
    formats = {of.value for of in builder.info.available_file_formats()}
    if not formats & {'array_record', 'tfrecord'}:
        raise ValueError(f'{os.fspath(builder.data_path)!r} is stored as {", ".join(sorted(formats))}: prepare it as '
                         'array_record or TFRecord')
    as_arrays = 'array_record' in formats
    records = builder.as_data_source(split, file_format='array_record').data_source if as_arrays else None
    info = builder.info.splits[split]  # not before: of two formats, the line above makes it tell of this one's files
    files = [os.fspath(path) for path in info.filepaths]
    _check_present(builder.data_path, files)
    _allow_open_files(len(files))
    if as_arrays:
        return ArrayRecords(records, files, info.shard_lengths)
    return tfrecord.open_records(files, info.shard_lengths, name=split, cache=cache)


def _check_present(folder: epath.Path, files: Sequence[str]) -> None:
    present = {path.name for path in folder.iterdir()}
    missing = [file for file in files if os.path.basename(file) not in present]
    if missing:
        raise FileNotFoundError(f'{len(missing)} of {len(files)} files are missing, the first is {missing[0]!r}: '
                                'copy or prepare the data set again')


def _allow_open_files(count: int) -> None:
    """Raises the limit, often 1,024: both readers keep every file of a split open. Worker processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now, most = (_OPEN_FILES if limit == resource.RLIM_INFINITY else min(limit, _OPEN_FILES) for limit in (soft, hard))
    if now < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if count + _OWN_FILES > most:
        raise ValueError(f'{count} files of data cannot be kept open: {most} may be; allow more with `ulimit -n`, or '
                         'prepare the data set in fewer files')
