"""Measures implementations of attention side by side: ours, and those of jax.nn.dot_product_attention."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax.benchmarks import cases, timing
from evit_jax.benchmarks.timing import Benchmark
from evit_jax.kernels.attention import multi_head_attention

IMPLEMENTATIONS = 'ours', 'xla', 'cudnn'  # the last two are those of jax.nn.dot_product_attention
TOKENS = 197, 257, 577, 1025, 1370  # 224 / 16, 224 / 14, 384 / 16, 512 / 16 and 518 / 14, with a class token


def measure(dtype: str, tokens: Sequence[int] = TOKENS, *, batch: int = 32, heads: int = 6, channels: int = 64,
            rounds: int = 7) -> list[dict[str, Any]]:
    """Times implementations of attention for sequence lengths, interleaved. Ones that cannot run are left out.

    Args:
      tokens: numbers of tokens.
      batch, heads, channels: number of images, number of heads, channels per head.

    Returns:
      One dict for each number of tokens and implementation: tokens, dtype, implementation, `relative`: the speed
      relative to ours, `seconds_per_call`, and `difference`: largest absolute difference from our output.
    """
    rows = []
    for n in tokens:
        shape = batch, n, 3 * heads * channels
        inputs = [jax.random.normal(jax.random.key(number), shape, dtype) for number in range(cases.NUM_INPUTS)]
        programs = _compile(inputs[0], heads)
        outputs = {name: np.asarray(program(inputs[0]), np.float32) for name, program in programs.items()}
        times = timing.interleave([_benchmark(f'attention {name}, {n} tokens', program, inputs)
                                   for name, program in programs.items()], rounds=rounds, seconds=1.0)
        rows += [{'tokens': n, 'dtype': dtype, 'implementation': name, 'relative': taken.faster_than(times[0]),
                  'seconds_per_call': list(taken.turns),
                  'difference': float(np.abs(outputs[name] - outputs['ours']).max())}
                 for name, taken in zip(programs, times)]
    return rows


def _compile(qkv, heads):
    """Returns the programs of the implementations that this device has, by name; ours is the first."""
    programs = {}
    for name in IMPLEMENTATIONS:
        program = jax.jit(functools.partial(_attention, heads=heads, implementation=name))
        try:
            program(qkv).block_until_ready()
        except Exception as error:  # JAX raises errors of many types for what a device or a shape does not allow
            if name == 'ours':
                raise
            logging.warning('attention %s of %d tokens in %s is left out: %s', name, qkv.shape[1], qkv.dtype,
                            str(error).partition('\n')[0])
        else:
            programs[name] = program
    return programs


def _benchmark(name, program, inputs):
    return Benchmark(name, lambda number: program(inputs[number % len(inputs)]), jax.block_until_ready,
                     cases.calls_in_flight())


def _attention(qkv, heads, implementation):
    """Returns the output of attention, [B, N, D], by one of `IMPLEMENTATIONS`."""
    if implementation == 'ours':
        return multi_head_attention(qkv, heads).out
    q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation).reshape(*qkv.shape[:2], -1)


def table(rows: Sequence[dict[str, Any]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Returns headers and rows of a table: the speeds relative to our attention."""
    values = {(row['tokens'], row['implementation']): f'{row["relative"]:.2f}x' for row in rows}
    tokens = dict.fromkeys(row['tokens'] for row in rows)
    return ('attention: tokens', *IMPLEMENTATIONS), [
        (str(n), *(values.get((n, name), '-') for name in IMPLEMENTATIONS)) for n in tokens]
