"""Fine-tuning from the weights of another run: other classes, another image size, and errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints.manager import newest_step, read_newest
from evit_jax.checkpoints.weights import start_from
from evit_jax.checkpoints.workdir import flat
from evit_jax.configs import deit_s_finetune
from evit_jax.data import splits
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.training import checks, experiment, loop
from tests.helpers import tiny_run

MODEL = tiny_run.NARROW
TWO_STEPS = {'batch_size': 64, 'model__name': 'vit_narrow', 'model__reduce_at': (1,), 'model__classes': 3,
             'keep__shrink_epochs': 0, 'optimizer__warmup_epochs': 0.0, 'log__pictures': 0, 'checkpoint__every': 100}


def config_of(**changes):
    return tiny_run.config_of(**TWO_STEPS | changes)


class Birds(GeneratedSource):
    """A small data set with class names."""
    sizes = {'train': 128, 'test': 64}
    names = ('jay', 'rook', 'wren')

    def __init__(self, split, classes):
        super().__init__(splits.resolve(split, self.sizes), 32, classes)
        if classes == len(self.names):
            self.class_names = self.names


def objects_of(config):
    """Returns the sources and the model config of a config."""
    classes = config.model.classes
    model_config = dataclasses.replace(MODEL, classes=classes, image_size=config.model.image_size)
    return {'sources': (Birds('train', classes), Birds('test', classes)), 'model_config': model_config}


def train(workdir, **changes):
    config = config_of(**changes)
    return loop.train(config, workdir, **objects_of(config))


def evaluate(workdir):
    return loop.evaluate_workdir(config_of(), workdir, source=Birds('test', 3))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('trained')
    return workdir, train(workdir)


def fives(config):
    """Returns parameters that are all 5."""
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 5, np.float32),
                        jax.eval_shape(models.create(config).init, jax.random.key(0)))


def start_from_fives(workdir, config, **options):
    return start_from(workdir, fives(config), config=config, **options)


def test_new_state_takes_over_every_weight_and_resets_step_and_optimizer(trained):
    config = config_of(init_from=str(trained[0]))
    state = experiment.setup(config, **objects_of(config)).new_state()
    want, _ = read_newest(trained[0], 'params')
    got = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf
           for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert state.step == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))


def test_start_from_with_ema_reads_the_ema(trained):
    loaded = [start_from_fives(trained[0], dataclasses.replace(MODEL, classes=3), ema=ema)['norm']['bias']
             for ema in (False, True)]
    for field, bias in zip(('params', 'ema'), loaded, strict=True):
        np.testing.assert_array_equal(bias, read_newest(trained[0], field)[0]['norm.bias'])
    assert not np.array_equal(*loaded)


def test_start_from_with_other_classes_and_image_size_keeps_the_new_head_and_resizes_positions(trained):
    old, _ = read_newest(trained[0], 'params')
    params = start_from_fives(trained[0], dataclasses.replace(MODEL, classes=7, image_size=64), ema=False)
    np.testing.assert_array_equal(params['head']['kernel'], np.full((16, 7), 5))
    np.testing.assert_array_equal(params['head']['bias'], np.full(7, 5))
    np.testing.assert_array_equal(params['norm']['bias'], old['norm.bias'])
    assert params['pos_embed'].shape == (1, 65, 16)
    np.testing.assert_array_equal(params['pos_embed'][:, 0], old['pos_embed'][:, 0])
    small, large = (grid.reshape(side, side, 16) for grid, side in (
        (old['pos_embed'][0, 1:], 4), (params['pos_embed'][0, 1:], 8)))
    nearest = np.repeat(np.repeat(small, 2, axis=0), 2, axis=1)
    assert np.corrcoef(large.ravel(), nearest.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(('names', 'warns'), [(Birds.names, False), (('owl', 'rook', 'wren'), True)])
def test_start_from_with_other_class_names_warns(trained, caplog, names, warns):
    start_from_fives(trained[0], dataclasses.replace(MODEL, classes=3), ema=False, class_names=names)
    assert ('their names differ' in caplog.text) == warns


def test_train_from_weights_of_other_classes_and_image_size_runs_to_the_end(trained, tmp_path):
    metrics = train(tmp_path, init_from=str(trained[0]), model__classes=7, model__image_size=64, ema_decay=0.0)
    assert np.isfinite(metrics['loss'])
    assert newest_step(tmp_path) == 2
    with pytest.raises(ValueError, match='kept no moving average'):
        start_from_fives(tmp_path, MODEL, ema=True)


def test_train_resumed_without_init_from_keeps_that_of_the_first_start(trained, tmp_path):
    train(tmp_path, init_from=str(trained[0]))
    train(tmp_path, init_from=None)
    assert json.loads((tmp_path / 'config.json').read_text())['init_from'] == str(trained[0])


def test_start_from_weights_that_do_not_fit_names_them(trained):
    with pytest.raises(ValueError, match=r'4 differ\): dist_token is missing .* head_dist.bias is missing there; '
                                         r'head_dist.kernel is missing there; pos_embed has shape'):
        start_from_fives(trained[0], dataclasses.replace(MODEL, classes=3, distilled=True), ema=False)
    with pytest.raises(ValueError, match=r'30 differ\).*bias has shape \(16,\), wanted \(32,\).*and 25 more\. Set'):
        start_from_fives(trained[0], dataclasses.replace(MODEL, width=32, classes=1000), ema=False)


def test_train_from_a_missing_run_is_refused_before_the_workdir_is_touched(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'config.init_from=\S+none: there is no file or folder'):
        train(tmp_path / 'run', init_from=str(tmp_path / 'none'))
    assert deit_s_finetune.get_config().init_from is None
    with pytest.raises(ValueError, match=r'starts from trained weights: give --config.init_from=WORKDIR'):
        checks.check_start(flat(deit_s_finetune.get_config()), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_read_newest_of_an_unreadable_checkpoint_names_it_and_keeps_it(tmp_path):
    (tmp_path / 'checkpoints' / '2' / 'state').mkdir(parents=True)
    (tmp_path / 'checkpoints' / '2' / '_CHECKPOINT_METADATA').write_text('{}')
    with pytest.raises(ValueError, match=r'checkpoint of step 2 in .* cannot be read'):
        read_newest(tmp_path, 'params')
    assert (tmp_path / 'checkpoints' / '2').exists()


def test_class_names_are_recorded_and_other_ones_are_refused(trained, monkeypatch):
    workdir, metrics = trained
    weights, metadata = read_newest(workdir, 'params')
    assert weights['head.bias'].shape == (3,)
    assert metadata['class_names'] == ['jay', 'rook', 'wren']
    assert metadata['config']['model']['classes'] == 3
    saved = json.loads((workdir / 'config.json').read_text())
    assert (saved['model.classes'], saved['class_names']) == (3, ['jay', 'rook', 'wren'])
    assert train(workdir)['top1'] == evaluate(workdir)['top1'] == metrics['top1']
    monkeypatch.setattr(Birds, 'names', ('jay', 'kite', 'wren'))
    for start in (train, evaluate):
        with pytest.raises(ValueError, match=r"run on other classes .* 'rook' there, 'kite' in the data"):
            start(workdir)
