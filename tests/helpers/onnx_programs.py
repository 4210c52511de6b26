"""Converts functions to ONNX and compares their results with JAX."""

import collections

import jax
import numpy as np
import pytest

pytest.importorskip('onnx', reason="the package onnx is not installed: pip install 'evit_jax[onnx]'")
pytest.importorskip('onnxruntime', reason="ONNX Runtime is not installed: pip install 'evit_jax[onnxruntime]'")

from evit_jax.serving import runtimes
from evit_jax.serving.jaxpr_to_onnx.convert import to_onnx

TOLERANCES = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 2e-3}  # dtype of the input -> tolerance


def convert(function, shape=(5, 4), dtype=np.float32, **weights):
    """Converts `function(x, **weights)` of a batch x [b, *shape], which returns one array, a tuple or a dict."""
    def program(arrays, x):
        return as_dict(function(x, **arrays))

    return to_onnx(program, weights, shape, np.dtype(dtype), weight_file=None, name='test')


def assert_same(function, shape=(5, 4), dtype=np.float32, **weights):
    """Checks that a function gives the same results in JAX and in ONNX Runtime, for batches of 1 and 3.

    Returns:
      The number of nodes of each ONNX operator.
    """
    model = convert(function, shape, dtype, **weights)
    run = runtimes.open_program(model.SerializeToString(), 'onnxruntime')
    for batch in (1, 3):
        x = np.random.default_rng(batch).normal(size=(batch, *shape), scale=3).astype(dtype)
        got, want = run(x), as_dict(jax.jit(function)(x, **weights))
        assert got.keys() == want.keys()
        for name, array in want.items():
            assert got[name].shape == array.shape, name
            assert got[name].dtype == array.dtype, name
            tolerance = TOLERANCES[np.dtype(dtype)]
            np.testing.assert_allclose(got[name], array, rtol=tolerance, atol=tolerance, err_msg=name)
    return collections.Counter(node.op_type for node in model.graph.node)


def as_dict(outputs):
    """Returns outputs by name."""
    if isinstance(outputs, dict):
        return outputs
    return {f'y{i}': array for i, array in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}


def skip_without(runtime):
    """Skips the test if a runtime is not installed. It imports none, because `import openvino` reports its use."""
    if not runtimes.is_installed(runtime):
        pytest.skip(f"{runtime} is not installed: pip install 'evit_jax[{runtime}]'")
