"""Models are downloaded from a hub on loopback, found in the cache, or refused with one line."""

import errno
import json
import pathlib
import re

import pytest
from huggingface_hub import constants, file_download

from evit_jax.interchange import hub
from tests.helpers import fake_hub

FIRST, SECOND = 'a' * 40, 'b' * 40
NAME = 'hf-hub:lab/vit'
INDEX = {'weight_map': {'head.bias': 'model-1.safetensors', 'head.weight': 'model-2.safetensors'}}
FILES = {'config.json': b'{}', 'preprocessor_config.json': b'{"size": 8}', 'model.safetensors': bytes(range(256)) * 40,
         'pytorch_model.bin': b'not downloaded', 'README.md': b'not downloaded'}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with fake_hub.running() as running:
        fake_hub.connect(monkeypatch, running.endpoint, tmp_path / 'cache')
        monkeypatch.setattr(file_download.time, 'sleep', lambda _: None)
        running.add('lab/vit', FILES)
        yield running


def names(folder):
    return sorted(path.name for path in pathlib.Path(folder).iterdir())


def blobs(folder):
    """Returns all files in a cache that are neither links nor bookkeeping."""
    return [path for path in folder.rglob('blobs/*') if path.is_file()]


@pytest.mark.parametrize('path, expected', [
    ('hf-hub:lab/vit', True), ('hf-hub:lab/vit@v1', True), ('https://huggingface.co/lab/vit', True),
    ('timm/vit', True), ('timm/here', False), ('lab/vit', False),
    ('runs/digits', False), ('gs://timm/vit', False)])
def test_is_hub_name_local_path_takes_precedence_over_the_abbreviation(tmp_path, monkeypatch, path, expected):
    (tmp_path / 'timm' / 'here').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_name(path) == expected


def test_is_hub_name_prefix_takes_precedence_over_a_local_path(tmp_path, monkeypatch):
    (tmp_path / 'hf-hub:timm' / 'here').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_name('hf-hub:timm/here')


@pytest.mark.parametrize('name', ['hf-hub:vit', 'hf-hub:', 'hf-hub:lab/vit/x', 'hf-hub:lab/vit@', 'hf-hub:lab vit/x'])
def test_download_malformed_name_is_refused(name):
    with pytest.raises(ValueError, match='give hf-hub:ORG/NAME'):
        hub.download(name)


def test_download_gets_only_the_files_of_a_model(server):
    model = hub.download(NAME)
    assert model.name == f'{NAME}@{FIRST}'
    assert names(model.folder) == ['config.json', 'model.safetensors', 'preprocessor_config.json']
    assert (model.folder / 'model.safetensors').read_bytes() == FILES['model.safetensors']


@pytest.mark.parametrize('page', ['https://huggingface.co/lab/vit', 'https://huggingface.co/lab/vit/'])
def test_download_address_of_a_page_is_its_model(server, page):
    assert hub.download(page).name == f'{NAME}@{FIRST}'


def test_download_abbreviation_is_the_organisation_timm(server):
    server.add('timm/vit', FILES)
    assert hub.download('timm/vit').name == f'hf-hub:timm/vit@{FIRST}'


def test_download_repository_with_an_index_gets_its_shards(server):
    server.add('lab/shards', {'model.safetensors.index.json': json.dumps(INDEX).encode(), 'model-1.safetensors': b'1',
                              'model-2.safetensors': b'22', 'model-3.safetensors': b'not listed'})
    folder = hub.download('hf-hub:lab/shards').folder
    assert names(folder) == ['model-1.safetensors', 'model-2.safetensors', 'model.safetensors.index.json']


def test_download_index_with_a_path_outside_its_folder_is_refused(server):
    index = {'weight_map': {'head.bias': '../model.safetensors'}}
    server.add('lab/shards', {'model.safetensors.index.json': json.dumps(index).encode()})
    with pytest.raises(ValueError, match='no file of its folder'):
        hub.download('hf-hub:lab/shards')


def test_download_repository_without_safetensors_gets_pytorch_weights(server):
    server.add('lab/old', {'config.json': b'{}', 'pytorch_model.bin': b'weights', 'tf_model.h5': b'x'})
    assert names(hub.download('hf-hub:lab/old').folder) == ['config.json', 'pytorch_model.bin']


def test_download_second_call_transfers_no_file_again(server):
    hub.download(NAME)
    del server.requests[:]
    hub.download(NAME)
    assert not [request for request in server.requests if request.startswith('GET') and '/api/' not in request]


def test_download_name_with_a_commit_in_the_cache_makes_no_request(server):
    name = hub.download(NAME).name
    del server.requests[:]
    assert hub.download(name).name == name
    assert not server.requests


def test_download_revision_selects_a_commit(server):
    server.add('lab/vit', FILES | {'model.safetensors': b'new'}, SECOND)
    server.repositories['lab/vit'].refs['v1'] = FIRST
    assert hub.download(NAME).name == f'{NAME}@{SECOND}'
    assert hub.download(f'{NAME}@v1').name == hub.download(f'{NAME}@{FIRST}').name == f'{NAME}@{FIRST}'


