"""ONNX Runtime and OpenVINO as engines of the model benchmark."""

import pytest

from evit_jax.benchmarks import cases, model_speed, onnx_cases
from evit_jax.serving import runtimes
from tests.helpers.benchmarks import measure_briefly, tiny, tiny_workloads  # noqa: F401

pytest.importorskip('onnx', reason="the package onnx is not installed: pip install 'evit_jax[onnx]'")
pytest.importorskip('onnxruntime', reason="ONNX Runtime is not installed: pip install 'evit_jax[onnxruntime]'")


def test_measure_against_onnxruntime_has_rows_with_its_own_speedup():
    measurement = measure_briefly(tiny_workloads(batch_sizes=[1]), against=['onnxruntime'])
    rows = {(row['engine'], row['rate']): row for row in measurement['rows']}
    assert list(rows) == [('jax', 1.0), ('jax', 0.5), ('onnxruntime', 1.0), ('onnxruntime', 0.5)]
    reduced, dense = rows['onnxruntime', 0.5], rows['onnxruntime', 1.0]
    assert reduced['speedup_over_dense'] > 0 and reduced['latency_p50_ms'] > 0 and dense['speedup_over_dense'] == 1
    assert reduced['executed_macs'] == rows['jax', 0.5]['executed_macs']
    assert measurement['runtimes'] == {'onnxruntime': runtimes.check_installed('onnxruntime')}


def test_check_logits_of_another_plan_raises():
    cache, (dense, workload) = cases.ModelCache(), tiny_workloads()
    ours, files = cases.inference_case(workload, cache), onnx_cases.OnnxFiles(cache)
    model_speed.check_logits(ours, onnx_cases.onnx_case(workload, 'onnxruntime', cache, files))
    with pytest.raises(ValueError, match='the logits of onnxruntime differ from ours'):
        model_speed.check_logits(ours, onnx_cases.onnx_case(dense, 'onnxruntime', cache, files))


def test_engines_have_the_requested_precisions_that_they_support(monkeypatch):
    monkeypatch.setattr(runtimes, 'check_installed', lambda *_: '1.0')
    both = ['onnxruntime', 'openvino']
    assert onnx_cases.engines(both, ['float32', 'bfloat16']) == ['onnxruntime', 'openvino', 'openvino bfloat16']
    assert onnx_cases.engines([], ['float32', 'bfloat16']) == []
    with pytest.raises(ValueError, match=r'--precision=bfloat16: no engine of --against .*, openvino would'):
        onnx_cases.engines(['onnxruntime'], ['bfloat16'])


def test_workloads_in_bfloat16_or_on_another_platform_are_refused():
    with pytest.raises(ValueError, match=r'runs ONNX files in float32, not .*: give --dtypes=float32'):
        onnx_cases.check_workloads(['openvino'], tiny_workloads(dtypes=['bfloat16']), 'cpu')
    with pytest.raises(ValueError, match='is measured on the CPU, and JAX computes on gpu: set JAX_PLATFORMS=cpu'):
        onnx_cases.check_workloads(['openvino'], tiny_workloads(), 'gpu')
