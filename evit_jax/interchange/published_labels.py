"""Label maps as zihangJiang/TokenLabeling publishes them, made by NFNet-F6: a file of PyTorch for each image.

FOLDER/<class>/<image>.pt holds a tensor [2, top, side, side] float16: logits, best first, and their classes. Rows of it
are rows of the image. They were made of the middle square of each image and are taken, as there, for maps of the whole
one. PyTorch is not needed.
"""

import os
import pathlib

import numpy as np

from evit_jax.interchange import torch_file
from evit_jax.interchange.stored import Stored


def label_map_path(folder: str | os.PathLike, example: str) -> pathlib.Path:
    """The file of the example with this id, which has the class and the name of the image up to the first dot.

    Where a file has the whole name of the image but for the suffix, it is that one: a/img.1.pt for a/img.1.png.
    An id of no two parts, as tfds has of ImageNet, is named n01440764_10026.JPEG: its class stands before the _.
    """
    image = pathlib.PurePosixPath(example)
    name = image.name.split('.')[0]
    kind = image.parent.name if '/' in example else name.split('_')[0]
    token_of_patch = pathlib.Path(folder).expanduser() / kind
    whole = token_of_patch / f'{image.stem}.pt'
    return whole if whole.is_file() else token_of_patch / f'{name}.pt'


def read_label_map(path: str | os.PathLike, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [top, side, side] float32, and their classes, int32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not hold a label map, or one of more classes.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no published label map {os.fspath(path)}: they are expected as '
                                'FOLDER/<class>/<image>.pt')
    with torch_file.opened(path) as stored:
        found = np.array(stored, np.float32) if isinstance(stored, Stored) else np.empty(0)
    if found.ndim != 4 or found.shape[0] != 2 or found.shape[2] != found.shape[3] or not found.size:
        raise ValueError(f'{os.fspath(path)} holds {_said(stored, found)}: a label map is a tensor [2, 5, 18, 18] or '
                         'of another square')
    value, index = found
    wrong = index[(index != np.floor(index)) | (index < 0) | (index >= classes)]
    if wrong.size:
        raise ValueError(f'{os.fspath(path)} names class {wrong.flat[0]:g}: the data have {classes} classes, 0 to '
                         f'{classes - 1}')
    return value, index.astype(np.int32)


def _said(stored, found):
    return f'a tensor {list(found.shape)}' if isinstance(stored, Stored) else f'a {type(stored).__name__}'
