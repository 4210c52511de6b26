"""What is read of a program compiled for TPU, on pieces of real ones; the slow test compiles without a TPU."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import digits
from evit_jax.benchmarks import tpu
from evit_jax.benchmarks.hlo import Collective, Program
from evit_jax.runtime import sharding
from evit_jax.training import experiment

ROOT = pathlib.Path(__file__).parents[2]

REDUCED = """
HloModule jit_step, is_scheduled=true

%region_108.109.clone (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%fused_computation.1580 (param_0: f32[16,32]) -> f32[16,32] {
  %param_0 = f32[16,32]{1,0:T(8,128)} parameter(0)
  ROOT %add.9 = f32[16,32]{1,0:T(8,128)} add(%param_0, %param_0), backend_config={"window_config":{"estimated_cycles":"7"}}
}

ENTRY %main.9 (param: f32[16,64], param.1: f32[16,32]) -> f32[64] {
  %param = f32[16,64]{1,0:T(8,128)} parameter(0)
  %param.1 = f32[16,32]{1,0:T(8,128)} parameter(1)
  %top_k.0 = (f32[16,128]{0,1:T(8,128)}, s32[16,128]{0,1:T(8,128)S(1)}) sort(%param, %iota), dimensions={1}
  %gather_fusion.2 = s32[2048]{0:T(1024)S(1)} fusion(%param), kind=kCustom, calls=%fused_computation.1580
  %fusion.1350 = (f32[16,32]{1,0:T(8,128)S(1)}, f32[16]{0}) fusion(%param.1), kind=kOutput, calls=%fused_computation.1580, backend_config={"window_config":{"estimated_cycles":"39606","iteration_bounds":["1","2"]}}
  %all-reduce.94 = (f32[64]{0:T(128)S(1)}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[]{:T(128)}) all-reduce(%a, %b, %c), channel_id=1, replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%region_108.109.clone, backend_config={"collective_algorithm_config":{"emitter":"RotatedPincerEmitter","debug":"{colors:2 cores:{8},{8}}"}}
  ROOT %get-tuple-element.581 = f32[64]{0} get-tuple-element(%all-reduce.94), index=0
}
"""  # noqa: E501

# One all-gather spread over three fusions; a sum of which each chip keeps a part; a ring that a loop goes round.
DIVIDED = """
%fused_computation.5615 (param_0.19806: bf16[1,197,24]) -> (bf16[1,197,24], bf16[1,197,192], u32[]) {
  %param_0.19806 = bf16[1,197,24]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.316 = bf16[1,197,192]{1,2,0:T(8,128)(2,1)} all-gather(%param_0.19806), channel_id=570, dimensions={2}
  ROOT %custom-call.118 = (bf16[1,197,24]{1,2,0}, bf16[1,197,192]{1,2,0}, u32[]{:S(2)}) custom-call(%all-gather.316), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.4879 (param_0.19811: bf16[1,197,24]) -> bf16[1,197,192] {
  %param_0.19811 = bf16[1,197,24]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.318 = bf16[1,197,192]{1,2,0:T(8,128)(2,1)S(1)} all-gather(%param_0.19811), channel_id=570, dimensions={2}
}

%all-reduce-scatter (input: f32[64,192]) -> f32[8,192] {
  %input = f32[64,192]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.214 = f32[64,192]{1,0:T(8,128)} all-reduce(%input), channel_id=65, use_global_device_ids=true
  ROOT %dynamic-slice.776 = f32[8,192]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.214, %multiply.1744, %constant.5806)
}

%wide.cond (wide.param.5: (bf16[1,96,192], u32[])) -> pred[] {
  %constant.2470 = u32[]{:T(128)} constant(4), metadata={op_name="jit(step)/dot_general"}
  %wide.param.5 = (bf16[1,96,192]{1,2,0}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.949 = u32[]{:T(128)} get-tuple-element(%wide.param.5), index=1
  ROOT %compare.92 = pred[]{:T(512)} compare(%get-tuple-element.949, %constant.2470), direction=LT
}

%wide.body.sunk (wide.param.0: (bf16[1,96,192], u32[])) -> (bf16[1,96,192], u32[]) {
  %constant.2468..sunk = u32[]{:T(128)} constant(2)
  %wide.param.0 = (bf16[1,96,192]{1,2,0}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.9329 = bf16[1,96,192]{1,2,0} get-tuple-element(%wide.param.0), index=0
  %get-tuple-element.1331 = u32[]{:T(128)} get-tuple-element(%wide.param.0), index=1
  %collective-permute-start = (bf16[1,96,192]{1,2,0}, bf16[1,96,192]{1,2,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.9329), channel_id=7, source_target_pairs={{0,7},{1,0}}
  %collective-permute-done = bf16[1,96,192]{1,2,0} collective-permute-done(%collective-permute-start)
  %fusion.876 = f32[8,8]{1,0} fusion(%collective-permute-done), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"10"}
  %add.1190 = u32[]{:T(128)} add(%get-tuple-element.1331, %constant.2468..sunk)
  ROOT %tuple.2 = (bf16[1,96,192]{1,2,0}, u32[]{:T(128)}) tuple(%collective-permute-done, %add.1190)
}

%none (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (p0: bf16[1,197,24], p1: f32[64,192], p2: bf16[1,96,192]) -> f32[8,192] {
  %p0 = bf16[1,197,24]{1,2,0} parameter(0)
  %p1 = f32[64,192]{1,0} parameter(1)
  %p2 = bf16[1,96,192]{1,2,0} parameter(2)
  %async-collective-start = (bf16[1,197,24]{1,2,0}, bf16[1,197,192]{1,2,0}, u32[]{:S(2)}) fusion(%p0), kind=kCustom, calls=%fused_computation.5615
  %fusion.4879 = bf16[1,197,192]{1,2,0} fusion(%p0), kind=kOutput, calls=%async_collective_fusion.4879, backend_config={"estimated_cycles":"100"}
  %constant.778 = u32[]{:T(128)} constant(0)
  %copy.892 = u32[]{:T(128)} copy(%constant.778)
  %tuple.341 = (bf16[1,96,192]{1,2,0}, u32[]{:T(128)}) tuple(%p2, %copy.892)
  %while.100 = (bf16[1,96,192]{1,2,0}, u32[]{:T(128)}) while(%tuple.341), condition=%wide.cond, body=%wide.body.sunk
  ROOT %fusion = f32[8,192]{1,0:T(8,128)S(1)} fusion(%p1), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_a_reduction_of_several_arrays_counts_once_with_the_bytes_of_all():
    assert Program(REDUCED).collectives() == [Collective('all-reduce', 1, 64 * 4 + 64 * 64 * 2 + 4)]


def test_cycles_are_those_of_whole_fusions_and_what_has_no_estimate_is_named():
    assert Program(REDUCED).cycles() == (39606, {'sort': 1, 'gather_fusion': 1})


def test_exchanges_in_pieces_count_once_and_those_of_a_loop_at_every_turn():
    assert sorted(Program(DIVIDED).collectives()) == [
        Collective('all-gather', 1, 197 * 192 * 2), Collective('collective-permute', 2, 96 * 192 * 2),
        Collective('reduce-scatter', 1, 64 * 192 * 4)]
    assert Program(DIVIDED).cycles().total == 100 + 2 * 10


def test_of_an_asynchronous_exchange_the_result_counts_and_of_a_scattered_sum_the_whole():
    lines = ['ENTRY %e (a: f32[8]) -> f32[8] {', '  %a = f32[8]{0} parameter(0)',
             '  %g = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), channel_id=1',
             '  %s = f32[1]{0} reduce-scatter(%a), channel_id=2', '  %r = f32[8]{0} all-reduce-start(%a), channel_id=3']
    assert Program('\n'.join(lines)).collectives() == [
        Collective('all-gather', 1, 64 * 4), Collective('reduce-scatter', 1, 8 * 4), Collective('all-reduce', 1, 8 * 4)]


def test_a_loop_whose_turns_are_not_known_leaves_the_sums_unknown():
    program = Program(DIVIDED.replace('constant(4)', 'parameter(1)'))
    assert [math.isnan(found.count) for found in program.collectives()].count(True) == 1
    assert math.isnan(program.cycles().total)


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match='no ENTRY'):
        Program('error: no such file')


def compiled(**changes):
    figures = {'step': 'train', 'plan': '4 > 2', 'images': 128, 'seconds': 100.0, 'arguments': 1e9, 'outputs': 1e9,
               'temporaries': 2e9, 'peak': 4e9, 'bytes_accessed': 7e10, 'flops': 2e12,
               'collectives': {'all-reduce': tpu.Exchange(2, 8.8e7)}, 'cycles': 1e8, 'unestimated': {'sort': 3},
               'images_per_second': 1920.0}
    return tpu.Compiled(**figures | changes)


def test_the_table_sets_the_steps_side_by_side_and_the_remarks_say_that_nothing_was_measured():
    programs, chip = [compiled(), compiled(step='eval', collectives={})], tpu.CHIPS['v5e']
    rows = {name: cells for name, *cells in tpu.rows_of(programs, chip)}
    assert rows['all-reduce'] == ['2: 88.00 MB', 'none'] and rows['peak, of 16.00 GB'] == ['25.0%', '25.0%']
    assert rows['estimated images/s'] == ['1,920', '1,920']
    said = ' '.join(tpu.remarks(programs, chip))
    assert 'not measured' in said and '1.50 GHz' in said and '6 sort' in said
    assert 'not published' not in said and 'not published' in ' '.join(tpu.remarks(programs, tpu.CHIPS['v6e']))


@pytest.mark.parametrize('topology', ['v9:2x2', 'tpu', ''])
def test_a_slice_of_no_known_kind_is_refused_with_an_example_of_each(topology):
    with pytest.raises(ValueError, match=rf'--topology={topology} names no TPU .*: there are v5e:16x16, v6e:2x4, v5p'):
        tpu.devices_of(topology)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install -e '\.\[tpu-aot\]'"):
        tpu.devices_of('v5e:2x4')


def test_a_batch_that_the_chips_cannot_share_is_refused():
    with pytest.raises(ValueError, match='batch_size=128 is not divisible by the 7 devices: use 126 or 133'):
        sharding.data_mesh(128, jax.devices()[:7])


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'evit_jax.benchmark', 'tpu', *arguments], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_program_asks_for_the_slice():
    done = run('--config', 'configs/digits.py')
    assert (done.returncode, done.stderr) == (
        2, 'error: give --topology SLICE, as in: python -m evit_jax.benchmark tpu --config configs/deit_s.py '
        '--topology v5e:16x16\n')


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                  reason='the TPU compiler is not installed: the extra [tpu-aot]')


@pytest.fixture(scope='module')
def compile_digits(tmp_path_factory):
    def compile_digits(sharding):
        file = tmp_path_factory.mktemp('tpu') / 'found.json'
        done = run('--config', 'configs/digits.py', '--topology=v5e:2x4', '--batch_per_chip=16', f'--json={file}',
                   f'--config.sharding={sharding}')
        assert done.returncode == 0, done.stderr
        assert 'not measured' in done.stdout and 'estimated images/s' in done.stdout
        found = json.loads(file.read_text())
        return found, {program['step']: program for program in found['programs']}

    return compile_digits


def bytes_of(program):
    return {kind: found['bytes'] for kind, found in program['collectives'].items()}


@needs_libtpu
@pytest.mark.slow
def test_for_tpu_too_the_chips_exchange_gradients_and_two_metrics_and_nothing_else(compile_digits):
    found, programs = compile_digits('replicated')
    assert bytes_of(programs['train']) == {'all-reduce': 4 * (found['parameters'] + 2)}  # loss and accuracy
    assert programs['eval']['collectives'] == {}
    for program in programs.values():
        assert program['images'] == 16 and program['flops'] > 0 and 0 < program['peak'] < found['chip']['hbm']
        assert program['images_per_second'] == pytest.approx(16 * 1.5e9 / program['cycles'])


@needs_libtpu
@pytest.mark.slow
def test_for_tpu_too_a_divided_state_is_collected_and_its_gradients_summed_in_parts(compile_digits):
    found, programs = compile_digits('fsdp')
    with digits.get_config().unlocked() as config:
        config.sharding = 'fsdp'
    params = experiment.setup(config).abstract_state().params
    divided = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.sharding.spec != sharding.PartitionSpec())
    # Collected in bfloat16, once or going round the ring of 8 pieces and home; in training forward and backward, and
    # then the gradients in float32. A layer's activations would be 64 KB at least.
    evaluation, train = bytes_of(programs['eval']), bytes_of(programs['train'])
    assert 2 * divided <= sum(evaluation.values()) <= 2 * divided * 9 / 8
    assert {*evaluation, *train} <= {'all-gather', 'reduce-scatter', 'collective-permute', 'all-reduce'}
    assert 0 <= train.pop('all-reduce') - 4 * (found['parameters'] - divided) < 4 * 50  # parts of the gradient's norm
    assert 4 * divided < sum(train.values()) <= 8 * divided * 9 / 8
