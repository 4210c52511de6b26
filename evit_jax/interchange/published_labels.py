"""Reads the label maps published by zihangJiang/TokenLabeling, one PyTorch file per image. PyTorch is not needed.

FOLDER/<class>/<image>.pt holds a tensor [2, top, rows, columns] float16: the logits of the `top` best classes, best
first, and their class indices. The annotator was NFNet-F6. It processed the centre square of each image; as in the
reference, the map is used for the whole image.
"""

import os
import pathlib

import numpy as np

from evit_jax.interchange import torch_file
from evit_jax.interchange.lazy_array import LazyArray


def label_map_path(folder: str | os.PathLike, example: str) -> pathlib.Path:
    """Returns the path of the label map of an example, such as a/img.pt for a/img.1.png.

    If only the last suffix of the image name is removed and this file exists (a/img.1.pt), its path is returned.

    Args:
      folder: folder of the published files.
      example: id or path of the image. The class is the name of its folder. If there is no folder, as in the ids of
        tfds (n01440764_10026.JPEG), the class is the text before the first underscore.
    """
    image = pathlib.PurePosixPath(example)
    name = image.name.split('.')[0]
    class_name = image.parent.name if '/' in example else name.split('_')[0]
    class_folder = pathlib.Path(folder).expanduser() / class_name
    full_name = class_folder / f'{image.stem}.pt'
    return full_name if full_name.is_file() else class_folder / f'{name}.pt'


def read_label_map(path: str | os.PathLike, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map.

    Returns:
      Logits [top, rows, columns] float32, and their class indices [top, rows, columns] int32.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a label map, or has a class index of `classes` or more.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no published label map {os.fspath(path)}: they are expected as '
                                'FOLDER/<class>/<image>.pt')
    with torch_file.opened(path) as content:
        array = np.array(content, np.float32) if isinstance(content, LazyArray) else np.empty(0)
    if array.ndim != 4 or array.shape[0] != 2 or not array.size:
        kind = f'tensor {list(array.shape)}' if isinstance(content, LazyArray) else type(content).__name__
        raise ValueError(f'{os.fspath(path)} holds a {kind}: a label map is a tensor [2, classes, rows, columns], such '
                         'as [2, 5, 18, 18]')
    value, index = array
    wrong = index[(index != np.floor(index)) | (index < 0) | (index >= classes)]
    if wrong.size:
        raise ValueError(f'{os.fspath(path)} names class {wrong.flat[0]:g}: the data have {classes} classes, 0 to '
                         f'{classes - 1}')
    return value, index.astype(np.int32)
