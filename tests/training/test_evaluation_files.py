"""The result files of an evaluation: their names, and when they are replaced or refused."""

import errno
import json

import pytest
from PIL import Image

from evit_jax.data import sources
from evit_jax.data.sources import digits
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import storage
from evit_jax.training import evaluation_files, loop, results
from tests.helpers import layouts

NAME = 'evaluate-evit-16-12at1-fused'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('trained')
    return workdir, layouts.train_here(workdir, epochs=2, data__mean=(0.4,) * 3, data__std=(0.2,) * 3, log__pictures=3)


def evaluate(workdir, **kwargs):
    return layouts.evaluate_here(workdir, **{'log__pictures': 3} | kwargs)


def refuse_to_write(monkeypatch):
    def refuse(file, content):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(storage, 'write_atomic', refuse)


@pytest.mark.parametrize('plan, name', [
    (make_plan(64, 6, rate=0.7, reduce_at=(0, 2, 4)), 'evit-64-45at0-33at2-24at4-fused'),
    (make_plan(64, 6, rate=0.7, reduce_at=(2,), fuse=False), 'evit-64-45at2'),
    (make_plan(196, 12, rate=1.0), 'dense-196'), (merge_plan(64, 3, r=4), 'tome-64-each-60-56-52'),
    (make_plan(64, 2, tokens=(60, 56), drop=(3, 0), reduce_at=(0, 1), reducer=get_reducer('prune_merge:mean')),
     'prune_merge-mean-64-each-60-56-drop-3-0')])
def test_plan_name_of_each_kind_of_plan(plan, name):
    assert evaluation_files.plan_name(plan) == name


def test_plan_name_of_a_plan_with_many_blocks_is_short_and_differs_for_other_drops():
    names = {evaluation_files.plan_name(make_plan(
        1369, 40, tokens=range(1301, 1261, -1), drop=(first, *[1] * 39), reduce_at=range(40),
        reducer=get_reducer('prune_merge'))) for first in (2, 3)}
    assert len(names) == 2 and all(len(name) == 200 for name in names)


def test_evaluate_workdir_writes_new_files_and_changes_no_others(trained):
    workdir, metrics = trained
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    result = evaluate(workdir, batch_size=128)  # larger than the test split
    after = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    assert after.keys() - before.keys() == {f'{NAME}.json', f'{NAME}.png'}
    assert before == {name: after[name] for name in before}
    written = json.loads(after[f'{NAME}.json'])
    assert written['metrics']['top1'] == result['top1'] == pytest.approx(metrics['top1'])
    assert written['metrics']['top1_ema'] == result['top1_ema'] and written['weights'] == ['params', 'ema']
    assert written['plan'] == {'name': NAME[9:], 'description': '16 > 13 tokens at blocks (1,), fused', 'patches': 16,
                               'reducer': 'evit', 'reduce_at': [1], 'tokens': [12], 'drop': [], 'fused': True}
    assert written['preprocessing'] == {'image_size': 16, 'mean': [0.4] * 3, 'std': [0.2] * 3, 'eval_crop': 1.0,
                                        'interpolation': 'bicubic'}
    assert written['data'] == {'source': 'custom', 'path': '', 'name': '', 'split': 'test', 'images': 100}
    assert (written['step'], written['workdir'], written['model']['dtype']) == (4, str(workdir), 'float32')
    assert written['date'].startswith('20') and {'jax', 'flax', 'numpy'} <= written['versions'].keys()
    with Image.open(workdir / f'{NAME}.png') as picture:
        assert picture.width > 200


def test_evaluate_workdir_with_out_writes_there(trained, tmp_path):
    evaluate(trained[0], out=tmp_path / 'new' / 'mine.json')
    evaluate(trained[0], out=tmp_path / 'other', keep__rate=1.0)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*.*')} == {
        'new/mine.json', 'new/mine.png', 'other/evaluate-dense-16.json'}


