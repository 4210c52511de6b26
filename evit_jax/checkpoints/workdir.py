"""Reads and writes `config.json` in a workdir: the flat config of the run and the classes of its data."""

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints.layout import check_version
from evit_jax.checkpoints.manager import newest_step
from evit_jax.data import splits
from evit_jax.data.classes import display_name
from evit_jax.models.config import ViTConfig
from evit_jax.runtime import storage

CONFIG_FILE = 'config.json'
# Keys that are not config keys: class names, the model (see `model_config`), a description of the data, and the
# segments (see `training.history`).
RECORDED = ('class_names', model_configs.KEY, 'recorded', 'segments')
_MAX_NAMED = 5  # maximal number of class names in an error message


def flat(config: Any, prefix: str = '') -> dict[str, Any]:
    """Flattens a nested dict or ConfigDict to dotted keys. Tuples become lists, as in JSON."""
    out = {}
    for key, value in config.items():
        if hasattr(value, 'items'):
            out |= flat(value, f'{prefix}{key}.')
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


def saved_config(path: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the flat config of the run in a workdir, or None if there is no run.

    `data.test_split` has its recorded form; `splits.from_record` converts it.

    Raises:
      ValueError: the file contains no JSON object, was written by an older version, or cannot be reached.
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
    check_version(config, path)
    if 'data.test_split' in config:
        config['data.test_split'] = splits.from_record(config['data.test_split'])
    return config


def trained_config(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the saved config of a run that has a checkpoint.

    Raises:
      ValueError: the workdir contains no run or no checkpoint.
    """
    saved = saved_config(path)
    if saved is None:
        raise ValueError(f'workdir {path} holds no run (no {CONFIG_FILE}): train first, or give the right --workdir')
    if newest_step(path) is None:
        raise ValueError(f'workdir {path} holds no checkpoint: train first, or give the right --workdir')
    return saved


def write_flat(path: str | os.PathLike, config: dict[str, Any]) -> None:
    """Writes a flat config to the workdir, atomically."""
    with storage.explain_bucket_errors(path):
        storage.write_atomic(storage.as_path(path) / CONFIG_FILE,
                             (json.dumps(config, indent=1, sort_keys=True) + '\n').encode())


def write_config(path: str | os.PathLike, metadata: dict[str, Any]) -> None:
    """Creates a workdir for weights without a run.

    Args:
      metadata: `config` (nested), and `class_names` and `model_config` if known.
    """
    storage.as_path(path).mkdir(parents=True, exist_ok=True)
    recorded = {key: metadata[key] for key in ('class_names', model_configs.KEY) if key in metadata}
    write_flat(path, flat(metadata['config']) | recorded)


def copy_config(path: str | os.PathLike, to: str | os.PathLike) -> None:
    """Creates another workdir with the same config."""
    storage.as_path(to).mkdir(parents=True, exist_ok=True)
    write_flat(to, saved_config(path))


def record_classes(path: str | os.PathLike, names: Sequence[str]) -> None:
    """Writes the class names of the data and the number of classes to the config in the workdir.

    Raises:
      ValueError: the run in the workdir has other classes.
    """
    saved = saved_config(path)
    check_classes(path, saved, names)
    write_flat(path, saved | {'model.classes': len(names), 'class_names': list(names)})


def record_model(path: str | os.PathLike, config: ViTConfig) -> None:
    """Writes the model config to the config in the workdir.

    Raises:
      ValueError: the run in the workdir has another model.
    """
    saved = saved_config(path)
    model_configs.check_same(path, saved, config)
    write_flat(path, saved | {model_configs.KEY: model_configs.to_json(config)})


def check_classes(path: str | os.PathLike, saved: dict[str, Any], names: Sequence[str]) -> None:
    """Compares the class names of the data with those of a run.

    Args:
      path: the workdir, for the error message.
      saved: flat config of the run.
      names: class names of the data.

    Raises:
      ValueError: the class names differ.
    """
    names = [*map(display_name, names)]
    old = [*map(display_name, saved.get('class_names', names))]
    if old == names:
        return
    missing = [name for name in old if name not in names] if {*names} < {*old} else []
    hint = ''
    if missing:
        hint = (f'; the data lack {", ".join(missing[:_MAX_NAMED])}{", ..." if len(missing) > _MAX_NAMED else ""}: to '
                'evaluate on val/ without them, make train/ next to it with a folder for each class of the run, which '
                'may be empty')
    first = next(pair for pair in itertools.zip_longest(old, names) if pair[0] != pair[1])
    raise ValueError(f'workdir {path} holds a run on other classes ({len(old)} there, {len(names)} in the data; '
                     f'the first that differs is {first[0]!r} there, {first[1]!r} in the data): give data of '
                     f'the same classes; to train on these, another --workdir and --config.init_from={path}{hint}')
