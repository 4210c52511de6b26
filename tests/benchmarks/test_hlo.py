"""The parser of HLO text, on pieces of programs compiled for TPU."""

import math

import pytest

from evit_jax.benchmarks.hlo import Collective, Program

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

# An all-gather spread over three fusions, an all-reduce followed by a slice, and a loop with a collective-permute.
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


def test_all_reduce_of_several_arrays_counts_once_with_the_bytes_of_all():
    assert Program(REDUCED).collectives() == [Collective('all-reduce', 1, 64 * 4 + 64 * 64 * 2 + 4)]


def test_cycles_sum_the_fusions_and_list_operations_without_estimate():
    assert Program(REDUCED).cycles() == (39606, {'sort': 1, 'gather_fusion': 1})


def test_collectives_in_pieces_count_once_and_those_of_a_loop_at_every_iteration():
    assert sorted(Program(DIVIDED).collectives()) == [
        Collective('all-gather', 1, 197 * 192 * 2), Collective('collective-permute', 2, 96 * 192 * 2),
        Collective('reduce-scatter', 1, 64 * 192 * 4)]
    assert Program(DIVIDED).cycles().total == 100 + 2 * 10


def test_asynchronous_collectives_count_results_and_reduce_scatter_counts_operands():
    lines = ['ENTRY %e (a: f32[8]) -> f32[8] {', '  %a = f32[8]{0} parameter(0)',
             '  %g = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), channel_id=1',
             '  %s = f32[1]{0} reduce-scatter(%a), channel_id=2', '  %r = f32[8]{0} all-reduce-start(%a), channel_id=3']
    assert Program('\n'.join(lines)).collectives() == [
        Collective('all-gather', 1, 64 * 4), Collective('reduce-scatter', 1, 8 * 4), Collective('all-reduce', 1, 8 * 4)]


def test_loop_with_unknown_trip_count_gives_nan():
    program = Program(DIVIDED.replace('constant(4)', 'parameter(1)'))
    assert [math.isnan(collective.count) for collective in program.collectives()].count(True) == 1
    assert math.isnan(program.cycles().total)


def test_text_without_an_entry_computation_raises():
    with pytest.raises(ValueError, match='no ENTRY'):
        Program('error: no such file')
