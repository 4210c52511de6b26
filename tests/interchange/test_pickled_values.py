"""Values beside the weights in PyTorch's checkpoints: plain data is read as it is, a few objects stay inert."""

import collections
import datetime

import numpy as np

from evit_jax.interchange.pickles import Inert
from tests.interchange.test_torch_file import name, plain, read_whole, write


def test_a_few_objects_are_allowed_and_stay_inert(tmp_path):
    setting = name('argparse Namespace') + b')\x81' + plain({'__setstate__': 'os.system', 'rate': 0.7}) + b'b'
    found = read_whole(write(tmp_path / 'a.pth', b'(' + setting + name('torch device') + plain(('cuda',)) + b'R'
                             + name('torch.torch_version TorchVersion') + plain(('2.13',)) + b'\x81t'))
    assert [type(value) for value in found] == [Inert] * 3
    assert found[0].state == {'__setstate__': 'os.system', 'rate': 0.7} and found[1].arguments == ('cuda',)


def test_numpy_scalars_and_default_dicts_are_read_as_plain_data(tmp_path):
    values = [np.float64(0.5), np.float32(-2), np.int64(2**40), np.bool_(True), np.uint8(7), np.float16(1.5),
              np.array(3, '>i4')[()]]
    counted = collections.defaultdict(list, {'a': [1]})  # protocol 2 names int long, and str unicode
    typed = [collections.defaultdict(kind) for kind in (int, str, set, frozenset)]
    held = {'values': values, 'counted': counted, 'empty': collections.defaultdict(None), 'text': np.str_('a'),
            'typed': typed, 'frozen': frozenset({1}), 'date': datetime.datetime(2026, 1, 2)}
    found = read_whole(write(tmp_path / 'a.pth', plain(held)))
    assert found['values'] == [0.5, -2.0, 2**40, True, 7, 1.5, 3]
    assert [type(value) for value in found['values']] == [float, float, int, bool, int, float, int]
    assert found['counted'] == {'a': [1]} and type(found['counted']) is dict and found['empty'] == {}
    assert type(found['text']) is type(found['date']) is Inert
    assert found['typed'] == [{}] * 4 and found['frozen'] == {1}
