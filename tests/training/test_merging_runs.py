"""A model trained while its tokens are merged: it learns, is evaluated under other plans, and resumes to the bit."""

import jax
import numpy as np
import pytest

from evit_jax.checkpoints.manager import read_newest
from evit_jax.training import loop
from tests.helpers import layouts

SCHEDULE = {'keep__shrink_epochs': 4, 'keep__levels': 2, 'log__eval_epochs': 9.0, 'log__pictures': 0}
METHODS = {'tome': {'reducer__r': 4}, 'pool': {'model__reduce_at': (0, 1), 'keep__rate': 0.5}}
LEFT = {'tome': 8 / 16, 'pool': 4 / 16}  # of the tokens
DENSE = {'reducer__r': 0, 'keep__rate': 1.0}

least = layouts.least


@pytest.fixture(scope='module', params=METHODS)
def run(request, tmp_path_factory):
    """Name of the method, its settings, workdir and final metrics of a training on 8 devices."""
    workdir = tmp_path_factory.mktemp(request.param)
    changes = {'reducer__name': request.param} | SCHEDULE | METHODS[request.param]
    return request.param, changes, workdir, layouts.train_here(workdir, **changes)


def test_the_loss_falls_while_more_and_more_is_merged(run):
    _, _, workdir, metrics = run
    records = layouts.records(workdir)
    assert len(records) == layouts.STEPS and records[-1]['train/loss'] < records[0]['train/loss'] - 0.2
    rates = [record['train/keep_rate'] for record in records]
    assert rates[0] == 1 > rates[-1] and rates == sorted(rates, reverse=True)
    assert metrics['images'] == 100 and metrics['top1'] > 0.5  # a third by chance


def test_it_is_evaluated_as_it_was_trained_and_dense(run):
    name, changes, workdir, metrics = run
    again = loop.evaluate_workdir(layouts.config_of(**changes), workdir)
    dense = loop.evaluate_workdir(layouts.config_of(**changes | DENSE), workdir)
    assert (again['top1'], again['macs']) == (metrics['top1'], metrics['macs'])
    assert metrics['random_kept_2'] == pytest.approx(LEFT[name])  # of the whole image, after the last block
    assert metrics['macs'] < dense['macs'] == dense['macs_dense'] and dense['loss'] != metrics['loss']


def test_a_run_cut_off_in_the_midst_of_its_schedule_ends_with_the_same_bits(run, tmp_path):
    _, changes, workdir, metrics = run
    layouts.cut_off(workdir, tmp_path)
    again = loop.train(layouts.config_of(**changes), tmp_path)
    assert again['loss'] == metrics['loss']
    jax.tree.map(np.testing.assert_array_equal, read_newest(tmp_path, 'params', 'ema')[:2],
                 read_newest(workdir, 'params', 'ema')[:2])
