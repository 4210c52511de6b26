"""Training with a teacher as a user runs it, on 8 virtual devices: it is heard, never changed, and refused by name."""

import dataclasses

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints.manager import read_newest
from evit_jax.checkpoints.weights import save
from evit_jax.training import distillation, experiment, loop
from tests.helpers import layouts

NAMES = layouts.Colours.class_names
LEARNS = {'model__distilled': True, 'distill__kind': 'hard', 'log__eval_epochs': 9.0, 'log__pictures': 0}


@pytest.fixture(scope='module', autouse=True)
def least():
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        patch.setitem(models.CONFIGS, 'vit_narrow', dataclasses.replace(layouts.SHAPE, width=32))
        yield


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('teacher')
    loop.train(layouts.config_of(log__eval_epochs=9.0, log__pictures=0), workdir)
    return workdir


@pytest.fixture(scope='module')
def distilled(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('distilled')
    config = layouts.config_of(teacher__path=str(teacher), **LEARNS)
    return workdir, config, loop.train(config, workdir)


def weights_of(workdir):
    return read_newest(workdir, 'params', 'ema')[:2]


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_a_distilled_model_learns_and_its_parts_are_logged(distilled):
    workdir, _, metrics = distilled
    first, last = layouts.records(workdir)[0], layouts.records(workdir)[-1]
    assert last['train/loss/teacher'] < first['train/loss/teacher']
    assert last['train/loss/labels'] < first['train/loss/labels']
    np.testing.assert_allclose(
        first['train/loss'], (first['train/loss/labels'] + first['train/loss/teacher']) / 2, rtol=1e-6)
    assert np.isfinite(metrics['loss'])


def test_the_teacher_is_no_part_of_the_checkpoint_and_stays_as_it_was(distilled, teacher):
    params, _ = weights_of(distilled[0])
    assert params.keys() == weights_of(teacher)[0].keys() | {'dist_token', 'head_dist.kernel', 'head_dist.bias'}
    assert experiment.setup(distilled[1]).abstract_state().params.keys() == models.create(
        dataclasses.replace(layouts.SHAPE, classes=3, distilled=True)).init(jax.random.key(0)).keys()


def test_a_run_with_a_teacher_that_was_cut_off_ends_with_the_same_bits(distilled, tmp_path):
    workdir, config, _ = distilled
    layouts.cut_off(workdir, tmp_path)
    loop.train(config, tmp_path)
    for got, want in zip(weights_of(tmp_path), weights_of(workdir)):
        assert_equal(got, want)


def test_the_teachers_weights_lie_as_the_states_do_and_it_says_the_same(teacher):
    heard = []
    for sharding, divided in (('replicated', 0), ('fsdp', 4)):
        laid = experiment.setup(layouts.config_of(teacher__path=str(teacher), sharding=sharding, **LEARNS))
        found = laid.read_teacher()
        assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found.params)) == divided
        _, metrics = laid.train_step(found)(laid.new_state(), example(laid), laid.plan, found.params)
        heard.append([float(metrics[name]) for name in ('loss', 'loss/teacher', 'grad_norm')])
    np.testing.assert_allclose(*heard, rtol=1e-5)


def example(laid):
    rng = np.random.default_rng(0)
    return {'image': rng.integers(0, 256, (64, 16, 16, 3), np.uint8), 'label': (np.arange(64) % 3).astype(np.int32)}


def test_a_teacher_is_an_argument_of_the_step_and_no_constant_in_it(teacher):
    laid = experiment.setup(layouts.config_of(teacher__path=str(teacher), **LEARNS))
    found = laid.read_teacher()
    step = laid.train_step(found)
    heard = []
    for params in (found.params, jax.tree.map(lambda leaf: 0 * leaf, found.params)):
        heard.append(float(step(laid.new_state(), example(laid), laid.plan, params)[1]['loss/teacher']))
    assert heard[0] != heard[1]


def test_a_model_that_begins_as_its_teacher_under_a_dense_plan_is_at_no_distance_from_it(teacher):
    config = layouts.config_of(init_from=str(teacher), distill__kind='self', distill__token_weight=0.5,
                               model__drop_path=0.0, keep__rate=1.0)
    laid = experiment.setup(config)
    found = laid.read_teacher()
    _, metrics = laid.train_step(found)(laid.new_state(), example(laid), laid.plan, found.params)
    assert abs(float(metrics['loss/teacher'])) < 1e-6 and float(metrics['loss/tokens']) < 1e-9
    assert found.plan.reductions == () and {'loss/labels', 'loss/teacher', 'loss/tokens'} <= metrics.keys()


def test_self_distillation_and_dropped_tokens_go_together(teacher, tmp_path):
    metrics = loop.train(layouts.config_of(
        init_from=str(teacher), distill__kind='self', distill__token_weight=0.5, keep__rate=0.5, epochs=2,
        log__eval_epochs=9.0, log__pictures=0), tmp_path)
    first = layouts.records(tmp_path)[0]
    assert first['train/loss/teacher'] > 1e-4 and first['train/loss/tokens'] > 1e-4 and np.isfinite(metrics['loss'])
    np.testing.assert_allclose(first['train/loss'], first['train/loss/labels'] + 0.5 * first['train/loss/teacher']
                               + 0.5 * first['train/loss/tokens'], rtol=1e-6)


