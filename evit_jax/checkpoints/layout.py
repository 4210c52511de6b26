"""Defines the layout of a checkpoint on disk: its folder, the names of its arrays, and the messages about it."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from evit_jax.runtime import backend, storage

_OLD_KEY = 'model.lowering'  # a key of version 0.1, now model.gather_impl
_NAME = re.compile(r'\d+\.(\w+)(.*)')  # splits 00001.params['blocks'][0]['norm1']['bias'] after the field
_KEYS = re.compile(r"\['?(\w+)'?\]")
_SYSTEM_ERROR = re.compile(r"([^:]+) \[os_error_code=")  # the system's message, at the end of a long line


def checkpoints_folder(workdir: str | os.PathLike) -> epath.Path:
    """Returns the folder in a workdir that holds a folder for each checkpoint, named by its step."""
    return storage.as_path(workdir) / 'checkpoints'


def check_version(config: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Refuses the config of a run that evit_jax 0.1 wrote: its parameters have other names.

    Args:
      config: config of the run, flat or nested.
      path: folder of the run, for the message.

    Raises:
      ValueError: the config has a key that only version 0.1 had.
    """
    if _OLD_KEY in config or 'lowering' in (config.get('model') or {}):
        raise ValueError(f'{path} was written by evit_jax 0.1, which this version does not read ({_OLD_KEY} in its '
                         'config): train again in another --workdir, or write its weights to a .safetensors file with '
                         'evit_jax 0.1 (evit_jax.convert) and convert that file with this version')


def named_leaves(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by name. Orbax stores such flat names unchanged; list indices would become text."""
    return {f'{number:05d}' + jax.tree_util.keystr(path).replace('/', '_'): leaf
            for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state))}


def split_name(name: str) -> tuple[str, str]:
    """Returns the field of the state and the dotted path in it that a name of `named_leaves` stands for."""
    field, path = _NAME.match(name).groups()
    return field, '.'.join(_KEYS.findall(path))


def shapes(state: Any) -> dict[str, list[int]]:
    """Returns the shapes of the leaves of a state by name, as JSON stores them."""
    return {name: list(leaf.shape) for name, leaf in named_leaves(state).items()}


def not_damaged(folder: epath.Path, step: int, error: Exception) -> str:
    """Returns the message about an undamaged checkpoint that this machine failed to read."""
    return (f'the checkpoint of step {step} in {folder} shows no damage, and this machine failed to read it '
            f'({reason(error)}): leave it where it is, solve that, and start again')


def reason(error: Exception) -> str:
    """Returns the reason of an error of Orbax or tensorstore in one line."""
    line = backend.first_line(error)
    return match[1].strip() if (match := _SYSTEM_ERROR.search(line)) else line
