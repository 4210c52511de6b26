"""Writes products, convolutions and reductions."""

import numpy as np

from evit_jax.serving.jaxpr_to_onnx.equations import is_static
from evit_jax.serving.jaxpr_to_onnx.graph import Tensor
from evit_jax.serving.jaxpr_to_onnx.primitives import WRITERS, writes


@writes('dot_general')
def _dot_general(graph, equation):
    """Writes a product as MatMul of [batch..., left, contracted] and [batch..., contracted, right]."""
    left, right = equation.inputs
    (contract_left, contract_right), (batch_left, batch_right) = equation.params['dimension_numbers']
    free_left, free_right = (_rest(value, [*contract, *batch]) for value, contract, batch in (
        (left, contract_left, batch_left), (right, contract_right, batch_right)))
    if not free_right and free_left and contract_left and contract_left[0] < free_left[0]:
        # A row times a matrix as it is stored, instead of the transposed matrix times a column.
        left, right, contract_left, contract_right = right, left, contract_right, contract_left
        batch_left, batch_right, free_left, free_right = batch_right, batch_left, free_right, free_left
    a = graph.transpose(graph.full(left), [*batch_left, *free_left, *contract_left])
    b = graph.transpose(graph.full(right), [*batch_right, *contract_right, *free_right])
    batch = _sizes(left, batch_left)
    if len(contract_left) > 1:
        contracted = [_product(_sizes(left, contract_left))]
        a = graph.reshape(a, [*batch, *_sizes(left, free_left), *contracted])
        b = graph.reshape(b, [*batch, *contracted, *_sizes(right, free_right)])
    output = equation.outputs[0]
    if left.dtype != right.dtype:  # ONNX multiplies equal dtypes only
        a, b = (name if value.dtype == output.dtype else graph.cast(name, output.dtype)
                for name, value in ((a, left), (b, right)))
    if not contract_left:
        a, b = graph.unsqueeze(a, [len(left.shape)]), graph.unsqueeze(b, [len(batch)])
    as_is = not batch and len(free_right) == 1 and free_left  # ONNX multiplies every matrix of the left tensor
    if not as_is:
        a = _with_one_axis(graph, a, len(batch), _sizes(left, free_left), left, contract_left, batch)
        b = _with_one_axis(graph, b, len(batch) + 1, _sizes(right, free_right), right, contract_right, batch)
    product = graph.add('MatMul', a, b)
    if not as_is:
        product = _with_axes(graph, product, batch, _sizes(left, free_left), _sizes(right, free_right))
    return product if output.dtype in (left.dtype, right.dtype) else graph.cast(product, output.dtype)


def _with_one_axis(graph, name, axis, free, value, contract, batch):
    """Joins the free axes of a factor, or adds one if there is none."""
    if len(free) == 1:
        return name
    if not free:
        return graph.unsqueeze(name, [axis])
    contracted = _product(_sizes(value, contract))
    middle = [_product(free)]
    tail = [*middle, contracted] if axis == len(batch) else [contracted, *middle]
    return graph.reshape(name, [*batch, *tail])


def _with_axes(graph, product, batch, left, right):
    """Splits the free axes of a product again, or removes the added ones."""
    if len(left) <= 1 and len(right) <= 1:
        axes = [len(batch)] * (not left) + [len(batch) + 1] * (not right)
        return graph.squeeze(product, axes)
    return graph.reshape(product, [*batch, *left, *right])


def _rest(value, axes):
    return [axis for axis in range(len(value.shape)) if axis not in axes]


def _sizes(value, axes):
    return [value.shape[axis] for axis in axes]


def _product(sizes):
    result = 1
    for size in sizes:
        result = result * size
    return result


