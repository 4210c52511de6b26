"""One training in every layout: processes, devices, and where the state lies change nothing but the rounding."""

import itertools
import math
import re
import shutil

import jax
import numpy as np
import pytest

from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.metrics import writers
from evit_jax.reduction.tokens import Tokens, keep_top_and_fuse
from evit_jax.runtime import sharding
from evit_jax.training import experiment, loop, step
from tests.helpers import layouts

LAYOUTS = {
    '1x1': {'processes': 1, 'devices': 1},
    '1x8': {'processes': 1, 'devices': 8},
    '1x8 fsdp': {'processes': 1, 'devices': 8, 'sharding': 'fsdp'},
    '2x4': {'processes': 2, 'devices': 4},
    '2x4 fsdp': {'processes': 2, 'devices': 4, 'sharding': 'fsdp'},
}
CLOSE = 1e-5  # relative; measured: 1.4e-7
EXACT = ('eval/images', 'eval/top1', 'eval/top5', 'eval/top1_ema', 'eval/object_kept_1', 'eval/random_kept_1')
SHAPE = re.compile(r'\w+\[([\d,]*)\]')
COLLECTIVE = re.compile(r'= (.*) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(')


@pytest.fixture(autouse=True)
def least(monkeypatch):
    layouts.prepare(monkeypatch)


def assert_agree(workdir, want):
    """Losses of every step, and what the last evaluation counted, against another run's."""
    assert len(layouts.losses(want)) == layouts.STEPS
    np.testing.assert_allclose(layouts.losses(workdir), layouts.losses(want), rtol=CLOSE)
    last, first = (writers.read_metrics(folder / 'metrics.jsonl')[-1] for folder in (workdir, want))
    assert {name: last[name] for name in EXACT} == {name: first[name] for name in EXACT}
    np.testing.assert_allclose(last['eval/loss'], first['eval/loss'], rtol=CLOSE)
    assert last['eval/images'] == layouts.Colours.sizes['test']


@pytest.fixture(scope='module')
def eight(tmp_path_factory):
    """Trained in this process, on its 8 devices."""
    workdir = tmp_path_factory.mktemp('layouts') / '1x8'
    layouts.train_here(workdir)
    return workdir


def test_two_processes_with_a_divided_state_agree_with_one(eight, tmp_path):
    layouts.train(tmp_path / 'run', **LAYOUTS['2x4 fsdp'])
    assert_agree(tmp_path / 'run', eight)
    assert 0.5 < writers.read_metrics(eight / 'metrics.jsonl')[-1]['eval/top1'] < 1  # a figure that can differ
    assert (tmp_path / 'run' / 'kept.png').exists() and (tmp_path / 'run' / 'curves.png').exists()


