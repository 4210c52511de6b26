"""Writes gathers and scatters with one indexed axis, as `take_along_axis`, `x[index]` and `.at[index]` make them."""

import numpy as np
from jax.lax import GatherScatterMode

from evit_jax.serving.jaxpr_to_onnx.primitives import writes


@writes('gather')
def _gather(graph, equation):
    x, index = equation.inputs
    params, numbers = equation.params, equation.params['dimension_numbers']
    is_single = not numbers.operand_batching_dims and index.shape == (len(numbers.start_index_map),)
    if is_single and isinstance(index, np.ndarray):
        return _slice(graph, equation)
    axis = _indexed_axis(numbers.start_index_map)
    _check(numbers.collapsed_slice_dims == (axis,) and params['slice_sizes'][axis] == 1, 'slices of a gather')
    rest = [size for i, size in enumerate(x.shape) if i != axis and i not in numbers.operand_batching_dims]
    slices = [size for i, size in enumerate(params['slice_sizes'])
              if i != axis and i not in numbers.operand_batching_dims]
    _check(all(a == b for a, b in zip(rest, slices)), 'slices of a gather')
    name, valid = _in_range(graph, index, x.shape[axis], params['mode'])
    gathered = _gather_rows(graph, x, name, index, numbers, axis)
    if valid is not None:
        fill = graph.constant(_fill_value(params['fill_value'], equation.outputs[0].dtype))
        valid = graph.squeeze(valid, [len(index.shape) - 1])
        output = len(equation.outputs[0].shape)
        valid = graph.unsqueeze(valid, sorted(numbers.offset_dims)) if output else valid
        gathered = graph.add('Where', valid, gathered, fill)
    return gathered


def _gather_rows(graph, x, index_name, index, numbers, axis):
    """Gathers by an index [batch..., others..., 1]. Returns the output in JAX's order of the axes."""
    batch, index_rank = list(numbers.operand_batching_dims), len(index.shape) - 1
    batch_of_index = list(numbers.start_indices_batching_dims)
    others = [i for i in range(index_rank) if i not in batch_of_index]
    offsets = [i for i in range(len(x.shape)) if i != axis and i not in batch]
    order = [*batch_of_index, *others]
    # The output has the axes of the index in their order, and those of the slices in the positions `offset_dims`.
    rest = iter(range(index_rank))
    wanted = [('slice', offsets[numbers.offset_dims.index(i)]) if i in numbers.offset_dims else ('index', next(rest))
              for i in range(index_rank + len(offsets))]
    if batch:
        operand = graph.transpose(graph.full(x), [*batch, axis, *offsets])
        index_name = graph.transpose(index_name, [*order, index_rank])
        axes = [*(('index', i) for i in order), *(('slice', i) for i in offsets)]
        if not offsets and len(others) == 1:
            rows = graph.add('GatherElements', operand, graph.squeeze(index_name, [index_rank]), axis=len(batch))
        else:
            rows = graph.add('GatherND', operand, index_name, batch_dims=len(batch))
    else:
        axes = [('slice', i) for i in offsets]
        axes[axis:axis] = [('index', i) for i in order]
        rows = _rows_of_all(graph, graph.full(x), index_name, index, axis)
    return graph.transpose(rows, [axes.index(each) for each in wanted])


def _rows_of_all(graph, operand, index_name, index, axis):
    """Gathers the same rows in the whole batch, by a slice if they have equal distances."""
    if isinstance(index, np.ndarray) and index.ndim == 2 and len(index) > 1:
        rows, steps = index[:, 0], np.diff(index[:, 0])
        if (steps == steps[0]).all() and steps[0] > 0 and rows[0] >= 0:
            return graph.slice(operand, {axis: (int(rows[0]), int(rows[-1]) + 1, int(steps[0]))})
    return graph.add('Gather', operand, graph.squeeze(index_name, [len(index.shape) - 1]), axis=axis)