def test_download_gated_model_needs_a_token(server, monkeypatch, tmp_path):
    server.add('lab/gated', FILES, gated=True)
    message = f'gated: accept its terms on {server.endpoint}/lab/gated, and set HF_TOKEN'
    with pytest.raises(PermissionError, match=message):
        hub.download('hf-hub:lab/gated')
    assert not blobs(tmp_path)
    monkeypatch.setenv('HF_TOKEN', fake_hub.TOKEN)
    assert hub.download('hf-hub:lab/gated').folder.is_dir()


def test_download_private_model_needs_a_token(server, monkeypatch):
    server.add('lab/private', FILES, private=True)
    with pytest.raises(FileNotFoundError, match='does not exist or is private: check the name'):
        hub.download('hf-hub:lab/private')
    monkeypatch.setenv('HF_TOKEN', fake_hub.TOKEN)
    assert hub.download('hf-hub:lab/private').folder.is_dir()


@pytest.mark.parametrize('name, message', [
    ('hf-hub:lab/none', 'lab/none does not exist or is private: check the name; for a private model, set HF_TOKEN'),
    ('timm/none', 'timm/none does not exist or is private, and there is no local path timm/none: check'),
    (f'{NAME}@v9', 'lab/vit has no revision v9: give one of its branches, tags or commits')])
def test_download_unknown_name_or_revision_is_refused(server, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        hub.download(name)


def test_download_repository_without_supported_weights_lists_its_files(server):
    server.add('lab/clip', dict.fromkeys(('open_clip_pytorch_model.bin', 'open_clip_config.json', 'README.md'), b'x'))
    message = re.escape('its files are open_clip_config.json, open_clip_pytorch_model.bin: give another model')
    with pytest.raises(FileNotFoundError, match=message):
        hub.download('hf-hub:lab/clip')


@pytest.mark.parametrize('status, error, message', [
    (403, PermissionError, 'refuses access to hf-hub:lab/vit@main .status 403.: set HF_TOKEN'),
    (500, ConnectionError, 'answers with status 500, and the cache does not have it: repeat')])
def test_download_other_status_is_explained(server, status, error, message, tmp_path):
    server.status = status
    with pytest.raises(error, match=message):
        hub.download(NAME)
    assert not blobs(tmp_path)


def test_download_without_network_uses_the_cache_or_is_refused(server, monkeypatch, tmp_path, caplog):
    hub.download(NAME)
    fake_hub.connect(monkeypatch, 'http://127.0.0.1:1', tmp_path / 'cache')
    assert hub.download(NAME).name == f'{NAME}@{FIRST}'
    assert 'its files in the cache are used' in caplog.text
    message = r'cannot be downloaded from http://127.0.0.1:1 \(.+\), and the cache does not have it: repeat the command'
    with pytest.raises(ConnectionError, match=message):
        hub.download('hf-hub:lab/other')


def test_download_offline_uses_the_cache_or_is_refused(server, monkeypatch):
    hub.download(NAME)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    del server.requests[:]
    assert hub.download(NAME).name == f'{NAME}@{FIRST}'
    with pytest.raises(ConnectionError, match='because HF_HUB_OFFLINE is set, and the cache does not have it'):
        hub.download('hf-hub:lab/other')
    assert not server.requests


def test_download_connection_cut_in_the_middle_resumes(server, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 512)  # received bytes are kept in whole chunks
    server.cuts['model.safetensors'] = 2
    folder = hub.download(NAME).folder
    assert (folder / 'model.safetensors').read_bytes() == FILES['model.safetensors']
    size = len(FILES['model.safetensors'])
    assert server.ranges == [f'bytes={size // 2}-', f'bytes={size * 3 // 4}-']


def test_download_cut_too_often_leaves_no_file_and_can_be_repeated(server, tmp_path):
    server.cuts['model.safetensors'] = 99
    with pytest.raises(ConnectionError, match=r'cannot be downloaded .* repeat the command'):
        hub.download(NAME)
    assert {path.read_bytes() for path in blobs(tmp_path)} == {FILES['config.json'], FILES['preprocessor_config.json']}
    server.cuts.clear()
    assert (hub.download(NAME).folder / 'model.safetensors').read_bytes() == FILES['model.safetensors']


def test_download_full_disk_is_explained_and_leaves_no_file(server, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(file_download, 'http_get', fail)
    with pytest.raises(OSError, match='cache has no space for hf-hub:lab/vit@main: free space, or set HF_HOME'):
        hub.download(NAME)
    assert not blobs(tmp_path)


def test_pinned_returns_the_commit_or_the_recorded_one(server):
    name = hub.pinned(NAME)
    assert name == f'{NAME}@{FIRST}'
    server.add('lab/vit', FILES, SECOND)
    assert hub.pinned(NAME, recorded=name) == hub.pinned(name) == name
    assert hub.pinned(NAME, recorded='hf-hub:lab/other@' + FIRST) == f'{NAME}@{SECOND}'
