import concurrent.futures
import multiprocessing
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from evit_jax.data.sources import digits, open_source
from evit_jax.data.sources.tfds_source import TfdsSource, locate
from tests.helpers import prepared

ROOT = pathlib.Path(__file__).parents[3]
SHARDS = {'train': [9, 0, 8], 'validation': [3, 4], 'test': [2]}


def record(split, number, **changes):
    return prepared.example(**{'image': f'jpeg of {split} {number}'.encode(), 'label': number % 3,
                               'file_name': f'{split}_{number}.JPEG'.encode()} | changes)


def shards_of(split, sizes):
    ends = np.cumsum(sizes).tolist()
    return [[record(split, number) for number in range(end - size, end)] for size, end in zip(sizes, ends)]


@pytest.fixture(scope='module')
def as_tfrecord(tmp_path_factory):
    """Writes a data_dir with insects/2.0.0."""
    path = tmp_path_factory.mktemp('tfrecord')
    prepared.write_data_set(path / 'insects' / '2.0.0', {split: shards_of(split, SHARDS[split]) for split in SHARDS})
    return path


@pytest.fixture(scope='module')
def as_array_record(as_tfrecord, tmp_path_factory):
    path = tmp_path_factory.mktemp('array_record')
    prepared.as_array_record(as_tfrecord / 'insects' / '2.0.0', path / 'insects' / '2.0.0')
    return path


@pytest.fixture(params=['tfrecord', 'array_record'])
def data_dir(request, as_tfrecord, as_array_record):
    return {'tfrecord': as_tfrecord, 'array_record': as_array_record}[request.param]


def ids(source):
    return [source[i]['id'] for i in range(len(source))]


def test_tfds_source_returns_examples_in_the_order_of_the_files(data_dir):
    source = open_source('tfds', 'train', path=data_dir, dataset='insects')
    assert len(source) == 17
    assert [source[i] for i in range(17)] == [
        {'image': f'jpeg of train {i}'.encode(), 'label': i % 3, 'id': f'train_{i}.JPEG'} for i in range(17)]
    assert source.class_names == ('ant', 'bee', 'cat') and source.num_classes == 3
    assert source.image_size is None
    with pytest.raises(IndexError):
        source[17]


def test_tfds_source_slices_cover_the_split_once(data_dir):
    whole = ids(TfdsSource(data_dir, 'train', 'insects'))
    for cut in ('90%', '13%', '1', '9', '16'):
        first, second = (ids(TfdsSource(data_dir, split, 'insects')) for split in (f'train[:{cut}]', f'train[{cut}:]'))
        assert first + second == whole and first and second
    assert ids(TfdsSource(data_dir, 'train[8:10]+validation[2:5]', 'insects')) == [
        'train_8.JPEG', 'train_9.JPEG', 'validation_2.JPEG', 'validation_3.JPEG', 'validation_4.JPEG']


def test_tfds_source_auto_is_validation_before_test(data_dir):
    assert ids(TfdsSource(data_dir, 'auto', 'insects'))[0] == 'validation_0.JPEG'
    for split in ('test', 'test[:100%]'):
        assert ids(TfdsSource(data_dir, split, 'insects')) == ['test_0.JPEG', 'test_1.JPEG']
    assert TfdsSource(data_dir, 'auto', 'insects').split == 'validation'


def test_tfds_source_without_a_test_split_holds_out_a_tenth_of_train(tmp_path):
    prepared.write_data_set(tmp_path / 'one' / '1.0.0', {'train': shards_of('train', [10])})
    train, test = (ids(TfdsSource(tmp_path, split, 'one')) for split in ('train', 'auto'))
    assert (len(train), len(test)) == (9, 1) and not set(train) & set(test)
    assert len(TfdsSource(tmp_path, 'train[:100%]', 'one')) == 10


def test_tfds_source_in_workers_reads_the_same_examples(data_dir):
    source = TfdsSource(data_dir, 'train', 'insects')
    want = [source[i] for i in range(len(source))]
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        assert list(pool.map(source.__getitem__, range(len(source)), chunksize=9)) == want


def test_tfds_source_ids_without_a_file_name_are_numbers_in_the_whole_split(tmp_path):
    features = {key: feature for key, feature in prepared.FEATURES.items() if key != 'file_name'}
    shards = [[prepared.example(image=b'x', label=1)] * 3, [prepared.example(image=b'x', label=1)] * 3]
    prepared.write_data_set(tmp_path / 'nameless' / '1.0.0', {'train': shards}, features)
    assert ids(TfdsSource(tmp_path, 'train[2:5]', 'nameless')) == ['train_0000002', 'train_0000003', 'train_0000004']


