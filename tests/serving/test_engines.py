"""Engines of the server: all give the outputs of the model, and what they cannot open is refused in one line."""

import functools
import shutil

import jax
import numpy as np
import pytest

from evit_jax.checkpoints.loaded import load_model
from evit_jax.serving import artifact, onnx_artifact, runtimes
from evit_jax.serving.engines import EngineOptions, open_served
from tests.helpers import exports, onnx_programs, tiny

RATES = EngineOptions(rates=(0.5,))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return exports.save_random_weights(tmp_path_factory.mktemp('weights'), keep__rate=0.5, model__reduce_at=(0,))


@pytest.fixture(scope='module')
def stablehlo(checkpoint, tmp_path_factory):
    folder, trained = tmp_path_factory.mktemp('stablehlo'), load_model(checkpoint)
    artifact.write(folder, trained, {'0.5': trained.plan(keep_rate=0.5)}, platforms=('cpu',), kept=True)
    return folder


@pytest.fixture(scope='module')
def onnx(checkpoint, tmp_path_factory):
    folder, trained = tmp_path_factory.mktemp('onnx'), load_model(checkpoint)
    onnx_artifact.write(folder, onnx_artifact.with_dtype(trained, None), {'0.5': trained.plan(keep_rate=0.5)})
    return folder


@pytest.fixture(scope='module')
def expected(checkpoint):
    served, engine = open_served(str(checkpoint), RATES)
    return served, engine('0.5', tiny.images(3, served.image_size[0]))


@pytest.mark.parametrize('name', runtimes.PRECISIONS)
def test_onnx_engine_of_a_checkpoint_gives_the_outputs_of_jax(checkpoint, expected, name):
    onnx_programs.skip_without(name)
    served, want = expected
    with_onnx, engine = open_served(str(checkpoint), RATES._replace(engine=name))
    got = engine('0.5', tiny.images(3, served.image_size[0]))
    assert with_onnx.engine == name and with_onnx.plans == served.plans and with_onnx.returns_kept
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-4)
    for arrays, expected_arrays in zip(got[1:], want[1:]):
        for array, expected_array in zip(arrays, expected_arrays, strict=True):
            np.testing.assert_allclose(array, expected_array, atol=1e-5)


def test_stablehlo_engine_gives_the_guesses_and_reductions_of_jax(stablehlo, expected):
    served, engine = open_served(str(stablehlo), EngineOptions())
    got, want = engine('0.5', tiny.images(3, served.image_size[0])), expected[1]
    np.testing.assert_allclose(got.logits - got.logits.max(axis=1, keepdims=True),
                               want.logits - want.logits.max(axis=1, keepdims=True), atol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got[1:], want[1:])
    assert served.plans['0.5']['rate'] == 0.5 and served.class_names == exports.NAMES


def test_onnx_engine_of_an_export_without_kept_returns_none(onnx, expected):
    served, engine = open_served(str(onnx), EngineOptions('onnxruntime'))
    got = engine('0.5', tiny.images(3, served.image_size[0]))
    np.testing.assert_allclose(got.logits, expected[1].logits, atol=1e-4)
    assert got.kept == () and not served.returns_kept


@pytest.mark.parametrize('options, message', [
    (EngineOptions('tensorrt'), '--engine=tensorrt is unknown, there are jax, onnxruntime, openvino'),
    (EngineOptions(precision='bfloat16'),
     '--precision=bfloat16 is for --engine=openvino: --engine=jax computes in the d'),
    (EngineOptions('onnxruntime', 'float16'), '--engine=onnxruntime computes in float32')])
def test_open_served_with_an_unknown_engine_or_precision_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        open_served('absent', options)


def test_open_served_with_a_missing_engine_names_the_extra(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"--engine=openvino needs the package openvino: pip install 'evit_jax\[open"):
        open_served('absent', EngineOptions('openvino'))


def test_open_served_of_an_export_with_another_engine_or_plans_is_refused(stablehlo, onnx):
    with pytest.raises(ValueError, match='holds StableHLO programs, which --engine=onnxruntime does not run: give'):
        open_served(str(stablehlo), EngineOptions('onnxruntime'))
    with pytest.raises(ValueError, match='give --engine=onnxruntime or --engine=openvino'):
        open_served(str(onnx), EngineOptions())
    with pytest.raises(ValueError, match='is an export, whose plans and weights are fixed: leave out --rates'):
        open_served(str(onnx), EngineOptions('onnxruntime', rates=(0.5,)))


@pytest.mark.parametrize('kind, name', [
    ('stablehlo', 'weights.npz'), ('onnx', 'weights.bin'), ('onnx', 'plan_0.5.onnx')])
def test_open_served_of_an_export_with_damaged_or_missing_weights_is_refused(request, tmp_path, kind, name):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / 'copy')
    options = EngineOptions('jax' if kind == 'stablehlo' else 'onnxruntime')
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f'{name} is damaged .its checksum differs.*: copy the folder again'):
        open_served(str(folder), options)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f'{name} is missing: copy the folder again'):
        open_served(str(folder), options)
