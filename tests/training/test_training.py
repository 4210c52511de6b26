"""Training as a user runs it, on generated images and 8 virtual devices: it learns, resumes to the bit, and says no."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import base
from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.data.transforms import mixing
from evit_jax.metrics import writers
from evit_jax.training import checks, experiment, loop
from evit_jax.training.evaluation import evaluate, object_patches, present, shares_of_tokens

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {'batch_size': 256, 'epochs': 1, 'compilation_cache': '', 'ema_decay': 0.9, 'model.name': 'vit_digits',
            'model.image_size': 32, 'model.classes': 10, 'model.dtype': 'float32', 'model.reduce_at': (1, 2, 3),
            'model.drop_path': 0.1, 'keep.shrink_epochs': 1, 'keep.levels': 2, 'data.augment': 'jitter',
            'data.crop': (), 'data.eval_crop': 1.0, 'data.repeats': 1, 'data.workers': 0, 'optimizer.lr': 6e-3,
            'optimizer.warmup_epochs': 0.2, 'log.every': 4, 'log.eval_epochs': 2.0, 'log.pictures': 2,
            'checkpoint.every': 7}


def tiny(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(SETTINGS | {key.replace('__', '.'): value for key, value in changes.items()})
    return config


def final_parameters(workdir, config):
    """The parameters of the newest checkpoint, and its step."""
    checkpoints = CheckpointManager(workdir, keep=3)
    state = checkpoints.restore(experiment.setup(config).abstract_state())
    checkpoints.close()
    return jax.tree.map(np.asarray, state.params), int(state.step)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed')
    return workdir, loop.train(tiny(), workdir)


def test_a_run_learns_and_leaves_metrics_checkpoints_and_pictures(undisturbed):
    workdir, metrics = undisturbed
    records = writers.read_metrics(workdir / 'metrics.jsonl')
    losses = [record['train/loss'] for record in records if 'train/loss' in record]
    assert losses[-1] < losses[0] - 0.2
    assert metrics['top1'] > 0.2
    assert metrics['macs'] < metrics['macs_dense']
    assert {'train/lr', 'train/keep_rate', 'train/images_per_second', 'train/input_wait'} <= records[0].keys()
    assert (workdir / 'kept.png').stat().st_size > 1000
    assert (workdir / 'curves.png').stat().st_size > 1000


def test_a_finished_run_started_again_only_evaluates(undisturbed):
    workdir, metrics = undisturbed
    again = loop.train(tiny(), workdir)
    assert again['top1'] == metrics['top1']


def command(workdir, *more):
    changed = [f'--config.{key}={value}' for key, value in SETTINGS.items()]
    return [sys.executable, '-m', 'evit_jax.main', '--config', 'configs/base.py', '--workdir', str(workdir), *changed,
            *more]


def kill_at(workdir, step):
    """Starts the program and kills it once the metrics have reached `step`."""
    process = subprocess.Popen(command(workdir, '--config.log.every=1'), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    metrics = workdir / 'metrics.jsonl'
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and any(record['step'] >= step for record in writers.read_metrics(metrics)):
            break
        time.sleep(0.05)
    assert process.poll() is None, 'the run ended before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_killed_twice_ends_with_the_bits_of_an_undisturbed_one(undisturbed, tmp_path):
    steps = np.random.default_rng().choice(np.arange(8, 36), 2, replace=False)
    for step in sorted(int(step) for step in steps):
        kill_at(tmp_path, step)
    subprocess.run(command(tmp_path), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    want, got = final_parameters(undisturbed[0], tiny()), final_parameters(tmp_path, tiny())
    assert want[1] == got[1] == 40
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=f'killed at {steps}'), want[0], got[0])


def test_one_set_of_weights_is_evaluated_under_other_plans_and_sizes(undisturbed):
    workdir, _ = undisturbed
    half = loop.evaluate_workdir(tiny(keep__rate=0.5), workdir)
    larger = loop.evaluate_workdir(tiny(model__image_size=64), workdir)
    full = loop.evaluate_workdir(tiny(keep__rate=1.0), workdir)
    assert half['macs'] < full['macs'] == full['macs_dense'] < larger['macs']
    assert 0 <= larger['top1'] <= 1


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, caplog):
    config = tiny(checkpoint__every=20)
    loop.train(config, tmp_path)
    for file in (tmp_path / 'checkpoints' / '40' / 'state').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    _, step = final_parameters(tmp_path, config)
    assert step == 20
    assert 'checkpoint of step 40 cannot be read' in caplog.text
    assert (tmp_path / 'unreadable_checkpoints' / '40').exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    config = tiny(checkpoint__every=1, optimizer__lr=1e30, optimizer__warmup_epochs=0.0, keep__shrink_epochs=0)
    with pytest.raises(FloatingPointError, match=r'step \d+: loss .* not finite .*; the last good checkpoint is that'):
        loop.train(config, tmp_path)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'model__name': 'deit_z'}, r"unknown model 'deit_z': did you mean deit_"),
    ({'keep__rate': 0.0}, r'config.keep.rate=0.0 is outside \(0, 1\]'),
    ({'keep__rate': 1.2}, r'config.keep.rate=1.2 is outside \(0, 1\]'),
    ({'model__reduce_at': (1, 1, 2)}, 'names a block twice'),
    ({'model__reduce_at': (1, 2, 6)}, r'block 6 is outside 0\.\.5'),
    ({'model__image_size': 60}, 'image size 60 is not divisible by the patch size 8: use 56 or 64'),
    ({'batch_size': 60}, 'batch_size=60 is not divisible by the 8 devices: use 56 or 64'),
    ({'model__gather_impl': 'scatter'},
     "config.model.gather_impl='scatter' is unknown: there are gather, one_hot, product"),
    ({'model__dtype': 'float8'}, "config.model.dtype='float8' is unknown: there are auto, float32, bfloat16"),
    ({'epochs': 0}, r'config.epochs=0 is outside \[1'),
    ({'model__classes': 1}, r'config.model.classes=1 is outside \[2'),
    ({'mixing__erase': 1.5}, r'config.mixing.erase=1.5 is outside \[0, 1\]'),
    ({'mixing__mixup': -0.1}, r'config.mixing.mixup=-0.1 is outside \[0'),
    ({'data__source': 'digit'}, "did you mean 'digits'"),
    ({'data__augment': 'rand'}, "policy 'rand' lacks inc1"),
    ({'data__crop': (0.5,)}, r'config.data.crop=\(0.5,\) has 1 values, not 0 or 2'),
    ({'data__mean': (0.5, 0.5)}, r'config.data.mean=\(0.5, 0.5\) has 2 values, not 3'),
    ({'optimizer__lr': -1.0}, r'config.optimizer.lr=-1.0 is outside \[0'),
    ({'log__eval_epochs': 0.0}, r'config.log.eval_epochs=0.0 is outside'),
    ({'log__writer': 'clux'}, "config.log.writer='clux' is unknown: there are default, clu"),
    ({'batch_size': 10248}, 'config.batch_size=10248 is larger than the data: 10240 examples in 1 epochs'),
])
def test_a_value_that_cannot_work_stops_before_anything_is_trained(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(tiny(**changes), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_a_workdir_of_another_config_is_refused_by_its_keys_and_left_alone(undisturbed):
    workdir, _ = undisturbed
    before = (workdir / 'config.json').read_text()
    with pytest.raises(ValueError, match=r'label_smoothing 0.1 -> 0.2\).*--accept_changes'):
        loop.train(tiny(label_smoothing=0.2), workdir)
    with pytest.raises(ValueError, match=r'another model .*classes 10 there, 12 here'):
        loop.evaluate_workdir(tiny(model__classes=12), workdir)
    with pytest.raises(ValueError, match=r'run of another model .*classes 10 -> 12'):
        loop.train(tiny(model__classes=12), workdir, accept_changes=True)
    assert (workdir / 'config.json').read_text() == before


def test_a_checkpoint_with_other_arrays_is_refused_and_left_where_it_is(undisturbed):
    workdir, _ = undisturbed
    checkpoints = CheckpointManager(workdir, keep=3)
    with pytest.raises(ValueError, match=r'holds other arrays .* the first is .*ema'):
        checkpoints.restore(experiment.setup(tiny(ema_decay=0.0)).abstract_state())
    assert checkpoints.latest() == 40
    checkpoints.close()


def test_an_evaluation_may_name_another_optimizer_and_no_average(undisturbed):
    workdir, metrics = undisturbed
    again = loop.evaluate_workdir(tiny(ema_decay=0.0, optimizer__clip_norm=1.0), workdir)
    assert again['top1'] == metrics['top1']


def test_evaluating_an_empty_workdir_says_so(tmp_path):
    with pytest.raises(ValueError, match='holds no run'):
        loop.evaluate_workdir(tiny(), tmp_path)


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot be written'):
        loop.train(tiny(), tmp_path / 'file')


def test_the_program_ends_with_one_line_and_a_code_on_an_unknown_key(tmp_path):
    done = subprocess.run(command(tmp_path, '--config.keep.rat=0.5'), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('error: unknown key config.keep.rat: did you mean config.keep.rate?')
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_configs_mixing_reaches_the_step_with_one_group_to_a_device(monkeypatch):
    asked = {}

    def record(images, labels, key, **how):
        asked.update(how)
        return images, jax.nn.one_hot(labels, 10)

    monkeypatch.setattr(mixing, 'mix_batch', record)
    laid = experiment.setup(tiny(mixing__erase=0.1, mixing__mixup=0.2, mixing__cutmix=0.3, mixing__switch=0.4))
    batch = {'image': np.zeros((256, 32, 32, 3), np.uint8), 'label': np.zeros(256, np.int32)}
    jax.eval_shape(laid.train_step(), laid.abstract_state(), batch, laid.plan)
    assert asked == {'mixing': mixing.Mixing(0.1, 0.2, 0.3, 0.4, smoothing=0.1), 'classes': 10, 'groups': 8}


def test_evaluation_counts_each_image_once_and_padding_never():
    def step(batch):
        right = batch['label'] == 1
        return {'loss': np.ones(4), 'right': right, 'right5': right, 'prediction': batch['label'],
                'kept': (np.array([[0, -1]] * 4),)}

    mask = np.zeros((4, 4, 4), bool)
    mask[:, :2, :2] = True
    batches = [{'image': np.zeros((4, 4, 4, 3), np.uint8), 'label': np.array(labels), 'weight': np.array(weights),
                'mask': mask, 'index': np.arange(4)}
               for labels, weights in (([1, 1, 0, 0], [1., 1, 1, 1]), ([1, 1, 1, 1], [1., 0, 0, 0]))]
    found = evaluate(step, batches, lambda batch: batch, patches=4, sample=8)
    assert found.metrics['top1'] == 3 / 5
    assert len(found.sample['image']) == len(found.sample['kept'][0]) == 5  # padding is in no picture
    assert found.metrics['object_kept_1'] == 1.0
    assert found.metrics['random_kept_1'] == 0.25


def test_an_evaluation_of_which_nothing_could_be_read_says_so():
    def step(batch):
        return {'loss': np.zeros(2), 'right': np.zeros(2), 'right5': np.zeros(2), 'prediction': np.zeros(2), 'kept': ()}

    nothing = {'image': np.zeros((2, 4, 4, 3), np.uint8), 'label': np.zeros(2, int), 'weight': np.zeros(2)}
    with pytest.raises(ValueError, match='none of the images to evaluate on could be read'):
        evaluate(step, [nothing], lambda batch: batch, patches=4)


def test_object_patches_and_presence_follow_the_grid():
    mask = np.zeros((1, 4, 4), bool)
    mask[0, 2:, :2] = True
    assert object_patches(mask, 4).tolist() == [[False, False, True, False]]
    assert present(np.array([[3, -1, 0]]), 4).tolist() == [[True, False, False, True]]


def test_a_merged_patch_counts_by_its_share_of_the_token():
    token_of_patch = np.array([[0, 1, 1, 2], [0, 0, 0, -1]])
    np.testing.assert_allclose(shares_of_tokens(token_of_patch), [[1, 1 / 2, 1 / 2, 1], [1 / 3, 1 / 3, 1 / 3, 0]])
    dropped = np.array([[-1, 0, -1, 1]])  # alone in their tokens: as when they are kept
    np.testing.assert_array_equal(shares_of_tokens(dropped), present(np.array([[1, 3]]), 4))


def test_r_follows_the_schedule_and_is_checked_before_anything_is_trained():
    merging = {'reducer__name': 'tome', 'reducer__r': 2, 'keep__levels': 3, 'epochs': 2}
    laid = experiment.setup(tiny(**merging))
    assert [stage.plan.counts[-1] for stage in laid.stages] == [16, 10, 4] and laid.plan.counts[0] == 14
    assert [experiment.keep_rate(laid, stage) for stage in laid.stages] == [1, 15 / 16, 14 / 16]
    assert experiment.setup(tiny(**merging, reducer__decreasing=True)).plan.counts[0] == 12
    for wrong, said in (({'reducer__r': 9}, '0 <= r <= 8'), ({'reducer__name': 'evit'}, 'evit merges none')):
        with pytest.raises(ValueError, match=said):
            checks.check(tiny(**merging | wrong))
