"""Writes elementwise primitives, and those that change only the shape or the order of elements."""

import numpy as np

from evit_jax.serving.jaxpr_to_onnx.equations import is_static
from evit_jax.serving.jaxpr_to_onnx.graph import Tensor, onnx_dtype
from evit_jax.serving.jaxpr_to_onnx.primitives import WRITERS, writes

_OPS = {  # primitive -> ONNX operator with the same inputs
    'add': 'Add', 'add_any': 'Add', 'sub': 'Sub', 'mul': 'Mul', 'div': 'Div', 'max': 'Max', 'min': 'Min', 'pow': 'Pow',
    'lt': 'Less', 'le': 'LessOrEqual', 'gt': 'Greater', 'ge': 'GreaterOrEqual', 'eq': 'Equal', 'neg': 'Neg',
    'abs': 'Abs', 'sign': 'Sign', 'exp': 'Exp', 'log': 'Log', 'sqrt': 'Sqrt', 'erf': 'Erf', 'tanh': 'Tanh',
    'sin': 'Sin', 'cos': 'Cos', 'logistic': 'Sigmoid', 'floor': 'Floor', 'ceil': 'Ceil', 'not': 'Not'}
_LOGICAL = {'and': 'And', 'or': 'Or', 'xor': 'Xor'}


def broadcast(graph, inputs):
    """Returns the names of the inputs, and the axes along which their broadcast result is stretched."""
    tensors = [graph.tensor(value) for value in inputs]
    arrays = [(value.shape, tensor.stretched) for value, tensor in zip(inputs, tensors) if len(value.shape)]
    # JAX broadcasts dimensions of 1, too: a result is stretched where all inputs have length 1, and one is stretched.
    axes = range(len(arrays[0][0])) if arrays else ()
    return [tensor.name for tensor in tensors], frozenset(
        axis for axis in axes if any(axis in stretched for _, stretched in arrays)
        and all(axis in stretched or _is_one(shape[axis]) for shape, stretched in arrays))


def _is_one(size):
    return is_static([size]) and size == 1


def elementwise(graph, inputs, op):
    """Adds a node of an elementwise operator."""
    names, stretched = broadcast(graph, inputs)
    return Tensor(graph.add(op, *names), stretched)


def _write_simple(graph, equation):
    return elementwise(graph, equation.inputs, _OPS[equation.name])


WRITERS.update(dict.fromkeys(_OPS, _write_simple))


@writes(*_LOGICAL)
def _logical(graph, equation):
    if equation.outputs[0].dtype != bool:
        raise NotImplementedError('bits of integers')
    return elementwise(graph, equation.inputs, _LOGICAL[equation.name])


@writes('ne')
def _not_equal(graph, equation):
    equal = elementwise(graph, equation.inputs, 'Equal')
    return Tensor(graph.add('Not', equal.name), equal.stretched)


def _unary(function):
    """Writes a primitive of one input: (graph, name of the input, equation) -> name of the output."""
    def write(graph, equation):
        tensor = graph.tensor(equation.inputs[0])
        return Tensor(function(graph, tensor.name, equation), tensor.stretched)

    return write


def _one(graph, equation):
    return graph.constant(1, equation.outputs[0].dtype)


WRITERS.update({
    'square': _unary(lambda graph, x, _: graph.add('Mul', x, x)),
    'integer_pow': _unary(lambda graph, x, equation: graph.add(
        'Pow', x, graph.constant(equation.params['y'], equation.outputs[0].dtype))),
    'rsqrt': _unary(lambda graph, x, equation: graph.add('Div', _one(graph, equation), graph.add('Sqrt', x))),
    'log1p': _unary(lambda graph, x, equation: graph.add('Log', graph.add('Add', x, _one(graph, equation)))),
    'expm1': _unary(lambda graph, x, equation: graph.add('Sub', graph.add('Exp', x), _one(graph, equation))),
    'exp2': _unary(lambda graph, x, equation: graph.add('Pow', graph.constant(2, equation.outputs[0].dtype), x)),
    'convert_element_type': _unary(lambda graph, x, equation: x if onnx_dtype(equation.inputs[0].dtype) == onnx_dtype(
        equation.outputs[0].dtype) else graph.cast(x, equation.outputs[0].dtype))})


@writes('rem')
def _remainder(graph, equation):
    names, stretched = broadcast(graph, equation.inputs)
    return Tensor(graph.add('Mod', *names, fmod=1), stretched)


@writes('is_finite')
def _is_finite(graph, equation):
    tensor = graph.tensor(equation.inputs[0])
    wrong = graph.add('Or', graph.add('IsNaN', tensor.name), graph.add('IsInf', tensor.name))
    return Tensor(graph.add('Not', wrong), tensor.stretched)


@writes('dim_as_value')
def _dimension(graph, equation):
    return graph.squeeze(graph.shape([equation.params['dim']]), [0])


@writes('select_n')
def _select(graph, equation):
    condition, *cases = equation.inputs
    if condition.dtype != bool:
        raise NotImplementedError('a choice among more than two cases')
    return elementwise(graph, [condition, *cases[::-1]], 'Where')


@writes('clamp')
def _clamp(graph, equation):
    low, x, high = equation.inputs
    names, stretched = broadcast(graph, [low, x, high])
    return Tensor(graph.add('Min', graph.add('Max', names[1], names[0]), names[2]), stretched)


