"""Writes data sets in the format of tfds: TFRecord files, features.json and dataset_info.json."""

import json
import shutil
import struct

import tensorflow_datasets as tfds

from evit_jax.data.sources import tfrecord


def crc32c(data):
    """Returns the CRC-32C of the data, bit by bit as in its definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def checksum(data):
    crc = crc32c(data)
    return struct.pack('<I', (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF)


def write_tfrecord(path, records):
    with open(path, 'wb') as file:
        for record in records:
            length = struct.pack('<Q', len(record))
            file.write(length + checksum(length) + record + checksum(record))


def read_tfrecord(path, count=None):
    """Returns all records of a file."""
    content = path.read_bytes()
    return [content[start + 12:start + 12 + length] for start, length in zip(*tfrecord.scan(str(path), count))]


def example(**features):
    """Returns an encoded tf.train.Example that maps names to lists of one value."""
    entries = b''.join(_field(1, _field(1, name.encode()) + _field(2, _feature(value)))
                       for name, value in features.items())
    return _field(1, entries)


def _feature(value):
    return _field(1, _field(1, value)) if isinstance(value, bytes) else _field(3, _field(1, _varint(value)))


def _field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value):
    value &= (1 << 64) - 1
    data = b''
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


FEATURES = {
    'file_name': tfds.features.Text(),
    'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
    'label': tfds.features.ClassLabel(names=['ant', 'bee', 'cat']),
}


def write_data_set(folder, splits, features=None, file_format='tfrecord'):
    """Writes a data set and returns its folder.

    Args:
      folder: NAME/VERSION; created.
      splits: split name -> list of shards, each a list of records.
    """
    folder.mkdir(parents=True)
    name = folder.parent.name
    for split, shards in splits.items():
        for number, records in enumerate(shards):
            write_tfrecord(folder / f'{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}', records)
    tfds.features.FeaturesDict(FEATURES if features is None else features).save_config(folder)
    (folder / 'dataset_info.json').write_text(json.dumps({
        'name': name, 'version': folder.name, 'fileFormat': file_format, 'splits': [
            {'name': split, 'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}', 'numBytes': '1',
             'shardLengths': [str(len(shard)) for shard in shards]} for split, shards in splits.items()]}))
    return folder


def as_array_record(source, target):
    """Copies a data set of TFRecord files to array_record files with the same records; returns its folder."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns('*.tfrecord*', '.*'))
    info = json.loads((source / 'dataset_info.json').read_text())
    (target / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'array_record'}))
    counts = [int(count) for split in info['splits'] for count in split['shardLengths']]
    paths = [path for split in info['splits'] for path in sorted(source.glob(f'*-{split["name"]}.tfrecord-*'))]
    for path, count in zip(paths, counts, strict=True):
        tfds.core.file_adapters.ArrayRecordFileAdapter.write_examples(
            target / path.name.replace('tfrecord', 'array_record'), enumerate(read_tfrecord(path, count)))
    return target
