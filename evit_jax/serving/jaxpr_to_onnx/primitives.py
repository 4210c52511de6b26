"""Tables of the functions that write JAX primitives as ONNX nodes."""

from collections.abc import Callable

from evit_jax.serving.jaxpr_to_onnx.equations import Equation
from evit_jax.serving.jaxpr_to_onnx.graph import Graph, Tensor

Writer = Callable[[Graph, Equation], Tensor | str | tuple]
"""(graph, equation) -> the tensor of its output, a tuple of tensors of its outputs, or names of full tensors."""

WRITERS: dict[str, Writer] = {}


def writes(*names: str) -> Callable[[Writer], Writer]:
    """Registers a function as the writer of primitives."""
    def register(writer):
        WRITERS.update(dict.fromkeys(names, writer))
        return writer

    return register