def test_a_teacher_of_another_image_size_and_normalisation_sees_the_same_picture(teacher):
    as_it_was = distillation.read(teacher, ema=False, dense=False, image_size=16, class_names=NAMES, dtype=np.float32)
    larger = distillation.read(teacher, ema=False, dense=True, image_size=32, class_names=NAMES, dtype=np.float32)
    assert as_it_was.plan.reductions == (1,) and larger.plan.patches == 64
    pixels = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    said = [as_it_was.teach(as_it_was.params, (pixels - np.array(mean)) / np.array(std), mean, std).logits
            for mean, std in ((as_it_was.mean, as_it_was.std), ((0.5,) * 3, (0.25, 0.5, 0.2)))]
    np.testing.assert_allclose(*said, rtol=1e-4, atol=1e-5)
    assert larger.teach(larger.params, np.zeros((2, 32, 32, 3)), larger.mean, larger.std).tokens.shape == (2, 64, 64)


def test_the_average_of_the_teacher_is_taken_where_it_is_asked_for(teacher):
    params, ema = weights_of(teacher)
    for want, average in ((params, False), (ema, True)):
        found = distillation.read(teacher, ema=average, dense=True, image_size=16, class_names=NAMES, dtype=np.float32)
        np.testing.assert_array_equal(found.params['norm']['bias'], want['norm.bias'])


@pytest.mark.parametrize(('changes', 'message'), [
    ({'distill__kind': 'hardest'}, "config.distill.kind='hardest' is unknown: there are none, hard, soft, self"),
    ({'distill__kind': 'hard'}, 'teaches a distillation token, which this model lacks: .*model.distilled=True'),
    ({'distill__kind': 'self'}, r'learns from a teacher: give --config.init_from=WORKDIR'),
    ({'distill__kind': 'self', 'init_from': 'nowhere'}, 'config.init_from=nowhere holds no checkpoint'),
    ({'distill__kind': 'soft', 'model__distilled': True}, r'learns from a teacher: give --config.teacher.path=WORKDIR'),
    ({'distill__kind': 'self', 'teacher__path': 'nowhere'}, 'config.teacher.path=nowhere holds no checkpoint'),
    ({'teacher__path': 'somewhere'}, 'nothing is learned from the teacher in somewhere: give --config.distill.kind='),
    ({'distill__alpha': 1.5}, r'config.distill.alpha=1.5 is outside \[0, 1\]'),
    ({'distill__tau': 0.0}, r'config.distill.tau=0.0 is outside \[0.001'),
    ({'distill__weight': -1.0}, r'config.distill.weight=-1.0 is outside \[0'),
    ({'distill__kind': 'self', 'distill__token_weight': 1.0, 'teacher__dense': False}, 'a teacher that drops none'),
    ({'reducer__share_weight': -1.0}, r'config.reducer.share_weight=-1.0 is outside \[0'),
    ({'optimizer__backbone_scale': -0.1}, r'config.optimizer.backbone_scale=-0.1 is outside \[0'),
    ({'optimizer__backbone_scale': 0.1}, 'reducer evit has none: leave them at 1 and 0')])
def test_what_cannot_teach_is_said_before_the_workdir_is_touched(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(layouts.config_of(**changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def strangers(tmp_path_factory):
    """Folders of weights that are no teachers here: other classes, other names of them, another width."""
    folder = tmp_path_factory.mktemp('strangers')
    for name, model, names in (('four', 'vit_layouts', (*NAMES, 'grey')),
                               ('other', 'vit_layouts', ('red', 'grey', 'blue')), ('narrow', 'vit_narrow', NAMES)):
        shape = dataclasses.replace(models.CONFIGS[model], classes=len(names))
        config = layouts.config_of(model__classes=len(names), model__name=model)
        save(folder / name, models.create(shape).init(jax.random.key(0)),
             {'config': config.to_dict(), 'class_names': list(names)})
    return folder


@pytest.mark.parametrize(('name', 'message'), [
    ('four', 'tells 4 classes apart, this data has 3'),
    ('other', r"knows other classes \(the first that differs is 'grey' there, 'green' in the data"),
    ('narrow', r'16 tokens of width 32, this model 16 of width 64.*token_weight=0'),
    ('damaged', r'cannot be read')])
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_trained(strangers, tmp_path, name, message):
    if name == 'damaged':
        (strangers / 'damaged' / 'checkpoints' / '2' / 'state').mkdir(parents=True)
        (strangers / 'damaged' / 'checkpoints' / '2' / '_CHECKPOINT_METADATA').write_text('{}')
    with pytest.raises(ValueError, match=message):
        loop.train(layouts.config_of(distill__kind='self', teacher__path=str(strangers / name),
                                     distill__token_weight=0.5), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_a_step_is_not_made_without_the_teacher_that_it_needs(teacher):
    laid = experiment.setup(layouts.config_of(teacher__path=str(teacher), **LEARNS))
    with pytest.raises(ValueError, match=r'config.distill.kind=hard needs a teacher, and there is none here'):
        laid.train_step()


def test_a_distilled_run_is_evaluated_without_its_teacher(distilled):
    workdir, config, metrics = distilled
    config = config.copy_and_resolve_references()
    config.teacher.path = 'gone'
    assert loop.evaluate_workdir(config, workdir)['top1'] == metrics['top1']
