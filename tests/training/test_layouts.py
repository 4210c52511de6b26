"""One training in every layout: the number of processes and devices and the sharding change only the rounding."""

import itertools
import math
import re
import shutil

import jax
import numpy as np
import pytest

from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.metrics import writers
from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.tokens import Tokens
from evit_jax.runtime import sharding
from evit_jax.training import step
from tests.helpers import layouts

LAYOUTS = layouts.LAYOUTS
CLOSE = 1e-5  # relative; measured: 1.4e-7
EXACT = ('eval/images', 'eval/top1', 'eval/top5', 'eval/top1_ema', 'eval/object_kept_1', 'eval/random_kept_1')
SHAPE = re.compile(r'\w+\[([\d,]*)\]')
COLLECTIVE = re.compile(r'= (.*) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(')


def assert_agree(workdir, want):
    """Compares the losses of every step and the metrics of the last evaluation with those of another run."""
    assert len(layouts.losses(want)) == layouts.STEPS
    np.testing.assert_allclose(layouts.losses(workdir), layouts.losses(want), rtol=CLOSE)
    last, first = (writers.read_metrics(folder / 'metrics.jsonl')[-1] for folder in (workdir, want))
    assert {name: last[name] for name in EXACT} == {name: first[name] for name in EXACT}
    np.testing.assert_allclose(last['eval/loss'], first['eval/loss'], rtol=CLOSE)
    assert last['eval/images'] == layouts.Colours.sizes['test']


def test_train_in_two_processes_with_fsdp_agrees_with_one_process(shared_run, tmp_path):
    layouts.train(tmp_path / 'run', **LAYOUTS['2x4 fsdp'])
    assert_agree(tmp_path / 'run', shared_run)
    assert 0.5 < writers.read_metrics(shared_run / 'metrics.jsonl')[-1]['eval/top1'] < 1
    assert (tmp_path / 'run' / 'kept.png').exists() and (tmp_path / 'run' / 'curves.png').exists()
    logs = [(tmp_path / f'run.{number}.log').read_text() for number in range(2)]
    assert [('images/s' in log, 'parameters:' in log, 'process ' in log) for log in logs] == [
        (True, True, True), (False, False, True)]  # process 0 alone reports progress


