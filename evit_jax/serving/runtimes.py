"""Runs ONNX files with the runtimes that are installed: ONNX Runtime and OpenVINO, on the CPU."""

import importlib.metadata
import importlib.util
import pathlib
import sys
from collections.abc import Callable

import numpy as np

PRECISIONS = {'onnxruntime': ('float32',), 'openvino': ('float32', 'bfloat16')}  # runtime -> precisions on a CPU
Program = Callable[[np.ndarray], dict[str, np.ndarray]]
"""images [B, H, W, 3] -> outputs by name."""


def is_installed(runtime: str) -> bool:
    """Returns True if a runtime can be imported."""
    return importlib.util.find_spec(runtime) is not None


def check_installed(runtime: str, flag: str = '') -> str:
    """Returns the version of a runtime.

    Args:
      flag: the flag that requests the runtime, for the message.

    Raises:
      ValueError: the runtime is unknown or not installed.
    """
    subject = flag or runtime
    if runtime not in PRECISIONS:
        raise ValueError(f'{subject}: the runtime {runtime!r} is unknown, there are {", ".join(PRECISIONS)}')
    if not is_installed(runtime):
        raise ValueError(f"{subject} needs the package {runtime}: pip install 'evit_jax[{runtime}]'")
    return importlib.metadata.version(runtime)


def open_program(model: pathlib.Path | bytes, runtime: str, *, precision: str = 'float32',
                 threads: int | None = None) -> Program:
    """Opens an ONNX model.

    Args:
      model: the file, or its content.
      runtime: a key of `PRECISIONS`.
      precision: precision of the computation; one of the values of `PRECISIONS`.
      threads: number of threads of a call; None: the default of the runtime.

    Raises:
      ValueError: the runtime is not installed, has not this precision, or cannot read the model.
    """
    version = check_installed(runtime)
    if precision not in PRECISIONS[runtime]:
        raise ValueError(f'{runtime} computes on a CPU in {" or ".join(PRECISIONS[runtime])}, not in {precision}')
    try:
        return _OPEN[runtime](model, precision, threads)
    except ValueError:
        raise
    except Exception as error:  # the runtimes raise exceptions of many types
        name = 'the model' if isinstance(model, bytes) else model
        reason = ' '.join(str(error).split())[:400]
        raise ValueError(f'{runtime} {version} cannot read {name} ({reason}): install a newer {runtime} if this one '
                         'has not the opset of the model, else export the model again') from error


def _open_onnxruntime(model, precision, threads):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options,
                                           providers=['CPUExecutionProvider'])
    name, outputs = session.get_inputs()[0].name, [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(outputs, session.run(outputs, {name: images})))


def _open_openvino(model, precision, threads):
    # `import openvino` reports its use to a server of its authors, from a fork of this process, unless this is missing.
    sys.modules.setdefault('openvino_telemetry', None)
    import openvino
    core = openvino.Core()
    if precision == 'bfloat16' and 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise ValueError('this CPU does not compute in bfloat16: measure OpenVINO in float32')
    settings = {'INFERENCE_PRECISION_HINT': {'float32': 'f32', 'bfloat16': 'bf16'}[precision],
                'PERFORMANCE_HINT': 'LATENCY'} | ({'INFERENCE_NUM_THREADS': threads} if threads else {})
    read = core.read_model(model if isinstance(model, bytes) else str(model))
    compiled = core.compile_model(read, 'CPU', settings)
    request, outputs = compiled.create_infer_request(), [output.names for output in compiled.outputs]

    def run(images):
        request.infer([images], share_inputs=True)
        # An output has several names: OpenVINO keeps those of the tensors that it joins.
        arrays = [request.get_output_tensor(number).data.copy() for number in range(len(outputs))]
        return {name: array for names, array in zip(outputs, arrays) for name in names}

    return run


_OPEN = {'onnxruntime': _open_onnxruntime, 'openvino': _open_openvino}
