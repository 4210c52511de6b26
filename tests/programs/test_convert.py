"""The program `convert` converts a file of real size and reports errors in one line."""

import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from evit_jax.checkpoints import workdir
from evit_jax.interchange import torch_weights
from evit_jax.models import get_config
from tests.helpers import program_modules, programs

convert = program_modules.module_fixture('convert')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A DeiT-Ti of zeros as a safetensors file."""
    config, path = get_config('deit_t'), tmp_path_factory.mktemp('tiny') / 'tiny.safetensors'
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), torch_weights.template(config))
    save_file({key: np.ascontiguousarray(value) for key, value in torch_weights.to_torch(zeros, config).items()}, path)
    return path


def test_convert_file_writes_a_workdir(convert, tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, 'absl')
    words = tiny, tmp_path / 'tiny', '--image_size=304', '--mean=0.5,0.5,0.5'
    assert programs.run(convert, ('SRC', 'DST'), *words) == (0, '')
    assert 'deit_t, images of 224, 1000 classes' in caplog.text and 'resized from images of 224 to 304' in caplog.text
    config = workdir.saved_config(tmp_path / 'tiny')
    assert config['model.image_size'] == 304 and config['data.mean'] == [0.5] * 3
    code, error = programs.run(convert, ('SRC', 'DST'), tmp_path / 'tiny', tmp_path / 'a.safetensors', '--std=1,1,1')
    assert code == 2 and error.startswith('error: --std applies to files') and '\n' not in error


@pytest.mark.parametrize('flag', ['--std=1,0,1', '--mean=1,2', '--mean=a,b,c', '--std=inf,1,1'])
def test_convert_invalid_channels_are_refused_in_one_line(convert, tiny, tmp_path, flag):
    code, error = programs.run(convert, ('SRC', 'DST'), tiny, tmp_path / 'new', flag)
    assert code == 2 and error.startswith('error: ') and ' numbers, such as 0.5,0.5,0.5' in error and '\n' not in error


@pytest.mark.parametrize('size', ['0', '224x', 'x', '8x8x8', 'large', '-16', '1e3'])
def test_convert_invalid_image_size_is_refused_in_one_line(convert, tiny, tmp_path, size):
    code, error = programs.run(convert, ('SRC', 'DST'), tiny, tmp_path / 'new', f'--image_size={size}')
    message = f'error: --image_size={size} must be a side or HEIGHTxWIDTH in pixels, such as 224 or 224x112'
    assert (code, error) == (2, message)


def test_convert_rectangular_image_size_resizes_the_positions(convert, tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, 'absl')
    assert programs.run(convert, ('SRC', 'DST'), tiny, tmp_path / 'tiny', '--image_size=224x112') == (0, '')
    assert 'resized from images of 224 to 224x112' in caplog.text
    stored = workdir.saved_config(tmp_path / 'tiny')['model_config']['fields']
    assert stored['image_size'] == [224, 112]


def test_convert_check_of_a_run_is_refused(convert, tiny, tmp_path):
    assert programs.run(convert, ('SRC', 'DST'), tiny, tmp_path / 'run') == (0, '')
    code, error = programs.run(convert, ('SRC', 'DST'), tmp_path / 'run', tmp_path / 'a.safetensors', '--check')
    assert code == 2 and error.startswith('error: --check applies to files of other programs')
