"""The reader of PyTorch's checkpoints: what PyTorch wrote is read as it was, and what is no weights is refused by name.

tests/golden_files/README.md tells how PyTorch wrote the files there.
"""

import io
import os
import pathlib
import pickle
import random
import re
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange import torch_file
from evit_jax.interchange.stored import Stored

FILES = pathlib.Path(__file__).parents[1] / 'golden_files'
TENSOR = 'torch._utils _rebuild_tensor_v2'


def name(words):
    """Opcodes that push a global."""
    module, _, name = words.partition(' ')
    return f'c{module}\n{name}\n'.encode()


def plain(value):
    """Opcodes that push plain data."""
    return pickle.dumps(value, 2)[2:-1]


def storage(*, count=6, key='0', kind=b'ctorch\nFloatStorage\n', word='storage'):
    return b'(' + plain(word) + kind + plain(key) + plain('cpu') + plain(count) + b'tQ'


def tensor(of=None, offset=0, size=(2, 3), stride=(3, 1)):
    view = (storage() if of is None else of) + plain(offset) + plain(size) + plain(stride)
    return name(TENSOR) + b'(' + view + plain(False) + plain({}) + b'tR'


def write(path, opcodes, *, members=(), compression=zipfile.ZIP_STORED, ended=b'.'):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + opcodes + ended, compression)
        archive.writestr('archive/data/0', np.arange(6, dtype=np.float32).tobytes(), compression)
        for member, content in members:
            archive.writestr(member, content)
    return path


def read_whole(path):
    def values(node):
        if isinstance(node, dict):
            return {key: values(value) for key, value in node.items()}
        return [values(value) for value in node] if isinstance(node, list | tuple) else (
            np.array(node) if isinstance(node, Stored) else node)

    with torch_file.opened(path) as tree:
        return values(tree)


def refusal(path):
    with pytest.raises(ValueError) as caught:
        read_whole(path)
    return str(caught.value)


def test_views_types_and_objects_are_read_as_pytorch_wrote_them():
    found = read_whole(FILES / 'containers.pth')
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    for got, want in zip(found['views'], [grid, grid.T, grid[1:, ::2], grid[2, 3], np.zeros((0, 3))], strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(found['parameter'], grid)
    assert [value.dtype for value in found['types']] == [
        np.float16, jnp.bfloat16, np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
    assert all(value.tolist() == [0, 1, 2] for value in found['types'][:-1])
    assert found['nothing'] is None and found['large'] == 2**80 and found['schedule']['milestones'] == {3: 1, 4: 1}
    assert found['args'].state == {'lr': 1e-3, 'names': {'a', 'b'}, 'type': 'torch.float32'}
    assert found['optimizer']['state'][0]['exp_avg'].shape == (3, 4)


def test_values_are_read_when_they_are_asked_for(tmp_path):
    path = write(tmp_path / 'a.pth', tensor())
    with torch_file.opened(path) as found:
        assert (found.shape, found.dtype) == ((2, 3), np.float32)
        np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3))
    content = path.read_bytes()
    values = np.arange(6, dtype=np.float32).tobytes()
    path.write_bytes(content.replace(values, bytes(len(values))))
    with torch_file.opened(path) as found:
        assert found.shape == (2, 3)
    assert 'cut off or damaged' in refusal(path)


