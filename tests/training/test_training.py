"""Training through `loop.train` and the program, on generated images and 8 virtual devices."""

import dataclasses
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.checkpoints.workdir import flat
from evit_jax.data.transforms import mixing
from evit_jax.metrics import writers
from evit_jax.training import checks, experiment, loop, model_setup
from tests.helpers import layouts
from tests.helpers.tiny_run import MODEL, ROOT, command, config_of, final_parameters, train


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('tiny_run')
    return workdir, train(workdir)


def evaluate(workdir, **changes):
    """Evaluates a run with changed config keys, as if they were given on the command line."""
    return loop.evaluate_workdir(config_of(**changes), workdir, from_file=False,
                                 explicit=[key.replace('__', '.') for key in changes])


def test_train_lowers_the_loss_and_writes_metrics_and_pictures(tiny_run):
    workdir, metrics = tiny_run
    records = writers.read_metrics(workdir / 'metrics.jsonl')
    losses = [record['train/loss'] for record in records if 'train/loss' in record]
    assert losses[-1] < losses[0] - 0.2
    assert metrics['top1'] > 0.2
    assert metrics['macs'] < metrics['macs_dense']
    assert {'train/lr', 'train/keep_rate', 'train/images_per_second', 'train/input_wait'} <= records[0].keys()
    assert (workdir / 'kept.png').stat().st_size > 1000
    assert (workdir / 'curves.png').stat().st_size > 1000


def test_train_of_a_finished_run_only_evaluates(tiny_run):
    workdir, metrics = tiny_run
    again = train(workdir)
    assert again['top1'] == metrics['top1']


def kill_at(workdir, step):
    """Starts the program and kills it when the metrics have reached a step."""
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
def test_train_killed_twice_ends_with_the_bits_of_an_undisturbed_run(tmp_path_factory, tmp_path):
    undisturbed = tmp_path_factory.mktemp('undisturbed')
    loop.train(config_of(), undisturbed)
    steps = np.random.default_rng().choice(np.arange(8, 36), 2, replace=False)
    for step in sorted(int(step) for step in steps):
        kill_at(tmp_path, step)
    subprocess.run(command(tmp_path), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    want, got = final_parameters(undisturbed, config_of()), final_parameters(tmp_path, config_of())
    assert want[1] == got[1] == 40
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=f'killed at {steps}'), want[0], got[0])


def test_evaluate_workdir_under_other_plans_and_image_sizes_changes_the_macs(tiny_run):
    workdir, metrics = tiny_run
    half, full = evaluate(workdir, keep__rate=0.5), evaluate(workdir, keep__rate=1.0)
    larger = evaluate(workdir, model__image_size=64)
    assert half['macs'] < metrics['macs'] < full['macs'] == full['macs_dense'] == half['macs_dense'] < larger['macs']
    assert 0 <= larger['top1'] <= 1


@pytest.mark.slow
def test_restore_sets_a_damaged_checkpoint_aside_and_reads_the_previous_one(tmp_path, caplog):
    config = config_of(checkpoint__every=20)
    loop.train(config, tmp_path)
    for file in (tmp_path / 'checkpoints' / '40' / 'state').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    _, step = final_parameters(tmp_path, config)
    assert step == 20
    assert 'checkpoint of step 40 cannot be read' in caplog.text
    assert (tmp_path / 'unreadable_checkpoints' / '40').exists()


