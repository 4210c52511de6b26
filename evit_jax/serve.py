"""Serves a model over HTTP, with a live page: python -m evit_jax.serve runs/digits --port 8000

PATH is a run, a file or folder of weights (.pth, .safetensors, Hugging Face, timm), hf-hub:ORG/NAME, or the folder of
an export. Exports fix the plans: StableHLO programs need --engine=jax, ONNX programs --engine=onnxruntime or
--engine=openvino. With these two engines, another PATH is first exported to a temporary folder.

  POST /predict   multipart/form-data with images: curl -F image=@cat.jpg 'localhost:8000/predict?rate=0.5'
                  ?plan=NAME, or ?rate=R and ?reducer=NAME, choose the plan; ?kept=1 adds the kept patches, ?top=N sets
                  the number of classes. A model without a head returns features.
  GET  /          the live page
  GET  /models    the plans; /healthz and /readyz for health checks; /metrics for Prometheus

All programs are compiled before /readyz answers 200: each plan with batches of 1, 2, 4, ... --max_batch images. Waiting
images of a plan are joined into a batch. Beyond --max_queue, requests get 503 with Retry-After. SIGTERM ends the server
after all accepted requests are answered. The server has no passwords and no TLS: it listens on this machine only,
unless --host names another address.
"""

import importlib.util
import pathlib

from absl import flags, logging

from evit_jax import cli
from evit_jax.data.names import in_one_line
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend

_PACKAGES = 'fastapi', 'uvicorn', 'python_multipart', 'prometheus_client'

_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; 0.0.0.0 for all addresses of this machine.')
_PORT = flags.DEFINE_integer('port', 8000, 'Port to listen on; 0 takes a free one.', lower_bound=0, upper_bound=65535)
_ENGINE = flags.DEFINE_string('engine', 'jax', 'Engine: jax, onnxruntime or openvino.')
_PRECISION = flags.DEFINE_string('precision', 'float32', 'Precision of --engine=openvino: float32 or bfloat16.')
_PLANS = flags.DEFINE_multi_string('plan', [], 'Plan file of python -m evit_jax.plan; may be repeated. The plan has '
                                   'the name of the file.')
_RATES = flags.DEFINE_list('rates', None, 'Keep rates, in (0, 1]; default: 0.3, 0.5, 0.7, 1.0 and the rate of '
                           'training. The dense plan and the plan of training are always served.')
_REDUCERS = flags.DEFINE_list('reducers', [], 'Reducers to serve the rates with, besides that of training: '
                              f'{", ".join(list_reducers())}.')
_EMA = flags.DEFINE_bool('ema', False, 'Use the moving average (EMA) of the weights.')
_MAX_BATCH = flags.DEFINE_integer('max_batch', 8, 'Largest number of images in a batch.', lower_bound=1)
_MAX_WAIT = flags.DEFINE_float('max_wait_ms', 2.0, 'Longest time in milliseconds that an image waits for others while '
                               'the engine is idle.', lower_bound=0)
_MAX_QUEUE = flags.DEFINE_integer('max_queue', 128, 'Largest number of waiting images, and of requests that are '
                                  'handled at a time.', lower_bound=1)
_MAX_IMAGES = flags.DEFINE_integer('max_images', 16, 'Largest number of images in a request.', lower_bound=1)
_MAX_MB = flags.DEFINE_float('max_mb', 16, 'Largest body of a request in MB.', lower_bound=0.001)
_MAX_MEGAPIXELS = flags.DEFINE_float('max_megapixels', 40, 'Largest image in millions of pixels.', lower_bound=0.001)
_BODY_SECONDS = flags.DEFINE_float('body_seconds', 10, 'Time in seconds for the body of a request.', lower_bound=0.1)
_SECONDS = flags.DEFINE_float('seconds', 30, 'Time in seconds for the answer after the body.', lower_bound=0.1)


def main(path: str) -> None:
    """Opens the model, compiles its plans, and serves until SIGTERM or Ctrl-C."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"the server needs the package {missing[0]}: pip install 'evit_jax[serve]'")
    from evit_jax.serving import engines, server
    from evit_jax.serving.service import Service
    from evit_jax.serving.uploads import Limits
    if _MAX_IMAGES.value > _MAX_QUEUE.value:
        raise ValueError(f'--max_images={_MAX_IMAGES.value} is more than --max_queue={_MAX_QUEUE.value}: a request '
                         'with so many images would never be accepted')
    options = engines.EngineOptions(
        _ENGINE.value, _PRECISION.value, _RATES.value and cli.numbers('rates', _RATES.value, float), _REDUCERS.value,
        {in_one_line(pathlib.Path(file).stem): read_plan_file(file) for file in _PLANS.value}, _EMA.value)
    options.check()
    with server.bind(_HOST.value, _PORT.value) as listener:
        backend.start()
        served, engine = engines.open_served(path, options)
        logging.info('%s of %s on %s; plans: %s', served.name, path, served.engine, '; '.join(
            f'{name} ({entry["macs_of_dense"]:.0%} of the MACs)' for name, entry in served.plans.items()))
        limits = Limits(
            max_batch=_MAX_BATCH.value, max_wait=_MAX_WAIT.value / 1e3, max_queue=_MAX_QUEUE.value,
            max_images=_MAX_IMAGES.value, max_bytes=int(_MAX_MB.value * 1e6),
            max_pixels=int(_MAX_MEGAPIXELS.value * 1e6), body_seconds=_BODY_SECONDS.value, seconds=_SECONDS.value)
        server.run(Service(served, engine, limits), listener)


if __name__ == '__main__':
    cli.run(main, 'PATH')
