"""One function opens runs, files, folders of other programs and models of the Hub."""

import numpy as np
import pytest

import evit_jax
from evit_jax.interchange import opening
from evit_jax.interchange.opening import open_model
from tests.helpers import fake_hub, published, tiny

HUB = 'hf-hub:lab/vit'


@pytest.fixture
def server(tmp_path, monkeypatch):
    with fake_hub.running() as running:
        fake_hub.connect(monkeypatch, running.endpoint, tmp_path / 'cache')
        running.add('lab/vit', published.files())
        yield running


def test_open_model_hub_name_has_weights_preprocessing_and_the_commit(server):
    model, want = open_model(HUB), published.model()
    np.testing.assert_array_equal(model.params['head']['kernel'], want.params['head']['kernel'])
    assert (model.mean, model.std, model.eval_crop) == ((0.5,) * 3, (0.25,) * 3, 1.0)
    assert model.class_names == published.CLASSES
    assert model.path == model.base_model == f'{HUB}@{"a" * 40}'


def test_open_model_every_kind_of_weights_is_opened(server, tmp_path):
    for name, content in published.files().items():
        (tmp_path / name).write_bytes(content)
    tiny.model().save(tmp_path / 'run')
    published.model().save(tmp_path / 'saved')
    for name, is_pretrained in ((HUB, True), (tmp_path, True), (tmp_path / 'model.safetensors', True),
                                (tmp_path / 'run', False), (tmp_path / 'saved', False)):
        assert opening.is_pretrained(name) == is_pretrained
        assert open_model(name).params['norm']['scale'].size


def test_open_model_missing_path_like_a_hub_name_has_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'file or folder lab/vit: give .*; hf-hub:lab/vit is a model of the'):
        open_model('lab/vit')
    with pytest.raises(FileNotFoundError, match=r'or hf-hub:ORG/NAME$'):
        open_model(tmp_path / 'none')


def test_check_exists_makes_no_request_and_names_the_config_key(server, tmp_path):
    opening.check_exists(HUB, 'init_from')
    assert not server.requests
    with pytest.raises(ValueError, match=rf'config.init_from={tmp_path}: the folder .* no checkpoint and no weights'):
        opening.check_exists(tmp_path / '', 'init_from')


def test_load_hub_name_computes_the_logits_of_the_original(server):
    model = evit_jax.load(HUB)
    images = tiny.images(2)
    want = published.model()(images.astype(np.float32) / 255)
    np.testing.assert_allclose(model(images.astype(np.float32) / 255), want, atol=1e-5)
    assert model.with_plan(keep_rate=0.5).macs < model.macs