class Runs:
    """What pickles to a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def hostile(tmp_path):
    """Names of kinds -> (opcodes, what is said)."""
    touch = plain((f'touch {tmp_path}/ran',)) + b'R'
    deep = b')' + b'\x85' * 100_000
    yield 'os.system', plain(Runs(os.system, f'touch {tmp_path}/ran')), 'posix.system'
    yield 'os.system, as text', name('os system') + touch, 'os.system'
    for builtin in ('eval', 'exec', 'getattr', 'open', '__import__'):
        yield builtin, name(f'builtins {builtin}') + plain(('a', 'b')) + b'R', f'asks for builtins.{builtin}$'
    yield 'subprocess', name('subprocess Popen') + plain(('true',)) + b'R', 'subprocess.Popen'
    yield 'a nested pickle', name('_pickle loads') + plain((b'cos\nsystem\n.',)) + b'R', '_codecs.encode|_pickle.loads'
    yield 'a nested load', name('torch.serialization load') + plain(('x',)) + b'R', 'torch.serialization.load'
    yield 'numpy', plain(np.ones(2)), r'numpy\..*_reconstruct.*For its weights alone.*state_dict'
    scalar = name('numpy.core.multiarray scalar')
    kind = name('numpy dtype') + plain(('f8', False, True)) + b'R' + plain((3, '<', None, None, None, -1, -1, 0)) + b'b'
    yield 'a numpy scalar of too little', scalar + b'(' + kind + b'C\x04aaaatR', 'type f8 has 4 bytes'
    yield 'a numpy scalar without a type', scalar + b'(' + plain('f8') + b'C\x08aaaaaaaatR', 'not made of a type'
    yield 'the type of a numpy array', name('numpy dtype') + b')\x81' + plain({'a': 1}) + b'b' + b')R', 'calls a Inert'
    yield 'bytes in another encoding', name('_codecs encode') + plain(('a', 'rot13')) + b'R', 'latin1'
    yield 'bytes of a number', name('_codecs encode') + plain((1, 'latin1')) + b'R', 'latin1'
    yield 'a defaultdict of a call', name('collections defaultdict') + b'(' + name('os system') + b'tR', 'os.system'
    yield 'a defaultdict of text', name('collections defaultdict') + plain(('list',)) + b'R', 'not made of the type'
    yield 'a defaultdict of a deep tuple', name('collections defaultdict') + b'(' + b')' + b'\x85' * 100_000 + b'tR', (
        'not made of the type')
    yield 'the type of a defaultdict, called', name('builtins list') + b')R', 'calls builtins.list, which is only a'
    yield 'functools.partial', name('functools partial') + b'(' + name('os system') + b'tR', 'functools.partial'
    yield 'a class of a model', name('models.vit ViT') + b')\x81}b', r'models.vit.ViT.*state_dict'
    yield 'attributes by a dotted name', plain('collections') + plain('OrderedDict.__init__.__globals__') + b'\x93', (
        'OrderedDict.__init__.__globals__')
    yield 'a name that is no text', plain(1) + plain('system') + b'\x93', 'names something by a system in a int'
    yield 'INST', b'(' + plain('true') + b'ios\nsystem\n', 'opcode INST'
    yield 'OBJ', b'(' + name('argparse Namespace') + plain('true') + b'o', 'opcode OBJ'
    yield 'an extension', b'\x82\x01', 'opcode EXT1'
    yield 'NEWOBJ_EX', name('argparse Namespace') + b')}\x92', 'opcode NEWOBJ_EX'
    yield 'a buffer from outside', b'\x97', 'opcode NEXT_BUFFER'
    yield 'an object of an allowed function', name(TENSOR) + b')\x81', 'makes an object of torch._utils'
    yield 'an object of text', plain('os.system') + b')\x81', 'makes an object of os.system'
    yield 'a call of text', plain('os.system') + b')R', 'calls a os.system'
    yield 'a call of an object', name('argparse Namespace') + b')\x81)R', 'calls a Inert'
    yield 'a call of a type', name('torch FloatStorage') + b')R', 'calls torch.FloatStorage, which is only a type'
    yield 'a call with no tuple', name(TENSOR) + plain([]) + b'R', 'with a list'
    yield 'the state of a tensor', tensor() + plain({'__setstate__': 1}) + b'b', 'sets the state of a Stored'
    yield 'the state of a list', b']' + plain({'__class__': 1}) + b'b', 'sets the state of a list'
    yield 'a persistent id of text', b'Pos.system\n', 'opcode PERSID'
    yield 'a persistent id of another kind', storage(word='module'), 'persistent id that is not of a storage'
    yield 'a storage of no type', storage(kind=plain('torch.FloatStorage')), 'has the type torch.FloatStorage'
    yield 'a storage of an object', storage(kind=name('argparse Namespace')), 'has the type argparse.Namespace'
    yield 'a storage elsewhere', storage(key='../version'), r'no storage \.\./version'
    yield 'a storage that is not there', storage(key='7'), 'no storage 7'
    yield 'a storage larger than its file', storage(count=2**40), r'1099511627776 values of float32, and has 24 bytes'
    yield 'a storage of less than nothing', storage(count=-6), 'is said to be int values'
    yield 'a tensor beyond its storage', tensor(offset=1), 'larger than its storage of 6'
    yield 'a tensor before its storage', tensor(offset=-1), 'not made of counts'
    yield 'a tensor with a long stride', tensor(stride=(2**40, 1)), r'the last at 1,099,511,627,778\) is larger'
    yield 'a tensor with a backward stride', tensor(stride=(-3, 1)), 'not made of counts'
    yield 'one value as many', tensor(size=(2**40,), stride=(0,)), r'1,099,511,627,776 values.* is larger'
    yield 'sizes whose product is past 64 bits', tensor(size=(2**62, 4), stride=(0, 0)), 'larger than its storage'
    yield 'a size past 64 bits', tensor(size=(2**70,), stride=(0,)), 'not made of counts'
    yield 'a size that is no number', tensor(size=('2', 3)), 'not made of counts'
    yield 'a thousand dimensions', tensor(size=(1,) * 1000, stride=(1,) * 1000), 'not made of counts'
    yield 'a tensor of no storage', tensor(of=plain('0')), 'not made of a storage'
    yield 'a tensor of too little', name(TENSOR) + b'(' + storage() + b'tR', 'not made of a storage'
    yield 'a dict of no pairs', name('collections OrderedDict') + plain((['ab', 'c'],)) + b'R', 'not made of pairs'
    yield 'a hash that overflows the stack', b'}' + deep + b'Ns', 'a key is a tuple'
    yield 'a set of such', name('__builtin__ set') + b'(](' + deep + b'etR', 'a key is a tuple'
    yield 'an entry of the memo that is not there', b'h\x05', 'entry 0x5 of its memo, which is not there'
    yield 'an empty stack', b'R', 'IndexError in REDUCE'
    yield 'a stack that is left over', b'NN', 'does not come out even'
    yield 'a mark that is not there', b'Nt', 'IndexError in TUPLE'
    yield 'items of a list', b']NNs', 'sets items of a list'
    yield 'half a pair', b'}(Nu', 'sets items of a dict'
    yield 'additions to a dict', b'}Na', 'appends to a dict'
    yield 'a second pickle', b'N.cos\nsystem\n', 'bytes follow its end'
    yield 'a number of a million digits', b'L' + b'9' * 1_000_000 + b'L\n', 'Exceeds the limit'
    yield 'text that claims to be long', b'\x8d' + struct.pack('<Q', 2**60), 'damaged'
    yield 'what is no opcode', b'\xff', r'opcode b.\\xff. unknown'


def test_what_is_no_weights_is_refused_by_name_and_never_run(tmp_path):
    kinds = list(hostile(tmp_path))
    assert len({kind for kind, _, _ in kinds}) == len(kinds) > 50
    found = {kind: refusal(write(tmp_path / 'hostile.pth', opcodes)) for kind, opcodes, _ in kinds}
    wrong = [(kind, found[kind]) for kind, _, said in kinds
             if 'hostile.pth is refused: ' not in found[kind] or not re.search(said, found[kind])]
    assert not wrong
    assert not (tmp_path / 'ran').exists()
    pickle.loads(b'\x80\x02' + kinds[0][1] + b'.')  # the same bytes do run elsewhere
    assert (tmp_path / 'ran').exists()


def test_names_are_shown_without_what_a_terminal_would_obey(tmp_path):
    found = refusal(write(tmp_path / 'a.pth', b'c\x1b[2Jevil\n' + b'x' * 1000 + b'\n'))
    assert r'\x1b[2Jevil' in found and '\x1b' not in found and len(found) < 500


def test_what_holds_itself_and_what_would_grow_when_unfolded_is_read_as_it_stands(tmp_path):
    folded = b']q\x00' + b''.join(b'0(' + bytes([*b'h', at]) * 2 + bytes([*b'lq', at + 1]) for at in range(60))
    with torch_file.opened(write(tmp_path / 'a.pth', folded)) as found:
        assert len(found) == 2
    with torch_file.opened(write(tmp_path / 'b.pth', b']q\x00h\x00a')) as found:
        assert found[0] is found


def test_compressed_members_and_those_that_claim_too_much_are_refused_before_they_are_unpacked(tmp_path):
    bomb = write(tmp_path / 'bomb.pth', tensor(), members=())
    with zipfile.ZipFile(bomb, 'a', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data/1', bytes(64 * 2**20))
    tracemalloc.start()
    assert 'archive/data/1 is compressed' in refusal(bomb)
    assert 'archive/data.pkl is compressed' in refusal(
        write(tmp_path / 'b.pth', b'N' * 100_000, compression=zipfile.ZIP_DEFLATED))
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()
    honest = write(tmp_path / 'a.pth', tensor()).read_bytes()
    size = struct.pack('<II', 24, 24)
    entry = honest.rindex(size)  # of archive/data/0 in the directory
    (tmp_path / 'c.pth').write_bytes(honest[:entry] + struct.pack('<II', 10**6, 10**6) + honest[entry + 8:])
    assert 'members claim 1,0' in refusal(tmp_path / 'c.pth')


def test_zips_that_are_no_checkpoint_are_told_apart(tmp_path):
    def said(**settings):
        return refusal(write(tmp_path / 'a.pth', tensor(), **settings))

    np.savez(tmp_path / 'a.npz', a=np.ones(2))
    assert 'without data.pkl' in refusal(tmp_path / 'a.npz')
    assert 'TorchScript' in said(members=[('archive/constants.pkl', b'')])
    assert 'big-endian' in said(members=[('archive/byteorder', b'big')])
    assert 'more than 4,194,304' in said(ended=bytes(4 * 2**20))
    with pytest.warns(UserWarning, match='Duplicate'):
        assert 'of which 2 have names of their own' in said(members=[('archive/data/0', bytes(24))])
    whole = write(tmp_path / 'b.pth', tensor()).read_bytes()
    (tmp_path / 'b.pth').write_bytes(whole[:-40])
    assert 'b.pth is cut off or damaged' in refusal(tmp_path / 'b.pth')
    encrypted = bytearray(whole)
    for mark, at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        encrypted[whole.index(mark) + at] |= 1
    (tmp_path / 'c.pth').write_bytes(encrypted)
    assert 'archive/data.pkl is encrypted' in refusal(tmp_path / 'c.pth')


def test_damage_anywhere_is_a_refusal_or_is_harmless(tmp_path):
    whole, draw, path = (FILES / 'containers.pth').read_bytes(), random.Random(0), tmp_path / 'a.pth'
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    pickled = next(member for member in members if member.endswith('data.pkl'))
    refused = 0
    for turn in range(600):
        if turn % 2:
            content = bytearray(whole)
            content[draw.randrange(len(content))] = draw.randrange(256)
            path.write_bytes(content[:draw.randrange(len(content))] if turn % 20 == 1 else content)
        else:  # with the right sums, so that the pickle is looked at
            content = bytearray(members[pickled])
            content[draw.randrange(len(content))] = draw.randrange(256)
            with zipfile.ZipFile(path, 'w') as archive:
                for member, value in members.items():
                    archive.writestr(member, bytes(content) if member == pickled else value)
        try:
            read_whole(path)
        except ValueError:
            refused += 1
    assert 200 < refused < 600


def test_the_format_before_zip_files_is_told_with_the_way_out():
    path = FILES / 'legacy.pth'
    with pytest.raises(ValueError, match=r"format of before version 1\.6; .*torch\.save\(torch\.load\('.*legacy\.pth'"):
        torch_file.is_torch_file(path.read_bytes()[:32], path)
    assert torch_file.is_torch_file((FILES / 'containers.pth').read_bytes()[:32], path)
    assert not torch_file.is_torch_file((FILES / 'timm.safetensors').read_bytes()[:32], path)