def test_files_of_other_data_or_preprocessing_keep_the_earlier_result(tmp_path, caplog):
    plan = make_plan(64, 6, reduce_at=())
    files = evaluation_files.files_of(tmp_path, plan, None)
    first = {'workdir': 'a', 'model': {'name': 'b'}, 'data': {'split': 'test', 'images': 100},
             'preprocessing': {'mean': [0.5] * 3}}
    other = first | {'data': {'split': 'test[:64]', 'images': 64}}
    for result in (first, other, first | {'step': 9, 'workdir': 'moved'}, other | {'step': 8}):
        files.write(result, b'')
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.glob('*.json')}
    plain, hashed = sorted(written)
    assert plain == 'evaluate-dense-64.json' and hashed.startswith('evaluate-dense-64_')
    assert (written[plain]['data'], written[plain]['step']) == (first['data'], 9)
    assert (written[hashed]['data'], written[hashed]['step']) == (other['data'], 8)
    assert 'data.split test there, test[:64] here, data.images 100 there, 64 here' in caplog.text
    named = evaluation_files.files_of(tmp_path, plan, tmp_path / plain)
    assert named.without_conflict(other) is named
    shared = evaluation_files.files_of(tmp_path, plan, tmp_path)
    assert shared.without_conflict(first | {'workdir': 'c'}) != shared


def test_check_out_with_another_suffix_is_refused_unless_it_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r'--out=\S+res.txt is neither a file that ends in .json nor a folder'):
        evaluation_files.check_out(tmp_path / 'res.txt')
    assert not list(tmp_path.iterdir())
    (tmp_path / 'v1.0').mkdir()
    evaluation_files.check_out(tmp_path / 'v1.0')
    evaluation_files.check_out(f'{tmp_path}/new.d/')


def test_evaluate_workdir_that_cannot_be_written_warns_and_returns_the_result(trained, caplog, monkeypatch):
    refuse_to_write(monkeypatch)
    assert evaluate(trained[0])['images'] == 100
    assert f'{NAME}.json cannot be written (Read-only file system)' in caplog.text and '--out' in caplog.text


def test_evaluate_workdir_with_out_that_cannot_be_written_is_refused_before_the_data_is_opened(
        trained, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.inputs, 'open_test_source', lambda config: pytest.fail('long work'))
    (tmp_path / 'file').write_text('')
    (tmp_path / 'a.json').mkdir()
    for out in ('file', 'file/a.json', 'a.json'):
        with pytest.raises(ValueError, match=rf'--out=\S*{out} cannot be written .*name a file that ends in .json'):
            loop.evaluate_workdir(layouts.config_of(), trained[0], out=tmp_path / out)
    refuse_to_write(monkeypatch)
    with pytest.raises(ValueError, match=r'Read-only file system'):
        evaluate(trained[0], out=tmp_path / 'b.json')


def test_evaluate_workdir_with_a_nan_loss_warns_and_writes_it_as_a_string(trained, tmp_path, monkeypatch, caplog):
    evaluate_params = results.evaluate_params

    def with_nan(*args, **kwargs):
        result = evaluate_params(*args, **kwargs)
        return result._replace(metrics=result.metrics | {'loss': float('nan')})

    monkeypatch.setattr(results, 'evaluate_params', with_nan)
    evaluate(trained[0], out=tmp_path / 'a.json')
    text = (tmp_path / 'a.json').read_text()
    assert json.loads(text, parse_constant=pytest.fail)['metrics']['loss'] == 'NaN'
    assert 'the loss is nan' in caplog.text


def test_evaluate_workdir_takes_mean_and_std_from_the_run(trained):
    workdir, metrics = trained
    for changes in ({}, {'data__mean': (0.9,) * 3, 'data__std': (0.01,) * 3}):
        assert layouts.evaluate_here(workdir, **changes)['loss'] == metrics['loss']
    other = layouts.evaluate_here(workdir, explicit=['data.mean'], data__mean=(0.9,) * 3)
    assert other['loss'] != metrics['loss']


def test_evaluate_workdir_on_other_classes_is_refused_before_digits_are_built(trained, monkeypatch):
    monkeypatch.setattr(digits, 'prepare', lambda *_: pytest.fail('long work'))
    monkeypatch.setattr(sources, 'open_source', lambda *_, **__: pytest.fail('long work'))
    with pytest.raises(ValueError, match=r"other classes .*'red' there, '0' in the data"):
        loop.evaluate_workdir(layouts.config_of(data__source='digits'), trained[0])
