"""Simplifies a graph before it is written: folds known arrays, and removes equations without effect."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evit_jax.serving.jaxpr_to_onnx.bounds import Bounds
from evit_jax.serving.jaxpr_to_onnx.equations import Equation, Value, is_static, make_equation, rebuild, size_of

_MAX_FOLDED = 2**16  # elements; a larger result is folded only if it is not larger than its inputs
_NEUTRAL = {'add': 0, 'sub': 0, 'mul': 1, 'div': 1, 'max': -np.inf, 'min': np.inf}


def simplify(outputs: Sequence[Value | np.ndarray], known: dict[Value, Any],
             bounds: Bounds) -> list[Value | np.ndarray]:
    """Returns outputs whose producers are simpler.

    Args:
      known: inputs of the graph -> arrays that replace them.
      bounds: receives the bounds of the integer arrays.
    """
    def replace(equation, inputs):
        new = _replacement(equation, inputs, bounds)
        if new is None:
            new = make_equation(equation.name, inputs, [(value.shape, value.dtype) for value in equation.outputs],
                                equation.params, equation.primitive).outputs
        for value in new:
            bounds(value)  # in the order of the graph, so that no recursion is deep
        return new

    return rebuild(outputs, replace, known)


def _replacement(equation, inputs, bounds):
    folded = _folded(equation, inputs)
    if folded is not None:
        return folded
    same = _unchanged_input(equation, inputs, bounds)
    return _without_empty_inputs(equation, inputs) if same is None else [same]


def _folded(equation: Equation, inputs: tuple) -> list[np.ndarray] | None:
    """Computes an equation whose inputs are known; None: they are not, or the result is too large."""
    if equation.primitive is None or equation.name == 'dim_as_value':
        return None
    if not all(isinstance(value, np.ndarray) for value in inputs) or not all(
            is_static(value.shape) and isinstance(value.dtype, np.dtype) for value in equation.outputs):
        return None
    size = sum(size_of(value.shape) for value in equation.outputs)
    if size > max(_MAX_FOLDED, sum(value.size for value in inputs)):
        return None
    result = equation.primitive.bind(*inputs, **equation.params)
    return list(map(np.asarray, result if equation.primitive.multiple_results else [result]))


def _unchanged_input(equation, inputs, bounds):
    """Returns the input that equals the output, or None."""
    name, (output, *_) = equation.name, equation.outputs
    if name == 'select_n' and len(inputs) == 3 and (decided := bounds.decided(inputs[0])) is not None:
        return inputs[1 + decided]
    if not inputs or inputs[0].shape != output.shape or inputs[0].dtype != output.dtype:
        return inputs[1] if name in ('add', 'mul', 'max', 'min') and _is_neutral(name, inputs[0], inputs[1], output) \
            else None
    if name in ('convert_element_type', 'reshape', 'broadcast_in_dim', 'slice'):
        return inputs[0]
    if name == 'transpose' and equation.params['permutation'] == tuple(range(len(output.shape))):
        return inputs[0]
    if name == 'concatenate' and len(inputs) == 1:
        return inputs[0]
    if name in ('scatter', 'scatter-add') and 0 in inputs[2].shape:
        return inputs[0]
    return inputs[0] if name in _NEUTRAL and _is_neutral(name, inputs[1], inputs[0], output) else None


def _is_neutral(name, neutral, other, output):
    return (isinstance(neutral, np.ndarray) and neutral.ndim == 0 and neutral == _NEUTRAL[name]
            and other.shape == output.shape and other.dtype == output.dtype)


def _without_empty_inputs(equation, inputs):
    """Removes inputs without elements from sums and concatenations; None: there are none."""
    if not any(0 in value.shape for value in inputs) or 0 in equation.outputs[0].shape:
        return None
    output = equation.outputs[0]
    if equation.name in ('dot_general', 'reduce_sum'):  # sums over no elements
        zero = np.zeros((), output.dtype)
        return make_equation('broadcast_in_dim', [zero], [(output.shape, output.dtype)],
                             {'shape': output.shape, 'broadcast_dimensions': ()}).outputs
    if equation.name == 'concatenate':
        rest = [value for value in inputs if 0 not in value.shape]
        return rest if len(rest) == 1 else make_equation('concatenate', rest, [(output.shape, output.dtype)],
                                                         equation.params).outputs
    return None
