"""Workloads: the combinations of the flags' lists, their MACs and descriptions."""

import pytest

from evit_jax import cli
from evit_jax.benchmarks.workloads import Workload, parse_choices
from tests.helpers.benchmarks import measure_briefly, tiny, tiny_workloads  # noqa: F401


@pytest.mark.parametrize('name, size, rate, giga', [
    ('deit_t', 224, 1, 1.25), ('deit_t', 224, 0.7, 0.82), ('deit_s', 224, 1, 4.60), ('deit_s', 224, 0.7, 3.03),
    ('deit_s', 224, 0.5, 2.31), ('deit_b', 224, 0.5, 8.82), ('deit_s', 272, 0.7, 4.56), ('deit_s', 304, 0.5, 4.44)])
def test_workload_of_a_published_model_has_the_macs_of_the_paper(name, size, rate, giga):
    workload, = tiny_workloads(names=[name], image_sizes=[size], rates=[rate])
    assert workload.macs / 1e9 == pytest.approx(giga, abs=0.005)


def test_combine_returns_every_combination_once_and_one_dense_workload():
    selected = tiny_workloads(fuse=[True, False], batch_sizes=[1, 2], dtypes=['float32', 'bfloat16'], train=True)
    assert len(selected) == len(set(selected)) == 2 * 2 * 2 * 3  # steps, batches, dtypes; dense, fused, not fused
    assert selected[0] == Workload('tiny', 1.0, False, 32, 1, 'float32', ())
    assert {workload.fused for workload in selected if workload.rate == 1} == {False}
    assert all(workload.dense in selected for workload in selected)
    assert len({str(workload) for workload in selected}) == len(selected)


def test_combine_several_reducers_share_one_dense_workload():
    selected = tiny_workloads(reducers=['evit', 'tome', 'random'], fuse=[True, False])
    names = [str(workload).split(',')[0] + f', {workload.reducer}' for workload in selected]
    assert names == ['tiny dense, evit', 'tiny 0.5 fused, evit', 'tiny 0.5 not fused, evit', 'tiny 0.5 merged, tome',
                    'tiny 0.5 fused, random', 'tiny 0.5 not fused, random']
    assert {workload.dense for workload in selected} == {selected[0]}
    assert len({str(workload) for workload in selected}) == len(selected)


def test_combine_r_adds_a_workload_of_each_merging_reducer():
    selected = tiny_workloads(reducers=['evit', 'tome', 'pool'], rates=[1.0], r=[2, 0])
    assert [str(workload) for workload in selected] == [
        f'tiny {kind}, 32 px, batch 2, float32' for kind in ('dense', 'r=2 merged, tome', 'r=2 merged, pool')]
    assert selected[1].plan.counts == (14, 12, 10, 8) and selected[1].dense == selected[0]
    row = measure_briefly(selected[:2])['rows'][1]
    assert (row['r'], row['rate'], row['plan']) == (2, None, str(selected[1].plan)) and row['speedup_over_dense'] > 0


def test_combine_gather_impls_apply_to_reducers_that_keep_by_rank():
    selected = tiny_workloads(rates=[1.0, 0.7], reducers=['evit', 'tome'], gather_impls=['', 'gather', 'product'])
    assert [(workload.dense == workload, str(workload.reducer), workload.gather_impl) for workload in selected] == [
        (True, 'evit', ''), (False, 'evit', ''), (False, 'evit', 'gather'), (False, 'evit', 'product'),
        (False, 'tome', '')]
    assert 'by product' in str(selected[3]) and {workload.dense for workload in selected} == {selected[0]}


def test_combine_without_reduce_at_uses_the_blocks_of_the_paper():
    assert tiny_workloads(names=['deit_s'])[-1].reduce_at == (3, 6, 9)
    assert tiny_workloads(names=['deit_s'], reduce_at=[2])[-1].reduce_at == (2,)


@pytest.mark.parametrize('changes, message', [
    ({'names': ['deit_x']}, "unknown model 'deit_x': did you mean deit_"), ({'rates': []}, '--rates is empty'),
    ({'reducers': ['tomme']}, "unknown reducer 'tomme': did you mean tome?"), ({'reducers': []}, '--reducers is empty'),
    ({'reducers': ['tome'], 'rates': [0.4]}, 'block 1: r=9 of 16 tokens cannot be merged by tome'),
    ({'r': [2, 4]}, '--r=2,4 is for reducers that merge, and none of --reducers=evit does: add tome or pool'),
    ({'reducers': ['pool'], 'r': [9]}, r'r=9 would merge 9 of 16 tokens .* give 0 <= r <= 8'),
    ({'rates': [1.5]}, r'keep rate 1.5 is outside \(0, 1\]'), ({'batch_sizes': [4, 0]}, '--batches=4,0: a batch of 0'),
    ({'image_sizes': [33]}, 'image size 33 is not divisible by the patch size 8: use 32 or 40'),
    ({'reduce_at': [9]}, r'reduce_at=\(9,\): block 9 is outside 0..3')])
def test_combine_value_out_of_range_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_workloads(**changes)


def test_workload_of_a_learned_reducer_has_its_modules_and_trains_on_all_tokens():
    dense, workload = tiny_workloads(names=['deit_t'], rates=[1, 0.7], fuse=[False], reducers=['dynamicvit'])
    assert (dense.modules.count, workload.modules.count) == (0, 3)
    workload.modules.check(workload.plan)
    assert workload._replace(train=True).macs > dense.macs > workload.macs  # masked tokens cost as much as kept ones


def test_flag_lists_with_bad_words_raise():
    assert cli.numbers('rates', ['1', '.5'], float) == (1, 0.5)
    with pytest.raises(ValueError, match='--rates=1,x is no list of numbers: give them with commas between'):
        cli.numbers('rates', ['1', 'x'], float)
    with pytest.raises(ValueError, match=r'--batches=1\.5 is no list of whole numbers'):
        cli.numbers('batches', ['1.5'], int)
    with pytest.raises(ValueError, match=r"--fuse=true,maybe: 'maybe' is unknown, there are true, false"):
        parse_choices('--fuse', ['true', 'maybe'], {'true': True, 'false': False})
