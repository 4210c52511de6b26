"""Bounds of integer arrays, from which an export derives that indices are in range."""

import math

import numpy as np

from evit_jax.serving.jaxpr_to_onnx.equations import Value

Interval = tuple[float, float]
UNKNOWN = -math.inf, math.inf
_SAME = frozenset({'broadcast_in_dim', 'reshape', 'transpose', 'squeeze', 'expand_dims', 'slice', 'rev', 'split',
                   'convert_element_type', 'reduce_max', 'reduce_min', 'copy'})
_COMPARISONS = {'lt': lambda low, high, c: (low < c, high < c), 'ge': lambda low, high, c: (low >= c, high >= c),
                'gt': lambda low, high, c: (low > c, high > c), 'le': lambda low, high, c: (low <= c, high <= c)}


class Bounds:
    """Computes the smallest and the largest value that the elements of an integer array can have."""

    def __init__(self):
        self._known: dict[Value, Interval] = {}

    def __call__(self, value: Value | np.ndarray, given: dict[Value, Interval] | None = None,
                 depth: int = 8) -> Interval:
        """Returns (smallest, largest), both inclusive.

        Args:
          given: tighter bounds of some values.
          depth: number of equations that are followed under `given`.
        """
        if isinstance(value, np.ndarray):
            is_integer = value.dtype.kind in 'iub' and value.size
            return (float(value.min()), float(value.max())) if is_integer else UNKNOWN
        if given and value in given:
            return given[value]
        if value.producer is None or not isinstance(value.dtype, np.dtype) or value.dtype.kind not in 'iub':
            return UNKNOWN
        if given and depth:
            return self._interval(value, given, depth - 1)
        if value not in self._known:
            self._known[value] = self._interval(value, None, depth)
        return self._known[value]

    def decided(self, value: Value | np.ndarray) -> bool | None:
        """Returns the value of a comparison with a constant, if the bounds decide it; else None."""
        if isinstance(value, np.ndarray) or value.producer is None or value.producer.name not in _COMPARISONS:
            return None
        x, limit = value.producer.inputs
        if not isinstance(limit, np.ndarray) or limit.size != 1:
            return None
        at_ends = _COMPARISONS[value.producer.name](*self(x), limit.item())
        return at_ends[0] if at_ends[0] == at_ends[1] and self(x) != UNKNOWN else None

    def _interval(self, value, given, depth):
        equation = value.producer
        if equation.name == 'select_n':
            return self._selected(equation, given, depth)
        if equation.name in ('top_k', 'sort') and value is not equation.outputs[0]:
            return self._of_sorted(equation, value)
        if equation.name in ('argmax', 'argmin'):
            axis, = equation.params['axes']
            size = equation.inputs[0].shape[axis]
            return (0, size - 1) if isinstance(size, int) else UNKNOWN
        if equation.name == 'iota':
            size = equation.params['shape'][equation.params['dimension']]
            return (0, size - 1) if isinstance(size, int) else UNKNOWN
        inputs = [self(each, given, depth) for each in equation.inputs]
        return _of_elementwise(equation, inputs)

    def _of_sorted(self, equation, value):
        if equation.name == 'sort':  # the second operand is permuted as the keys are
            return self(equation.inputs[equation.outputs.index(value)])
        size = equation.inputs[0].shape[-1]
        return (0, size - 1) if isinstance(size, int) else UNKNOWN

    def _selected(self, equation, given, depth):
        """Bounds each case under the condition that the case is selected."""
        condition, *cases = equation.inputs
        limits = [{}, {}]
        if isinstance(condition, Value) and condition.producer and condition.producer.name in ('lt', 'ge'):
            x, limit = condition.producer.inputs
            if isinstance(x, Value) and isinstance(limit, np.ndarray) and limit.size == 1 and limit.dtype.kind == 'i':
                (low, high), limit = self(x, given, depth), limit.item()
                limits = [{x: (max(low, limit), high)}, {x: (low, min(high, limit - 1))}]
                limits = limits if condition.producer.name == 'lt' else limits[::-1]
        intervals = [self(case, (given or {}) | limit, depth) for case, limit in zip(cases, limits)]
        return min(low for low, _ in intervals), max(high for _, high in intervals)


def _of_elementwise(equation, inputs):
    name = equation.name
    if name in _SAME:
        return inputs[0]
    if name in ('concatenate', 'pad', 'scatter', 'gather'):
        inputs = {'concatenate': inputs, 'pad': inputs, 'scatter': [inputs[0], inputs[-1]], 'gather': inputs[:1]}[name]
        return min(low for low, _ in inputs), max(high for _, high in inputs)
    if name in ('lt', 'le', 'gt', 'ge', 'eq', 'ne', 'not', 'and', 'or') and equation.outputs[0].dtype == bool:
        return 0, 1
    (low, high), (low2, high2) = inputs[0] if inputs else UNKNOWN, inputs[1] if len(inputs) > 1 else UNKNOWN
    if name == 'add':
        return low + low2, high + high2
    if name == 'sub':
        return low - high2, high - low2
    if name == 'mul' and UNKNOWN not in inputs:
        ends = [a * b for a in inputs[0] for b in inputs[1]]
        return min(ends), max(ends)
    if name == 'neg':
        return -high, -low
    if name in ('max', 'min'):
        combine = max if name == 'max' else min
        return combine(low, low2), combine(high, high2)
    if name in ('cumsum', 'reduce_sum') and (low, high) != UNKNOWN:
        axes = [equation.params['axis']] if name == 'cumsum' else equation.params['axes']
        sizes = [equation.inputs[0].shape[axis] for axis in axes]
        if all(isinstance(size, int) for size in sizes):
            count = math.prod(sizes)
            return min(low, low * count), max(high, high * count)
    return UNKNOWN
