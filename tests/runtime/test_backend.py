"""A failure of the machine is reported as such, and never as a damaged checkpoint."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.checkpoints import manager, weights
from evit_jax.checkpoints.manager import CheckpointManager, read_metadata, read_newest
from evit_jax.checkpoints.state import TrainState
from evit_jax.runtime import backend, storage
from tests.helpers import layouts


@pytest.fixture
def saved(tmp_path):
    """A folder with a checkpoint of a minimal training state at step 0."""
    weights.save(tmp_path, {'bias': np.ones(3, np.float32)}, {'config': {'model': {'name': 'vit_digits'}}})
    return tmp_path


def run(words, platform):
    return subprocess.run([sys.executable, '-m', *words], capture_output=True, text=True, cwd=layouts.ROOT,
                          env=os.environ | {'JAX_PLATFORMS': platform})


@pytest.mark.parametrize('platform', ['tpu', pytest.param('cuda', marks=pytest.mark.slow), 'nonsense'])
def test_predict_without_the_requested_backend_names_it_and_the_available_ones(tmp_path, platform):
    done = run(['evit_jax.predict', tmp_path / 'absent', 'a.png', f'--kept={tmp_path / "made"}'], platform)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert f'JAX_PLATFORMS={platform} (' in done.stderr and 'this machine has cpu: set' in done.stderr
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('words', [
    ['main', '--config=configs/digits.py', '--workdir={}/run'], ['export', '{}/run', '{}/out'],
    ['label', '{}/run', '--config=configs/digits.py', '--out={}/labels', '--config.data.path={}/data'],
    ['convert', '{}/a.pth', '{}/out'], ['describe', '--config=configs/digits.py', '--config.data.path={}/data'],
    ['visualize', 'kept', '{}/run', '--out={}/kept.html'], ['visualize', 'drop', '{}/run', '--out={}/drop.png'],
    ['benchmark', 'model', '--json={}/x.json'], ['plan', '--model=deit_s', '--target=2x', '--out={}/x.json'],
    ['compare', '--config=configs/compare_digits.py', '--out={}/out']], ids=lambda words: '-'.join(words[:2]))
@pytest.mark.slow
def test_programs_start_the_backend_before_they_read_or_write(tmp_path, words):
    done = run([f'evit_jax.{words[0]}', *(word.format(tmp_path) for word in words[1:])], 'nonsense')
    assert done.returncode == 2 and 'JAX_PLATFORMS=nonsense' in done.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if path.name != 'out']


def test_first_line_of_an_error_without_text_is_its_default_or_representation():
    assert backend.first_line(ValueError('\n one \ntwo')) == 'one'
    assert backend.first_line(AssertionError()) == 'AssertionError()'
    assert backend.first_line(AssertionError(), 'no plugin') == 'no plugin'


MACHINE = [MemoryError(), PermissionError(13, 'Permission denied'), OSError(24, 'Too many open files'),
           jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'),
           ValueError("PERMISSION_DENIED: Error opening: Permission denied [os_error_code='EACCES']"),
           RuntimeError('a bug of Orbax')]


@pytest.mark.parametrize('error', MACHINE, ids=repr)
def test_read_newest_of_an_intact_checkpoint_that_fails_is_not_reported_as_damage(saved, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(manager, '_read_meta', fail)
    with pytest.raises(ValueError, match=r'step 0 in .* shows no damage, and this machine failed to read it \('):
        read_newest(saved, 'params')


@pytest.mark.parametrize('error', MACHINE[:-1], ids=repr)
def test_restore_on_a_machine_failure_leaves_the_checkpoint(saved, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(manager.checksums, 'check', fail)
    like = TrainState(jnp.zeros((), jnp.int32), {'bias': jnp.zeros(3)}, None, ())
    checkpoints = CheckpointManager(saved, keep=1)
    with pytest.raises(type(error) if not isinstance(error, ValueError | OSError) else ValueError):
        checkpoints.restore(like)
    checkpoints.close()
    assert (saved / 'checkpoints' / '0').exists() and not (saved / 'unreadable_checkpoints').exists()


def test_read_metadata_on_a_machine_failure_raises(saved, monkeypatch):
    def fail(*_):
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr(manager, '_read_meta', fail)
    with pytest.raises(ValueError, match='Too many open files'):
        read_metadata(saved)


@pytest.mark.parametrize('error', [OSError(5, 'Input/output error'), FileNotFoundError(2, 'No such file'),
                                   ValueError("DATA_LOSS [os_error_code='EIO']"), KeyError('leaves')], ids=repr)
def test_is_machine_failure_of_a_damaged_file_is_false(error):
    assert not storage.is_machine_failure(error)
