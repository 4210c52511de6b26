"""Layout of a checkpoint on disk: its folder, the names of its arrays, and error messages."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from evit_jax.runtime import backend, storage

_OLD_KEY = 'model.lowering'  # a key of version 0.1, now model.gather_impl
_NAME = re.compile(r'\d+\.(\w+)(.*)')  # splits 00001.params['blocks'][0]['norm1']['bias'] after params
_KEYS = re.compile(r"\['?(\w+)'?\]")
_SYSTEM_ERROR = re.compile(r"([^:]+) \[os_error_code=")  # the system's message, near the end of a long line


def checkpoints_folder(workdir: str | os.PathLike) -> epath.Path:
    """Returns the folder of checkpoints in a workdir. Each checkpoint is a subfolder, named by its step."""
    return storage.as_path(workdir) / 'checkpoints'


def check_version(config: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Checks that a run was not written by evit_jax 0.1, which used other parameter names.

    Args:
      config: config of the run, flat or nested.
      path: folder of the run, for the error message.

    Raises:
      ValueError: the config has a key of version 0.1.
    """
    if _OLD_KEY in config or 'lowering' in (config.get('model') or {}):
        raise ValueError(f'{path} was written by evit_jax 0.1, which this version does not read ({_OLD_KEY} in its '
                         'config): train again in another --workdir, or write its weights to a .safetensors file with '
                         'evit_jax 0.1 (evit_jax.convert) and convert that file with this version')


def named_leaves(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by flat name. Orbax stores flat names unchanged, but not list indices."""
    return {f'{number:05d}' + jax.tree_util.keystr(path).replace('/', '_'): leaf
            for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state))}


def split_name(name: str) -> tuple[str, str]:
    """Splits a name of `named_leaves` into the field of the state and the dotted path in the field."""
    field, path = _NAME.match(name).groups()
    return field, '.'.join(_KEYS.findall(path))


def shapes(state: Any) -> dict[str, list[int]]:
    """Returns the shapes of the leaves of a state by name, as lists for JSON."""
    return {name: list(leaf.shape) for name, leaf in named_leaves(state).items()}


def not_damaged(folder: epath.Path, step: int, error: Exception) -> str:
    """Returns the error message for an undamaged checkpoint that this machine failed to read."""
    return (f'the checkpoint of step {step} in {folder} shows no damage, and this machine failed to read it '
            f'({reason(error)}): leave it where it is, solve that, and start again')


def reason(error: Exception) -> str:
    """Returns a one-line reason for an Orbax or tensorstore error."""
    line = backend.first_line(error)
    return match[1].strip() if (match := _SYSTEM_ERROR.search(line)) else line