def _slice(graph, equation):
    """Writes a gather with one known index as a slice."""
    (x, index), params = equation.inputs, equation.params
    numbers, sizes = params['dimension_numbers'], params['slice_sizes']
    _check(all(size == full for i, (size, full) in enumerate(zip(sizes, x.shape)) if i not in numbers.start_index_map),
           'slices of a gather')
    starts = {axis: int(np.clip(start, 0, x.shape[axis] - sizes[axis]))
              for axis, start in zip(numbers.start_index_map, index.ravel())}
    name = graph.slice(graph.full(x), {axis: (start, start + sizes[axis], 1) for axis, start in starts.items()
                                       if sizes[axis] != x.shape[axis]})
    name = graph.squeeze(name, list(numbers.collapsed_slice_dims))
    added = [i for i in range(len(equation.outputs[0].shape)) if i not in numbers.offset_dims]
    return graph.unsqueeze(name, added)


def _in_range(graph, index, size, mode):
    """Returns the name of an index in [0, size), and of the mask of the elements that were in range; None: all were."""
    low, high = graph.bounds(index)
    name = graph.full(index)
    if mode == GatherScatterMode.PROMISE_IN_BOUNDS or (low >= 0 and high < size):
        return name, None
    zero, last = graph.constant(0, np.int64), graph.constant(size - 1, np.int64)
    clipped = graph.add('Min', graph.add('Max', name, zero), last)
    return clipped, None if mode == GatherScatterMode.CLIP else graph.add('Equal', clipped, name)


@writes('scatter', 'scatter-add', 'scatter-mul')
def _scatter(graph, equation):
    x, index, updates = equation.inputs
    numbers = equation.params['dimension_numbers']
    axis = _indexed_axis(numbers.scatter_dims_to_operand_dims)
    batch = list(numbers.operand_batching_dims)
    _check(numbers.inserted_window_dims == (axis,) and batch == list(range(len(batch))) and axis == len(batch)
           and len(index.shape) == len(batch) + 2 and list(numbers.scatter_indices_batching_dims) == batch
           and list(numbers.update_window_dims) == list(range(len(batch) + 1, len(x.shape))),
           'the layout of a scatter')
    size, operand, index_name = x.shape[axis], graph.full(x), graph.full(index)
    low, high = graph.bounds(index)
    in_range = equation.params['mode'] == GatherScatterMode.PROMISE_IN_BOUNDS or (low >= 0 and high < size)
    if not in_range:  # one more row takes the updates that are out of range
        operand = _with_one_more_row(graph, operand, len(x.shape), axis)
        outside = graph.add('Or', graph.add('Less', index_name, graph.constant(0, np.int64)),
                            graph.add('Greater', index_name, graph.constant(size - 1, np.int64)))
        index_name = graph.add('Where', outside, graph.constant(size, np.int64), index_name)
    index_name = graph.squeeze(index_name, [len(index.shape) - 1])
    window = list(range(len(batch) + 1, len(x.shape)))
    if window:
        index_name = graph.add('Expand', graph.unsqueeze(index_name, window), graph.shape(updates.shape))
    reduction = {'scatter': {}, 'scatter-add': {'reduction': 'add'}, 'scatter-mul': {'reduction': 'mul'}}
    result = graph.add('ScatterElements', operand, index_name, graph.full(updates), axis=axis,
                       **reduction[equation.name])
    return result if in_range else graph.slice(result, {axis: (0, size, 1)})


def _fill_value(value, dtype):
    """Returns the value of a gather for an index that is out of range, as JAX chooses it."""
    if value is None:
        value = np.nan if dtype.kind == 'f' else np.iinfo(dtype).min if dtype.kind == 'i' else 0
    return np.asarray(value, dtype)


def _with_one_more_row(graph, name, rank, axis):
    widths = np.zeros(2 * rank, np.int64)
    widths[rank + axis] = 1
    return graph.add('Pad', name, graph.constant(widths), mode='constant')


def _indexed_axis(axes):
    _check(len(axes) == 1, 'several indexed axes')
    return int(axes[0])


def _check(condition, what):
    if not condition:
        raise NotImplementedError(what)
