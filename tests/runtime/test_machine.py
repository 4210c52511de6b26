"""Defaults that depend on the machine: dtype and number of workers, and a run that resumes on another platform."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from evit_jax.checkpoints import open_defaults, weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import load_model
from evit_jax.configs import base
from evit_jax.runtime import machine
from evit_jax.training import experiment, limits
from tests.helpers import layouts

SHORT = {'epochs': 1, 'ema_decay': 0.0, 'log__pictures': 0, 'log__eval_epochs': 9.0, 'checkpoint__every': 100,
         'checkpoint__best': 'top1'}  # 2 steps


def recorded(workdir):
    return json.loads((workdir / 'config.json').read_text())['model.dtype']


@pytest.mark.parametrize(('dtype', 'platform', 'recorded', 'resolved'), [
    ('auto', 'cpu', None, 'float32'), ('auto', 'gpu', None, 'bfloat16'), ('auto', 'tpu', None, 'bfloat16'),
    ('auto', 'cpu', 'bfloat16', 'bfloat16'), ('auto', 'tpu', 'float32', 'float32'), ('auto', 'tpu', 'auto', 'bfloat16'),
    ('float32', 'tpu', 'bfloat16', 'float32'), ('bfloat16', 'cpu', None, 'bfloat16')])
def test_resolve_dtype_prefers_explicit_then_recorded_then_platform(dtype, platform, recorded, resolved):
    assert machine.resolve_dtype(dtype, platform, recorded) == resolved


@pytest.mark.parametrize(('workers', 'cores', 'resolved'), [
    (-1, 1, 0), (-1, 2, 0), (-1, 4, 3), (-1, 9, 8), (-1, 224, 8), (0, 16, 0), (3, 1, 3)])
def test_resolve_workers_automatic_leaves_a_core_and_explicit_is_kept(workers, cores, resolved):
    assert machine.resolve_workers(workers, cores) == resolved


@pytest.mark.parametrize(('files', 'cores'), [
    ({}, 6),
    ({'proc/self/cgroup': '0::/pod', 'sys/fs/cgroup/pod/cpu.max': 'max 100000'}, 6),
    ({'proc/self/cgroup': '0::/pod', 'sys/fs/cgroup/pod/cpu.max': '250000 100000'}, 2),
    ({'proc/self/cgroup': '0::/pod/inner', 'sys/fs/cgroup/pod/cpu.max': '50000 100000'}, 1),
    ({'proc/self/cgroup': '0::/not/visible/here', 'sys/fs/cgroup/cpu.max': '300000 100000'}, 3),
    ({'proc/self/cgroup': '5:memory:/a\n4:cpu,cpuacct:/a\n0::/', 'sys/fs/cgroup/cpu/a/cpu.cfs_quota_us': '400000\n',
      'sys/fs/cgroup/cpu/a/cpu.cfs_period_us': '100000\n'}, 4),
    ({'proc/self/cgroup': '4:cpu,cpuacct:/a', 'sys/fs/cgroup/cpu/a/cpu.cfs_quota_us': '-1\n',
      'sys/fs/cgroup/cpu/a/cpu.cfs_period_us': '100000\n'}, 6)])
def test_usable_cores_returns_the_minimum_of_affinity_and_quotas(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(machine.os, 'sched_getaffinity', lambda process: set(range(6)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.usable_cores(tmp_path) == cores


def test_limits_accept_automatic_values_and_name_wrong_ones():
    config = base.get_config()
    assert (config.model.dtype, config.data.workers) == ('auto', -1)
    limits.check(workdirs.flat(config))
    config.data.workers = -2
    with pytest.raises(ValueError, match=r'data\.workers=-2 is outside \[-1, inf\]'):
        limits.check(workdirs.flat(config))
    config.update_from_flattened_dict({'data.workers': -1, 'model.dtype': 'float16'})
    with pytest.raises(ValueError, match=r"model\.dtype='float16' is unknown: there are auto, float32, bfloat16"):
        limits.check(workdirs.flat(config))


@pytest.mark.parametrize('changes', [
    {'data.mean': (127.5,) * 3}, {'data.mean': (0.5, -0.5, 0.5)}, {'data.std': (0.5, 0.5, 0.0)},
    {'data.std': (58.4, 57.1, 57.4)}, {'data.std': (float('nan'),) * 3}], ids=str)
def test_limits_mean_or_std_of_values_outside_0_to_1_is_refused(changes):
    config = base.get_config()
    config.update_from_flattened_dict({'data.mean': (0.0, 1.0, 0.485), 'data.std': (1.0, 1 / 255, 0.5)})
    limits.check(workdirs.flat(config))
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=rf'config.{next(iter(changes))}=.* is outside .*divide .* by 255'):
        limits.check(workdirs.flat(config))


@pytest.mark.parametrize(('platform', 'dtype'), [('cpu', 'float32'), ('tpu', 'bfloat16')])
def test_setup_open_dtype_is_that_of_the_platform_of_the_mesh(platform, dtype):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))  # a slice that is not this machine
    run = experiment.setup(layouts.config_of(model__dtype='auto'), mesh=mesh, sources=layouts.sources(),
                           model_config=layouts.SHAPE)
    assert run.config.model.dtype == run.metadata['config']['model']['dtype'] == dtype


def test_load_model_open_dtype_is_resolved(tmp_path):
    run = layouts.setup()
    metadata = run.metadata
    metadata['config']['model']['dtype'] = 'auto'
    weights.save(tmp_path, run.new_state().params, metadata)
    assert load_model(tmp_path).dtype == 'float32'
    assert workdirs.saved_config(tmp_path)['model.dtype'] == 'auto'
    resolved = open_defaults.resolve_for_training(
        workdirs.flat(layouts.config_of(model__dtype='auto')), tmp_path, 'cpu')
    assert resolved['model.dtype'] == 'float32'


def test_train_open_dtype_is_recorded_and_kept_on_another_platform(tmp_path, monkeypatch, caplog):
    caplog.set_level('INFO')
    layouts.train_here(tmp_path, model__dtype='auto', **SHORT)
    assert recorded(tmp_path) == 'float32' and 'model.dtype=auto: float32, on cpu' in caplog.text
    resolve = machine.resolve_dtype
    monkeypatch.setattr(machine, 'resolve_dtype', lambda dtype, platform, recorded: resolve(dtype, 'tpu', recorded))
    layouts.train_here(tmp_path, model__dtype='auto', **SHORT)
    assert recorded(tmp_path) == 'float32' and 'model.dtype=auto: float32, as recorded in the workdir' in caplog.text
    layouts.evaluate_here(tmp_path, model__dtype='auto', **SHORT)
    result, = tmp_path.glob('evaluate-*.json')
    assert json.loads(result.read_text())['model']['dtype'] == 'float32'
    with pytest.raises(ValueError, match=r'another config .*model\.dtype float32 -> bfloat16'):
        layouts.train_here(tmp_path, model__dtype='bfloat16', **SHORT)
