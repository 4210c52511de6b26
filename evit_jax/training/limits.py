"""The limits of each value of a config by itself."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from absl import logging

from evit_jax.checkpoints import best
from evit_jax.metrics import writers
from evit_jax.reduction.gather import GATHERS
from evit_jax.runtime import machine, sharding
from evit_jax.training import distillation, step

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def check(config: Any) -> None:
    """Raises a ValueError for a value outside its limits."""
    _check_numbers(config)
    for key, lengths in {'crop': (0, 2), 'ratio': (2,), 'mean': (3, 0), 'std': (3, 0)}.items():
        if len(config.data[key]) not in lengths:
            raise ValueError(f'config.data.{key}={tuple(config.data[key])} has {len(config.data[key])} values, not '
                             f'{" or ".join(map(str, lengths))}')
    _check_normalisation(config.data)
    averaged = config.ema_decay > 0
    for key, value, known in (
            ('model.dtype', config.model.dtype, (machine.AUTO, *DTYPES)),
            ('model.gather_impl', config.model.gather_impl, ('', *GATHERS)),
            ('sharding', config.sharding, sharding.SHARDINGS),
            ('log.writer', config.log.writer, writers.KINDS), ('nonfinite', config.nonfinite, step.NONFINITE),
            ('distill.kind', config.distill.kind, distillation.KINDS),
            ('checkpoint.best', config.checkpoint.best, ('', *best.METRICS) if averaged else ('', best.METRICS[0]))):
        if value not in known:
            raise ValueError(f'config.{key}={value!r} is unknown: there are {", ".join(filter(None, known))}')


def mixes(config: Any) -> bool:
    """True where mixup, cutmix or MixToken mixes the images of a batch."""
    return bool(config.mixing.mixup or config.mixing.cutmix or config.data.token_labels)


def check_mixing(config: Any, devices: int) -> None:
    """Checks that each image has another image as its partner, on its own device; logs how many have none.

    Raises:
      ValueError: there is one image on a device, or only copies of one.
    """
    size, repeats = config.batch_size, config.data.repeats
    unmixed = _count_unmixed(size, devices, repeats)
    if not mixes(config) or not unmixed:
        return
    each, whole = size // devices, 2 * repeats * devices
    if unmixed == size:
        given = (f'config.data.token_labels={config.data.token_labels} (MixToken)' if config.data.token_labels else
                 f'config.mixing.mixup={config.mixing.mixup}, config.mixing.cutmix={config.mixing.cutmix}')
        off = ('--config.data.token_labels=' if config.data.token_labels else
               '--config.mixing.mixup=0 --config.mixing.cutmix=0')
        images = 'one image' if each == 1 else f'{each} copies (config.data.repeats={repeats}) of one image'
        raise ValueError(f'config.batch_size={size} puts {images} on each of {devices} devices, and {given} mixes '
                         f'images of one device: nothing would be mixed. Give --config.batch_size={whole} or a larger '
                         f'multiple of it, {"--config.data.repeats=1, " if each > 1 else ""}use fewer devices, or give '
                         f'{off}')
    why = ('the middle one has no partner' if repeats == 1 else
           f'the partner of one in the middle is a copy of it (config.data.repeats={repeats})')
    sizes = ' or '.join(str(one) for one in (size // whole * whole, size // whole * whole + whole) if one)
    logging.warning('%d of the %d images of a batch are not mixed: on each of %d devices there are %d, and %s. '
                    '--config.batch_size=%s mixes all', unmixed, size, devices, each, why, sizes)


def _count_unmixed(size: int, devices: int, repeats: int) -> int:
    """Images of a batch whose partner is themselves or a copy; copies stand in a row, partners as in a mirror."""
    each = size // devices
    starts = [row - row % each for row in range(size)]
    return sum(row // repeats == (2 * start + each - 1 - row) // repeats for row, start in enumerate(starts))


def _check_numbers(config):
    share, count, amount = (0, 1), (1, math.inf), (0, math.inf)
    limits = {
        'batch_size': count, 'epochs': count, 'label_smoothing': (0, 0.999), 'ema_decay': (0, 0.999999),
        'model.drop_path': (0, 0.999), 'model.classes': (2 if config.model.classes else 0, math.inf),
        'reducer.r': amount, 'reducer.share_weight': amount, 'keep.macs': share, 'keep.start_epoch': amount,
        'keep.shrink_epochs': amount, 'distill.alpha': share, 'distill.tau': (1e-3, math.inf),
        'distill.weight': amount, 'distill.token_weight': amount, 'data.repeats': count,
        'data.workers': (machine.BY_CORES, math.inf),
        'data.flip': share, 'data.eval_crop': share, 'data.max_failed': share, 'data.token_weight': amount,
        'mixing.erase': share,
        'mixing.mixup': amount, 'mixing.cutmix': amount, 'mixing.switch': share, 'optimizer.lr': amount,
        'optimizer.warmup_epochs': amount, 'optimizer.warmup_lr': amount, 'optimizer.min_lr': amount,
        'optimizer.weight_decay': amount, 'optimizer.b2': (0, 0.9999999), 'optimizer.clip_norm': amount,
        'optimizer.accumulate': count, 'optimizer.backbone_scale': amount, 'optimizer.backbone_from_epoch': amount,
        'log.every': count, 'log.eval_epochs': (1e-9, math.inf), 'log.pictures': amount, 'checkpoint.every': count,
        'checkpoint.minutes': amount, 'checkpoint.keep': count}
    for key, (low, high) in limits.items():
        value = functools.reduce(lambda node, part: node[part], key.split('.'), config)
        if not low <= value <= high:
            raise ValueError(f'config.{key}={value} is outside [{low}, {high}]')


def _check_normalisation(data):
    """Checks the mean and std of the channels, which are those of values in 0..1."""
    hint = 'of values in 0..1: divide those of values in 0..255 by 255'
    if bad := [value for value in data.mean if not 0 <= value <= 1]:
        raise ValueError(f'config.data.mean={tuple(data.mean)}: {bad[0]} is outside [0, 1]. Give the mean {hint}')
    if bad := [value for value in data.std if not 0 < value <= 1]:
        raise ValueError(f'config.data.std={tuple(data.std)}: {bad[0]} is outside (0, 1]. Give the standard deviation '
                         f'{hint}')