@pytest.mark.slow
def test_accumulated_gradients_of_a_divided_state_agree_with_those_of_a_whole_one(tmp_path):
    for name in sharding.SHARDINGS:
        loop.train(layouts.config_of(sharding=name, optimizer__accumulate=2), tmp_path / name)
    assert_agree(tmp_path / 'fsdp', tmp_path / 'replicated')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Workdirs by layout."""
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
def test_a_run_begun_in_one_layout_continues_in_any_other(trained, tmp_path, before, name):
    workdir = tmp_path / 'run'
    layouts.cut_off(trained[before], workdir)
    layouts.train(workdir, **LAYOUTS[name])
    np.testing.assert_allclose(layouts.losses(workdir), layouts.losses(trained['1x1'])[5:], rtol=CLOSE)
    assert (writers.read_metrics(workdir / 'metrics.jsonl')[-1]['eval/top1']
            == writers.read_metrics(trained['1x1'] / 'metrics.jsonl')[-1]['eval/top1'])


@pytest.mark.parametrize('name', sharding.SHARDINGS)
def test_a_checkpoint_is_restored_to_the_bit_where_the_config_wants_it(eight, name):
    laid = experiment.setup(layouts.config_of(sharding=name))
    checkpoints = CheckpointManager(eight, keep=3)
    state, as_it_was = (checkpoints.restore(laid._replace(config=config).abstract_state())
                        for config in (laid.config, layouts.config_of()))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, as_it_was)
    jax.tree.map(lambda leaf, place: place.is_equivalent_to(leaf.sharding, leaf.ndim) or pytest.fail(f'{leaf.shape}'),
                 state, laid.shardings())


def test_a_divided_state_takes_its_share_of_memory_and_small_arrays_stay_whole():
    laid = experiment.setup(layouts.config_of(sharding='fsdp'))
    state = laid.new_state()
    held = {leaf.shape: leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(state)}
    assert held[64, 256] == (64, 32) and held[256, 64] == (32, 64)
    assert held[64, 192] == (64, 192) and held[64,] == (64,)
    divided = [leaf for part in (state.params, state.ema, state.opt_state) for leaf in jax.tree.leaves(part)
               if not leaf.sharding.is_fully_replicated]
    assert len(divided) == 4 * 4  # four kernels: parameters, average, both moments


def collectives(lowered):
    """(name, numbers in its result) of each collective of a program."""
    return [(name, sum(math.prod(map(int, filter(None, shape.split(',')))) for shape in SHAPE.findall(result)))
            for result, name in COLLECTIVE.findall(lowered.compile().as_text())]


def programs(**changes):
    """Training and evaluation step, lowered, and the number of parameters."""
    laid = experiment.setup(layouts.config_of(**changes))
    state, batch = laid.abstract_state(), laid.abstract_batch()
    return (laid.train_step().lower(state, batch, laid.plan), laid.eval_step().lower(state.params, batch, laid.plan),
            sum(leaf.size for leaf in jax.tree.leaves(state.params)))


def test_the_places_of_labels_are_those_of_top_k_and_what_is_no_number_is_never_right():
    logits = np.random.default_rng(0).integers(0, 4, (200, 6)).astype(np.float32)  # many are equal
    labels = np.arange(200) % 6
    best = np.asarray(jax.lax.top_k(logits, 6)[1])
    np.testing.assert_array_equal(step.places(logits, labels), (best == labels[:, None]).argmax(1))
    assert (step.places(np.full((6, 6), np.nan), np.arange(6)) == 6).all()


@pytest.mark.parametrize('batch', [16, 6])  # the second cannot be divided by hand
def test_devices_that_rank_their_own_images_find_the_order_of_one_among_ties_too(batch):
    mesh, rng = sharding.data_mesh(8), np.random.default_rng(0)
    score = rng.integers(0, 9, (batch, 49)).astype(np.float32)
    patch = np.tile(np.arange(49, dtype=np.int32), (batch, 1))
    tokens = Tokens(rng.normal(size=(batch, 49, 4)).astype(np.float32), patch)

    def reduced(score):
        return keep_top_and_fuse(tokens, score, 30, 0)

    gradient, twice = jax.grad(lambda score: (reduced(score).x ** 2).sum()), jax.vmap(reduced)
    for reduce, given in ((reduced, score), (gradient, score), (twice, np.stack([score, score]))):
        divided = jax.jit(sharding.with_mesh(mesh, reduce), in_shardings=sharding.replicated(mesh))
        jax.tree.map(np.testing.assert_array_equal, divided(given), jax.jit(reduce)(given))


@pytest.mark.parametrize('fuse', [True, False])
def test_the_devices_exchange_gradients_and_two_metrics_and_nothing_else(fuse):
    train, evaluation, parameters = programs(mixing__mixup=0.8, mixing__cutmix=1.0, model__fuse=fuse)
    assert collectives(evaluation) == []
    assert {name for name, _ in collectives(train)} == {'all-reduce'}
    assert sum(numbers for _, numbers in collectives(train)) == parameters + 2  # loss and accuracy


@pytest.mark.parametrize(('classes', 'arrays'), [(3, 4), (256, 5)])  # in the second the head is divided too
def test_with_a_divided_state_its_arrays_are_collected_once_and_no_activation_is(classes, arrays):
    train, evaluation, parameters = programs(sharding='fsdp', model__classes=classes)
    for program in (train, evaluation):
        gathered = [found for found in collectives(program) if found[0] == 'all-gather']
        assert gathered == arrays * [('all-gather', 64 * 256)]
    reduced = [numbers for name, numbers in collectives(train) if name != 'all-gather']
    assert {name for name, _ in collectives(train)} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    assert sum(reduced) < parameters + 50  # and the parts of the gradient's norm


@pytest.mark.slow
def test_two_processes_begin_from_the_weights_of_another_run_as_one_does(eight, tmp_path):
    changes = {'init_from': str(eight), 'epochs': 2}
    loop.train(layouts.config_of(**changes), tmp_path / 'one')
    layouts.train(tmp_path / 'two', **LAYOUTS['2x4 fsdp'], **changes)
    np.testing.assert_allclose(layouts.losses(tmp_path / 'two'), layouts.losses(tmp_path / 'one'), rtol=CLOSE)
    assert layouts.losses(tmp_path / 'two')[0] < layouts.losses(eight)[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(('place', 'how'), [
    ('init_from', {'distill__kind': 'self', 'distill__token_weight': 0.5, 'keep__rate': 0.5}),
    ('teacher__path', {'distill__kind': 'hard', 'model__distilled': True})], ids=['self', 'hard'])
def test_two_processes_with_a_divided_state_learn_from_a_teacher_as_one_does(eight, tmp_path, place, how):
    changes = how | {place: str(eight), 'epochs': 2, 'log__pictures': 0}
    loop.train(layouts.config_of(**changes), tmp_path / 'one')
    layouts.train(tmp_path / 'two', **LAYOUTS['2x4 fsdp'], **changes)
    taught = [[record['train/loss/teacher'] for record in layouts.records(tmp_path / name)] for name in ('two', 'one')]
    assert min(taught[1]) > 1e-4
    np.testing.assert_allclose(*taught, rtol=CLOSE)
    np.testing.assert_allclose(*(layouts.losses(tmp_path / name) for name in ('two', 'one')), rtol=CLOSE)


@pytest.mark.slow
def test_processes_agree_that_a_checkpoint_cannot_be_read_and_use_the_one_before(trained, tmp_path):
    shutil.copytree(trained['2x4'], tmp_path / 'run')
    for file in (tmp_path / 'run' / 'checkpoints' / '10' / 'state').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    layouts.train(tmp_path / 'run', **LAYOUTS['2x4'])
    assert (tmp_path / 'run' / 'unreadable_checkpoints' / '10').exists()
    assert_agree(tmp_path / 'run', trained['2x4'])


@pytest.mark.slow
def test_what_one_process_cannot_read_stops_all_of_them_with_one_verdict(tmp_path):
    started = layouts.start(tmp_path / 'run', processes=2, devices=1, broken_in=1)
    assert layouts.wait(started, 120) == [2, 2]
    for number, here in enumerate(("none of them in this process", "the last one 'example")):
        log = (tmp_path / f'run.{number}.log').read_text()
        assert 'samples could not be read' in log and here in log


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused_to_all_processes_in_the_same_words(eight, tmp_path):
    shutil.copytree(eight, tmp_path / 'run')
    started = layouts.start(tmp_path / 'run', processes=2, devices=1, label_smoothing=0.2)
    assert layouts.wait(started, 120) == [2, 2]
    for number in range(2):
        assert 'label_smoothing 0.1 -> 0.2' in (tmp_path / f'run.{number}.log').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_when_a_process_is_killed_the_other_ends_within_a_minute_and_says_so(tmp_path, killed):
    started = layouts.start(tmp_path / 'run', processes=2, devices=1, epochs=5000, checkpoint__every=10_000)
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    layouts.until(lambda: metrics.exists() and metrics.read_text().count('\n') > 5, 120)
    started[killed].kill()
    assert layouts.wait(started, 60)[1 - killed] != 0
    log = (tmp_path / f'run.{1 - killed}.log').read_text()
    assert 'another process of this run is gone' in log or 'another task died' in log