@pytest.mark.slow
def test_train_with_accumulated_gradients_agrees_under_both_shardings(tmp_path):
    for name in sharding.SHARDINGS:
        layouts.train_here(tmp_path / name, sharding=name, optimizer__accumulate=2)
    assert_agree(tmp_path / 'fsdp', tmp_path / 'replicated')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Workdirs by the name of the layout."""
    folder = tmp_path_factory.mktemp('trained')
    for name, layout in LAYOUTS.items():
        layouts.train(folder / name, **layout)
    return {name: folder / name for name in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_agrees_with_one_device(trained, name):
    got, want = np.array(layouts.losses(trained[name])), np.array(layouts.losses(trained['1x1']))
    print(f'{name}: losses differ by {np.abs(got / want - 1).max():.1e} at most')
    assert_agree(trained[name], trained['1x1'])


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'name'), itertools.permutations(LAYOUTS, 2))
def test_train_resumed_in_another_layout_agrees(trained, tmp_path, before, name):
    workdir = tmp_path / 'run'
    layouts.cut_off(trained[before], workdir)
    layouts.train(workdir, **LAYOUTS[name])
    np.testing.assert_allclose(layouts.losses(workdir), layouts.losses(trained['1x1'])[5:], rtol=CLOSE)
    assert (writers.read_metrics(workdir / 'metrics.jsonl')[-1]['eval/top1']
            == writers.read_metrics(trained['1x1'] / 'metrics.jsonl')[-1]['eval/top1'])


@pytest.mark.parametrize('name', sharding.SHARDINGS)
def test_restore_gives_equal_bits_with_the_sharding_of_the_config(shared_run, name):
    run = layouts.setup(sharding=name)
    checkpoints = CheckpointManager(shared_run, keep=3)
    state, replicated = (checkpoints.restore(run._replace(config=config).abstract_state())
                         for config in (run.config, layouts.config_of()))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, replicated)
    jax.tree.map(lambda leaf, sharding: sharding.is_equivalent_to(leaf.sharding, leaf.ndim) or pytest.fail(
        f'{leaf.shape}'), state, run.shardings())


def test_fsdp_divides_large_arrays_and_replicates_small_ones():
    state = layouts.setup(sharding='fsdp').new_state()
    held = {leaf.shape: leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(state)}
    assert held[64, 256] == (64, 32) and held[256, 64] == (32, 64)
    assert held[64, 192] == (64, 192) and held[64,] == (64,)
    divided = [leaf for part in (state.params, state.ema, state.opt_state) for leaf in jax.tree.leaves(part)
               if not leaf.sharding.is_fully_replicated]
    assert len(divided) == 4 * 4  # four kernels: parameters, average, both moments


def collectives(lowered):
    """Returns (name, number of elements in its result) of each collective of a program."""
    return [(name, sum(math.prod(map(int, filter(None, shape.split(',')))) for shape in SHAPE.findall(result)))
            for result, name in COLLECTIVE.findall(lowered.compile().as_text())]


def programs(**changes):
    """Returns the lowered training and evaluation step, and the number of parameters."""
    run = layouts.setup(**changes)
    state, batch = run.abstract_state(), run.abstract_batch()
    return (run.train_step().lower(state, batch, run.plan), run.eval_step().lower(state.params, batch, run.plan),
            sum(leaf.size for leaf in jax.tree.leaves(state.params)))


def test_eval_step_is_shared_by_equal_runs_only():
    step = layouts.setup().eval_step()
    assert step is layouts.setup(optimizer__lr=0.1).eval_step()
    for changes in ({'data__mean': (0.1, 0.2, 0.3)}, {'sharding': 'fsdp'}, {'model__distilled': True}):
        assert step is not layouts.setup(**changes).eval_step()


def test_label_ranks_are_those_of_top_k_and_nan_is_never_right():
    logits = np.random.default_rng(0).integers(0, 4, (200, 6)).astype(np.float32)  # many logits are equal
    labels = np.arange(200) % 6
    best = np.asarray(jax.lax.top_k(logits, 6)[1])
    np.testing.assert_array_equal(step.label_ranks(logits, labels), (best == labels[:, None]).argmax(1))
    assert (step.label_ranks(np.full((6, 6), np.nan), np.arange(6)) == 6).all()


@pytest.mark.parametrize('batch', [16, 6])  # 6 is not divisible by the 8 devices
def test_keep_top_on_several_devices_breaks_ties_as_on_one(batch):
    mesh, rng = sharding.data_mesh(8), np.random.default_rng(0)
    score = rng.integers(0, 9, (batch, 49)).astype(np.float32)
    patch = np.tile(np.arange(49, dtype=np.int32), (batch, 1))
    tokens = Tokens(rng.normal(size=(batch, 49, 4)).astype(np.float32), patch)

    def reduced(score):
        return keep_top(tokens, score, 30, fuse_weights=score)

    gradient, twice = jax.grad(lambda score: (reduced(score).x ** 2).sum()), jax.vmap(reduced)
    for reduce, scores in ((reduced, score), (gradient, score), (twice, np.stack([score, score]))):
        divided = jax.jit(sharding.with_mesh(mesh, reduce), in_shardings=sharding.replicated(mesh))
        jax.tree.map(np.testing.assert_array_equal, divided(scores), jax.jit(reduce)(scores))


@pytest.mark.parametrize('fuse', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_train_step_all_reduces_only_gradients_and_two_metrics(fuse):
    train, evaluation, parameters = programs(mixing__mixup=0.8, mixing__cutmix=1.0, model__fuse=fuse)
    assert collectives(evaluation) == []
    assert {name for name, _ in collectives(train)} == {'all-reduce'}
    assert sum(numbers for _, numbers in collectives(train)) == parameters + 2  # loss and accuracy


@pytest.mark.parametrize(('classes', 'arrays'), [
    (256, 5), pytest.param(3, 4, marks=pytest.mark.slow)])  # with 256 classes the head is divided, too
def test_fsdp_gathers_each_divided_array_once_and_no_activation(classes, arrays):
    train, evaluation, parameters = programs(sharding='fsdp', model__classes=classes)
    for program in (train, evaluation):
        gathered = [collective for collective in collectives(program) if collective[0] == 'all-gather']
        assert gathered == arrays * [('all-gather', 64 * 256)]
    reduced = [numbers for name, numbers in collectives(train) if name != 'all-gather']
    assert {name for name, _ in collectives(train)} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    assert sum(reduced) < parameters + 50  # the others are parts of the gradient's norm


@pytest.mark.slow
def test_train_from_init_from_in_two_processes_agrees_with_one(shared_run, tmp_path):
    changes = {'init_from': str(shared_run), 'epochs': 2}
    layouts.train_here(tmp_path / 'one', **changes)
    layouts.train(tmp_path / 'two', **LAYOUTS['2x4 fsdp'], **changes)
    np.testing.assert_allclose(layouts.losses(tmp_path / 'two'), layouts.losses(tmp_path / 'one'), rtol=CLOSE)
    assert layouts.losses(tmp_path / 'two')[0] < layouts.losses(shared_run)[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(('key', 'settings'), [
    ('init_from', {'distill__kind': 'self', 'distill__token_weight': 0.5, 'keep__rate': 0.5}),
    ('teacher__path', {'distill__kind': 'hard', 'model__distilled': True})], ids=['self', 'hard'])
def test_train_with_a_teacher_in_two_processes_agrees_with_one(shared_run, tmp_path, key, settings):
    changes = settings | {key: str(shared_run), 'epochs': 2, 'log__pictures': 0}
    layouts.train_here(tmp_path / 'one', **changes)
    layouts.train(tmp_path / 'two', **LAYOUTS['2x4 fsdp'], **changes)
    teacher_losses = [[record['train/loss/teacher'] for record in layouts.records(tmp_path / name)]
                      for name in ('two', 'one')]
    assert min(teacher_losses[1]) > 1e-4
    np.testing.assert_allclose(*teacher_losses, rtol=CLOSE)
    np.testing.assert_allclose(*(layouts.losses(tmp_path / name) for name in ('two', 'one')), rtol=CLOSE)


@pytest.mark.slow
def test_restore_of_a_damaged_checkpoint_in_two_processes_reads_the_previous_one(trained, tmp_path):
    shutil.copytree(trained['2x4'], tmp_path / 'run')
    for file in (tmp_path / 'run' / 'checkpoints' / '10' / 'state').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    layouts.train(tmp_path / 'run', **LAYOUTS['2x4'])
    assert (tmp_path / 'run' / 'unreadable_checkpoints' / '10').exists()
    assert_agree(tmp_path / 'run', trained['2x4'])


@pytest.mark.slow
def test_train_with_examples_that_one_process_cannot_read_stops_all_processes(tmp_path):
    started = layouts.start(tmp_path / 'run', processes=2, devices=1, broken_in=1)
    assert layouts.wait(started, 120) == [2, 2]
    for number, message in enumerate(("none of them in this process", "the last one 'example")):
        log = (tmp_path / f'run.{number}.log').read_text()
        assert 'samples could not be read' in log and message in log


@pytest.mark.slow
def test_train_in_a_workdir_of_another_config_is_refused_in_all_processes(shared_run, tmp_path):
    shutil.copytree(shared_run, tmp_path / 'run')
    started = layouts.start(tmp_path / 'run', processes=2, devices=1, label_smoothing=0.2)
    assert layouts.wait(started, 120) == [2, 2]
    for number in range(2):
        assert 'label_smoothing 0.1 -> 0.2' in (tmp_path / f'run.{number}.log').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_train_with_one_process_killed_ends_the_other_within_a_minute(tmp_path, killed):
    started = layouts.start(tmp_path / 'run', processes=2, devices=1, epochs=5000, checkpoint__every=10_000)
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    layouts.until(lambda: metrics.exists() and metrics.read_text().count('\n') > 5, 120)
    started[killed].kill()
    assert layouts.wait(started, 60)[1 - killed] != 0
    log = (tmp_path / f'run.{1 - killed}.log').read_text()
    assert 'another process of this run has ended' in log or 'another task died' in log
