"""What stands in the folder of a run: one model and config from its first start to its last."""

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.checkpoints.manager import newest_step
from evit_jax.data import splits
from evit_jax.data.classes import display_name
from evit_jax.data.positions import Segment
from evit_jax.reduction import budget
from evit_jax.runtime import storage

CONFIG_FILE = 'config.json'
# What a run may change when it goes on: none of it alters the parameters at the end, but for rounding.
_FREE_IN_TRAINING = ('log.', 'checkpoint.', 'data.workers', 'data.path', 'data.index_cache', 'data.max_failed',
                     'compilation_cache', 'sharding', 'remat', 'model.gather_impl', 'profile_steps', 'nonfinite')
_BEGINNING = ('init_from', 'init_ema')  # a run that goes on stays with what was said of its beginning
# Values that leave a key to the data, the initial weights or the machine: a run keeps those of its first start.
_OPEN = {'model.classes': 0, 'model.dtype': 'auto', 'data.mean': [], 'data.std': []}
# The model's identity: its parameters' shapes, and what else decides logits.
_MODEL_KEYS = ('model.name', 'model.classes', 'model.distilled', *(f'model.{key}' for key in models.UNSHAPED))
# Recorded beside the config: what the data told of themselves, and the history of the run (see `history`).
RECORDED = ('class_names', 'recorded', 'segments')
# What runs did that began before there were such keys; configs/base.py says the same.
_UNSAID = budget.UNSAID | {
    'model.heads': 0, 'model.norm_epsilon': 0.0, 'model.activation': '', 'model.pooling': '', 'model.one_head': False,
    'reducer.share_weight': 2.0, 'distill.kind': 'none', 'distill.alpha': 0.5, 'distill.tau': 3.0,
    'distill.weight': 0.5, 'distill.token_weight': 0.0, 'teacher.path': '', 'teacher.ema': False, 'teacher.dense': True,
    'data.token_labels': '', 'data.token_weight': 1.0, 'optimizer.b2': 0.999, 'optimizer.backbone_scale': 1.0,
    'optimizer.backbone_from_epoch': 0.0}


