"""Converts a function of weights and images to an ONNX model with a dynamic batch size."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
import onnx
from jax import export
from onnx import helper

from evit_jax.serving.jaxpr_to_onnx import elementwise, idioms, indexing, products  # noqa: F401  register writers
from evit_jax.serving.jaxpr_to_onnx.bounds import Bounds
from evit_jax.serving.jaxpr_to_onnx.equations import Value, in_order, is_static, trace
from evit_jax.serving.jaxpr_to_onnx.graph import Graph, Tensor, WeightFile
from evit_jax.serving.jaxpr_to_onnx.primitives import WRITERS
from evit_jax.serving.jaxpr_to_onnx.simplify import simplify

BATCH = 'b'  # name of the batch dimension


def to_onnx(function: Callable[..., dict[str, jax.Array]], weights: Mapping[str, np.ndarray], image_shape: tuple,
            image_dtype: np.dtype, *, weight_file: WeightFile | None, name: str) -> onnx.ModelProto:
    """Converts a function to an ONNX model.

    Args:
      function: (weights by name, images [b, ...]) -> outputs by name, whose first dimension is b.
      image_shape: shape of one image.
      weight_file: receives the weights; None: the model contains them, which limits it to 2 GB.
      name: name of the graph.

    Raises:
      ValueError: the function contains a primitive that has no ONNX form.
    """
    batch, = export.symbolic_shape(BATCH)
    images, names = jax.ShapeDtypeStruct((batch, *image_shape), image_dtype), []

    def flat(images, *arrays):
        outputs = function(dict(zip(weights, arrays)), images)
        names.extend(outputs)
        return list(outputs.values())

    specs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in weights.values()]
    (image_value, *weight_values), outputs = trace(flat, images, *specs)
    bounds = Bounds()
    outputs = simplify(idioms.replace_idioms(outputs), dict(zip(weight_values, weights.values())), bounds)
    graph = Graph(weight_file, bounds, batch, 'images')
    graph.tensors[image_value] = Tensor('images')
    for equation in in_order(outputs):
        _write(graph, equation)
    return graph.model([_info('images', image_value.shape, image_value.dtype)],
                       {name: _output(graph, name, value) for name, value in zip(names, outputs)}, name)


def _write(graph, equation):
    if all(0 in value.shape for value in equation.outputs):
        return  # `simplify` removed all uses of empty arrays
    try:
        if equation.name not in WRITERS:
            raise NotImplementedError
        results = WRITERS[equation.name](graph, equation)
    except NotImplementedError as error:
        reason = f' ({error})' if str(error) else ''
        raise ValueError(f'the model computes {equation.name}{reason}, which the ONNX export does not support: export '
                         'with --format=stablehlo, or choose another reducer') from error
    results = results if type(results) is tuple else (results,)
    graph.tensors.update(zip(equation.outputs, (
        result if isinstance(result, Tensor) else Tensor(result) for result in results)))


def _output(graph, name, value: Value | np.ndarray):
    tensor, dtype = graph.full(value), np.dtype(value.dtype)
    if dtype.kind in 'iu':
        tensor, dtype = graph.cast_to_int32(tensor), np.dtype(np.int32)
    return tensor, _info(name, value.shape, dtype)


def _info(name, shape, dtype):
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [
        size if is_static([size]) else str(size) for size in shape])