@writes('conv_general_dilated')
def _convolution(graph, equation):
    (x, kernel), params = equation.inputs, equation.params
    layout = params['dimension_numbers']
    if set(params['lhs_dilation']) != {1} or params['batch_group_count'] != 1:
        raise NotImplementedError('a transposed or a batch-grouped convolution')
    low, high = zip(*params['padding'])
    result = graph.add('Conv', graph.transpose(graph.full(x), layout.lhs_spec),
                       graph.transpose(graph.full(kernel), layout.rhs_spec), pads=[*map(int, low), *map(int, high)],
                       strides=list(map(int, params['window_strides'])),
                       dilations=list(map(int, params['rhs_dilation'])), group=int(params['feature_group_count']))
    return graph.transpose(result, np.argsort(layout.out_spec))


def _reduce(op, axes_as_input=False):
    def write(graph, equation):
        x, axes = equation.inputs[0], sorted(map(int, equation.params['axes']))
        name, is_logical = graph.full(x, axes), x.dtype == bool
        if is_logical:
            name = graph.cast(name, np.int32)
        name = (graph.add(op, name, graph.constant(axes, np.int64), keepdims=0) if axes_as_input
                else graph.add(op, name, axes=axes, keepdims=0))
        left = [axis for axis in range(len(x.shape)) if axis not in axes]
        stretched = frozenset(left.index(axis) for axis in graph.tensor(x).stretched - {*axes})
        return Tensor(graph.cast(name, bool) if is_logical else name, stretched)

    return write


WRITERS.update({'reduce_sum': _reduce('ReduceSum', axes_as_input=True), 'reduce_max': _reduce('ReduceMax'),
                'reduce_min': _reduce('ReduceMin'), 'reduce_prod': _reduce('ReduceProd'),
                'reduce_or': _reduce('ReduceMax'), 'reduce_and': _reduce('ReduceMin')})


def _arg(op):
    def write(graph, equation):
        axis, = equation.params['axes']
        return graph.add(op, graph.full(equation.inputs[0]), axis=int(axis), keepdims=0)

    return write


WRITERS.update({'argmax': _arg('ArgMax'), 'argmin': _arg('ArgMin')})


@writes('cumsum')
def _cumulative_sum(graph, equation):
    axis = graph.constant(equation.params['axis'], np.int64)
    return graph.add('CumSum', graph.full(equation.inputs[0]), axis, reverse=int(equation.params['reverse']))


@writes('top_k')
def _top_k(graph, equation):
    params, x = equation.params, equation.inputs[0]
    if not is_static([params['k']]):
        raise NotImplementedError('a number of elements that depends on the batch size')
    axis = params.get('axis', -1)
    return graph.add('TopK', graph.full(x), graph.constant([params['k']], np.int64), axis=int(axis), num_outputs=2)


@writes('sort')
def _sort(graph, equation):
    """Writes a sort by one key. Equal keys keep their order, because ONNX's TopK takes the first of them first."""
    keys, *others = equation.inputs
    params = equation.params
    if params['num_keys'] != 1 or keys.dtype == bool:
        raise NotImplementedError('a sort by several keys')
    axis = int(params['dimension'])
    sorted_keys, index = graph.add('TopK', graph.full(keys), graph.constant([keys.shape[axis]], np.int64), axis=axis,
                                   largest=0, num_outputs=2)
    return (sorted_keys, *(index if _is_range(value, axis) else graph.add(
        'GatherElements', graph.full(value), index, axis=axis) for value in others))


def _is_range(value, axis):
    """Returns True if the elements of a value are their indices along an axis."""
    while not isinstance(value, np.ndarray) and value.producer and value.producer.name == 'broadcast_in_dim':
        equation = value.producer
        axes = list(equation.params['broadcast_dimensions'])
        if axis not in axes:
            return False
        value, axis = equation.inputs[0], axes.index(axis)
    if isinstance(value, np.ndarray):
        numbers = np.arange(value.shape[axis]).reshape([-1 if i == axis else 1 for i in range(value.ndim)])
        return bool((value == numbers).all())
    return value.producer is not None and value.producer.name == 'iota' and value.producer.params['dimension'] == axis
