"""The reader of PyTorch checkpoints returns what PyTorch saved, and refuses damaged and hostile zip files.

tests/golden_files/README.md describes how PyTorch wrote the files there.
"""

import io
import pathlib
import random
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange import torch_file
from tests.helpers.torch_files import read_whole, refusal, tensor, write_checkpoint

FILES = pathlib.Path(__file__).parents[1] / 'golden_files'


def test_opened_pytorch_file_has_its_views_dtypes_and_objects():
    tree = read_whole(FILES / 'containers.pth')
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    for got, want in zip(tree['views'], [grid, grid.T, grid[1:, ::2], grid[2, 3], np.zeros((0, 3))], strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(tree['parameter'], grid)
    assert [value.dtype for value in tree['types']] == [
        np.float16, jnp.bfloat16, np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
    assert all(value.tolist() == [0, 1, 2] for value in tree['types'][:-1])
    assert tree['nothing'] is None and tree['large'] == 2**80 and tree['schedule']['milestones'] == {3: 1, 4: 1}
    assert tree['args'].state == {'lr': 1e-3, 'names': {'a', 'b'}, 'type': 'torch.float32'}
    assert tree['optimizer']['state'][0]['exp_avg'].shape == (3, 4)


def test_opened_tensor_is_read_on_conversion_to_numpy(tmp_path):
    path = write_checkpoint(tmp_path / 'a.pth', tensor())
    with torch_file.opened(path) as array:
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
        np.testing.assert_array_equal(array, np.arange(6).reshape(2, 3))
    content = path.read_bytes()
    values = np.arange(6, dtype=np.float32).tobytes()
    path.write_bytes(content.replace(values, bytes(len(values))))
    with torch_file.opened(path) as array:
        assert array.shape == (2, 3)
    assert 'cut off or damaged' in refusal(path)


def test_opened_compressed_or_oversized_members_are_refused_unread(tmp_path):
    bomb = write_checkpoint(tmp_path / 'bomb.pth', tensor(), members=())
    with zipfile.ZipFile(bomb, 'a', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data/1', bytes(64 * 2**20))
    tracemalloc.start()
    assert 'archive/data/1 is compressed' in refusal(bomb)
    assert 'archive/data.pkl is compressed' in refusal(
        write_checkpoint(tmp_path / 'b.pth', b'N' * 100_000, compression=zipfile.ZIP_DEFLATED))
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()
    honest = write_checkpoint(tmp_path / 'a.pth', tensor()).read_bytes()
    size = struct.pack('<II', 24, 24)
    entry = honest.rindex(size)  # the sizes of archive/data/0 in the central directory
    (tmp_path / 'c.pth').write_bytes(honest[:entry] + struct.pack('<II', 10**6, 10**6) + honest[entry + 8:])
    assert 'members declare 1,0' in refusal(tmp_path / 'c.pth')


def test_opened_other_zip_files_are_refused_with_the_reason(tmp_path):
    def message(**settings):
        return refusal(write_checkpoint(tmp_path / 'a.pth', tensor(), **settings))

    np.savez(tmp_path / 'a.npz', a=np.ones(2))
    assert 'without data.pkl' in refusal(tmp_path / 'a.npz')
    assert 'TorchScript' in message(members=[('archive/constants.pkl', b'')])
    assert 'big-endian' in message(members=[('archive/byteorder', b'big')])
    assert 'more than 4,194,304' in message(end=bytes(4 * 2**20))
    with pytest.warns(UserWarning, match='Duplicate'):
        assert 'of which 2 have different names' in message(members=[('archive/data/0', bytes(24))])
    whole = write_checkpoint(tmp_path / 'b.pth', tensor()).read_bytes()
    (tmp_path / 'b.pth').write_bytes(whole[:-40])
    assert 'b.pth is cut off or damaged' in refusal(tmp_path / 'b.pth')
    encrypted = bytearray(whole)
    for signature, flags in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        encrypted[whole.index(signature) + flags] |= 1
    (tmp_path / 'c.pth').write_bytes(encrypted)
    assert 'archive/data.pkl is encrypted' in refusal(tmp_path / 'c.pth')


def test_opened_file_with_one_damaged_byte_raises_only_value_errors(tmp_path):
    whole, rng, path = (FILES / 'containers.pth').read_bytes(), random.Random(0), tmp_path / 'a.pth'
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    pickled = next(member for member in members if member.endswith('data.pkl'))
    refused = 0
    for attempt in range(600):
        if attempt % 2:
            content = bytearray(whole)
            content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content[:rng.randrange(len(content))] if attempt % 20 == 1 else content)
        else:  # with correct checksums, so that the pickle is parsed
            content = bytearray(members[pickled])
            content[rng.randrange(len(content))] = rng.randrange(256)
            with zipfile.ZipFile(path, 'w') as archive:
                for member, value in members.items():
                    archive.writestr(member, bytes(content) if member == pickled else value)
        try:
            read_whole(path)
        except ValueError:
            refused += 1
    assert 200 < refused < 600


def test_is_torch_file_legacy_format_is_refused_with_the_way_out():
    path = FILES / 'legacy.pth'
    with pytest.raises(ValueError, match=r"PyTorch before version 1\.6; .*torch\.save\(torch\.load\('.*legacy\.pth'"):
        torch_file.is_torch_file(path.read_bytes()[:32], path)
    assert torch_file.is_torch_file((FILES / 'containers.pth').read_bytes()[:32], path)
    assert not torch_file.is_torch_file((FILES / 'timm.safetensors').read_bytes()[:32], path)
