"""Flat lists of equations: the jaxpr of a function without nested calls.

Every array is a `Value` that an equation computes, or a numpy array that is known at export.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

CALLS = {'jit': 'jaxpr', 'closed_call': 'call_jaxpr', 'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr',
         'checkpoint': 'jaxpr', 'remat2': 'jaxpr'}  # primitive -> its parameter that holds the called jaxpr
COPIES = frozenset({'stop_gradient', 'copy', 'copy_p', 'layout_constraint', 'sharding_constraint',
                    'optimization_barrier'})


@dataclasses.dataclass(eq=False, repr=False)
class Value:
    """An array of the graph. Dimensions are integers or symbolic expressions."""

    shape: tuple
    dtype: np.dtype
    producer: 'Equation | None' = None  # None: an input of the graph


@dataclasses.dataclass(eq=False, repr=False)
class Equation:
    """A primitive that is applied to values and known arrays."""

    name: str
    inputs: tuple[Value | np.ndarray, ...]
    outputs: tuple[Value, ...]
    params: dict[str, Any]
    primitive: core.Primitive | None = None  # None: the equation is not from JAX, see `idioms`


def make_equation(name: str, inputs: Sequence, outputs: Sequence[tuple[tuple, Any]], params: dict,
                  primitive: core.Primitive | None = None) -> Equation:
    """Makes an equation with new values of the given shapes and dtypes as outputs."""
    equation = Equation(name, tuple(inputs), tuple(Value(tuple(shape), dtype) for shape, dtype in outputs), params,
                        primitive)
    for value in equation.outputs:
        value.producer = equation
    return equation


def trace(function: Callable, *inputs: jax.ShapeDtypeStruct) -> tuple[list[Value], list[Value | np.ndarray]]:
    """Traces a function of arrays that returns a flat sequence of arrays.

    Branches of `jax.lax.platform_dependent` are chosen for the CPU.

    Returns:
      The values of the inputs, and the outputs. The producers of the values lead from the outputs to the inputs.
    """
    closed = jax.jit(function).trace(*inputs).jaxpr
    values = [Value(tuple(spec.shape), np.dtype(spec.dtype)) for spec in inputs]
    return values, _inline(closed.jaxpr, closed.consts, values)


def _inline(jaxpr: core.Jaxpr, constants: Iterable, inputs: Iterable) -> list[Value | np.ndarray]:
    """Inlines the calls in a jaxpr. Returns its outputs."""
    env = dict(zip(jaxpr.constvars, map(np.asarray, constants))) | dict(zip(jaxpr.invars, inputs))

    def read(atom):
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _inlined(eqn, [read(atom) for atom in eqn.invars])))
    return [read(atom) for atom in jaxpr.outvars]


def _inlined(eqn: core.JaxprEqn, inputs: list) -> Sequence[Value | np.ndarray]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        called = params[CALLS[name]]
        closed = isinstance(called, core.ClosedJaxpr)
        return _inline(called.jaxpr if closed else called, called.consts if closed else (), inputs)
    if name == 'platform_index':
        return [np.asarray(next(index for index, names in enumerate(params['platforms'])
                                if names is None or 'cpu' in names))]
    if name == 'cond' and isinstance(inputs[0], np.ndarray):
        branch = params['branches'][int(inputs[0])]
        return _inline(branch.jaxpr, branch.consts, inputs[1:])
    if name in COPIES:
        return inputs
    return make_equation(name, inputs, [(var.aval.shape, var.aval.dtype) for var in eqn.outvars], params,
                         eqn.primitive).outputs


def in_order(outputs: Iterable[Value | np.ndarray]) -> list[Equation]:
    """Returns the equations that the outputs depend on, each after the equations of its inputs."""
    order, state = [], {}
    stack = [value.producer for value in outputs if isinstance(value, Value) and value.producer]
    while stack:
        equation = stack[-1]
        if state.get(equation) == 'done':
            stack.pop()
        elif state.get(equation) == 'entered':
            state[equation] = 'done'
            order.append(stack.pop())
        else:
            state[equation] = 'entered'
            stack.extend(value.producer for value in equation.inputs
                         if isinstance(value, Value) and value.producer and value.producer not in state)
    return order


def rebuild(outputs: Sequence[Value | np.ndarray],
            replace: Callable[[Equation, tuple], Sequence[Value | np.ndarray] | None],
            known: dict[Value, Any]) -> list[Value | np.ndarray]:
    """Rewrites a graph from the inputs to the outputs.

    Args:
      outputs: the outputs of the graph.
      replace: (equation, its rewritten inputs) -> the values of its outputs; None: the equation is kept.
      known: inputs of the graph -> the value or array that replaces them.

    Returns:
      The rewritten outputs. The given graph is not changed.
    """
    env = dict(known)

    def read(value):
        return env.get(value, value) if isinstance(value, Value) else value

    for equation in in_order(outputs):
        inputs = tuple(map(read, equation.inputs))
        new = replace(equation, inputs)
        if new is None:
            new = make_equation(equation.name, inputs, [(value.shape, value.dtype) for value in equation.outputs],
                                equation.params, equation.primitive).outputs
        env.update(zip(equation.outputs, new))
    return [read(value) for value in outputs]


def is_static(shape: Iterable) -> bool:
    """Returns True if no dimension is symbolic."""
    return all(isinstance(size, int | np.integer) for size in shape)


def size_of(shape: Sequence) -> int:
    """Returns the number of elements of a static shape."""
    return math.prod(map(int, shape))
