"""An ONNX graph that is built node by node, and the file of the weights that several graphs share."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper

from evit_jax.serving.jaxpr_to_onnx.bounds import Bounds
from evit_jax.serving.jaxpr_to_onnx.equations import Value, is_static

OPSET = 17  # has LayerNormalization; ONNX Runtime 1.12, OpenVINO 2022.3 and TensorRT 8.6 read it
IR_VERSION = 8
_ALIGNMENT = 4096  # alignment of each array in the file of the weights, so that it can be mapped into memory
_MAX_INLINE = 1024  # bytes; larger constants are stored in the file of the weights
_WIDE = {np.dtype(np.int32): np.dtype(np.int64), np.dtype(np.int8): np.dtype(np.int64),
         np.dtype(np.int16): np.dtype(np.int64)}  # all signed integers are int64, as ONNX's indices are


class WeightFile:
    """A file of arrays. Equal arrays are stored once."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._offsets: dict[bytes, int] = {}
        path.write_bytes(b'')

    def add(self, array: np.ndarray) -> onnx.TensorProto:
        """Stores an array. Returns a tensor without a name that refers to it."""
        content = array.tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self._offsets:
            with self.path.open('ab') as file:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                self._offsets[digest] = file.tell()
                file.write(content)
        tensor = onnx.TensorProto(dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                                  data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (('location', self.path.name), ('offset', self._offsets[digest]), ('length', len(content))):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Tensor(NamedTuple):
    """A tensor of the graph for a `Value`.

    The tensor has length 1 along the axes in `stretched`, where the value repeats: ONNX broadcasts as NumPy does, so
    that most broadcasts need no node.
    """

    name: str
    stretched: frozenset[int] = frozenset()


class Graph:
    """Builds the graph of one program.

    Args:
      weights: receives the large constants; None: they are stored in the model.
      bounds: bounds of the integer arrays.
      batch: the symbolic batch size.
      batch_input: name of the input whose first dimension is the batch size.
    """

    def __init__(self, weights: WeightFile | None, bounds: Bounds, batch: Any, batch_input: str):
        self.bounds, self.tensors = bounds, {}
        self._weights, self._batch, self._batch_input = weights, batch, batch_input
        self._nodes: list[onnx.NodeProto] = []
        self._node_of: dict[str, onnx.NodeProto] = {}
        self._names: dict[tuple, tuple[str, ...]] = {}
        self._constants: dict[tuple, onnx.TensorProto] = {}

    def add(self, op: str, *inputs: str, num_outputs: int | None = None, **attributes: Any) -> Any:
        """Adds a node, unless an equal one exists. Returns the name of its output, or a tuple if given a number."""
        key = (op, inputs, num_outputs, repr(sorted(attributes.items())))
        if key not in self._names:
            outputs = tuple(f'{op}_{len(self._nodes)}{f"_{i}" if i else ""}' for i in range(num_outputs or 1))
            node = helper.make_node(op, inputs, outputs, name=outputs[0], **attributes)
            self._nodes.append(node)
            self._names[key] = outputs
            self._node_of |= dict.fromkeys(outputs, node)
        return self._names[key] if num_outputs else self._names[key][0]

    def constant(self, array: Any, dtype: Any = None) -> str:
        """Adds an initializer, unless an equal one exists. Returns its name."""
        array = np.asarray(array, dtype)
        array = np.ascontiguousarray(array.astype(onnx_dtype(array.dtype))).reshape(array.shape)
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            is_inline = self._weights is None or array.nbytes <= _MAX_INLINE
            tensor = onnx.numpy_helper.from_array(array) if is_inline else self._weights.add(array)
            tensor.name = f'constant_{len(self._constants)}'
            self._constants[key] = tensor
        return self._constants[key].name

    def tensor(self, value: Value | np.ndarray) -> Tensor:
        """Returns the tensor of a value, which may be stretched."""
        return Tensor(self.constant(value)) if isinstance(value, np.ndarray) else self.tensors[value]

    def full(self, value: Value | np.ndarray, axes: Sequence[int] | None = None) -> str:
        """Returns the name of the tensor of a value that has its full length along the axes; None: all axes."""
        tensor = self.tensor(value)
        axes = tensor.stretched if axes is None else tensor.stretched & {*axes}
        if not axes:
            return tensor.name
        shape = [size if axis in axes else 1 for axis, size in enumerate(value.shape)]
        return self.add('Expand', tensor.name, self.shape(shape))

    def shape(self, shape: Sequence) -> str:
        """Returns the name of a shape as a vector. Symbolic dimensions are computed from the batch size."""
        if is_static(shape):
            return self.constant(shape, np.int64)
        sizes = list(map(self._dimension, shape))
        return sizes[0] if len(sizes) == 1 else self.add('Concat', *sizes, axis=0)

    def reshape(self, name: str, shape: Sequence, before: Sequence = ()) -> str:
        """Adds a Reshape. ONNX infers a symbolic dimension.

        Args:
          before: the shape before; if it begins with the same dimension, shape inference keeps its name.
        """
        symbolic = [axis for axis, size in enumerate(shape) if not is_static([size])]
        if len(symbolic) > 1 or 0 in shape:
            return self.add('Reshape', name, self.shape(shape))
        is_first = symbolic == [0] and before and before[0] == shape[0]
        numbers = [size if axis not in symbolic else 0 if is_first else -1 for axis, size in enumerate(shape)]
        return self.add('Reshape', name, self.constant(numbers, np.int64))

    def transpose(self, name: str, permutation: Sequence[int]) -> str:
        """Adds a Transpose. Two transposes in succession become one."""
        before = self._node_of.get(name)
        if before is not None and before.op_type == 'Transpose':
            inner = helper.get_attribute_value(before.attribute[0])
            name, permutation = before.input[0], [inner[axis] for axis in permutation]
        if list(permutation) == list(range(len(permutation))):
            return name
        return self.add('Transpose', name, perm=[int(axis) for axis in permutation])

    def squeeze(self, name: str, axes: Sequence[int]) -> str:
        """Adds a Squeeze, unless there are no axes. A squeeze moves ahead of a transpose."""
        if not axes:
            return name
        before = self._node_of.get(name)
        if before is not None and before.op_type == 'Transpose':
            perm = helper.get_attribute_value(before.attribute[0])
            removed = sorted(perm[axis] for axis in axes)
            rest = [axis for i, axis in enumerate(perm) if i not in axes]
            return self.transpose(self.squeeze(before.input[0], removed),
                                  [axis - sum(gone < axis for gone in removed) for axis in rest])
        return self.add('Squeeze', name, self.constant(list(axes), np.int64))

    def unsqueeze(self, name: str, axes: Sequence[int]) -> str:
        """Adds an Unsqueeze, unless there are no axes."""
        return self.add('Unsqueeze', name, self.constant(list(axes), np.int64)) if axes else name

    def slice(self, name: str, bounds: dict[int, tuple[int, int, int]]) -> str:
        """Adds a Slice of axis -> (start, stop, step), unless there are no axes. It moves ahead of a transpose."""
        if not bounds:
            return name
        before = self._node_of.get(name)
        if before is not None and before.op_type == 'Transpose':
            perm = helper.get_attribute_value(before.attribute[0])
            bounds = {perm[axis]: part for axis, part in bounds.items()}
            return self.transpose(self.slice(before.input[0], bounds), perm)
        starts, stops, steps = zip(*bounds.values())
        return self.add('Slice', name, *(self.constant(part, np.int64) for part in (starts, stops, [*bounds], steps)))

    def cast(self, name: str, dtype: Any) -> str:
        """Adds a Cast."""
        return self.add('Cast', name, to=helper.np_dtype_to_tensor_dtype(onnx_dtype(dtype)))

    def cast_to_int32(self, name: str) -> str:
        """Adds a Cast to int32, the dtype of indices in the outputs."""
        return self.add('Cast', name, to=onnx.TensorProto.INT32)

    def model(self, inputs: Sequence[onnx.ValueInfoProto], outputs: dict[str, tuple[str, onnx.ValueInfoProto]],
              name: str) -> onnx.ModelProto:
        """Returns the model.

        Args:
          outputs: name of each output -> (the tensor, its type).
        """
        nodes = [*self._nodes, *(helper.make_node('Identity', [tensor], [output]) for output, (tensor, _) in
                                 outputs.items())]
        needed, kept = {*outputs}, []
        for node in reversed(nodes):
            if needed & {*node.output}:
                needed |= {*node.input}
                kept.append(node)
        graph = helper.make_graph(kept[::-1], name, inputs, [type_ for _, type_ in outputs.values()], initializer=[
            tensor for tensor in self._constants.values() if tensor.name in needed])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION,
                                 producer_name='evit_jax')

    def _dimension(self, size):
        """Returns the name of a dimension as a vector of length 1."""
        if is_static([size]):
            return self.constant([size], np.int64)
        batch = self.add('Shape', self._batch_input, start=0, end=1)
        if size == self._batch:
            return batch
        factor = size // self._batch
        if not is_static([factor]) or factor * self._batch != size:
            raise ValueError(f'the dimension {size} is no multiple of the batch size: ONNX cannot express it')
        return self.add('Mul', batch, self.constant([factor], np.int64))


def onnx_dtype(dtype: Any) -> np.dtype:
    """Returns the dtype in the graph: int64 for signed integers, as ONNX's indices are; else the dtype itself."""
    return _WIDE.get(np.dtype(dtype), np.dtype(dtype))
