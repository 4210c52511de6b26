"""The pickle reader returns plain data, represents a few objects without building them, and refuses the rest."""

import collections
import datetime
import os
import pickle
import re
import struct
import tracemalloc

import numpy as np

from evit_jax.interchange import torch_file
from evit_jax.interchange.restricted_pickle import InertObject
from tests.helpers.torch_files import (
    REBUILD_TENSOR,
    named,
    plain,
    read_whole,
    refusal,
    storage,
    tensor,
    write_checkpoint,
)


def test_opened_allowed_objects_become_inert_objects(tmp_path):
    arguments = named('argparse Namespace') + b')\x81' + plain({'__setstate__': 'os.system', 'rate': 0.7}) + b'b'
    device = named('torch device') + plain(('cuda',)) + b'R'
    version = named('torch.torch_version TorchVersion') + plain(('2.13',)) + b'\x81'
    objects = read_whole(write_checkpoint(tmp_path / 'a.pth', b'(' + arguments + device + version + b't'))
    assert [type(value) for value in objects] == [InertObject] * 3
    assert objects[0].state == {'__setstate__': 'os.system', 'rate': 0.7} and objects[1].arguments == ('cuda',)


def test_opened_numpy_scalars_and_default_dicts_become_plain_data(tmp_path):
    values = [np.float64(0.5), np.float32(-2), np.int64(2**40), np.bool_(True), np.uint8(7), np.float16(1.5),
              np.array(3, '>i4')[()]]
    counted = collections.defaultdict(list, {'a': [1]})  # protocol 2 writes int as long, str as unicode
    of_types = [collections.defaultdict(kind) for kind in (int, str, set, frozenset)]
    saved = {'values': values, 'counted': counted, 'empty': collections.defaultdict(None), 'text': np.str_('a'),
             'of_types': of_types, 'frozen': frozenset({1}), 'date': datetime.datetime(2026, 1, 2)}
    loaded = read_whole(write_checkpoint(tmp_path / 'a.pth', plain(saved)))
    assert loaded['values'] == [0.5, -2.0, 2**40, True, 7, 1.5, 3]
    assert [type(value) for value in loaded['values']] == [float, float, int, bool, int, float, int]
    assert loaded['counted'] == {'a': [1]} and type(loaded['counted']) is dict and loaded['empty'] == {}
    assert type(loaded['text']) is type(loaded['date']) is InertObject
    assert loaded['of_types'] == [{}] * 4 and loaded['frozen'] == {1}


