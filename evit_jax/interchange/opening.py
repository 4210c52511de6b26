"""Opens a model of any kind: a run, weights of another program, or a name on the Hugging Face Hub."""

import os
import re

from evit_jax.checkpoints import loaded, weights
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.manager import newest_step
from evit_jax.interchange import hub, weight_files
from evit_jax.interchange.pretrained_model import read_pretrained
from evit_jax.runtime import storage

KINDS = ('the folder of a run, a file or folder of weights (.pth, .safetensors, Hugging Face, timm), or '
         f'{hub.PREFIX}ORG/NAME')


def open_model(name: str | os.PathLike, *, ema: bool = False) -> LoadedModel:
    """Loads a model.

    Args:
      name: a Hub name (see `hub.is_hub_name`); a PyTorch or safetensors file; a Hugging Face or timm folder; the
        workdir of a run or its folder `best`; or a folder of converted weights.
      ema: load the exponential moving average (EMA) of the weights.

    Raises:
      FileNotFoundError: the path does not exist, or the Hub has no such model.
      ValueError: there is no readable checkpoint, it has no EMA, weights are not finite, or the model is not supported.
      OSError: the model cannot be downloaded; see `hub.download`.
    """
    check_exists(name)
    if is_pretrained(name):
        pretrained = read_pretrained(name, ema=ema)
        path = pretrained.metadata['config']['base_model'] if hub.is_hub_name(name) else name  # the former has a commit
        return loaded.from_arrays(path, weights.by_name(pretrained.params), pretrained.metadata)
    return loaded.load_model(name, ema=ema)


def is_pretrained(name: str | os.PathLike) -> bool:
    """Returns True for a Hub name, a file, or a folder of another program; False for a run or a missing path."""
    if hub.is_hub_name(name):
        return True
    if storage.is_remote(name):
        return False
    path = storage.as_path(name)
    return path.is_file() or (path.is_dir() and newest_step(path) is None and weight_files.holds_weights(path))


def check_exists(name: str | os.PathLike, key: str = '') -> None:
    """Checks that a local path exists, and that a folder contains a checkpoint or weights. It downloads nothing.

    Args:
      key: config key of the path, for error messages.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the folder contains no weights.
    """
    if hub.is_hub_name(name):
        return
    setting = f'config.{key}={name}: ' if key else ''
    if not storage.is_remote(name) and not storage.as_path(name).exists():
        is_like_hub_name = re.fullmatch(r'[\w.-]+/[\w.-]+', os.fspath(name))
        hint = f'; {hub.PREFIX}{name} is a model of the Hugging Face Hub' if is_like_hub_name else ''
        raise FileNotFoundError(f'{setting}there is no file or folder {name}: give {KINDS}{hint}')
    if not is_pretrained(name) and newest_step(name) is None:
        raise ValueError(f'{setting}the folder {name} holds no checkpoint and no weights: give {KINDS}')
