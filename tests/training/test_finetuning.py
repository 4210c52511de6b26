"""A run that begins from another's weights: other classes, another image size, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import base, deit_s_finetune
from evit_jax import models
from evit_jax.checkpoints.manager import newest_step, read_newest
from evit_jax.checkpoints.weights import start_from
from evit_jax.data import sources, splits
from evit_jax.models.config import ViTConfig
from evit_jax.training import checks, experiment, loop
from tests.training.test_training import SETTINGS

LEAST = ViTConfig(image_size=32, patch_size=8, width=16, depth=2, heads=2)
FEW = SETTINGS | {'batch_size': 64, 'model.name': 'vit_least', 'model.reduce_at': (1,), 'model.classes': 0,
                  'keep.shrink_epochs': 0, 'optimizer.warmup_epochs': 0.0, 'log.pictures': 0, 'checkpoint.every': 100,
                  'mixing.erase': 0.25, 'mixing.mixup': 0.8, 'mixing.cutmix': 1.0}  # 2 steps


def few(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(FEW | {key.replace('__', '.'): value for key, value in changes.items()})
    return config


class Birds(sources.GeneratedSource):
    """A small data set that knows its classes."""
    sizes = {'train': 128, 'test': 64}
    names = ('jay', 'rook', 'wren')

    def __init__(self, split, classes):
        super().__init__(splits.resolve(split, self.sizes), 32, classes or len(self.names))
        if classes in (0, len(self.names)):
            self.class_names = self.names


@pytest.fixture(scope='module', autouse=True)
def least():
    """The least model and the least data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'open_source', lambda name, split, *, num_classes, **_: Birds(split, num_classes))
        patch.setitem(models.CONFIGS, 'vit_least', LEAST)
        yield


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('trained')
    return workdir, loop.train(few(), workdir)


def fives(shape):
    """Parameters that are no trained ones."""
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 5, np.float32),
                        jax.eval_shape(models.create(shape).init, jax.random.key(0)))


def test_every_weight_is_taken_over_to_the_bit_and_step_and_optimizer_are_new(trained):
    state = experiment.setup(few(init_from=str(trained[0]))).new_state()
    want, _ = read_newest(trained[0], 'params')
    got = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf
           for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert state.step == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))


def test_the_average_is_taken_where_it_is_asked_for(trained):
    taken = [start_from(trained[0], fives(dataclasses.replace(LEAST, classes=3)), prefix=1, ema=ema)['norm']['bias']
             for ema in (False, True)]
    for field, bias in zip(('params', 'ema'), taken, strict=True):
        np.testing.assert_array_equal(bias, read_newest(trained[0], field)[0]['norm.bias'])
    assert not np.array_equal(*taken)


def test_other_classes_keep_the_fresh_head_and_another_image_size_resizes_the_positions(trained):
    old, _ = read_newest(trained[0], 'params')
    params = start_from(trained[0], fives(dataclasses.replace(LEAST, classes=7, image_size=64)), prefix=1, ema=False)
    np.testing.assert_array_equal(params['head']['kernel'], np.full((16, 7), 5))
    np.testing.assert_array_equal(params['head']['bias'], np.full(7, 5))
    np.testing.assert_array_equal(params['norm']['bias'], old['norm.bias'])
    assert params['pos_embed'].shape == (1, 65, 16)
    np.testing.assert_array_equal(params['pos_embed'][:, 0], old['pos_embed'][:, 0])
    small, large = (grid.reshape(side, side, 16) for grid, side in (
        (old['pos_embed'][0, 1:], 4), (params['pos_embed'][0, 1:], 8)))
    nearest = np.repeat(np.repeat(small, 2, axis=0), 2, axis=1)
    assert np.corrcoef(large.ravel(), nearest.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(('names', 'said'), [(Birds.names, False), (('owl', 'rook', 'wren'), True)])
def test_a_head_kept_for_as_many_classes_of_other_names_is_warned_of(trained, caplog, names, said):
    start_from(trained[0], fives(dataclasses.replace(LEAST, classes=3)), prefix=1, ema=False, class_names=names)
    assert ('their names differ' in caplog.text) == said


def test_a_run_on_other_classes_and_a_larger_image_trains_to_its_end(trained, tmp_path):
    config = few(init_from=str(trained[0]), model__classes=7, model__image_size=64, ema_decay=0.0)
    metrics = loop.train(config, tmp_path)
    assert np.isfinite(metrics['loss'])
    assert newest_step(tmp_path) == 2
    with pytest.raises(ValueError, match='kept no moving average'):
        start_from(tmp_path, fives(LEAST), prefix=1, ema=True)


def test_a_run_that_goes_on_need_not_be_told_again_where_it_began(trained, tmp_path):
    loop.train(few(init_from=str(trained[0])), tmp_path)
    loop.train(few(init_from=None), tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['init_from'] == str(trained[0])


def test_weights_that_do_not_fit_are_named_in_one_message(trained):
    with pytest.raises(ValueError, match=r'4 differ\): dist_token is missing .* head_dist.bias is missing there; '
                                         r'head_dist.kernel is missing there; pos_embed has shape'):
        start_from(trained[0], fives(dataclasses.replace(LEAST, classes=3, distilled=True)), prefix=2, ema=False)
    with pytest.raises(ValueError, match=r'30 differ\).*bias has shape \(16,\), wanted \(32,\).*and 25 more\. Set'):
        start_from(trained[0], fives(dataclasses.replace(LEAST, width=32)), prefix=1, ema=False)


def test_a_start_that_is_not_there_is_said_before_the_workdir_is_touched(tmp_path):
    with pytest.raises(ValueError, match=r'config.init_from=\S+none holds no checkpoint'):
        loop.train(few(init_from=str(tmp_path / 'none')), tmp_path / 'run')
    assert deit_s_finetune.get_config().init_from is None
    with pytest.raises(ValueError, match=r'starts from trained weights: give --config.init_from=WORKDIR'):
        checks.check_start(deit_s_finetune.get_config(), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_that_cannot_be_read_is_named_and_left(tmp_path):
    (tmp_path / 'checkpoints' / '2' / 'state').mkdir(parents=True)
    (tmp_path / 'checkpoints' / '2' / '_CHECKPOINT_METADATA').write_text('{}')
    with pytest.raises(ValueError, match=r'checkpoint of step 2 in .* cannot be read'):
        read_newest(tmp_path, 'params')
    assert (tmp_path / 'checkpoints' / '2').exists()


def test_classes_of_the_data_travel_with_the_run_and_may_not_change(trained, monkeypatch):
    workdir, metrics = trained
    weights, metadata = read_newest(workdir, 'params')
    assert weights['head.bias'].shape == (3,)
    assert metadata['class_names'] == ['jay', 'rook', 'wren']
    assert metadata['config']['model']['classes'] == 3
    saved = json.loads((workdir / 'config.json').read_text())
    assert (saved['model.classes'], saved['class_names']) == (3, ['jay', 'rook', 'wren'])
    assert loop.train(few(), workdir)['top1'] == loop.evaluate_workdir(few(), workdir)['top1'] == metrics['top1']
    monkeypatch.setattr(Birds, 'names', ('jay', 'kite', 'wren'))
    for start in (loop.train, loop.evaluate_workdir):
        with pytest.raises(ValueError, match=r"run on other classes .* 'rook' there, 'kite' in the data"):
            start(few(), workdir)
