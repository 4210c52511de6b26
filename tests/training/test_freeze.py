"""Linear probe: with model.freeze=backbone, only the heads are trained."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints.manager import read_newest
from evit_jax.checkpoints.state import HEADS, trained_part
from evit_jax.checkpoints.workdir import flat
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.training import checks
from tests.helpers import layouts

least = layouts.least
PROBE = {'model__freeze': 'backbone', 'optimizer__lr': 0.5, 'log__pictures': 0}


@pytest.fixture(scope='module')
def probed(shared_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('probed')
    layouts.train_here(workdir, init_from=str(shared_run), epochs=10, **PROBE)
    return workdir


def is_head(name):
    return name.split('.')[0] in HEADS


def test_train_with_a_frozen_backbone_changes_the_heads_only(shared_run, probed):
    before, _ = read_newest(shared_run, 'params')
    for field in ('params', 'ema'):
        after, _ = read_newest(probed, field)
        assert {name for name in before if not np.array_equal(after[name], before[name])} == {
            'head.kernel', 'head.bias'}, field


def test_train_with_a_frozen_backbone_lowers_the_loss(probed):
    losses = layouts.losses(probed)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:2])


def test_new_state_with_a_frozen_backbone_has_optimizer_state_for_the_heads_only():
    shapes = layouts.setup(**PROBE).abstract_state()
    moments = [leaf.shape for leaf in jax.tree.leaves(shapes.opt_state) if leaf.shape]
    assert sorted(moments) == [(3,), (3,), (64, 3), (64, 3)]


def test_train_step_with_a_frozen_backbone_has_no_backward_pass():
    def flops(**changes):
        run = layouts.setup(**changes)
        step = run.train_step().lower(run.abstract_state(), run.abstract_batch(), run.stages[-1].plan)
        return step.compile().cost_analysis()['flops']

    assert flops(**PROBE) < 0.5 * flops()


def test_trained_part_of_an_lvvit_with_a_frozen_backbone_has_both_heads():
    config = LVViTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, classes=3, stem_width=8)
    params = jax.eval_shape(models.create(config).init, jax.random.key(0))
    assert {*trained_part(params, 'backbone')} == {'head', 'aux_head'}
    assert trained_part(params, '') == params


def test_train_resumed_with_another_freeze_is_refused(probed, tmp_path):
    assert json.loads((probed / 'config.json').read_text())['model.freeze'] == 'backbone'
    with pytest.raises(ValueError, match=r'another model.freeze \(.*model.freeze backbone -> .*give another --workdir'):
        layouts.train_here(probed, accept_changes=True, epochs=10, log__pictures=0)


def test_train_resumed_with_a_frozen_backbone_logs_what_is_trained_and_gives_the_same_bits(
        shared_run, probed, tmp_path, caplog):
    caplog.set_level('INFO')
    layouts.cut_off(probed, tmp_path / 'resumed', step=15)
    layouts.train_here(tmp_path / 'resumed', init_from=str(shared_run), epochs=10, **PROBE)
    assert 'only these are trained: head.bias, head.kernel' in caplog.text
    wanted, got = (read_newest(folder, 'params')[0] for folder in (probed, tmp_path / 'resumed'))
    np.testing.assert_array_equal(got['head.kernel'], wanted['head.kernel'])


def test_evaluate_workdir_of_a_linear_probe_needs_no_init_from(probed):
    assert layouts.evaluate_here(probed, explicit=())['images'] == 100


@pytest.mark.parametrize(('changes', 'message'), [
    ({}, 'model.freeze=backbone would keep random weights'),
    ({'reducer__name': 'dynamicvit'}, 'dynamicvit trains its predictors through the backbone')])
def test_check_of_a_frozen_backbone_that_cannot_work_is_refused(changes, message, tmp_path):
    config = flat(layouts.config_of(**PROBE | changes))
    base = dataclasses.replace(layouts.SHAPE, classes=3)
    with pytest.raises(ValueError, match=message):
        checks.check(config, base)
        checks.check_start(config, tmp_path, base)