def test_tfds_source_digits_copied_to_tfrecord_equal_their_build(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, 'BANK', 96)
    digits.clutter_bank.cache_clear()
    built = digits.prepare(tmp_path / 'built', {'train': 5, 'test': 3})
    digits.clutter_bank.cache_clear()
    records = {split: [[*built.as_data_source(split).data_source]] for split in ('train', 'test')}
    copy = prepared.write_data_set(tmp_path / 'cluttered_digits' / '1.2.0', records, built.info.features)
    for split in records:
        made = open_source('tfds', split, path=built.data_path, num_classes=10)
        copied = open_source('tfds', split, path=copy)
        assert [copied[i] for i in range(len(copied))] == [made[i] for i in range(len(made))]
        assert len(made) == len(records[split][0]) and made.image_size == digits.CANVAS
        seen = digits.example(0, split, 2)
        assert {key: made[2][key] for key in ('mask', 'label', 'id')} == {
            key: seen[key] for key in ('mask', 'label', 'id')}


def test_tfds_source_array_record_copy_is_readable_by_tfds(as_tfrecord, as_array_record):
    source = TfdsSource(as_tfrecord, 'train', 'insects')
    theirs = tfds.builder_from_directory(as_array_record / 'insects' / '2.0.0').as_data_source(
        'train', decoders={'image': tfds.decode.SkipDecoding()})
    assert len(theirs) == len(source)
    for ours, record in zip((source[i] for i in range(17)), theirs):
        assert (ours['image'], ours['label'], ours['id']) == (
            record['image'], record['label'], record['file_name'].decode())


def test_locate_returns_the_newest_or_the_requested_version(tmp_path):
    for version in ('2.0.0', '10.0.0', '9.0.0'):
        prepared.write_data_set(tmp_path / 'insects' / version, {'train': shards_of('train', [1])})
    (tmp_path / 'insects' / 'incomplete.XY_11.0.0').mkdir()
    assert locate(tmp_path, 'insects').name == '10.0.0'
    assert locate(tmp_path, 'insects:9.0.0').name == '9.0.0'
    assert locate(tmp_path / 'insects').name == '10.0.0'
    assert locate(tmp_path / 'insects', 'insects').name == '10.0.0'
    assert locate(tmp_path).name == '10.0.0'
    assert locate(tmp_path / 'insects' / '2.0.0').name == '2.0.0'
    with pytest.raises(FileNotFoundError, match=r"insects' holds no prepared data set 'insects:3.0.0', but 10.0.0"):
        locate(tmp_path, 'insects:3.0.0')


def test_locate_several_configs_raise_unless_one_is_requested(tmp_path):
    for config in ('large', 'small'):
        folder = prepared.write_data_set(tmp_path / 'x' / 'insects' / config, {'train': shards_of('train', [1])})
        (tmp_path / 'insects' / config).mkdir(parents=True)
        shutil.move(folder, tmp_path / 'insects' / config / '1.0.0')
    assert locate(tmp_path, 'insects/small').parent.name == 'small'
    with pytest.raises(ValueError, match=r'several data sets that fit .insects/large, insects/small.: name one'):
        locate(tmp_path, 'insects')


@pytest.mark.parametrize('changes, error, message', [
    ({'path': 'nowhere'}, FileNotFoundError, 'there is no folder .*nowhere'),
    ({'dataset': 'imagenet2012'}, FileNotFoundError,
     "no prepared data set 'imagenet2012', but insects: .*tfds build imagenet2012 --data_dir="),
    ({'dataset': 'in sects'}, ValueError, "data set 'in sects': write it like 'imagenet2012'"),
    ({'split': 'dev'}, ValueError, "no split 'dev' .there are train, validation, test"),
    ({'split': 'train[:1'}, ValueError, "split 'train.:1': Unrecognized split format"),
    ({'split': 'train[50:]'}, ValueError, "split 'train.50:.': .* incompatible with 17 examples; write"),
    ({'split': 'train[:0%]'}, ValueError, 'holds no examples .there are 17 in'),
    ({'num_classes': 10}, ValueError, "num_classes=10, but source 'tfds' has 3"),
])
def test_locate_absent_data_set_raises(as_tfrecord, changes, error, message):
    arguments = {'split': 'train', 'path': '', 'dataset': 'insects'} | changes
    with pytest.raises(error, match=message):
        open_source('tfds', **arguments | {'path': as_tfrecord / arguments['path']})


@pytest.mark.parametrize('label', [-1, 3, 2**40])
def test_tfds_source_label_out_of_range_raises_with_the_example(tmp_path, label):
    folder = prepared.write_data_set(tmp_path / 'odd' / '1.0.0', {'train': [[record('train', 0, label=label)]]})
    source = TfdsSource(folder, 'train[:100%]')
    with pytest.raises(ValueError, match=rf"'train_0.JPEG': label {label} is outside \[0, 2\]"):
        source[0]


@pytest.mark.parametrize('changed, message', [
    (b'\x0a\xff\xff', 'train_0000000'), (b'', 'has no image, or no label'),
    (record('train', 0)[:-9], 'train_0000000'), (prepared.example(image=5, label=1), 'has no image')])
