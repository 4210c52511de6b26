"""What is timed of a case: its forward pass or its training step, compiled, or PyTorch's forward pass; and a product.

All on one device. The input is there before, and as several batches that take turns, so that no result can be kept.
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
from evit_jax.benchmarks.cases import Case
from evit_jax.benchmarks.clock import Benchmark
from evit_jax.checkpoints.loaded import load_model
from evit_jax.interchange import vit
from evit_jax.training.experiment import Experiment

OURS = 'jax'
INPUTS = 4          # batches that take turns
_LATENCIES = 100    # calls at batch 1, over all rounds, for the percentiles
_SQUARES = {'cpu': 2048}  # side of the matrices multiplied
_LARGE_SQUARE = 8192      # on other devices


class BenchmarkCase(NamedTuple):
    """A case as one engine runs it."""

    case: Case
    engine: str                   # OURS, or one of torch_evit.RIVALS
    call: Callable[[int], Any]    # number of the call -> its result, on the way
    wait: Callable[[Any], Any]
    fetch: Callable[[Any], np.ndarray] = np.asarray  # a result of the forward pass: logits [B, L]
    compile_seconds: float | None = None  # None where nothing is compiled
    parameters: int = 0
    arguments: int = 0            # bytes of weights and input
    needed: int | None = None     # bytes at the peak, as the compiler has it

    def contender(self, rounds: int) -> Benchmark:
        """To be timed: at batch 1 as a server would wait, else the device is kept busy."""
        single = self.case.batch == 1
        # On a CPU two calls at a time would only take each other's threads.
        return Benchmark(f'{self.engine}, {self.case}', self.call, self.wait,
                         ahead=1 if single or device().platform == 'cpu' else 2,
                         least=-(-_LATENCIES // rounds) if single else 1)


class ModelCache:
    """Weights and images, made once for all cases that share them."""

    def __init__(self):
        self.params = functools.cache(self._params)
        self.images = functools.cache(self._images)
        self.torch_model = functools.cache(self._torch_model)

    def _params(self, config, run):
        """The weights of a run where its model has this config, else fresh ones, which take as long."""
        if run and (trained := load_model(run)).config == config:
            return jax.device_put(trained.params, device())
        return jax.device_put(models.create(config).init(jax.random.key(0)), device())

    def _images(self, size, batch):
        """Normalised batches, on the host."""
        rng = np.random.default_rng(0)
        return [rng.standard_normal((batch, size, size, 3), np.float32) for _ in range(INPUTS)]

    def _torch_model(self, config, run, dtype):
        weights = vit.to_torch(jax.device_get(self.params(config, run)), config)
        return torch_evit.TorchEViT(weights, config, dtype=dtype, device=device().platform)


def device() -> jax.Device:
    """The one that all is measured on."""
    return jax.devices()[0]


def inference(case: Case, stock: ModelCache) -> BenchmarkCase:
    """The forward pass as it is served: normalised float32 images to logits."""
    shape, params = models.folded(case.config, stock.params(case.config, case.run))
    model, plan = models.create(shape, dtype=jnp.dtype(case.dtype), gather_impl=case.gather_impl), case.plan
    images = jax.device_put(stock.images(case.size, case.batch), device())
    forward = jax.jit(lambda params, images: model.apply(params, images, plan)[0])
    program, seconds = _compiled(forward, params, images[0])
    return _subject(case, program, lambda number: program(params, images[number % INPUTS]), seconds)


def training(case: Case, run: Experiment) -> BenchmarkCase:
    """The run's training step; its input is uint8 images and labels, as training has them on the device."""
    assert run.plan == case.plan
    rng, shapes = np.random.default_rng(0), run.abstract_batch()
    limits = {'image': 256, 'label': run.model.config.classes}
    batches = [{name: jax.device_put(rng.integers(limits[name], size=of.shape).astype(of.dtype), of.sharding)
                for name, of in shapes.items()} for _ in range(INPUTS)]
    teacher = run.read_teacher()
    taught_by = (teacher.params,) if teacher else ()
    program, seconds = _compiled(run.train_step(teacher), run.abstract_state(), shapes, run.plan.in_training(),
                                 *taught_by)
    state = run.new_state()

    def step(number):
        nonlocal state
        state, metrics = program(state, batches[number % INPUTS], *taught_by)
        return metrics

    return _subject(case, program, step, seconds)


def baseline(case: Case, engine: str, stock: ModelCache) -> BenchmarkCase:
    """PyTorch's forward pass, on the same weights and images."""
    model, plan = stock.torch_model(case.config, case.run, case.dtype), case.plan
    images = [model.tensor(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
              for batch in stock.images(case.size, case.batch)]
    forward, wait = model.forward(plan, engine), model.wait
    begin = time.perf_counter()
    if engine == torch_evit.COMPILED:
        wait(forward(images[0]))
    seconds = time.perf_counter() - begin if engine == torch_evit.COMPILED else None
    return BenchmarkCase(case, engine, lambda number: forward(images[number % INPUTS]), wait,
                   lambda logits: logits.float().cpu().numpy(), seconds, case.config.parameters())


def product(dtype: str) -> tuple[Benchmark, float]:
    """A large matrix product, the measure of the device, and its FLOPs."""
    side = _SQUARES.get(device().platform, _LARGE_SQUARE)
    keys = jax.random.split(jax.random.key(0), 1 + INPUTS)
    left, *rights = [jax.device_put(jax.random.normal(key, (side, side), dtype), device()) for key in keys]
    program = jax.jit(jnp.matmul).lower(left, rights[0]).compile()
    ahead = 1 if device().platform == 'cpu' else 2
    return Benchmark(f'product, {dtype}', lambda number: program(left, rights[number % INPUTS]),
                     jax.block_until_ready, ahead), 2.0 * side**3


def _compiled(function: Callable, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
    """With the seconds that tracing and compiling took. What is compiled ahead cannot be compiled anew when called."""
    begin = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - begin


def _subject(case, program, call, seconds):
    memory = program.memory_analysis()
    needed = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
              + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    return BenchmarkCase(case, OURS, call, jax.block_until_ready, np.asarray, seconds, case.config.parameters(),
                   memory.argument_size_in_bytes, needed)
