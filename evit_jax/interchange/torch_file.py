"""Reads PyTorch checkpoints (.pth, .pt) without PyTorch.

A checkpoint is a zip file of one pickle and of storages, which hold raw values. Each storage is one member of the zip
file. A tensor is a view (offset, size, stride) of a storage.

Source: torch/serialization.py.
"""

import contextlib
import functools
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from evit_jax.interchange import restricted_pickle
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.restricted_pickle import AllowList, GlobalName, InertObject, checked_key, printable

_TYPES = {f'torch.{name}Storage': np.dtype(dtype) for name, dtype in {
    'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'BFloat16': jnp.bfloat16, 'Long': np.int64,
    'Int': np.int32, 'Short': np.int16, 'Char': np.int8, 'Byte': np.uint8, 'Bool': np.bool_}.items()}
_DTYPES = {f'torch.{name}' for name in ('float32', 'float64', 'float16', 'bfloat16', 'int64', 'int32', 'uint8')}
_INERT = {'argparse.Namespace', 'types.SimpleNamespace', 'torch.device', 'numpy.dtype', 'pathlib.PosixPath',
          'pathlib.WindowsPath', 'pathlib.PurePosixPath', 'pathlib.PureWindowsPath',
          'torch.torch_version.TorchVersion', 'datetime.datetime', 'datetime.date', 'datetime.timedelta'}
# Factories that a pickled defaultdict may name.
_FACTORIES = {f'{module}.{name}' for module in ('builtins', '__builtin__') for name in (
    'bool', 'dict', 'float', 'frozenset', 'int', 'list', 'long', 'set', 'str', 'tuple', 'unicode')}
_SCALARS = {'b1', 'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'}  # type codes of NumPy numbers
# Maximum size in bytes. The pickle of a large model and its optimizer has a tenth of this size. A hostile pickle of
# this size takes a few 100 MB of memory.
_MAX_PICKLE = 4 * 2**20
_MAX_MEMBERS = 100_000
_MAX_DIMENSIONS = 32
_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the pickled magic number of PyTorch before 1.6
_RESAVE = 'where PyTorch is installed, and if you trust the file, save its weights again: '