def test_tfds_source_other_record_raises_with_the_example(tmp_path, changed, message):
    folder = prepared.write_data_set(tmp_path / 'odd' / '1.0.0', {'train': [[changed]]})
    with pytest.raises(ValueError, match=message):
        TfdsSource(folder, 'train[:100%]')[0]


def test_tfds_source_without_labels_raises(tmp_path):
    features = {'image': prepared.FEATURES['image'], 'caption': tfds.features.Text()}
    folder = prepared.write_data_set(tmp_path / 'odd' / '1.0.0', {'train': [[b'']]}, features)
    with pytest.raises(ValueError, match=r'image .*and label .*needed, it has .*caption \(Text\)'):
        TfdsSource(folder, 'train')


@pytest.mark.parametrize('name, text', [
    ('dataset_info.json', '{"name": '), ('dataset_info.json', '{}'),
    ('features.json', '{"type": '), ('features.json', None)])
def test_load_builder_damaged_metadata_raises(as_tfrecord, tmp_path, name, text):
    folder = shutil.copytree(as_tfrecord / 'insects' / '2.0.0', tmp_path / 'copy')
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(ValueError, match=r"copy': dataset_info.json or features.json is damaged or too old"):
        TfdsSource(folder, 'train')


def test_tfds_source_missing_files_raise_with_their_number(data_dir, tmp_path):
    folder = shutil.copytree(data_dir / 'insects' / '2.0.0', tmp_path / 'copy')
    for path in folder.glob('*train*-00002-of-00003'):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of 3 files are missing, the first is .*00002-of-00003'):
        TfdsSource(folder, 'train')
    assert len(TfdsSource(folder, 'validation')) == 7


def test_tfds_source_truncated_array_record_raises_with_file_and_example(as_array_record, tmp_path):
    folder = shutil.copytree(as_array_record / 'insects' / '2.0.0', tmp_path / 'copy')
    (file,) = folder.glob('*train*-00002-of-00003')
    file.write_bytes(file.read_bytes()[:1000])
    source = TfdsSource(folder, 'train')
    assert source[8]['id'] == 'train_8.JPEG'
    with pytest.raises(ValueError, match=r"example 'train_0000009': .*00002-of-00003' is cut off or damaged"):
        source[9]


def test_tfds_source_raises_the_limit_on_open_files(tmp_path):
    shards = {'train': [[record('train', number)] for number in range(90)]}
    one = prepared.write_data_set(tmp_path / 'many' / '1.0.0', shards)
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import pathlib
from evit_jax.data.sources.tfds_source import TfdsSource
from tests.helpers import prepared
prepared.as_array_record(pathlib.Path({os.fspath(one)!r}), pathlib.Path({os.fspath(tmp_path / 'arrays')!r}))
for path in {os.fspath(one)!r}, {os.fspath(tmp_path / 'arrays')!r}:
    source = TfdsSource(path, 'train[:100%]')
    assert [source[i]['id'] for i in range(90)] == [f'train_{{i}}.JPEG' for i in range(90)]
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tfds_source_does_not_import_tensorflow(as_tfrecord, as_array_record):
    program = f"""
import sys
from evit_jax.data.sources import open_source
for path in {os.fspath(as_tfrecord)!r}, {os.fspath(as_array_record)!r}:
    open_source('tfds', 'train', path=path, dataset='insects')[3]
assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tfds_source_is_picklable_after_reading(data_dir):
    source = TfdsSource(data_dir, 'validation', 'insects')
    source[0]
    assert ids(pickle.loads(pickle.dumps(source))) == ids(source)


def test_tfds_source_other_file_format_raises(tmp_path):
    folder = prepared.write_data_set(tmp_path / 'odd' / '1.0.0', {'train': [[b'']]}, file_format='riegeli')
    with pytest.raises(ValueError, match='stored as riegeli: prepare it as array_record or TFRecord'):
        TfdsSource(folder, 'train')


def test_tfds_source_names_are_lines_without_a_byte_order_mark(tmp_path):
    features = prepared.FEATURES | {'label': tfds.features.ClassLabel(names=['ant', 'bee', 'cat'])}
    folder = prepared.write_data_set(tmp_path / 'insects' / '1.0.0', {
        'train': [[record('train', 0, file_name=b'a\nb\xe9.jpg')]], 'test': [[record('test', 0)]]}, features)
    (names,) = folder.glob('*label*.txt')
    names.write_text('\ufeffant\nbee\x1b[31m\ncafe\u0301\n', encoding='utf-8')
    source = open_source('tfds', 'train', path=tmp_path, dataset='insects')
    assert source.class_names == ('ant', r'bee\x1b[31m', 'caf\xe9') and source[0]['id'] == r'a\nb\xe9.jpg'
