"""Finds layer norms, GELUs and softmaxes in a graph, which ONNX runtimes compute faster than their single equations.

A pattern is the trace of the kernel itself, at the shapes of the candidate. So it stays equal to the kernel.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evit_jax.kernels.activations import gelu
from evit_jax.kernels.attention import softmax_product
from evit_jax.serving.jaxpr_to_onnx.elementwise import elementwise
from evit_jax.serving.jaxpr_to_onnx.equations import Equation, Value, make_equation, rebuild, trace
from evit_jax.serving.jaxpr_to_onnx.primitives import writes

_EPSILON = 0.0123  # stands for any number in a pattern


class Idiom(NamedTuple):
    """A function whose equations are replaced by one equation with its name."""

    name: str
    function: Callable
    specs: Callable[[Equation], Sequence[jax.ShapeDtypeStruct] | None]  # last equation -> inputs; None: it is another


def replace_idioms(outputs: Sequence[Value | np.ndarray]) -> list[Value | np.ndarray]:
    """Returns outputs in whose graph each idiom is one equation."""
    def replace(equation, inputs):
        candidate = make_equation(equation.name, inputs, [(value.shape, value.dtype) for value in equation.outputs],
                                  equation.params, equation.primitive)
        for idiom in IDIOMS:
            match = _match(idiom, candidate)
            if match is not None:
                output = candidate.outputs[0]
                return make_equation(idiom.name, match[0], [(output.shape, output.dtype)], match[1]).outputs
        return candidate.outputs

    return rebuild(outputs, replace, {})


def _match(idiom, candidate):
    """Returns (inputs, params) of an idiom that ends with an equation; None: it does not match."""
    specs = idiom.specs(candidate)
    if specs is None:
        return None
    inputs, (output,) = _pattern(idiom, tuple(specs))
    bindings, numbers = {}, []
    if not _is_equal(output, candidate.outputs[0], {*inputs}, bindings, numbers):
        return None
    return [bindings[value] for value in inputs], {'epsilon': numbers[0]} if numbers else {}


@functools.lru_cache(maxsize=256)
def _pattern(idiom, specs):
    return trace(lambda *arrays: [idiom.function(*arrays)], *specs)


def _is_equal(pattern, target, free, bindings, numbers):
    """Compares the equations of a pattern and of a target. Adds to `bindings` what each value of the pattern is."""
    if isinstance(pattern, np.ndarray):
        if pattern.ndim == 0 and pattern == np.asarray(_EPSILON, pattern.dtype) and isinstance(target, np.ndarray):
            numbers.append(target.item())
            return True
        return isinstance(target, np.ndarray) and pattern.shape == target.shape and bool((pattern == target).all())
    if pattern in bindings:
        return bindings[pattern] is target
    if pattern.shape != target.shape or pattern.dtype != target.dtype:
        return False
    if pattern not in free:
        a, b = pattern.producer, target.producer if isinstance(target, Value) else None
        if b is None or a.name != b.name or a.params != b.params or len(a.inputs) != len(b.inputs) or any(
                not _is_equal(x, y, free, bindings, numbers) for x, y in zip(a.inputs, b.inputs)):
            return False
    bindings[pattern] = target
    return True


def _layer_norm(x, scale, bias):
    norm = nnx.LayerNorm(x.shape[-1], epsilon=_EPSILON, dtype=x.dtype, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale, bias
    return norm(x)


def _producer(value, name):
    """Returns the equation that computes a value, if it is of a primitive; else None."""
    equation = value.producer if isinstance(value, Value) else None
    return equation if equation is not None and equation.name == name else None


def _spec_of_output(equation, dtype=None):
    output = equation.outputs[0]
    return jax.ShapeDtypeStruct(output.shape, dtype or output.dtype)


def _layer_norm_specs(equation):
    last = equation if equation.name == 'add' else (
        _producer(equation.inputs[0], 'add') if equation.name == 'convert_element_type' else None)
    if last is None or _producer(last.inputs[0], 'mul') is None or not equation.outputs[0].shape:
        return None
    vector = jax.ShapeDtypeStruct(equation.outputs[0].shape[-1:], jnp.float32)
    return _spec_of_output(equation), vector, vector


def _gelu_specs(equation):
    return [_spec_of_output(equation)] if equation.name == 'mul' and _producer(equation.inputs[1], 'add') else None


def _softmax_specs(equation):
    is_softmax = equation.name == 'div' and _producer(equation.inputs[0], 'exp')
    return [_spec_of_output(equation)] if is_softmax else None


def _attention_specs(equation, has_size):
    last = equation if equation.name == 'div' else (
        _producer(equation.inputs[0], 'div') if equation.name == 'convert_element_type' else None)
    product = None if last is None else _producer(last.inputs[0], 'dot_general')
    if product is None or len(equation.outputs[0].shape) < 3:
        return None
    weights, output = product.inputs[0], equation.outputs[0]
    if weights.shape[:-1] != output.shape[:-1]:
        return None
    *batch, _, d = output.shape
    keys = jax.ShapeDtypeStruct((*batch, weights.shape[-1], d), output.dtype)
    # The sizes are equal in all heads.
    size = [jax.ShapeDtypeStruct((batch[0], *[1] * (len(batch) - 1), weights.shape[-1]), jnp.float32)] * has_size
    return [_spec_of_output(equation), keys, keys, *size]


IDIOMS = (
    Idiom('layer_norm', _layer_norm, _layer_norm_specs),
    Idiom('gelu', gelu, _gelu_specs),
    Idiom('softmax', jax.nn.softmax, _softmax_specs),
    Idiom('softmax_product', lambda q, k, v: softmax_product(q, k, v, None, None),
          functools.partial(_attention_specs, has_size=False)),
    Idiom('softmax_product', lambda q, k, v, size: softmax_product(q, k, v, size, None),
          functools.partial(_attention_specs, has_size=True)))


@writes('layer_norm')
def _write_layer_norm(graph, equation):
    x, *affine = equation.inputs
    scale, bias = (graph.constant(value, x.dtype) if isinstance(value, np.ndarray) else graph.full(value)
                   for value in affine)
    return graph.add('LayerNormalization', graph.full(x), scale, bias, axis=-1, epsilon=equation.params['epsilon'])


@writes('gelu')
def _write_gelu(graph, equation):
    """Writes the sequence of operators that runtimes fuse."""
    x = graph.full(equation.inputs[0])
    number = functools.partial(graph.constant, dtype=equation.outputs[0].dtype)
    erf = graph.add('Erf', graph.add('Div', x, number(math.sqrt(2))))
    return graph.add('Mul', graph.add('Mul', x, graph.add('Add', erf, number(1))), number(0.5))


@writes('softmax')
def _write_softmax(graph, equation):
    return graph.add('Softmax', graph.full(equation.inputs[0]), axis=-1)


@writes('softmax_product')
def _write_softmax_product(graph, equation):
    """Writes softmax(q kᵀ + log(size)) v. The softmax is float32."""
    q, k, v, *size = equation.inputs
    rank, dtype = len(q.shape), q.dtype
    logits = graph.add('MatMul', graph.full(q), graph.transpose(graph.full(k), [*range(rank - 2), rank - 1, rank - 2]))
    logits = logits if dtype == np.float32 else graph.cast(logits, np.float32)
    for sizes in size:
        log = elementwise(graph, [sizes], 'Log')
        logits = graph.add('Add', logits, graph.unsqueeze(log.name, [rank - 2]))
    weights = graph.add('Softmax', logits, axis=-1)
    return graph.add('MatMul', weights if dtype == np.float32 else graph.cast(weights, dtype), graph.full(v))
