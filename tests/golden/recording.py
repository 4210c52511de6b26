"""Parts that the recordings of timm and of transformers share."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from safetensors import safe_open


class Case(NamedTuple):
    """A tiny model: its files and the sizes of its images."""

    name: str
    configs: dict[str, Any]            # file name -> content of config.json and preprocessor_config.json
    arrays: dict[str, list[int]]       # name in the file of weights -> shape
    sizes: list[tuple[int, int]]       # (height, width) in pixels; the first is native
    unused: Sequence[str] = ()         # names of arrays that the outputs do not depend on
    config: dict[str, Any] | None = None  # fields of the ViTConfig, if they are known


def read_files(folder: pathlib.Path):
    """Returns the configs and the shapes of the arrays in a folder of `save_pretrained` or timm."""
    configs = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob('*config.json'))}
    with safe_open(folder / 'model.safetensors', 'np') as file:
        return configs, {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