class _Storage(NamedTuple):
    """A one-dimensional array in a member of the zip file."""

    member: zipfile.ZipInfo
    dtype: np.dtype
    count: int


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[Any]:
    """Opens a checkpoint and yields the saved object.

    Dicts, lists, numbers and text are unchanged. A tensor becomes a `LazyArray`, which can be read only inside the
    `with` block. An object of a few other classes becomes an `InertObject`.

    Raises:
      ValueError: the file is damaged, is not a checkpoint, or holds an object that weights do not need.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield _contents(archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f'{path} is cut off or damaged: {error}') from error
    except _Refusal as error:
        raise ValueError(f'{path} is refused: {error}') from error


def is_torch_file(start: bytes, path: str | pathlib.Path) -> bool:
    """Returns True if a file begins like a PyTorch checkpoint.

    Args:
      start: at least the first 15 bytes of the file.
      path: path of the file, for the error message.

    Raises:
      ValueError: the file has the format of PyTorch before version 1.6, which is not a zip file.
    """
    if start.startswith(_LEGACY):
        raise ValueError(f'{path} has the format of PyTorch before version 1.6; {_RESAVE}'
                         f"torch.save(torch.load('{path}', map_location='cpu', weights_only=True), 'NEW.pth')")
    return start.startswith((b'PK\x03\x04', b'PK\x05\x06'))


class _Refusal(Exception):
    """Raised when a file is refused. `opened` adds the path of the file to the message."""


def _contents(archive):
    members = _members(archive)
    file = next((name for name in members if name.endswith('/data.pkl')), None)
    if file is None:
        raise _Refusal('a zip file without data.pkl is not a checkpoint of PyTorch')
    folder = file.removesuffix('data.pkl')
    if f'{folder}constants.pkl' in members:
        raise _Refusal(f'it is a TorchScript program; {_RESAVE}torch.save(model.state_dict(), NEW)')
    order = members.get(f'{folder}byteorder')
    if order is not None and archive.read(order) != b'little':
        raise _Refusal('its numbers are big-endian: save it again on a little-endian machine')
    if members[file].file_size > _MAX_PICKLE:
        raise _Refusal(f'its data.pkl has {members[file].file_size:,} bytes, more than {_MAX_PICKLE:,}')
    persistent_load = functools.partial(_storage, members, f'{folder}data/')
    rebuild = functools.partial(_tensor, functools.lru_cache(maxsize=1)(lambda name: archive.read(members[name])))
    allowed = AllowList(
        calls={'torch._utils._rebuild_tensor_v2': rebuild, 'torch._utils._rebuild_tensor': rebuild,
               'torch._utils._rebuild_parameter': _parameter, 'torch.Size': _container(tuple, ()),
               'collections.OrderedDict': _container(_dict_of_pairs, ()), 'collections.Counter': _container(dict, {}),
               'collections.defaultdict': _defaultdict, '_codecs.encode': _encoded_bytes,
               'numpy.core.multiarray.scalar': _scalar, 'numpy._core.multiarray.scalar': _scalar,
               **{f'{module}.{name}': _container(_set, ()) for module in ('builtins', '__builtin__')
                  for name in ('set', 'frozenset')}},
        types=_TYPES.keys() | _DTYPES | _FACTORIES, inert=_INERT, persistent_load=persistent_load)
    try:
        return restricted_pickle.load(archive.read(members[file]), allowed)
    except ValueError as error:
        more = (f'. For its weights alone: {_RESAVE}loaded = torch.load(FILE, weights_only=False), then '
                'torch.save(loaded.state_dict(), NEW), or the state_dict in loaded'
                # The condition excludes functions such as os.system: the advice would execute them.
                if re.search(r'refers to (?:numpy\.|\S*\.[A-Z])', str(error)) else '')
        raise _Refusal(f'its pickle holds more than weights, or is damaged: {error}{more}') from error


def _members(archive):
    """Returns the members of the zip file by name.

    Compressed members and sizes larger than the file are refused, because both could exhaust the memory. PyTorch never
    writes compressed members.
    """
    members = {member.filename: member for member in archive.infolist()}
    if len(members) != len(archive.infolist()) or len(members) > _MAX_MEMBERS:
        raise _Refusal(f'it has {len(archive.infolist()):,} members, of which {len(members):,} have different names')
    for name, member in members.items():
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise _Refusal(f'{printable(name)} is compressed ({member.compress_size:,} bytes, declared as '
                           f'{member.file_size:,}), which PyTorch never does')
        if member.flag_bits & 1:
            raise _Refusal(f'{printable(name)} is encrypted')
    total, file_size = sum(member.file_size for member in members.values()), os.path.getsize(archive.filename)
    if not all(0 <= member.header_offset < file_size for member in members.values()):
        raise _Refusal('a member begins outside of the file')
    if total > file_size:
        raise _Refusal(f'its members declare {total:,} bytes, the file has {file_size:,}')
    return members


def _storage(members, folder, persistent_id):
    """Returns the storage for a persistent id ('storage', type, key, device, count)."""
    if type(persistent_id) is not tuple or len(persistent_id) != 5 or persistent_id[0] != 'storage':
        raise ValueError('it has a persistent id that is not of a storage')
    kind, key, _, count = persistent_id[1:]
    if type(kind) is not GlobalName or kind not in _TYPES:
        raise ValueError(f'a storage has the type {printable(kind)}')
    if type(key) is not str or not re.fullmatch(r'\d+', key, re.ASCII) or f'{folder}{key}' not in members:
        raise ValueError(f'there is no storage {printable(key)}')
    member, dtype = members[f'{folder}{key}'], _TYPES[kind]
    if not _is_count(count) or count * dtype.itemsize != member.file_size:
        raise ValueError(f'storage {key} declares {count if _is_count(count) else printable(count)} values '
                         f'of {dtype.name}, and has {member.file_size:,} bytes')
    return _Storage(member, dtype, count)


def _tensor(read, arguments):
    """Replaces `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`.

    `_rebuild_tensor` has only the first four arguments. Every element of the view must lie inside the storage.
    """
    if len(arguments) not in (4, 6, 7) or type(arguments[0]) is not _Storage:
        raise ValueError('a tensor is not made of a storage, offset, size and stride')
    storage, offset, size, stride = arguments[:4]
    sized = type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= _MAX_DIMENSIONS
    if not sized or not all(map(_is_count, (offset, *size, *stride))):
        raise ValueError('the offset, size or stride of a tensor is not made of counts')
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0
    if count > storage.count or last >= max(storage.count, 1):
        raise ValueError(f'a tensor of shape {size} ({count:,} values, the last at {last:,}) is larger than its '
                         f'storage of {storage.count:,}')
    # The stride of an axis with one element is never used, and could overflow NumPy's integers.
    stride = tuple(step if n > 1 else 0 for n, step in zip(size, stride))

    def values():
        if not count:
            return np.zeros(size, storage.dtype)
        flat = np.frombuffer(read(storage.member.filename), storage.dtype)[offset:]
        return np.lib.stride_tricks.as_strided(flat, size, [step * storage.dtype.itemsize for step in stride],
                                               writeable=False)

    return LazyArray(size, storage.dtype, values)


def _parameter(arguments):
    """Replaces `_rebuild_parameter(data, requires_grad, hooks)`."""
    if len(arguments) != 3 or type(arguments[0]) is not LazyArray:
        raise ValueError('a parameter is not made of a tensor')
    return arguments[0]


def _container(make, default):
    """Returns a replacement for the call of a container type. It takes no argument, or one list, tuple or dict."""

    def call(arguments):
        if len(arguments) > 1 or type(*arguments or (default,)) not in (list, tuple, dict):
            raise ValueError('a container is not made of a list')
        return make(*arguments or (default,))

    return call


def _dict_of_pairs(items):
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in items):
        raise ValueError('an ordered dict is not made of pairs')
    return {checked_key(key): value for key, value in items}


def _set(items):
    return {checked_key(item) for item in items}


def _defaultdict(arguments):
    """Replaces `defaultdict(factory)` by an empty dict. The pickle adds the items afterwards."""
    factory = arguments[0] if len(arguments) == 1 else None
    is_type = type(factory) is GlobalName and factory in _FACTORIES
    if len(arguments) > 1 or not (factory is None or is_type):
        raise ValueError('a defaultdict is not made of the type of its values')
    return {}


def _encoded_bytes(arguments):
    """Replaces `_codecs.encode(text, 'latin1')`. Pickles of protocol 2 store bytes in this form."""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != 'latin1':
        raise ValueError('bytes are not written as text in latin1')
    return arguments[0].encode('latin1')


def _scalar(arguments):
    """Replaces `numpy.core.multiarray.scalar(dtype, bytes)` by a Python number. Text and dates become inert objects."""
    kind, content = arguments if len(arguments) == 2 else (None, None)
    if type(kind) is not InertObject or kind.name != 'numpy.dtype' or type(content) is not bytes:
        raise ValueError('a numpy scalar is not made of a type and bytes')
    code = kind.arguments[0] if kind.arguments else None
    order = kind.state[1] if type(kind.state) is tuple and len(kind.state) > 1 else None
    if type(code) is not str or code not in _SCALARS:
        return InertObject('numpy.scalar', ())
    if order not in ('<', '>', '|') or int(code[1:]) != len(content):
        raise ValueError(f'a numpy scalar of type {code} has {len(content)} bytes, or no byte order')
    return np.frombuffer(content, np.dtype(code).newbyteorder(order))[0].item()


def _is_count(value):
    return type(value) is int and 0 <= value < 2**63