def test_train_with_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r'step \d+: loss .* not finite .*; the last good checkpoint is that'):
        layouts.train_here(tmp_path, checkpoint__every=1, optimizer__lr=1e30, optimizer__warmup_epochs=0.0,
                           log__pictures=0)


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
    ({'data__source': 'digit'}, 'did you mean digits'),
    ({'data__augment': 'rand'}, "policy 'rand' lacks inc1"),
    ({'data__crop': (0.5,)}, r'config.data.crop=\(0.5,\) has 1 values, not 0 or 2'),
    ({'data__mean': (0.5, 0.5)}, r'config.data.mean=\(0.5, 0.5\) has 2 values, not 3'),
    ({'optimizer__lr': -1.0}, r'config.optimizer.lr=-1.0 is outside \[0'),
    ({'log__eval_epochs': 0.0}, r'config.log.eval_epochs=0.0 is outside'),
    ({'log__writer': 'clux'}, "config.log.writer='clux' is unknown: there are default, clu"),
    ({'batch_size': 10248}, 'config.batch_size=10248 is larger than the data: 10240 examples in 1 epochs'),
])
def test_train_with_a_bad_value_is_refused_before_the_first_step(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config_of(**changes), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_train_in_a_workdir_of_another_config_is_refused_by_key_and_changes_nothing(tiny_run):
    workdir, _ = tiny_run
    before = (workdir / 'config.json').read_text()
    with pytest.raises(ValueError, match=r'label_smoothing 0.1 -> 0.2\).*--accept_changes'):
        train(workdir, label_smoothing=0.2)
    with pytest.raises(ValueError, match=r'holds a run on other classes \(10 there, 12 in the data'):
        evaluate(workdir, model__classes=12)
    with pytest.raises(ValueError, match=r'run of another model .*classes 10 -> 12'):
        loop.train(config_of(model__classes=12), workdir, accept_changes=True,
                   model_config=dataclasses.replace(MODEL, classes=12))
    with pytest.raises(ValueError, match=r'model.classes=12 contradicts the model that is given, which has 10 classes'):
        loop.train(config_of(model__classes=12), workdir, accept_changes=True, model_config=MODEL)
    assert (workdir / 'config.json').read_text() == before


def test_restore_of_other_arrays_is_refused_and_keeps_the_checkpoint(tiny_run):
    workdir, _ = tiny_run
    checkpoints = CheckpointManager(workdir, keep=3)
    with pytest.raises(ValueError, match=r'holds other arrays .* the first is .*ema'):
        checkpoints.restore(experiment.setup(config_of(ema_decay=0.0), model_config=MODEL).abstract_state())
    assert checkpoints.latest() == 40
    checkpoints.close()


def test_evaluate_workdir_ignores_the_optimizer_and_ema_of_the_config(tiny_run):
    workdir, metrics = tiny_run
    again = evaluate(workdir, ema_decay=0.0, optimizer__clip_norm=1.0)
    assert again['top1'] == metrics['top1']


def test_evaluate_workdir_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match='holds no run'):
        loop.evaluate_workdir(config_of(), tmp_path)


def test_train_in_a_file_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot be written'):
        loop.train(config_of(), tmp_path / 'file')


def test_main_with_an_unknown_key_ends_with_one_line_and_code_2(tmp_path):
    done = subprocess.run(command(tmp_path, '--config.keep.rat=0.5'), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('error: unknown key config.keep.rat: did you mean config.keep.rate?')
    assert len(done.stderr.strip().splitlines()) == 1


def test_train_step_mixes_with_the_settings_of_the_config_in_one_group_per_device(monkeypatch):
    arguments = {}

    def record(images, labels, key, **kwargs):
        arguments.update(kwargs)
        return images, jax.nn.one_hot(labels, 10)

    monkeypatch.setattr(mixing, 'mix_batch', record)
    run = experiment.setup(config_of(mixing__erase=0.1, mixing__mixup=0.2, mixing__cutmix=0.3, mixing__switch=0.4))
    batch = {'image': np.zeros((256, 32, 32, 3), np.uint8), 'label': np.zeros(256, np.int32)}
    jax.eval_shape(run.train_step(), run.abstract_state(), batch, run.plan)
    assert arguments == {'mixing': mixing.Mixing(0.1, 0.2, 0.3, 0.4, smoothing=0.1), 'classes': 10, 'groups': 8}


def test_setup_with_r_follows_the_schedule_and_checks_the_limit():
    merging = {'reducer__name': 'tome', 'reducer__r': 2, 'keep__levels': 3, 'epochs': 2}
    run = experiment.setup(config_of(**merging))
    assert [stage.plan.counts[-1] for stage in run.stages] == [16, 10, 4] and run.plan.counts[0] == 14
    assert [model_setup.logged_keep_rate(run.flat_config, stage) for stage in run.stages] == [1, 15 / 16, 14 / 16]
    assert experiment.setup(config_of(**merging, reducer__decreasing=True)).plan.counts[0] == 12
    for wrong, message in (({'reducer__r': 9}, '0 <= r <= 8'), ({'reducer__name': 'evit'}, 'evit merges none')):
        with pytest.raises(ValueError, match=message):
            checks.check(flat(config_of(**merging | wrong)))