class PickledCall:
    """Pickles to a call of a function."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def hostile(tmp_path):
    """Yields (description, opcodes, pattern of the refusal)."""
    touch = plain((f'touch {tmp_path}/ran',)) + b'R'
    deep = b')' + b'\x85' * 100_000
    yield 'os.system', plain(PickledCall(os.system, f'touch {tmp_path}/ran')), 'posix.system'
    yield 'os.system, as text', named('os system') + touch, 'os.system'
    for builtin in ('eval', 'exec', 'getattr', 'open', '__import__'):
        yield builtin, named(f'builtins {builtin}') + plain(('a', 'b')) + b'R', f'refers to builtins.{builtin}$'
    yield 'subprocess', named('subprocess Popen') + plain(('true',)) + b'R', 'subprocess.Popen'
    nested = plain((b'cos\nsystem\n.',))
    yield 'a nested pickle', named('_pickle loads') + nested + b'R', '_codecs.encode|_pickle.loads'
    yield 'a nested load', named('torch.serialization load') + plain(('x',)) + b'R', 'torch.serialization.load'
    yield 'numpy', plain(np.ones(2)), r'numpy\..*_reconstruct.*For its weights alone.*state_dict'
    scalar = named('numpy.core.multiarray scalar')
    state = plain((3, '<', None, None, None, -1, -1, 0))
    kind = named('numpy dtype') + plain(('f8', False, True)) + b'R' + state + b'b'
    yield 'a numpy scalar with too few bytes', scalar + b'(' + kind + b'C\x04aaaatR', 'type f8 has 4 bytes'
    yield 'a numpy scalar without a type', scalar + b'(' + plain('f8') + b'C\x08aaaaaaaatR', 'not made of a type'
    dtype = named('numpy dtype') + b')\x81' + plain({'a': 1}) + b'b'
    yield 'the type of a numpy array, called', dtype + b')R', 'calls a InertObject'
    yield 'bytes in another encoding', named('_codecs encode') + plain(('a', 'rot13')) + b'R', 'latin1'
    yield 'bytes of a number', named('_codecs encode') + plain((1, 'latin1')) + b'R', 'latin1'
    defaultdict = named('collections defaultdict')
    yield 'a defaultdict of a call', defaultdict + b'(' + named('os system') + b'tR', 'os.system'
    yield 'a defaultdict of text', defaultdict + plain(('list',)) + b'R', 'not made of the type'
    yield 'a defaultdict of a deep tuple', defaultdict + b'(' + deep + b'tR', 'not made of the type'
    yield 'the type of a defaultdict, called', named('builtins list') + b')R', 'calls builtins.list, which is allowed'
    yield 'functools.partial', named('functools partial') + b'(' + named('os system') + b'tR', 'functools.partial'
    yield 'a class of a model', named('models.vit ViT') + b')\x81}b', r'models.vit.ViT.*state_dict'
    yield 'attributes by a dotted name', plain('collections') + plain('OrderedDict.__init__.__globals__') + b'\x93', (
        'OrderedDict.__init__.__globals__')
    yield 'a name that is not text', plain(1) + plain('system') + b'\x93', 'name of a global is not text: int, system'
    yield 'INST', b'(' + plain('true') + b'ios\nsystem\n', 'opcode INST'
    yield 'OBJ', b'(' + named('argparse Namespace') + plain('true') + b'o', 'opcode OBJ'
    yield 'an extension', b'\x82\x01', 'opcode EXT1'
    yield 'NEWOBJ_EX', named('argparse Namespace') + b')}\x92', 'opcode NEWOBJ_EX'
    yield 'an external buffer', b'\x97', 'opcode NEXT_BUFFER'
    yield 'an object of an allowed function', named(REBUILD_TENSOR) + b')\x81', 'makes an object of torch._utils'
    yield 'an object of text', plain('os.system') + b')\x81', 'makes an object of os.system'
    yield 'a call of text', plain('os.system') + b')R', 'calls a os.system'
    yield 'a call of an object', named('argparse Namespace') + b')\x81)R', 'calls a InertObject'
    yield 'a call of a type', named('torch FloatStorage') + b')R', 'calls torch.FloatStorage, which is allowed only as'
    yield 'a call with no tuple', named(REBUILD_TENSOR) + plain([]) + b'R', 'with a list'
    yield 'the state of a tensor', tensor() + plain({'__setstate__': 1}) + b'b', 'sets the state of a LazyArray'
    yield 'the state of a list', b']' + plain({'__class__': 1}) + b'b', 'sets the state of a list'
    yield 'a persistent id of text', b'Pos.system\n', 'opcode PERSID'
    yield 'a persistent id of another kind', storage(word='module'), 'persistent id that is not of a storage'
    yield 'a storage whose type is text', storage(kind=plain('torch.FloatStorage')), 'has the type torch.FloatSt'
    yield 'a storage of a class', storage(kind=named('argparse Namespace')), 'has the type argparse.Namespace'
    yield 'a storage outside of its folder', storage(key='../version'), r'no storage \.\./version'
    yield 'a missing storage', storage(key='7'), 'no storage 7'
    yield 'a storage larger than its file', storage(count=2**40), r'1099511627776 values of float32, and has 24 bytes'
    yield 'a storage with a negative size', storage(count=-6), 'declares int values'
    yield 'a tensor beyond its storage', tensor(offset=1), 'larger than its storage of 6'
    yield 'a tensor before its storage', tensor(offset=-1), 'not made of counts'
    yield 'a tensor with a long stride', tensor(stride=(2**40, 1)), r'the last at 1,099,511,627,778\) is larger'
    yield 'a tensor with a backward stride', tensor(stride=(-3, 1)), 'not made of counts'
    yield 'a stride of 0', tensor(size=(2**40,), stride=(0,)), r'1,099,511,627,776 values.* is larger'
    yield 'sizes whose product is past 64 bits', tensor(size=(2**62, 4), stride=(0, 0)), 'larger than its storage'
    yield 'a size past 64 bits', tensor(size=(2**70,), stride=(0,)), 'not made of counts'
    yield 'a size that is not a number', tensor(size=('2', 3)), 'not made of counts'
    yield 'a thousand dimensions', tensor(size=(1,) * 1000, stride=(1,) * 1000), 'not made of counts'
    yield 'a tensor without a storage', tensor(of=plain('0')), 'not made of a storage'
    yield 'a tensor with one argument', named(REBUILD_TENSOR) + b'(' + storage() + b'tR', 'not made of a storage'
    pairs = plain((['ab', 'c'],))
    yield 'a dict of items that are not pairs', named('collections OrderedDict') + pairs + b'R', 'not made of pairs'
    yield 'a hash that overflows the stack', b'}' + deep + b'Ns', 'a key is a tuple'
    yield 'a set of deep tuples', named('__builtin__ set') + b'(](' + deep + b'etR', 'a key is a tuple'
    yield 'a missing entry of the memo', b'h\x05', 'entry 0x5 of its memo, which does not exist'
    yield 'an empty stack', b'R', 'IndexError in REDUCE'
    yield 'two objects on the stack at the end', b'NN', 'does not hold one object at the end'
    yield 'a missing mark', b'Nt', 'IndexError in TUPLE'
    yield 'items of a list', b']NNs', 'sets items of a list'
    yield 'half a pair', b'}(Nu', 'sets items of a dict'
    yield 'an item appended to a dict', b'}Na', 'appends to a dict'
    yield 'a second pickle', b'N.cos\nsystem\n', 'bytes follow its end'
    yield 'a number of a million digits', b'L' + b'9' * 1_000_000 + b'L\n', 'Exceeds the limit'
    yield 'text longer than the file', b'\x8d' + struct.pack('<Q', 2**60), 'damaged'
    yield 'an unknown opcode', b'\xff', r'opcode b.\\xff. unknown'


def test_opened_hostile_pickle_is_refused_and_never_executed(tmp_path):
    kinds = list(hostile(tmp_path))
    assert len({kind for kind, _, _ in kinds}) == len(kinds) > 50
    messages = {kind: refusal(write_checkpoint(tmp_path / 'hostile.pth', opcodes)) for kind, opcodes, _ in kinds}
    wrong = [(kind, messages[kind]) for kind, _, pattern in kinds
             if 'hostile.pth is refused: ' not in messages[kind] or not re.search(pattern, messages[kind])]
    assert not wrong
    assert not (tmp_path / 'ran').exists()
    pickle.loads(b'\x80\x02' + kinds[0][1] + b'.')  # pickle executes the same bytes
    assert (tmp_path / 'ran').exists()


def test_opened_refusal_escapes_control_characters(tmp_path):
    message = refusal(write_checkpoint(tmp_path / 'a.pth', b'c\x1b[2Jevil\n' + b'x' * 1000 + b'\n'))
    assert r'\x1b[2Jevil' in message and '\x1b' not in message and len(message) < 500


def test_opened_recursive_and_shared_objects_are_not_copied(tmp_path):
    nested = b']q\x00' + b''.join(
        b'0(' + bytes([*b'h', index]) * 2 + bytes([*b'lq', index + 1]) for index in range(60))  # 2**60 items if copied
    with torch_file.opened(write_checkpoint(tmp_path / 'a.pth', nested)) as content:
        assert len(content) == 2
    with torch_file.opened(write_checkpoint(tmp_path / 'b.pth', b']q\x00h\x00a')) as content:
        assert content[0] is content


def test_opened_huge_memo_index_allocates_no_memory(tmp_path):
    tracemalloc.start()
    assert read_whole(write_checkpoint(tmp_path / 'a.pth', b'Nr\xff\xff\xff\x7f')) is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
