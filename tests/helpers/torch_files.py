"""Builds PyTorch checkpoints from pickle opcodes, without PyTorch, and reads them completely."""

import pickle
import zipfile

import numpy as np
import pytest

from evit_jax.interchange import torch_file
from evit_jax.interchange.lazy_array import LazyArray

REBUILD_TENSOR = 'torch._utils _rebuild_tensor_v2'


def named(words):
    """Returns opcodes that push a global, given as 'module name'."""
    module, _, name = words.partition(' ')
    return f'c{module}\n{name}\n'.encode()


def plain(value):
    """Returns opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def storage(*, count=6, key='0', kind=b'ctorch\nFloatStorage\n', word='storage'):
    """Returns opcodes that push a storage by its persistent id."""
    return b'(' + plain(word) + kind + plain(key) + plain('cpu') + plain(count) + b'tQ'


def tensor(of=None, offset=0, size=(2, 3), stride=(3, 1)):
    """Returns opcodes that push a tensor. `of` are the opcodes of its storage; default: six float32."""
    view = (storage() if of is None else of) + plain(offset) + plain(size) + plain(stride)
    return named(REBUILD_TENSOR) + b'(' + view + plain(False) + plain({}) + b'tR'


def write_checkpoint(path, opcodes, *, members=(), compression=zipfile.ZIP_STORED, end=b'.'):
    """Writes a checkpoint with a pickle, the storage 0 (0.0 to 5.0) and other members (name, content)."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + opcodes + end, compression)
        archive.writestr('archive/data/0', np.arange(6, dtype=np.float32).tobytes(), compression)
        for member, content in members:
            archive.writestr(member, content)
    return path


def read_whole(path):
    """Reads a checkpoint with the values of all its tensors."""
    def values(node):
        if isinstance(node, dict):
            return {key: values(value) for key, value in node.items()}
        return [values(value) for value in node] if isinstance(node, list | tuple) else (
            np.array(node) if isinstance(node, LazyArray) else node)

    with torch_file.opened(path) as tree:
        return values(tree)


def refusal(path):
    """Returns the message with which a checkpoint is refused."""
    with pytest.raises(ValueError) as caught:
        read_whole(path)
    return str(caught.value)
