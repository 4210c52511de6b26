"""Checks each value of a config against the limits in `configs/base.py`, and the batch size for mixing."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax.checkpoints import best
from evit_jax.configs.base import KEYS, Key

_SCALE_HINT = {'data.mean': 'mean', 'data.std': 'standard deviation'}


def check(config: Mapping[str, Any]) -> None:
    """Checks each value of a flat config separately.

    Raises:
      ValueError: a value is outside its limits. The message gives the value and the limits.
    """
    for name, key in KEYS.items():
        _check_value(name, key, config[name])
    metric = config['checkpoint.best']
    if config['ema_decay'] == 0 and metric not in ('', best.METRICS[0]):
        raise ValueError(f'config.checkpoint.best={metric!r} is unknown: there are {best.METRICS[0]}, as '
                         'config.ema_decay=0 keeps no moving average')


def mixes(config: Mapping[str, Any]) -> bool:
    """Returns True if mixup, cutmix or MixToken mixes the images of a batch."""
    return bool(config['mixing.mixup'] or config['mixing.cutmix'] or config['data.token_labels'])


def check_mixing(config: Mapping[str, Any], devices: int) -> None:
    """Logs a warning if some images of a batch cannot be mixed with another image on the same device.

    Args:
      config: flat config.
      devices: number of devices that share a batch.

    Raises:
      ValueError: no image of the batch can be mixed.
    """
    size, repeats = config['batch_size'], config['data.repeats']
    unmixed = _count_unmixed(size, devices, repeats)
    if not mixes(config) or not unmixed:
        return
    per_device, multiple = size // devices, 2 * repeats * devices
    if unmixed == size:
        maps, mixup, cutmix = (config[key] for key in ('data.token_labels', 'mixing.mixup', 'mixing.cutmix'))
        given = (f'config.data.token_labels={maps} (MixToken)' if maps else
                 f'config.mixing.mixup={mixup}, config.mixing.cutmix={cutmix}')
        off = ('--config.data.token_labels=' if maps else
               '--config.mixing.mixup=0 --config.mixing.cutmix=0')
        images = ('one image' if per_device == 1 else
                  f'{per_device} copies (config.data.repeats={repeats}) of one image')
        raise ValueError(f'config.batch_size={size} puts {images} on each of {devices} devices, and {given} mixes '
                         f'images of one device: nothing would be mixed. Give --config.batch_size={multiple} or a '
                         f'larger multiple of it, {"--config.data.repeats=1, " if per_device > 1 else ""}use fewer '
                         f'devices, or give {off}')
    reason = ('the middle one has no partner' if repeats == 1 else
              f'the partner of one in the middle is a copy of it (config.data.repeats={repeats})')
    below = size // multiple * multiple
    sizes = ' or '.join(str(count) for count in (below, below + multiple) if count)
    logging.warning('%d of the %d images of a batch are not mixed: on each of %d devices there are %d, and %s. '
                    '--config.batch_size=%s mixes all', unmixed, size, devices, per_device, reason, sizes)


def _count_unmixed(size: int, devices: int, repeats: int) -> int:
    """Counts the images of a batch that are mixed with themselves or with a copy of themselves.

    Copies of an image are adjacent. Image i of the n images on a device is mixed with image n - 1 - i.
    """
    per_device = size // devices
    starts = [row - row % per_device for row in range(size)]
    return sum(row // repeats == (2 * start + per_device - 1 - row) // repeats for row, start in enumerate(starts))


def _check_value(name: str, key: Key, value: Any) -> None:
    if key.choices and value not in key.choices:
        raise ValueError(f'config.{name}={value!r} is unknown: there are {", ".join(filter(None, key.choices))}')
    if not isinstance(key.default, tuple):
        if key.limits and not _within(key, value):
            raise ValueError(f'config.{name}={value} is outside {key.limits} ({key.help})')
        return
    value = tuple(value)
    if key.lengths and len(value) not in key.lengths:
        raise ValueError(f'config.{name}={value} has {len(value)} values, not {" or ".join(map(str, key.lengths))} '
                         f'({key.help})')
    if outside := [number for number in value if not _within(key, number)]:
        hint = (f'. Give the {_SCALE_HINT[name]} of values in 0..1: divide those of values in 0..255 by 255'
                if name in _SCALE_HINT else f' ({key.help})')
        raise ValueError(f'config.{name}={value}: {outside[0]} is outside {key.limits}{hint}')


def _within(key: Key, number: float) -> bool:
    """Returns True if a number is within the limits of a key or equals its special value. NaN is not within."""
    if key.special is not None and number == key.special:
        return True
    low, high = map(float, key.limits[1:-1].split(','))
    above = number >= low if key.limits[0] == '[' else number > low
    return above and (number <= high if key.limits[-1] == ']' else number < high)
