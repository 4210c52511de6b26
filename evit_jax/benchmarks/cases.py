"""Compiles workloads for one device: JAX's forward pass and training step, PyTorch's forward pass, and a matmul.

Inputs are copied to the device before the clock starts. Calls cycle through several batches, so that no result can be
reused.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax import models
from evit_jax.benchmarks import torch_evit
from evit_jax.benchmarks.timing import Benchmark
from evit_jax.benchmarks.workloads import Workload
from evit_jax.interchange import torch_weights
from evit_jax.interchange.opening import open_model
from evit_jax.models.config import as_hw
from evit_jax.reduction.reducer import NO_MODULES
from evit_jax.training.experiment import Experiment

JAX = 'jax'          # name of our engine in results
NUM_INPUTS = 4       # number of batches that the calls cycle through
_MIN_LATENCIES = 100      # minimum number of calls at batch size 1, over all rounds, to compute percentiles
_MATMUL_SIZES = {'cpu': 2048}  # side of the square matrices in the reference matmul
_LARGE_MATMUL = 8192           # side of these matrices on other platforms


class BenchmarkCase(NamedTuple):
    """A workload, compiled and ready to run on one engine."""

    workload: Workload
    engine: str                   # JAX, one of torch_evit.ENGINES, or one of onnx_cases.engines
    call: Callable[[int], Any]    # number of the call -> result, which may not be computed yet
    wait: Callable[[Any], Any]    # blocks until a result is computed
    fetch: Callable[[Any], np.ndarray] = np.asarray  # result of a forward pass -> logits [B, L]
    compile_seconds: float | None = None  # None for an engine that does not compile
    parameters: int = 0
    argument_bytes: int = 0         # weights and input
    peak_bytes: int | None = None   # peak memory, according to the compiler's analysis

    def benchmark(self, rounds: int) -> Benchmark:
        """Returns the case as a benchmark. Calls at batch size 1 are synchronous, as in a server; others are queued."""
        single = self.workload.batch_size == 1
        # Calls are not queued on a CPU, where two concurrent calls would compete for the same threads.
        return Benchmark(f'{self.engine}, {self.workload}', self.call, self.wait,
                         in_flight=1 if single else calls_in_flight(),
                         min_calls=-(-_MIN_LATENCIES // rounds) if single else 1)


class ModelCache:
    """Caches weights, images and PyTorch models, so that cases can share them."""

    def __init__(self):
        self.params = functools.cache(self._params)
        self.images = functools.cache(self._images)
        self.torch_model = functools.cache(self._torch_model)

    def _params(self, config, run, modules=NO_MODULES):
        """Returns the run's weights if config and modules match its model, else random weights, which are as fast."""
        if run and ((loaded := open_model(run)).config, loaded.modules) == (config, modules):
            return jax.device_put(loaded.params, device())
        return jax.device_put(models.create(config, modules=modules).init(jax.random.key(0)), device())

    def _images(self, size, batch_size):
        """Returns normalised batches on the host, each [B, H, W, 3] float32."""
        rng = np.random.default_rng(0)
        return [rng.standard_normal((batch_size, *as_hw(size), 3), np.float32) for _ in range(NUM_INPUTS)]

    def _torch_model(self, config, run, dtype):
        weights = torch_weights.to_torch(jax.device_get(self.params(config, run)), config)
        return torch_evit.TorchEViT(weights, config, dtype=dtype, device=device().platform)


def device() -> jax.Device:
    """Returns the device for all measurements."""
    return jax.devices()[0]


def calls_in_flight() -> int:
    """Returns the number of calls to keep in the device's queue."""
    return 1 if device().platform == 'cpu' else 2


def inference_case(workload: Workload, cache: ModelCache) -> BenchmarkCase:
    """Compiles the forward pass as in serving: it maps normalised float32 images to logits."""
    params = cache.params(workload.config, workload.run, workload.modules)
    config, params = models.fold_batchnorm(workload.config, params)
    model = models.create(config, dtype=jnp.dtype(workload.dtype), gather_impl=workload.gather_impl,
                          modules=workload.modules)
    plan = workload.plan
    images = jax.device_put(cache.images(workload.image_size, workload.batch_size), device())
    forward = jax.jit(lambda params, images: model.apply(params, images, plan)[0])
    program, seconds = _compile(forward, params, images[0])
    return _compiled_case(workload, program, lambda number: program(params, images[number % NUM_INPUTS]), seconds)


def training_case(workload: Workload, run: Experiment) -> BenchmarkCase:
    """Compiles the training step of a run. The inputs are uint8 images and labels on the device, as in training."""
    assert run.plan == workload.plan
    rng, shapes = np.random.default_rng(0), run.abstract_batch()
    limits = {'image': 256, 'label': run.model.config.classes}
    batches = [{name: jax.device_put(rng.integers(limits[name], size=array.shape).astype(array.dtype), array.sharding)
                for name, array in shapes.items()} for _ in range(NUM_INPUTS)]
    teacher = run.read_teacher()
    teacher_params = (teacher.params,) if teacher else ()
    program, seconds = _compile(run.train_step(teacher), run.abstract_state(), shapes, run.plan.in_training(),
                                *teacher_params)
    state = run.new_state()

    def step(number):
        nonlocal state
        state, metrics = program(state, batches[number % NUM_INPUTS], *teacher_params)
        return metrics

    return _compiled_case(workload, program, step, seconds)


def baseline_case(workload: Workload, engine: str, cache: ModelCache) -> BenchmarkCase:
    """Prepares PyTorch's forward pass with the same weights and images.

    Args:
      engine: one of torch_evit.ENGINES.
    """
    model, plan = cache.torch_model(workload.config, workload.run, workload.dtype), workload.plan
    images = [model.tensor(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
              for batch in cache.images(workload.image_size, workload.batch_size)]
    forward, wait = model.forward(plan, engine), model.wait
    begin = time.perf_counter()
    if engine == torch_evit.COMPILED:
        wait(forward(images[0]))
    seconds = time.perf_counter() - begin if engine == torch_evit.COMPILED else None
    return BenchmarkCase(workload, engine, lambda number: forward(images[number % NUM_INPUTS]), wait,
                         lambda logits: logits.float().cpu().numpy(), seconds, workload.config.parameters(plan))


def matmul_benchmark(dtype: str) -> tuple[Benchmark, float]:
    """Returns the benchmark of a large matrix product, and its FLOPs. It is the reference for the device's speed."""
    side = _MATMUL_SIZES.get(device().platform, _LARGE_MATMUL)
    keys = jax.random.split(jax.random.key(0), 1 + NUM_INPUTS)
    left, *rights = [jax.device_put(jax.random.normal(key, (side, side), dtype), device()) for key in keys]
    program = jax.jit(jnp.matmul).lower(left, rights[0]).compile()
    return Benchmark(f'matmul, {dtype}', lambda number: program(left, rights[number % NUM_INPUTS]),
                     jax.block_until_ready, calls_in_flight()), 2.0 * side**3


def _compile(function: Callable, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
    """Compiles a function. Returns the program, which is never recompiled, and the seconds of tracing and compiling."""
    begin = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - begin


def _compiled_case(workload, program, call, seconds):
    memory = program.memory_analysis()
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    return BenchmarkCase(workload, JAX, call, jax.block_until_ready, np.asarray, seconds,
                         workload.config.parameters(workload.plan), memory.argument_size_in_bytes, peak)
