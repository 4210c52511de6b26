"""PyTorch's checkpoints (.pth, .pt: zip files of a pickle and raw values), read without PyTorch.

Source: torch/serialization.py; a tensor is a view (offset, size, stride) of a storage, which is one member of the zip.
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

from evit_jax.interchange import pickles
from evit_jax.interchange.stored import Stored

_TYPES = {f'torch.{name}Storage': np.dtype(dtype) for name, dtype in {
    'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'BFloat16': jnp.bfloat16, 'Long': np.int64,
    'Int': np.int32, 'Short': np.int16, 'Char': np.int8, 'Byte': np.uint8, 'Bool': np.bool_}.items()}
_DTYPES = {f'torch.{name}' for name in ('float32', 'float64', 'float16', 'bfloat16', 'int64', 'int32', 'uint8')}
_INERT = {'argparse.Namespace', 'types.SimpleNamespace', 'torch.device', 'numpy.dtype', 'pathlib.PosixPath',
          'pathlib.WindowsPath', 'pathlib.PurePosixPath', 'pathlib.PureWindowsPath',
          'torch.torch_version.TorchVersion', 'datetime.datetime', 'datetime.date', 'datetime.timedelta'}
_FACTORIES = {f'{module}.{name}' for module in ('builtins', '__builtin__') for name in (
    'bool', 'dict', 'float', 'frozenset', 'int', 'list', 'long', 'set', 'str', 'tuple', 'unicode')}  # defaultdict's
_SCALARS = {'b1', 'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'}  # NumPy's types of one number
_MAX_PICKLE = 4 * 2**20  # of a model with its optimizer it takes a tenth of that; filled with opcodes, a few 100 MB
_MAX_MEMBERS = 100_000
_MAX_DIMENSIONS = 32
_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the magic number of PyTorch before 1.6, pickled
_RESAVE = 'where PyTorch is installed, and if you trust the file, save its weights again: '


class _Storage(NamedTuple):
    """A run of values of one type in a member of the zip."""
    member: zipfile.ZipInfo
    dtype: np.dtype
    count: int


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[Any]:
    """What was saved: dicts, lists, numbers and text, tensors as `Stored`, and a few other objects as `Inert`.

    The tensors can be read in the body only.

    Raises:
      ValueError: it is no such file, it is damaged, or it holds anything that is not needed for weights; says what.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield _contents(archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f'{path} is cut off or damaged: {error}') from error
    except _Refusal as error:
        raise ValueError(f'{path} is refused: {error}') from error


def is_torch_file(start: bytes, path: str | pathlib.Path) -> bool:
    """Whether a file that begins so is to be read here.

    Raises:
      ValueError: it is PyTorch's, but of the time before zip files.
    """
    if start.startswith(_LEGACY):
        raise ValueError(f"{path} has PyTorch's format of before version 1.6; {_RESAVE}torch.save(torch.load('{path}', "
                         "map_location='cpu', weights_only=True), 'NEW.pth')")
    return start.startswith((b'PK\x03\x04', b'PK\x05\x06'))


class _Refusal(Exception):
    """Said of a file whose path is not known where it is raised."""


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
        raise _Refusal('its numbers are big-endian: save it again on a machine of today')
    if members[file].file_size > _MAX_PICKLE:
        raise _Refusal(f'its data.pkl has {members[file].file_size:,} bytes, more than {_MAX_PICKLE:,}')
    storage_of = functools.partial(_storage_of, members, f'{folder}data/')
    rebuild = functools.partial(_tensor, functools.lru_cache(maxsize=1)(lambda name: archive.read(members[name])))
    allowed = pickles.Allowed(
        calls={'torch._utils._rebuild_tensor_v2': rebuild, 'torch._utils._rebuild_tensor': rebuild,
               'torch._utils._rebuild_parameter': _parameter, 'torch.Size': _one(tuple, ()),
               'collections.OrderedDict': _one(_pairs, ()), 'collections.Counter': _one(dict, {}),
               'collections.defaultdict': _defaultdict, '_codecs.encode': _encoded,
               'numpy.core.multiarray.scalar': _scalar, 'numpy._core.multiarray.scalar': _scalar,
               **{f'{module}.{name}': _one(_set, ()) for module in ('builtins', '__builtin__')
                  for name in ('set', 'frozenset')}},
        types=_TYPES.keys() | _DTYPES | _FACTORIES, inert=_INERT, persistent=storage_of)
    try:
        return pickles.load(archive.read(members[file]), allowed)
    except ValueError as error:
        more = (f'. For its weights alone: {_RESAVE}held = torch.load(FILE, weights_only=False), then '
                'torch.save(held.state_dict(), NEW), or the state_dict in held'
                if re.search(r'asks for (?:numpy\.|\S*\.[A-Z])', str(error)) else '')  # nobody should load os.system
        raise _Refusal(f'its pickle holds more than weights, or is damaged: {error}{more}') from error


