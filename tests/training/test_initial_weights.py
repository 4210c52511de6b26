"""Runs that start from, or learn from, a model of the Hub: converted once, pinned to a commit, resumed without it."""

import json

import numpy as np
import pytest

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import read_newest
from evit_jax.interchange.opening import open_model
from evit_jax.training import experiment, initial_weights
from tests.helpers import fake_hub, layouts, published

FIRST, SECOND = 'a' * 40, 'b' * 40
HUB = 'hf-hub:lab/vit'


@pytest.fixture
def server(tmp_path, monkeypatch):
    with fake_hub.running() as running:
        fake_hub.connect(monkeypatch, running.endpoint, tmp_path / 'cache')
        running.add('lab/vit', published.files(), FIRST)
        yield running


def prepare(config, workdir):
    """Returns the config of a training after `initial_weights.prepare`."""
    return experiment.with_values(config, initial_weights.prepare(workdirs.flat(config), workdir))


def head(folder):
    return read_newest(folder, 'params')[0]['head.kernel']


def test_prepare_hub_name_is_converted_into_the_workdir(server, tmp_path):
    config = prepare(layouts.config_of(init_from=HUB, init_ema=False), tmp_path / 'run')
    assert config.init_from == initial_weights.folder_in(tmp_path / 'run')
    np.testing.assert_array_equal(head(config.init_from), published.model().params['head']['kernel'])
    assert open_model(config.init_from).base_model == f'{HUB}@{FIRST}'
    server.add('lab/vit', published.files(seed=1), SECOND)
    config = prepare(layouts.config_of(init_from=HUB), tmp_path / 'run')  # no checkpoint was saved
    assert open_model(config.init_from).base_model == f'{HUB}@{SECOND}'


def test_prepare_file_of_weights_is_converted_into_the_workdir(tmp_path):
    (tmp_path / 'vit.safetensors').write_bytes(published.files()['model.safetensors'])
    config = prepare(layouts.config_of(init_from=str(tmp_path / 'vit.safetensors')), tmp_path / 'run')
    assert open_model(config.init_from).base_model == 'vit.safetensors'


def test_prepare_run_or_missing_path_is_unchanged(tmp_path):
    published.model().save(tmp_path / 'other')
    for name in (str(tmp_path / 'other'), str(tmp_path / 'none'), ''):
        assert prepare(layouts.config_of(init_from=name), tmp_path / 'run').init_from == name
    assert not (tmp_path / 'run').exists()


def resumed(folder, **recorded):
    """Saves weights as the checkpoint of a run that began with these config values."""
    published.model().save(folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | recorded))
    return folder


def test_prepare_resumed_run_needs_no_hub(server, tmp_path):
    run = resumed(tmp_path / 'run', base_model=f'{HUB}@{FIRST}')
    config = prepare(layouts.config_of(init_from=HUB), run)
    assert config.init_from == initial_weights.folder_in(run) and not server.requests
    assert not (run / 'initial').exists()


def test_prepare_resumed_self_distillation_restores_the_recorded_commit(server, tmp_path):
    server.add('lab/vit', published.files(seed=1), SECOND)
    run = resumed(tmp_path / 'run', base_model=f'{HUB}@{FIRST}')
    config = layouts.config_of(init_from=HUB, distill__kind='self')
    assert open_model(prepare(config, run).init_from).base_model == f'{HUB}@{FIRST}'
    del server.requests[:]
    prepare(config, run)
    assert not server.requests


def test_prepare_teacher_gets_its_commit_and_keeps_it(server, tmp_path):
    config = layouts.config_of(teacher__path=HUB, distill__kind='soft')
    assert prepare(config, tmp_path / 'run').teacher.path == f'{HUB}@{FIRST}'
    server.add('lab/vit', published.files(seed=1), SECOND)
    run = resumed(tmp_path / 'again', **{'teacher.path': f'{HUB}@{FIRST}'})
    assert prepare(config, run).teacher.path == f'{HUB}@{FIRST}'
    assert prepare(config, tmp_path / 'new').teacher.path == f'{HUB}@{SECOND}'


def test_prepare_failed_download_leaves_no_initial_weights(server, tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist or is private'):
        prepare(layouts.config_of(init_from='hf-hub:lab/none'), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
