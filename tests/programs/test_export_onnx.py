"""The export program with --format=onnx: a folder that ONNX Runtime reads, and refusals in one line."""

import json

import numpy as np
import pytest

from evit_jax.serving import onnx_artifact
from tests.helpers import exports

pytest.importorskip('onnx', reason="the package onnx is not installed: pip install 'evit_jax[onnx]'")
pytest.importorskip('onnxruntime', reason="ONNX Runtime is not installed: pip install 'evit_jax[onnxruntime]'")
checkpoint, export, run = exports.checkpoint, exports.export, exports.run


def test_export_onnx_writes_a_checked_folder(checkpoint, run, tmp_path):
    assert run(checkpoint, tmp_path / 'onnx', '--format=onnx', '--rates=0.5,1', '--input_dtype=float32') == (0, '')
    manifest = json.loads((tmp_path / 'onnx' / 'manifest.json').read_text())
    assert list(manifest['plans']) == ['0.5', '1.0'] and manifest['outputs'] == ['logits', 'features']
    assert all(check['difference'] < 1e-5 for check in manifest['checks'].values())
    outputs = onnx_artifact.load(tmp_path / 'onnx', '0.5')(np.zeros((2, 16, 16, 3), np.float32))
    assert outputs['logits'].shape == (2, 3)


@pytest.mark.parametrize('text, size', [('24', (24, 24)), ('24x8', (24, 8))])
def test_export_image_size_resizes_the_input(checkpoint, run, tmp_path, text, size):
    assert run(checkpoint, tmp_path / 'onnx', '--format=onnx', '--rates=0.5', f'--image_size={text}', '--kept')[0] == 0
    assert json.loads((tmp_path / 'onnx' / 'manifest.json').read_text())['image']['size'] == [*size]
    outputs = onnx_artifact.load(tmp_path / 'onnx')(np.zeros((1, *size, 3), np.uint8))
    assert outputs['logits'].shape == (1, 3) and outputs['class_attention_0'].shape == outputs['token_of_patch_0'].shape


def test_export_onnx_without_onnxruntime_warns_that_nothing_was_checked(checkpoint, run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(onnx_artifact.runtimes, 'is_installed', lambda name: False)
    assert run(checkpoint, tmp_path / 'onnx', '--format=onnx', '--rates=0.5')[0] == 0
    assert "plan 0.5 was not checked: it needs ONNX Runtime, pip install 'evit_jax[onnxruntime]'" in caplog.text
    assert 'The files were not checked' in (tmp_path / 'onnx' / 'README.md').read_text()


@pytest.mark.parametrize('words, message', [
    (('--format=onnx', '--platforms=cpu'), '--platforms does not apply to --format=onnx: leave it out'),
    (('--input_dtype=float32',), '--input_dtype does not apply to --format=stablehlo: leave it out'),
    (('--format=onnx', '--dtype=bfloat16'), '--format=onnx --dtype=bfloat16: give float32 or float16'),
    (('--image_size=9',), 'patch'), (('--image_size=x',), '--image_size=x must be a side or HEIGHTxWIDTH in pixels'),
    (('--dtype=float16',), '--dtype=float16 is for --format=onnx: give float32 or bfloat16'),
    (('--format=onnx', '--reducer=random', '--rates=0.5'), 'computes bitcast_convert_type, which the ONNX export')])
def test_export_onnx_invalid_flag_is_refused_in_one_line(checkpoint, run, tmp_path, words, message):
    code, errors = run(checkpoint, tmp_path / 'new', *words)
    assert code == 2 and message in errors and '\n' not in errors and not list(tmp_path.iterdir())


def test_export_onnx_without_the_package_names_the_extra(checkpoint, run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_artifact.importlib.util, 'find_spec', lambda name: None)
    code, errors = run(checkpoint, tmp_path / 'new', '--format=onnx')
    assert code == 2 and "--format=onnx needs the package onnx: pip install 'evit_jax[onnx]'" in errors
