"""Training with a teacher: its outputs train the student, its weights do not change, and a wrong teacher is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints.manager import read_newest
from evit_jax.checkpoints.weights import save
from evit_jax.training import distillation
from tests.helpers import layouts
from tests.helpers.weights import random_params

NAMES = layouts.Colours.class_names
LEARNS = {'model__distilled': True, 'distill__kind': 'hard', 'log__eval_epochs': 9.0, 'log__pictures': 0}


@pytest.fixture(scope='module', autouse=True)
def least():
    """Registers the models, because `load_model` finds them by name."""
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        patch.setitem(models.CONFIGS, 'vit_narrow', dataclasses.replace(layouts.SHAPE, width=32))
        yield


@pytest.fixture(scope='module')
def teacher(shared_run):
    return shared_run


@pytest.fixture(scope='module')
def distilled(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('distilled')
    changes = {'teacher__path': str(teacher)} | LEARNS
    return workdir, changes, layouts.train_here(workdir, **changes)


def weights_of(workdir):
    return read_newest(workdir, 'params', 'ema')[:2]


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_train_with_a_teacher_lowers_and_logs_both_parts_of_the_loss(distilled):
    workdir, _, metrics = distilled
    first, last = layouts.records(workdir)[0], layouts.records(workdir)[-1]
    assert last['train/loss/teacher'] < first['train/loss/teacher']
    assert last['train/loss/labels'] < first['train/loss/labels']
    np.testing.assert_allclose(
        first['train/loss'], (first['train/loss/labels'] + first['train/loss/teacher']) / 2, rtol=1e-6)
    assert np.isfinite(metrics['loss'])


def test_checkpoint_of_a_distilled_run_has_no_teacher(distilled, teacher):
    params, _ = weights_of(distilled[0])
    assert params.keys() == weights_of(teacher)[0].keys() | {'dist_token', 'head_dist.kernel', 'head_dist.bias'}
    assert layouts.setup(**distilled[1]).abstract_state().params.keys() == random_params(models.create(
        dataclasses.replace(layouts.SHAPE, classes=3, distilled=True))).keys()


def test_train_with_a_teacher_resumed_ends_with_the_same_bits(distilled, tmp_path):
    workdir, changes, _ = distilled
    layouts.cut_off(workdir, tmp_path)
    layouts.train_here(tmp_path, **changes)
    for got, want in zip(weights_of(tmp_path), weights_of(workdir)):
        assert_equal(got, want)


def test_read_teacher_shards_its_weights_like_the_state_with_equal_losses(teacher):
    losses = []
    for sharding, divided in (('replicated', 0), ('fsdp', 4)):
        run = layouts.setup(teacher__path=str(teacher), sharding=sharding, **LEARNS)
        loaded = run.read_teacher()
        assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(loaded.params)) == divided
        _, metrics = run.train_step(loaded)(run.new_state(), batch(), run.plan, loaded.params)
        losses.append([float(metrics[name]) for name in ('loss', 'loss/teacher', 'grad_norm')])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def batch():
    rng = np.random.default_rng(0)
    return {'image': rng.integers(0, 256, (64, 16, 16, 3), np.uint8), 'label': (np.arange(64) % 3).astype(np.int32)}


def test_train_step_takes_the_teachers_parameters_as_an_argument(teacher):
    run = layouts.setup(teacher__path=str(teacher), **LEARNS)
    loaded = run.read_teacher()
    step = run.train_step(loaded)
    losses = []
    for params in (loaded.params, jax.tree.map(lambda leaf: 0 * leaf, loaded.params)):
        losses.append(float(step(run.new_state(), batch(), run.plan, params)[1]['loss/teacher']))
    assert losses[0] != losses[1]


def test_self_distillation_of_the_teachers_weights_under_a_dense_plan_has_no_loss(teacher):
    run = layouts.setup(init_from=str(teacher), distill__kind='self', distill__token_weight=0.5, model__drop_path=0.0,
                        keep__rate=1.0)
    loaded = run.read_teacher()
    _, metrics = run.train_step(loaded)(run.new_state(), batch(), run.plan, loaded.params)
    assert abs(float(metrics['loss/teacher'])) < 1e-6 and float(metrics['loss/tokens']) < 1e-9
    assert loaded.plan.reductions == () and {'loss/labels', 'loss/teacher', 'loss/tokens'} <= metrics.keys()


def test_self_distillation_with_dropped_tokens_logs_the_three_parts(teacher, tmp_path):
    metrics = layouts.train_here(
        tmp_path, init_from=str(teacher), distill__kind='self', distill__token_weight=0.5, keep__rate=0.5, epochs=2,
        log__eval_epochs=9.0, log__pictures=0)
    first = layouts.records(tmp_path)[0]
    assert first['train/loss/teacher'] > 1e-4 and first['train/loss/tokens'] > 1e-4 and np.isfinite(metrics['loss'])
    np.testing.assert_allclose(first['train/loss'], first['train/loss/labels'] + 0.5 * first['train/loss/teacher']
                               + 0.5 * first['train/loss/tokens'], rtol=1e-6)


def test_teach_with_another_normalisation_or_image_size_gets_the_same_images(teacher):
    as_trained = distillation.load_teacher(teacher, ema=False, dense=False, image_size=16, class_names=NAMES,
                                           dtype=np.float32)
    larger = distillation.load_teacher(teacher, ema=False, dense=True, image_size=32, class_names=NAMES,
                                       dtype=np.float32, patch_tokens=True)
    assert as_trained.plan.reductions == (1,) and larger.plan.patches == 64
    pixels = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    teach = jax.jit(as_trained.teach, static_argnums=(2, 3))
    logits = [teach(as_trained.params, (pixels - np.array(mean)) / np.array(std), mean, std).logits
              for mean, std in ((as_trained.mean, as_trained.std), ((0.5,) * 3, (0.25, 0.5, 0.2)))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    teach = jax.jit(larger.teach, static_argnums=(2, 3))
    assert teach(larger.params, np.zeros((2, 32, 32, 3)), larger.mean, larger.std).tokens.shape == (2, 64, 64)


def test_load_teacher_with_ema_reads_the_ema(teacher):
    params, ema = weights_of(teacher)
    for want, use_ema in ((params, False), (ema, True)):
        loaded = distillation.load_teacher(teacher, ema=use_ema, dense=True, image_size=16, class_names=NAMES,
                                           dtype=np.float32)
        np.testing.assert_array_equal(loaded.params['norm']['bias'], want['norm.bias'])


@pytest.mark.parametrize(('changes', 'message'), [
    ({'distill__kind': 'hardest'}, "config.distill.kind='hardest' is unknown: there are none, hard, soft, self"),
    ({'distill__kind': 'hard'}, 'trains a distillation token, which this model lacks: .*model.distilled=True'),
    ({'distill__kind': 'self'}, r'learns from a teacher: give --config.init_from of a trained model'),
    ({'distill__kind': 'self', 'init_from': 'nowhere'}, 'config.init_from=nowhere: there is no file or folder nowhere'),
    ({'distill__kind': 'soft', 'model__distilled': True}, r'learns from a teacher: give --config.teacher.path of a'),
    ({'distill__kind': 'self', 'teacher__path': 'nowhere'}, 'config.teacher.path=nowhere: there is no file'),
    ({'teacher__path': 'somewhere'}, 'the teacher in somewhere is not used: give --config.distill.kind='),
    ({'distill__alpha': 1.5}, r'config.distill.alpha=1.5 is outside \[0, 1\]'),
    ({'distill__tau': 0.0}, r'config.distill.tau=0.0 is outside \[0.001'),
    ({'distill__weight': -1.0}, r'config.distill.weight=-1.0 is outside \[0'),
    ({'distill__kind': 'self', 'distill__token_weight': 1.0, 'teacher__dense': False}, 'a teacher that drops none'),
    ({'reducer__share_weight': -1.0}, r'config.reducer.share_weight=-1.0 is outside \[0'),
    ({'optimizer__backbone_scale': -0.1}, r'config.optimizer.backbone_scale=-0.1 is outside \[0'),
    ({'optimizer__backbone_scale': 0.1}, 'reducer evit has none: leave them at 1 and 0')])
def test_train_with_a_bad_distillation_config_is_refused_before_the_workdir_is_touched(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        layouts.train_here(tmp_path / 'run', **changes)
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def wrong_teachers(tmp_path_factory):
    """Folder of teachers that do not fit: another number of classes, other class names, another width."""
    folder = tmp_path_factory.mktemp('wrong_teachers')
    for name, model, names in (('four', 'vit_layouts', (*NAMES, 'grey')),
                               ('other', 'vit_layouts', ('red', 'grey', 'blue')), ('narrow', 'vit_narrow', NAMES)):
        shape = dataclasses.replace(models.CONFIGS[model], classes=len(names))
        config = layouts.config_of(model__classes=len(names), model__name=model)
        save(folder / name, random_params(models.create(shape)),
             {'config': config.to_dict(), 'class_names': list(names)})
    return folder


@pytest.mark.parametrize(('name', 'message'), [
    ('four', 'has 4 classes, this data has 3'),
    ('other', r"has other classes \(the first that differs is 'grey' there, 'green' in the data"),
    ('narrow', r'16 tokens of width 32, this model 16 of width 64.*token_weight=0'),
    ('damaged', r'cannot be read')])
def test_train_with_a_teacher_that_does_not_fit_is_refused(wrong_teachers, tmp_path, name, message):
    if name == 'damaged':
        (wrong_teachers / 'damaged' / 'checkpoints' / '2' / 'state').mkdir(parents=True)
        (wrong_teachers / 'damaged' / 'checkpoints' / '2' / '_CHECKPOINT_METADATA').write_text('{}')
    with pytest.raises(ValueError, match=message):
        layouts.train_here(tmp_path / 'run', distill__kind='self', teacher__path=str(wrong_teachers / name),
                           distill__token_weight=0.5)
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_train_step_without_the_needed_teacher_is_refused(teacher):
    run = layouts.setup(teacher__path=str(teacher), **LEARNS)
    with pytest.raises(ValueError, match=r'config.distill.kind=hard needs a teacher, and there is none here'):
        run.train_step()


def test_evaluate_workdir_of_a_distilled_run_needs_no_teacher(distilled):
    workdir, changes, metrics = distilled
    assert layouts.evaluate_here(workdir, **changes | {'teacher__path': 'gone'})['top1'] == metrics['top1']
