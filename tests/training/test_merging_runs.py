"""Training with merged tokens: the loss falls, other plans can be evaluated, and a run resumes to the bit."""

import jax
import numpy as np
import pytest

from evit_jax.checkpoints.manager import read_newest
from tests.helpers import layouts

SCHEDULE = {'keep__shrink_epochs': 4, 'keep__levels': 2, 'log__eval_epochs': 9.0, 'log__pictures': 0}
METHODS = {'tome': {'reducer__r': 4}, 'pool': {'model__reduce_at': (0, 1), 'keep__rate': 0.5}}
REMAINING = {'tome': 8 / 16, 'pool': 4 / 16}  # fraction of the tokens after the last block
DENSE = {'reducer__r': 0, 'keep__rate': 1.0}


@pytest.fixture(scope='module', params=METHODS)
def run(request, tmp_path_factory):
    """Name, settings, workdir and final metrics of a training with each method."""
    workdir = tmp_path_factory.mktemp(request.param)
    changes = {'reducer__name': request.param} | SCHEDULE | METHODS[request.param]
    return request.param, changes, workdir, layouts.train_here(workdir, **changes)


def test_train_with_a_merging_schedule_lowers_the_loss(run):
    _, _, workdir, metrics = run
    records = layouts.records(workdir)
    assert len(records) == layouts.STEPS and records[-1]['train/loss'] < records[0]['train/loss'] - 0.2
    rates = [record['train/keep_rate'] for record in records]
    assert rates[0] == 1 > rates[-1] and rates == sorted(rates, reverse=True)
    assert metrics['images'] == 100 and metrics['top1'] > 0.5  # chance is 1/3


def test_evaluate_workdir_of_a_merging_run_as_trained_and_dense(run):
    name, changes, workdir, metrics = run
    again = layouts.evaluate_here(workdir, **changes)
    dense = layouts.evaluate_here(workdir, **changes | DENSE)
    assert (again['top1'], again['macs']) == (metrics['top1'], metrics['macs'])
    assert metrics['random_kept_2'] == pytest.approx(REMAINING[name])
    assert metrics['macs'] < dense['macs'] == dense['macs_dense'] and dense['loss'] != metrics['loss']


def test_train_resumed_within_the_schedule_ends_with_the_same_bits(run, tmp_path):
    _, changes, workdir, metrics = run
    layouts.cut_off(workdir, tmp_path)
    again = layouts.train_here(tmp_path, **changes)
    assert again['loss'] == metrics['loss']
    jax.tree.map(np.testing.assert_array_equal, read_newest(tmp_path, 'params', 'ema')[:2],
                 read_newest(workdir, 'params', 'ema')[:2])
