"""The folder of a run: writable, and of one model and config from its first start to its last."""

import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

CONFIG_FILE = 'config.json'
_NEED_FREE = 64 * 2**20
# What a run may change when it goes on: none of it alters the parameters at the end.
_FREE_IN_TRAINING = ('log.', 'checkpoint.', 'data.workers', 'data.path', 'compilation_cache')
# What decides the parameters' shapes: an evaluation may change everything else.
_MODEL_KEYS = ('model.name', 'model.classes', 'model.distilled')


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
    """Makes the folder ready for training with a config.

    Raises:
      ValueError: it cannot be written, has no room, or holds a run with another config.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f'workdir {folder} cannot be written ({error.strerror}): give another --workdir') from error
    if (free := shutil.disk_usage(folder).free) < _NEED_FREE:
        raise ValueError(f'workdir {folder} has {free / 2**20:.0f} MiB free, a run needs at least '
                         f'{_NEED_FREE // 2**20}: make room or give another --workdir')
    old = saved_config(folder)
    new = flat(config)
    if old is not None:
        differ = [key for key in sorted(old.keys() | new.keys())
                  if old.get(key) != new.get(key) and not key.startswith(_FREE_IN_TRAINING)]
        said = ', '.join(f'{key} {old.get(key)} -> {new.get(key)}' for key in differ)
        if any(key in (*_MODEL_KEYS, 'model.image_size') for key in differ):
            raise ValueError(f'workdir {folder} holds a run of another model ({said}): give another --workdir')
        if differ and not accept_changes:
            raise ValueError(f'workdir {folder} holds a run with another config ({said}): give another --workdir, or '
                             f'--accept_changes to go on with the new values')
    temporary = folder / f'.{CONFIG_FILE}.{os.getpid()}'
    temporary.write_text(json.dumps(new, indent=1, sort_keys=True) + '\n')
    temporary.replace(folder / CONFIG_FILE)


def saved_config(path: str | os.PathLike) -> dict[str, Any] | None:
    """The flat config of the run in a workdir, or None where there is none.

    Raises:
      ValueError: the file cannot be read as JSON.
    """
    file = pathlib.Path(path) / CONFIG_FILE
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f'{file} is no JSON ({error}): restore it, or give another --workdir') from error


def trained_config(path: str | os.PathLike, config: dict[str, Any]) -> dict[str, Any]:
    """The saved config of a run that is to be evaluated with `config`.

    Raises:
      ValueError: there is no run, or it has another model.
    """
    old, new = saved_config(path), flat(config)
    if old is None:
        raise ValueError(f'workdir {path} holds no run (no {CONFIG_FILE}): train first, or give the right --workdir')
    if differ := [key for key in _MODEL_KEYS if old.get(key) != new.get(key)]:
        said = ', '.join(f'{key} {old.get(key)} there, {new.get(key)} here' for key in differ)
        raise ValueError(f'workdir {path} holds another model ({said}): use the config that it was trained with')
    return old
