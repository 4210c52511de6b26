"""Comparison of values between processes: all processes continue, or all end with the same error."""

import pathlib

import jax
import pytest

from evit_jax.checkpoints import weights
from evit_jax.checkpoints.workdir import flat
from evit_jax.runtime import agreement
from evit_jax.training import identity, loop
from tests.helpers import layouts

least = layouts.least


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    """The outcome of each check in each of two processes."""
    folder = tmp_path_factory.mktemp('agreeing') / 'run'
    started = layouts.start(folder, processes=2, devices=1, module='tests.helpers.agreeing')
    codes = layouts.wait(started, 120)
    logs = [pathlib.Path(f'{folder}.{number}.log').read_text() for number in range(2)]
    assert codes == [0, 0], logs
    return [dict(line.split(': ', 1) for line in log.splitlines() if ': ' in line) for log in logs]


def test_check_same_of_equal_values_returns_in_all_processes(outputs):
    assert [log['same'] for log in outputs] == ['returned None'] * 2


@pytest.mark.parametrize(('check', 'message'), [
    ('value', 'process 1 differs from process 0 in b and 1 more: \'' + 'x' * 5001 + "' in process 1, 'x' in process 0"),
    ('name', "process 1 differs from process 0 in b: none in process 1, '2' in process 0"),
    ('letters', r"process 1 differs from process 0 in class 0: 'zoë\udce9' in process 1, 'zoe' in process 0"),
])
def test_check_same_of_different_values_raises_the_same_in_all_processes(outputs, check, message):
    assert [log[check] for log in outputs] == [f'ValueError {message}; way out'] * 2


def test_on_every_process_returns_the_result_of_each_process(outputs):
    assert [log['decided'] for log in outputs] == ['returned 0', 'returned 1']


def test_on_every_process_with_one_failure_names_process_and_reason_in_the_others(outputs):
    assert [log['no file'] for log in outputs] == ['ValueError process 1 cannot continue: no folder é',
                                                'FileNotFoundError no folder é']
    assert [log['no text'] for log in outputs] == ['RuntimeError ',
                                                'ValueError process 0 cannot continue: RuntimeError()']


def test_same_weights_of_different_arrays_raises_in_all_processes(outputs):
    for log in outputs:
        assert log['weights'].startswith('ValueError process 1 differs from process 0 in the weights of /nowhere: ')


def test_single_process_agrees_with_itself():
    agreement.check_same({'a': 1}, '')
    assert agreement.on_every_process(lambda: 'done') == 'done'
    assert weights.same_weights('', lambda: 3) == 3


def test_digest_tree_depends_on_names_shapes_and_values():
    base = agreement.digest_tree({'a': jax.numpy.ones(4)})
    others = [{'b': jax.numpy.ones(4)}, {'a': jax.numpy.ones((2, 2))}, {'a': jax.numpy.zeros(4)}]
    assert base == agreement.digest_tree({'a': jax.numpy.ones(4)})
    assert len({base, *map(agreement.digest_tree, others)}) == 4


def values_of(monkeypatch, check):
    """Returns the values that a check compares."""
    compared = {}
    monkeypatch.setattr(identity.distributed, 'is_single_process', lambda: False)
    monkeypatch.setattr(agreement, 'check_same', lambda values, _: compared.update(values))
    check()
    return compared


def test_check_processes_compares_config_options_and_versions_but_no_keys_of_a_machine(monkeypatch):
    compared = values_of(monkeypatch, lambda: identity.check_processes(
        flat(layouts.config_of(init_from='/mnt/a', data__path='/b')), '/run', accept_changes=False))
    assert compared['config.init_from'] is True and compared['config.batch_size'] == 64
    assert compared['accept_changes'] is False and compared['jax'] == jax.__version__
    assert {'Python', 'code of evit_jax', 'numpy', 'jaxlib', 'flax', 'devices', 'workdir'} <= compared.keys()
    assert not {'config.data.path', 'config.data.workers', 'config.compilation_cache'} & compared.keys()


@pytest.mark.parametrize('start', [loop.train, loop.evaluate_workdir])
def test_train_and_evaluate_read_the_workdir_in_all_processes_before_they_compare(monkeypatch, tmp_path, start):
    tasks = []
    monkeypatch.setattr(agreement, 'on_every_process', lambda task: tasks.append(task) or task())
    monkeypatch.setattr(identity, 'check_processes', lambda *_, **__: pytest.fail('compared too early'))
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='is no JSON'):
        start(layouts.config_of(model__dtype='auto'), tmp_path)
    assert len(tasks) == 1


def test_train_compares_resolved_values(monkeypatch, tmp_path):
    compared = []
    monkeypatch.setattr(identity, 'check_processes', lambda config, *_, **__: compared.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(layouts.config_of(model__dtype='auto'), tmp_path)
    assert compared[0]['model.dtype'] == 'float32'
    assert len(compared[0]['data.mean']) == len(compared[0]['data.std']) == 3


def test_of_sources_holds_classes_counts_splits_and_fingerprints():
    values = identity.of_sources({split: layouts.Colours(split) for split in ('train', 'test')})
    assert values['class 1'] == 'green' and values['number of classes'] == 3
    assert [values[f'number of examples in {split!r}'] for split in ('train', 'test')] == [128, 100]
    assert len([name for name in values if name.startswith('names or order')]) == 2


@pytest.mark.parametrize(('second', 'messages'), [
    ({'examples': 96}, 2 * ["error: process 1 differs from process 0 in number of examples in 'train' and 1 more: '96' "
                            "in process 1, '128' in process 0; give all processes the same data"]),
    pytest.param({'examples': 0}, ['error: process 1 cannot continue: there is no folder', 'error: there is no folder'],
                 marks=pytest.mark.slow),
    pytest.param({'label_smoothing': 0.2}, 2 * ["error: process 1 differs from process 0 in config.label_smoothing: "
                                                "'0.2' in process 1, '0.1' in process 0"], marks=pytest.mark.slow),
    pytest.param({'batch_size': 63}, ['error: process 1 cannot continue: batch_size=63 is not divisible',
                                      'error: batch_size=63 is not divisible'], marks=pytest.mark.slow)])
def test_train_with_processes_that_differ_ends_in_all_before_the_first_step(tmp_path, second, messages):
    started = layouts.start(tmp_path / 'run', processes=2, devices=1, second=second)
    assert layouts.wait(started, 120) == [2, 2]
    for number, message in enumerate(messages):
        assert message in (tmp_path / f'run.{number}.log').read_text()
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()