def _members(archive):
    """The members by name, none of which can be larger than the file: PyTorch compresses nothing."""
    members = {member.filename: member for member in archive.infolist()}
    if len(members) != len(archive.infolist()) or len(members) > _MAX_MEMBERS:
        raise _Refusal(f'it has {len(archive.infolist()):,} members, of which {len(members):,} have names of their own')
    for name, member in members.items():
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise _Refusal(f'{pickles.shown(name)} is compressed ({member.compress_size:,} bytes that claim to be '
                           f'{member.file_size:,}), which PyTorch never does')
        if member.flag_bits & 1:
            raise _Refusal(f'{pickles.shown(name)} is encrypted')
    total, there = sum(member.file_size for member in members.values()), os.path.getsize(archive.filename)
    if not all(0 <= member.header_offset < there for member in members.values()):
        raise _Refusal('a member begins outside of the file')
    if total > there:
        raise _Refusal(f'its members claim {total:,} bytes, the file has {there:,}')
    return members


def _storage_of(members, folder, identity):
    """The storage that a persistent id stands for: ('storage', type, key, device, count)."""
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != 'storage':
        raise ValueError('it has a persistent id that is not of a storage')
    kind, key, _, count = identity[1:]
    if type(kind) is not pickles.Name or kind not in _TYPES:
        raise ValueError(f'a storage has the type {pickles.shown(kind)}')
    if type(key) is not str or not re.fullmatch(r'\d+', key, re.ASCII) or f'{folder}{key}' not in members:
        raise ValueError(f'there is no storage {pickles.shown(key)}')
    member, dtype = members[f'{folder}{key}'], _TYPES[kind]
    if not _is_count(count) or count * dtype.itemsize != member.file_size:
        raise ValueError(f'storage {key} is said to be {count if _is_count(count) else pickles.shown(count)} values '
                         f'of {dtype.name}, and has {member.file_size:,} bytes')
    return _Storage(member, dtype, count)


def _tensor(read, arguments):
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata]), or without the last three.

    Every element that it would touch is checked to be in the storage.
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
    stride = tuple(step if n > 1 else 0 for n, step in zip(size, stride))  # the others are never taken, and may be huge

    def values():
        if not count:
            return np.zeros(size, storage.dtype)
        flat = np.frombuffer(read(storage.member.filename), storage.dtype)[offset:]
        return np.lib.stride_tricks.as_strided(flat, size, [step * storage.dtype.itemsize for step in stride],
                                               writeable=False)

    return Stored(size, storage.dtype, values)


def _parameter(arguments):
    """_rebuild_parameter(data, requires_grad, hooks)."""
    if len(arguments) != 3 or type(arguments[0]) is not Stored:
        raise ValueError('a parameter is not made of a tensor')
    return arguments[0]


def _one(make, default):
    """A stand-in for calling a container, with nothing or with one list, tuple or dict."""
    def call(arguments):
        if len(arguments) > 1 or type(*arguments or (default,)) not in (list, tuple, dict):
            raise ValueError('a container is not made of a list')
        return make(*arguments or (default,))

    return call


def _pairs(items):
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in items):
        raise ValueError('an ordered dict is not made of pairs')
    return {pickles.checked_key(key): value for key, value in items}


def _set(items):
    return {pickles.checked_key(item) for item in items}


def _defaultdict(arguments):
    """An empty dict in place of defaultdict(factory); its items follow by themselves, and nobody calls the factory."""
    factory = arguments[0] if len(arguments) == 1 else None
    is_type = type(factory) is pickles.Name and factory in _FACTORIES
    if len(arguments) > 1 or not (factory is None or is_type):
        raise ValueError('a defaultdict is not made of the type of its values')
    return {}


def _encoded(arguments):
    """Bytes, as pickles of protocol 2 write them: text in latin1."""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != 'latin1':
        raise ValueError('bytes are not written as text in latin1')
    return arguments[0].encode('latin1')


def _scalar(arguments):
    """numpy.core.multiarray.scalar(dtype, bytes), as Python's own number; text and dates stay inert."""
    kind, content = arguments if len(arguments) == 2 else (None, None)
    if type(kind) is not pickles.Inert or kind.name != 'numpy.dtype' or type(content) is not bytes:
        raise ValueError('a numpy scalar is not made of a type and bytes')
    code = kind.arguments[0] if kind.arguments else None
    order = kind.state[1] if type(kind.state) is tuple and len(kind.state) > 1 else None
    if type(code) is not str or code not in _SCALARS:
        return pickles.Inert('numpy.scalar', ())
    if order not in ('<', '>', '|') or int(code[1:]) != len(content):
        raise ValueError(f'a numpy scalar of type {code} has {len(content)} bytes, or no byte order')
    return np.frombuffer(content, np.dtype(code).newbyteorder(order))[0].item()


def _is_count(value):
    return type(value) is int and 0 <= value < 2**63