def flat(config: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested settings as one level of dotted keys, in JSON's types."""
    out = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flat(value, f'{prefix}{key}.')
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


def open_workdir(path: str | os.PathLike, config: dict[str, Any], *, accept_changes: bool) -> None:
    """Makes the workdir ready for training with a config; claim it first.

    A key that was not there when the run in it began counts as what runs did then.

    Raises:
      ValueError: it holds a run with another config (a checkpoint of one), or cannot be reached.
    """
    folder = storage.as_path(path)
    old = saved_config(folder) if newest_step(folder) is not None else None
    new = flat(config)
    if old is not None:
        if 'batch_size' not in old:
            raise ValueError(f'workdir {folder} holds weights alone, and no training that could go on: give another '
                             f'--workdir, and --config.init_from={folder} to start from these weights')
        old = flat(_UNSAID) | old
        new = _with_recorded(old, new) | {key: old[key] for key in _BEGINNING if key in old}
        there, here = models.resolved(old), models.resolved(new)
        differ = [key for key in sorted(there.keys() | here.keys())
                  if there.get(key) != here.get(key) and not key.startswith(_FREE_IN_TRAINING)]
        said = ', '.join(f'{key} {there.get(key)} -> {here.get(key)}' for key in differ)
        if any(key in (*_MODEL_KEYS, 'model.image_size') for key in differ):
            raise ValueError(f'workdir {folder} holds a run of another model ({said}): give another --workdir')
        if 'optimizer.accumulate' in differ:
            raise ValueError(f'workdir {folder} holds a run whose optimizer counts its updates by another '
                             f'optimizer.accumulate ({said}): keep the old value, or give another --workdir and '
                             f'--config.init_from={folder} to start from its weights')
        if differ and not accept_changes:
            raise ValueError(f'workdir {folder} holds a run with another config ({said}): give another --workdir, or '
                             f'--accept_changes to go on with the new values{_in_epochs(differ)}')
        if differ:
            logging.warning('going on with another config than the run began with: %s', said)
        if 'segments' not in old and {'batch_size', 'data.repeats'} & {*differ}:
            begun = Segment(0, 0, old['batch_size'], old['data.repeats'], None)
            new['segments'] = [begun._asdict()]
    write_flat(folder, new)


def _in_epochs(differ):
    """The meaning of changed keys for the position of a run, for a message."""
    if not {'batch_size', 'data.repeats', 'epochs'} & {*differ}:
        return ''
    return ', from the place in the epoch that it has reached (examples are counted, not steps)'


def record_classes(path: str | os.PathLike, names: Sequence[str]) -> None:
    """Notes in the workdir's config which classes the data has.

    Raises:
      ValueError: the run in the workdir began with other classes.
    """
    saved = saved_config(path)
    check_classes(path, saved, names)
    write_flat(path, saved | {'model.classes': len(names), 'class_names': list(names)})


def check_classes(path: str | os.PathLike, saved: dict[str, Any], names: Sequence[str]) -> None:
    """Raises a ValueError if the run in the workdir, with this saved config, has other classes."""
    names = [*map(display_name, names)]
    if (old := [*map(display_name, saved.get('class_names', names))]) != names:
        missing = [name for name in old if name not in names] if {*names} < {*old} else []
        only = (f'; the data lack {", ".join(missing[:5])}{", ..." if len(missing) > 5 else ""}: to evaluate on val/ '
                'without them, make train/ beside it with a folder for each class of the run, which may be empty'
                if missing else '')
        first = next(pair for pair in itertools.zip_longest(old, names) if pair[0] != pair[1])
        raise ValueError(f'workdir {path} holds a run on other classes ({len(old)} there, {len(names)} in the data; '
                         f'the first that differs is {first[0]!r} there, {first[1]!r} in the data): give data of '
                         f'the same classes; to train on these, another --workdir and --config.init_from={path}{only}')


def saved_config(path: str | os.PathLike) -> dict[str, Any] | None:
    """The flat config of the run in a workdir, or None where there is none; see `splits.from_record`.

    Raises:
      ValueError: the file holds no dict in JSON, or cannot be reached.
    """
    file = storage.as_path(path) / CONFIG_FILE
    with storage.explain_bucket_errors(path):
        if not file.exists():
            return None
        content = file.read_bytes()
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ValueError(f'{file} is no JSON ({error}): restore it, or give another folder') from error
    if not isinstance(config, dict):
        raise ValueError(f'{file} holds no config, but a {type(config).__name__}: restore it, or give another folder')
    split = {'data.test_split': splits.from_record(config['data.test_split'])} if 'data.test_split' in config else {}
    return config | split


def recorded_dtype(path: str | os.PathLike) -> str | None:
    """The dtype of the run that a training in this workdir continues; None where it begins one.

    Raises:
      ValueError: the workdir cannot be reached, or its config cannot be read.
    """
    return None if newest_step(path) is None else (saved_config(path) or {}).get('model.dtype')


def write_config(path: str | os.PathLike, metadata: dict[str, Any]) -> None:
    """Makes a folder the workdir of a run that is known by its weights alone.

    Args:
      about: config (nested), and class_names where they are known.
    """
    storage.as_path(path).mkdir(parents=True, exist_ok=True)
    names = {'class_names': list(metadata['class_names'])} if 'class_names' in metadata else {}
    write_flat(path, flat(metadata['config']) | names)


def copy_config(path: str | os.PathLike, to: str | os.PathLike) -> None:
    """Makes another folder a workdir of the same config."""
    storage.as_path(to).mkdir(parents=True, exist_ok=True)
    write_flat(to, saved_config(path))


def trained_config(path: str | os.PathLike) -> dict[str, Any]:
    """The saved config of a run that is to be evaluated.

    Raises:
      ValueError: there is no run, or no checkpoint of it.
    """
    saved = saved_config(path)
    if saved is None:
        raise ValueError(f'workdir {path} holds no run (no {CONFIG_FILE}): train first, or give the right --workdir')
    if newest_step(path) is None:
        raise ValueError(f'workdir {path} holds no checkpoint: train first, or give the right --workdir')
    return saved


def _with_recorded(old, new):
    """The new flat config with the values of the run where it leaves them open."""
    known = {key: old[key] for key in RECORDED if key in old}
    return new | known | {key: old[key] for key, value in _OPEN.items() if new.get(key) == value and key in old}


def write_flat(path: str | os.PathLike, config: dict[str, Any]) -> None:
    """Writes a flat config."""
    with storage.explain_bucket_errors(path):
        storage.write_atomic(storage.as_path(path) / CONFIG_FILE,
                            (json.dumps(config, indent=1, sort_keys=True) + '\n').encode())
