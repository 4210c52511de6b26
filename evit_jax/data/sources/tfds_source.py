"""Source of data sets prepared by tensorflow_datasets (tfds), as array_record or TFRecord, without TensorFlow."""

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
from evit_jax.data.sources.base import check_index

_NAME = re.compile(r'(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?')
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_INFO = 'dataset_info.json'
_IDS = ('file_name', 'id')  # text features that name an example
_MAX_OPEN_FILES = 10_240    # limit to request; macOS allows no more
_OTHER_FILES = 128          # open files of the process that are not data


class TfdsSource:
    """Slices of the splits of a prepared data set with the features image and label, and optionally mask.

    The id of an example is the file name in its record. If the record has none, the id is the split and the number.

    Args:
      path: data_dir of tfds, or the folder of the data set within it.
      split: 'train' or 'auto' (see `splits.resolve`), or a split or slice in tfds notation.
      dataset: name within a data_dir: 'imagenet2012', 'imagenet2012:5.1.0' or 'name/config:1.0.0'.
      cache: folder for the index of TFRecord files if it cannot be written to their folder.

    Raises:
      OSError: the data set is absent, unprepared or incomplete.
      ValueError: the data set lacks features, is damaged, or does not have the split.
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
        self.slices = splits.slices(self.split, {
            name: split_info.num_examples for name, split_info in info.splits.items()})
        self._ends = np.cumsum([each.stop - each.start for each in self.slices])
        self._records = {each.split: _open(builder, each.split, cache) for each in self.slices}
        self.fingerprint = _fingerprint(info, self.slices)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        row = int(np.searchsorted(self._ends, index, 'right'))
        split, _, stop = self.slices[row]
        number = stop - int(self._ends[row]) + index
        name = f'{split}_{number:07d}'
        try:
            features = self._parse(self._records[split][number])
        except (ValueError, DecodeError) as error:
            raise ValueError(f'example {name!r}: {error}') from error
        image, label = features.get('image'), features.get('label')
        if not isinstance(image, bytes) or not isinstance(label, int):
            raise ValueError(f'example {name!r} has no image, or no label')
        name = next((in_one_line(os.fsdecode(features[key])) for key in _IDS if features.get(key)), name)
        if not 0 <= label < self.num_classes:
            raise ValueError(f'example {name!r}: label {label} is outside [0, {self.num_classes - 1}]'
                             + ('; are the labels of this split withheld?' if label == -1 else ''))
        mask = {'mask': features['mask']} if 'mask' in features else {}
        return {'image': image, 'label': label, 'id': name} | mask

    def _parse(self, record: bytes) -> dict[str, bytes | int]:
        """Returns the first value of each feature in `self._keys`."""
        feature = tf_example_pb2.Example.FromString(record).features.feature
        return {key: values[0] for key in self._keys
                if (values := feature[key].bytes_list.value or feature[key].int64_list.value)}


class ArrayRecords:
    """Records of a split in array_record files, as bytes. Errors name the file."""

    def __init__(self, records: Sequence[bytes], files: Sequence[str], counts: Sequence[int]):
        self._records, self._files, self._ends = records, tuple(files), np.cumsum(counts)

    def __getitem__(self, number: int) -> bytes:
        try:
            return self._records[number]
        except RuntimeError as error:
            file = self._files[np.searchsorted(self._ends, number, 'right')]
            raise ValueError(f'{file!r} is cut off or damaged, copy it or prepare it again ({error})') from error


def locate(path: str | os.PathLike, dataset: str = '') -> epath.Path:
    """Returns the folder of a prepared data set, which holds dataset_info.json. The newest version is selected.

    Raises:
      ValueError: `dataset` is not in tfds notation, or several data sets match.
      FileNotFoundError: the data set is absent or unprepared.
    """
    root = epath.Path(path).expanduser()
    match = _NAME.fullmatch(dataset)
    if dataset and not match:
        raise ValueError(f"data set {dataset!r}: write it like 'imagenet2012', 'imagenet2012:5.1.0' or "
                         "'name/config:1.0.0'")
    try:
        if not root.is_dir():
            raise FileNotFoundError(f'there is no folder {os.fspath(root)!r}')
    except ImportError as error:  # epath lacks packages for gs://
        raise ValueError(f'{os.fspath(root)!r} cannot be reached: {error}') from error
    if (root / _INFO).exists():
        return root
    name, config, version = match.group('name', 'config', 'version') if match else (root.name, None, None)
    folder = root if root.name == name else root / name
    candidates = [folder / config] if config else [folder, *_folders(folder)]
    matches = {os.fspath(each.relative_to(root)): versions for each in candidates
               if (versions := _versions(each, version))}
    if not matches:
        raise FileNotFoundError(_missing_message(root, dataset, folder))
    if len(matches) > 1:
        raise ValueError(f'{os.fspath(root)!r} holds several data sets that fit ({", ".join(matches)}): name one of '
                         'them')
    (versions,) = matches.values()
    return max(versions, key=lambda folder: [int(number) for number in folder.name.split('.')])


def load_builder(folder: epath.Path) -> tfds.core.DatasetBuilder:
    """Returns the builder of a prepared data set. Only its info and file paths are used.

    Raises:
      ValueError: dataset_info.json or features.json is unreadable.
    """
    try:
        return tfds.builder_from_directory(folder)
    except (ValueError, ParseError) as error:
        raise ValueError(f'{os.fspath(folder)!r}: dataset_info.json or features.json is damaged or too old; copy or '
                         f'prepare the data set again ({error})') from error


def _versions(folder: epath.Path, version: str | None) -> list[epath.Path]:
    """Returns the folders of the prepared versions of a data set, or only of the requested version."""
    inner = folder.iterdir() if folder.is_dir() else ()
    return [each for each in inner if _VERSION.fullmatch(each.name) and version in (None, each.name)
            and (each / _INFO).exists()]


def _folders(folder: epath.Path) -> list[epath.Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir()) if folder.is_dir() else []


def _missing_message(root: epath.Path, dataset: str, folder: epath.Path) -> str:
    parent = folder if folder.is_dir() else root
    names = ', '.join(inner.name for inner in _folders(parent)[:10]) or 'no folders'
    return (f'{os.fspath(parent)!r} holds no prepared data set{f" {dataset!r}" if dataset else ""}, but {names}: name '
            f'one that is there, or prepare it with "tfds build {dataset or "NAME"} --data_dir={os.fspath(root)} '
            '--file_format=array_record" (this needs TensorFlow)')


def _keys(info: tfds.core.DatasetInfo) -> tuple[str, ...]:
    """Returns the names of the features to read."""
    features = dict(info.features.items()) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    if not (isinstance(features.get('image'), tfds.features.Image)
            and isinstance(features.get('label'), tfds.features.ClassLabel) and features['label'].num_classes):
        kinds = ', '.join(f'{key} ({type(feature).__name__})' for key, feature in features.items()) or 'no named ones'
        raise ValueError(f'data set {info.full_name!r}: the features image (an Image) and label (a ClassLabel) are '
                         f'needed, it has {kinds}')
    texts = [key for key in _IDS if isinstance(features.get(key), tfds.features.Text)]
    return 'image', 'label', *texts, *(['mask'] if isinstance(features.get('mask'), tfds.features.Image) else [])


def _fingerprint(info: tfds.core.DatasetInfo, slices: Sequence[splits.SplitSlice]) -> str:
    """Returns a digest of name, version, slices and split sizes. TFRecord and array_record files have the same one."""
    used = {name: info.splits[name] for name in dict.fromkeys(each.split for each in slices)}
    sizes = [f'{name} {split.shard_lengths} {split.num_bytes}' for name, split in used.items()]
    return digest(info.full_name, *(f'{each.split}[{each.start}:{each.stop}]' for each in slices), *sizes)


def _open(builder: tfds.core.DatasetBuilder, split: str, cache: str | None) -> ArrayRecords | tfrecord.TFRecords:
    """Opens the records of a whole split."""
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if not formats & {'array_record', 'tfrecord'}:
        raise ValueError(f'{os.fspath(builder.data_path)!r} is stored as {", ".join(sorted(formats))}: prepare it as '
                         'array_record or TFRecord')
    as_arrays = 'array_record' in formats
    records = builder.as_data_source(split, file_format='array_record').data_source if as_arrays else None
    info = builder.info.splits[split]  # read last: as_data_source selects the file format
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
    """Raises the limit on open files, because both readers keep every file of a split open.

    The default limit is often 1,024. Worker processes inherit the raised limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    current, highest = (_MAX_OPEN_FILES if limit == resource.RLIM_INFINITY else min(limit, _MAX_OPEN_FILES)
                        for limit in (soft, hard))
    if current < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    if count + _OTHER_FILES > highest:
        raise ValueError(f'{count} files of data cannot be kept open: the limit is {highest}; raise it with `ulimit '
                         '-n`, or prepare the data set in fewer files')
