"""Estimates for TPU: tables, errors, and slow tests that compile for a slice without a TPU."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from evit_jax.benchmarks import tpu
from evit_jax.configs import digits
from evit_jax.runtime import sharding
from evit_jax.training import experiment

ROOT = pathlib.Path(__file__).parents[2]


def make_step(**changes):
    figures = {'step': 'train', 'plan': '4 > 2', 'images': 128, 'seconds': 100.0, 'arguments': 1e9, 'outputs': 1e9,
               'temporaries': 2e9, 'peak': 4e9, 'bytes_accessed': 7e10, 'flops': 2e12,
               'collectives': {'all-reduce': tpu.Collectives(2, 8.8e7)}, 'cycles': 1e8, 'unestimated': {'sort': 3},
               'images_per_second': 1920.0}
    return tpu.CompiledStep(**figures | changes)


def test_table_has_a_column_for_each_step_and_remarks_name_the_limits():
    programs, chip = [make_step(), make_step(step='eval', collectives={})], tpu.CHIPS['v5e']
    rows = {name: cells for name, *cells in tpu.table_rows(programs, chip)}
    assert rows['all-reduce'] == ['2: 88.00 MB', 'none'] and rows['peak, of 16.00 GB'] == ['25.0%', '25.0%']
    assert rows['estimated images/s'] == ['1,920', '1,920']
    text = ' '.join(tpu.remarks(programs, chip))
    assert 'not measured' in text and '1.50 GHz' in text and '6 sort' in text
    assert 'not published' not in text and 'not published' in ' '.join(tpu.remarks(programs, tpu.CHIPS['v6e']))


@pytest.mark.parametrize('topology', ['v9:2x2', 'tpu', ''])
def test_devices_of_unknown_chip_raises_with_examples(topology):
    examples = 'v5e:16x16, v6e:2x4, v5p'
    with pytest.raises(ValueError, match=f'--topology={topology} names no known TPU: there are {examples}'):
        tpu.devices_of(topology)


def test_devices_of_without_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install -e '\.\[tpu-aot\]'"):
        tpu.devices_of('v5e:2x4')


def test_data_mesh_batch_that_the_devices_cannot_share_raises():
    with pytest.raises(ValueError, match='batch_size=128 is not divisible by the 7 devices: use 126 or 133'):
        sharding.data_mesh(128, jax.devices()[:7])


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'evit_jax.benchmark', 'tpu', *arguments], cwd=ROOT,
                          capture_output=True, text=True)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                  reason='the TPU compiler is not installed: the extra [tpu-aot]')


@pytest.fixture(scope='module')
def compile_digits(tmp_path_factory):
    def compile_digits(sharding):
        file = tmp_path_factory.mktemp('tpu') / 'result.json'
        done = run('--config', 'configs/digits.py', '--topology=v5e:2x4', '--batch_per_chip=16', f'--json={file}',
                   f'--config.sharding={sharding}')
        assert done.returncode == 0, done.stderr
        assert 'not measured' in done.stdout and 'estimated images/s' in done.stdout
        result = json.loads(file.read_text())
        return result, {program['step']: program for program in result['programs']}

    return compile_digits


def bytes_of(program):
    return {kind: result['bytes'] for kind, result in program['collectives'].items()}


@needs_libtpu
@pytest.mark.slow
def test_replicated_steps_all_reduce_gradients_and_two_metrics_only(compile_digits):
    result, programs = compile_digits('replicated')
    assert bytes_of(programs['train']) == {'all-reduce': 4 * (result['parameters'] + 2)}  # loss and accuracy
    assert programs['eval']['collectives'] == {}
    for program in programs.values():
        assert program['images'] == 16 and program['flops'] > 0 and 0 < program['peak'] < result['chip']['hbm']
        assert program['images_per_second'] == pytest.approx(16 * 1.5e9 / program['cycles'])


@needs_libtpu
@pytest.mark.slow
def test_fsdp_steps_gather_the_sharded_state_and_reduce_its_gradients(compile_digits):
    result, programs = compile_digits('fsdp')
    with digits.get_config().unlocked() as config:
        config.sharding = 'fsdp'
    params = experiment.setup(config).abstract_state().params
    sharded = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.sharding.spec != sharding.PartitionSpec())
    # Gathered in bfloat16, at once or around a ring of 8 pieces; in training for the forward and the backward pass, and
    # gradients in float32. The activations of a layer would have at least 64 KB.
    evaluation, train = bytes_of(programs['eval']), bytes_of(programs['train'])
    assert 2 * sharded <= sum(evaluation.values()) <= 2 * sharded * 9 / 8
    assert {*evaluation, *train} <= {'all-gather', 'reduce-scatter', 'collective-permute', 'all-reduce'}
    assert 0 <= train.pop('all-reduce') - 4 * (result['parameters'] - sharded) < 4 * 50  # parts of the gradient norm
    assert 4 * sharded < sum(train.values()) <= 8 * sharded * 9 / 8
