"""Runtimes of ONNX: a missing package, a bad precision and a model that cannot be read give one line."""

import sys

import numpy as np
import pytest

from evit_jax.serving import runtimes
from tests.helpers.onnx_programs import convert, skip_without


def test_unknown_or_missing_runtime_is_refused_with_the_extra(monkeypatch):
    with pytest.raises(ValueError, match="the runtime 'tensorrt' is unknown, there are onnxruntime, openvino"):
        runtimes.check_installed('tensorrt', '--against=tensorrt')
    monkeypatch.setattr(runtimes.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"--against=openvino needs the package openvino: pip install 'evit_jax\[open"):
        runtimes.check_installed('openvino', '--against=openvino')


def test_precision_that_a_runtime_has_not_is_refused():
    with pytest.raises(ValueError, match='onnxruntime computes on a CPU in float32, not in bfloat16'):
        runtimes.open_program(b'', 'onnxruntime', precision='bfloat16')


def test_damaged_model_and_too_new_opset_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r'onnxruntime .* cannot read the model .*export the model again') as refused:
        runtimes.open_program(b'no model', 'onnxruntime')
    assert '\n' not in str(refused.value)
    model = convert(lambda x: x + 1)
    model.opset_import[0].version = 999
    with pytest.raises(ValueError, match='install a newer onnxruntime if this one has not the opset'):
        runtimes.open_program(model.SerializeToString(), 'onnxruntime')


@pytest.mark.parametrize('runtime', runtimes.PRECISIONS)
def test_runtime_computes_the_outputs_by_name(runtime):
    skip_without(runtime)
    program = runtimes.open_program(convert(lambda x: {'double': 2 * x, 'next': x + 1}).SerializeToString(), runtime,
                                    threads=1)
    x = np.ones((3, 5, 4), np.float32)
    np.testing.assert_array_equal(program(x)['double'], 2 * x)
    np.testing.assert_array_equal(program(x)['next'], 2 * x)
    assert runtime != 'openvino' or sys.modules['openvino_telemetry'] is None
