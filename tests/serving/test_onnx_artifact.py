"""Folders of ONNX files: every reducer and architecture equals the model, and damage is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import modules_at
from evit_jax.reduction.registry import get_reducer, list_reducers
from evit_jax.serving import onnx_artifact, runtimes
from tests.helpers import onnx_programs, tiny
from tests.helpers.weights import random_params

DEPTH, TOKENS = 3, (12, 9)
# Field values that reach every layer of the architectures.
ARCHITECTURES = {
    'distilled': {'distilled': True}, 'registers': {'registers': 2, 'prefix_positions': 1, 'pooling': 'token_avg'},
    'clip': {'pre_norm': True, 'activation': 'quick_gelu', 'layer_scale': 0.5},
    'siglip': {'class_token': False, 'pooling': 'map', 'activation': 'gelu_tanh', 'classes': 0},
    'eva02': {'rope': 'eva', 'k_bias': False, 'swiglu': True, 'mlp_norm': True, 'activation': 'silu',
              'pooling': 'avg_fc_norm'},
    'dinov3': {'rope': 'dinov3', 'absolute_positions': False, 'registers': 2, 'qk_norm': True, 'classes': 0}}


# Reducers of the fast suite: tokens are kept, merged, clustered, masked, mixed, and chosen by learned modules.
FAST = ('evit', 'tome', 'ward', 'kmedoids', 'ats', 'sit', 'dynamicvit')


def loaded_model(config=tiny.CONFIG, reducer='evit', **changes):
    """Returns a model with random weights; its reducer owns modules at all blocks but the first."""
    config = dataclasses.replace(config, depth=DEPTH, **changes)
    modules = modules_at(get_reducer(reducer), range(1, DEPTH), TOKENS)
    model = models.create(config, modules=modules)
    params = random_params(model, 1)
    return tiny.model().loaded._replace(config=config, params=params, modules=modules, image_size=config.image_size)


def plan_of(config, reducer='evit', tokens=TOKENS):
    reducer = get_reducer(reducer)
    return make_plan(config.patches(config.image_size), DEPTH, tokens=tokens, reduce_at=range(1, DEPTH),
                     fuse=reducer.can_fuse, reducer=reducer)


def check(trained, plan, folder, input_dtype='uint8'):
    file = folder / 'model.onnx'
    file.write_bytes(onnx_artifact.convert(trained, plan, input_dtype=input_dtype, kept=False).SerializeToString())
    return onnx_artifact.check(file, trained, plan, input_dtype)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder, trained = tmp_path_factory.mktemp('onnx'), loaded_model()
    dense = make_plan(16, DEPTH, reduce_at=())
    onnx_artifact.write(folder, trained, {'fast': plan_of(trained.config), 'dense': dense}, kept=True)
    return folder


@pytest.mark.parametrize('reducer', [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST))
                                     for name in list_reducers() if name != 'random'])
def test_check_of_a_reducer_finds_equal_outputs_and_kept_patches(reducer, tmp_path):
    trained = loaded_model(reducer=reducer)
    result = check(trained, plan_of(trained.config, reducer), tmp_path)
    assert result.difference < 1e-5 and result.equal == result.images == 4


def test_check_of_a_plan_with_drops_finds_equal_outputs(tmp_path):
    trained, reducer = loaded_model(), get_reducer('prune_merge')
    plan = make_plan(16, DEPTH, tokens=(12, 9), drop=(2, 1), reduce_at=(1, 2), fuse=False, reducer=reducer)
    assert check(trained, plan, tmp_path).equal == 4


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_check_of_an_architecture_finds_equal_outputs(name, tmp_path):
    trained = loaded_model(**ARCHITECTURES[name])
    assert check(trained, plan_of(trained.config), tmp_path).difference < 1e-5


def test_check_of_lvvit_and_a_rectangle_finds_equal_outputs(tmp_path):
    config = LVViTConfig(image_size=(16, 24), patch_size=4, width=32, depth=DEPTH, heads=2, classes=3, stem_width=8)
    trained = loaded_model(config).fold_batchnorm()
    assert check(trained, plan_of(trained.config), tmp_path, 'float32').difference < 1e-5


def test_check_of_other_weights_is_refused(tmp_path):
    trained = loaded_model()
    plan, file = plan_of(trained.config), tmp_path / 'model.onnx'
    file.write_bytes(onnx_artifact.convert(trained, plan, input_dtype='uint8', kept=False).SerializeToString())
    trained.params['head']['bias'] = trained.params['head']['bias'] + np.array([1, 0, 0], np.float32)
    with pytest.raises(ValueError, match=r"the logits of model.onnx differ from the model's by up to .* discarded"):
        onnx_artifact.check(file, trained, plan, 'uint8')


def test_convert_of_random_tokens_is_refused():
    trained = loaded_model()
    with pytest.raises(ValueError, match=r'computes bitcast_convert_type, which the ONNX export does not support'):
        onnx_artifact.convert(trained, plan_of(trained.config, 'random'), input_dtype='uint8', kept=False)


def test_write_float16_stores_half_the_weights(exported, tmp_path):
    trained = onnx_artifact.with_dtype(loaded_model(), 'float16')
    onnx_artifact.write(tmp_path, trained, {'fast': plan_of(trained.config)})
    assert (tmp_path / 'weights.bin').stat().st_size < 0.8 * (exported / 'weights.bin').stat().st_size
    with pytest.raises(ValueError, match='--dtype=bfloat16: give float32 or float16'):
        onnx_artifact.with_dtype(trained, 'bfloat16')


def test_write_shares_the_weights_and_describes_the_files(exported):
    assert {file.name for file in exported.iterdir()} == {
        'plan_fast.onnx', 'plan_dense.onnx', 'weights.bin', 'manifest.json', 'README.md'}
    manifest, readme = json.loads((exported / 'manifest.json').read_text()), (exported / 'README.md').read_text()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded_model().params))
    assert (exported / 'weights.bin').stat().st_size < 2 * parameters  # holds both plans, aligned
    assert manifest['checks']['fast']['equal'] == 4 and manifest['opset'] == 17
    assert 'images`, uint8 [b, 16, 16, 3]' in readme and '- `token_of_patch_s`: int32 [b, 16]' in readme


@pytest.mark.parametrize('runtime', runtimes.PRECISIONS)
def test_load_runs_any_batch_size_of_the_default_plan(exported, runtime):
    onnx_programs.skip_without(runtime)
    program = onnx_artifact.load(exported, 'fast', runtime=runtime, threads=1)
    images = tiny.images(3)
    outputs = program(images)
    assert outputs['logits'].shape == (3, 3) and outputs['kept_1'].shape == (3, 10)
    assert outputs['token_of_patch_0'].dtype == np.int32
    np.testing.assert_allclose(program(images[:1])['logits'], outputs['logits'][:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ('weights.bin', 'plan_fast.onnx'))
def test_load_of_a_missing_or_damaged_file_is_refused(exported, tmp_path, name):
    folder = pathlib.Path(shutil.copytree(exported, tmp_path / 'copy'))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f'{name} is damaged .its checksum differs.*: copy the folder again'):
        onnx_artifact.load(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f'{name} is missing: copy the folder again'):
        onnx_artifact.load(folder)


def test_load_of_another_folder_or_plan_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match=r'is no exported model .it holds no manifest.json.: give'):
        onnx_artifact.load(tmp_path)
    with pytest.raises(ValueError, match="has no plan 'slow', it has fast, dense"):
        onnx_artifact.load(exported, 'slow')