@writes('iota')
def _iota(graph, equation):
    params = equation.params
    axis, rank = params['dimension'], len(params['shape'])
    if not is_static([params['shape'][axis]]):
        raise NotImplementedError('a range over the batch')
    numbers = np.arange(params['shape'][axis], dtype=params['dtype'])
    return Tensor(graph.constant(numbers.reshape([-1 if i == axis else 1 for i in range(rank)])),
                  frozenset(range(rank)) - {axis})


@writes('broadcast_in_dim')
def _broadcast_in_dim(graph, equation):
    x, (output,) = equation.inputs[0], equation.outputs
    axes = [int(axis) for axis in equation.params['broadcast_dimensions']]
    tensor = graph.tensor(x)
    new = [axis for axis in range(len(output.shape)) if axis not in axes]
    stretched = {axes[axis] for axis in tensor.stretched}
    stretched |= {axis for old, axis in enumerate(axes) if x.shape[old] != output.shape[axis]}
    stretched |= {axis for axis in new if output.shape[axis] != 1}
    return Tensor(graph.unsqueeze(tensor.name, new), frozenset(stretched))


@writes('reshape')
def _reshape(graph, equation):
    x, (output,) = equation.inputs[0], equation.outputs
    added = _added_axes(x.shape, output.shape)
    if added is not None:
        return graph.unsqueeze(graph.full(x), added)
    return graph.reshape(graph.full(x), output.shape, x.shape)


def _added_axes(before, after):
    """Returns the axes of length 1 that turn one shape into the other; None: they are not the only change."""
    added, rest = [], [*before]
    for axis, size in enumerate(after):
        if rest and isinstance(rest[0], int) == isinstance(size, int) and rest[0] == size:
            rest.pop(0)
        elif _is_one(size):
            added.append(axis)
        else:
            return None
    return None if rest else added


@writes('squeeze')
def _squeeze(graph, equation):
    tensor, gone = graph.tensor(equation.inputs[0]), sorted(equation.params['dimensions'])
    left = [axis for axis in range(len(equation.inputs[0].shape)) if axis not in gone]
    return Tensor(graph.squeeze(tensor.name, gone), frozenset(left.index(axis) for axis in tensor.stretched - {*gone}))


@writes('expand_dims')
def _expand_dims(graph, equation):
    return graph.unsqueeze(graph.full(equation.inputs[0]), sorted(equation.params['dimensions']))


@writes('transpose')
def _transpose(graph, equation):
    tensor, permutation = graph.tensor(equation.inputs[0]), equation.params['permutation']
    return Tensor(graph.transpose(tensor.name, permutation),
                  frozenset(permutation.index(axis) for axis in tensor.stretched))


@writes('concatenate')
def _concatenate(graph, equation):
    names = [graph.full(value) for value in equation.inputs]
    return graph.add('Concat', *names, axis=int(equation.params['dimension']))


@writes('stack')
def _stack(graph, equation):
    axis = int(equation.params['axis'])
    return graph.add('Concat', *(graph.unsqueeze(graph.full(value), [axis]) for value in equation.inputs), axis=axis)


@writes('slice')
def _slice(graph, equation):
    x, params = equation.inputs[0], equation.params
    steps = params['strides'] or (1,) * len(x.shape)
    parts = {axis: (start, stop, step) for axis, (start, stop, step) in enumerate(zip(
        params['start_indices'], params['limit_indices'], steps)) if start != 0 or stop != x.shape[axis] or step != 1}
    if not all(map(is_static, parts.values())):
        raise NotImplementedError('a slice of the batch')
    return graph.slice(graph.full(x), parts)


@writes('split')
def _split(graph, equation):
    name, sizes = graph.full(equation.inputs[0]), [size for size in equation.params['sizes'] if size]
    parts = [name] if len(sizes) == 1 else graph.add(
        'Split', name, graph.constant(sizes, np.int64), axis=int(equation.params['axis']), num_outputs=len(sizes))
    rest = iter(parts)
    return tuple(next(rest) if size else '' for size in equation.params['sizes'])  # an empty part is never read


@writes('unstack')
def _unstack(graph, equation):
    name, axis = graph.full(equation.inputs[0]), int(equation.params['axis'])
    return tuple(graph.squeeze(graph.slice(name, {axis: (i, i + 1, 1)}), [axis])
                 for i in range(len(equation.outputs)))


@writes('tile')
def _tile(graph, equation):
    return graph.add('Tile', graph.full(equation.inputs[0]), graph.constant(equation.params['reps'], np.int64))


@writes('rev')
def _reverse(graph, equation):
    x = equation.inputs[0]
    return graph.slice(graph.full(x), {axis: (-1, -x.shape[axis] - 1, -1) for axis in equation.params['dimensions']})


@writes('pad')
def _pad(graph, equation):
    x, value = equation.inputs
    low, high, interior = zip(*equation.params['padding_config'])
    if any(interior) or min(*low, *high) < 0:
        raise NotImplementedError('a pad between the elements, or of a negative width')
    widths = graph.constant([*low, *high], np.int64)
    return graph.add('Pad', graph.full(x), widths, graph.full(value), mode='constant')
