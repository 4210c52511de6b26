"""The public API, used as in the README, with a tiny model and tiny data."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax.interchange import safetensors_file, torch_weights
from evit_jax.reduction.plan_file import PlanFile
from tests.helpers import tiny


@pytest.fixture(scope='module')
def images():
    return tiny.images(8)


@pytest.fixture(scope='module')
def stripes():
    return tiny.stripes()


@pytest.fixture(scope='module')
def config():
    """A config with which the tiny model learns the stripes in a few steps."""
    from evit_jax.configs import base
    config = base.get_config()
    config.update_from_flattened_dict({
        'batch_size': 32, 'epochs': 7, 'ema_decay': 0.0, 'compilation_cache': '', 'label_smoothing': 0.0,
        'model.dtype': 'float32', 'model.drop_path': 0.0, 'data.augment': 'none', 'data.crop': (), 'data.flip': 0.0,
        'data.colour_jitter': 0.0, 'data.repeats': 1, 'data.workers': 0, 'data.eval_crop': 0.0, 'mixing.erase': 0.0,
        'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'optimizer.lr': 5e-2, 'optimizer.warmup_epochs': 1.0,
        'log.every': 7, 'log.eval_epochs': 100.0, 'log.pictures': 0})
    return config


def test_import_is_lazy():
    code = ('import sys, evit_jax; print(dir(evit_jax)); '
            'print([name for name in ("jax", "numpy") if name in sys.modules])')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    names, heavy = result.stdout.splitlines()
    assert heavy == '[]' and "'create_model'" in names


def test_every_public_name_is_documented_and_others_are_refused():
    for name in evit_jax.__all__:
        assert getattr(evit_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        evit_jax.lod  # noqa: B018


def test_create_model_classifies_uint8_images(images):
    model = evit_jax.create_model('vit_digits', keep_rate=0.7, num_classes=5, seed=1)
    logits = model(tiny.images(2, size=64))
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    assert 'vit_digits' in evit_jax.list_models() and 'deit_s' in evit_jax.list_models()
    other = evit_jax.create_model('vit_digits', num_classes=5, seed=2)
    assert not np.array_equal(other.params['cls_token'], model.params['cls_token'])


def test_create_model_of_a_custom_config_has_default_blocks_and_class_names():
    config = evit_jax.ViTConfig(image_size=16, patch_size=4, width=16, depth=4, heads=2, classes=3)
    model = evit_jax.create_model(config, keep_rate=0.5)
    assert model.plan == evit_jax.make_plan(16, 4, rate=0.5, reduce_at=(1, 2, 3))
    assert model.class_names == ('0', '1', '2') and model.config == config
    assert evit_jax.create_model(config, class_names=('cat', 'dog')).config.classes == 2


@pytest.mark.parametrize('arguments, message', [
    ({'model': 'deit_x'}, "unknown model 'deit_x'"), ({'keep_rate': 0.0}, r'keep rate 0.0 is outside \(0, 1\]'),
    ({'reduce_at': (7,)}, 'block 7 is outside'), ({'reducer': 'evi'}, "unknown reducer 'evi': did you mean evit"),
    ({'num_classes': 4, 'class_names': ('a', 'b')}, 'names 2 classes, its model has 4')])
def test_create_model_with_a_wrong_value_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        evit_jax.create_model(**{'model': tiny.CONFIG} | arguments)


def test_forward_under_another_plan_returns_kept_tokens_and_the_token_of_each_patch(images):
    output = tiny.model().with_plan(keep_rate=0.25).forward(images)
    assert output.logits.shape == (8, 3) and output.features.shape == (8, 32)
    assert output.kept[0].shape == (8, 5)              # 4 patches and the fused token
    assert output.class_attention[0].shape == (8, 16)  # to the 16 patches that enter
    assert output.token_of_patch[0].shape == (8, 16)   # the token that holds each patch


def test_with_plan_of_a_plan_file_has_its_token_counts(images, tmp_path):
    model, file = tiny.model(), tmp_path / 'plan.json'
    plan = evit_jax.make_plan(16, 2, tokens=(9,), reduce_at=(0,))
    file.write_text(json.dumps(PlanFile.of(plan, model.loaded.name, 16).metadata()))
    assert model.with_plan(plan=file).plan == model.with_plan(plan=plan).plan == plan


def test_unpool_gives_a_dense_map_of_the_tokens(images):
    model = tiny.model(reducer='tome')
    output = model.forward(images)
    assert model.unpool(output.patch_tokens, output.token_of_patch).shape == (8, 4, 4, 32)


def test_predict_names_the_classes_of_files(tmp_path):
    Image.fromarray(tiny.images(1, size=40)[0]).save(tmp_path / 'cat.jpg')
    model = tiny.model()
    prediction, = model.predict(str(tmp_path / 'cat.jpg'))
    assert prediction.top[0].name in tiny.NAMES and 1 / 3 <= prediction.top[0].probability <= 1
    assert model.draw(prediction).width > 16


def test_load_reads_a_saved_model(images, tmp_path):
    model = tiny.model(reducer='tome', keep_rate=0.75)
    model.save(tmp_path / 'mine')
    again = evit_jax.load(tmp_path / 'mine')
    np.testing.assert_array_equal(again(images), model(images))
    assert again.plan == model.plan and f'from {tmp_path}' in repr(again)


def test_load_reads_a_safetensors_file_and_writes_nothing(tmp_path):
    model = evit_jax.create_model('vit_digits', keep_rate=1.0)
    safetensors_file.write(tmp_path / 'model.safetensors', torch_weights.to_torch(model.params, model.config), {})
    images = tiny.images(2, size=64)
    want = model(images.astype(np.float32) / 255)
    for path in (tmp_path / 'model.safetensors', tmp_path):
        np.testing.assert_allclose(evit_jax.load(path)(images.astype(np.float32) / 255), want, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ['model.safetensors']


@pytest.mark.parametrize('name, message', [
    ('none', 'there is no file or folder .*none'), ('empty', 'empty holds no checkpoint and no weights'),
    ('a.pth', 'a.pth is neither'), ('', 'give one of its files: a.pth')])
def test_load_of_another_path_is_refused(tmp_path, name, message):
    (tmp_path / 'a.pth').write_bytes(b'no weights')
    (tmp_path / 'empty').mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evit_jax.load(tmp_path / name)


def test_evaluate_takes_arrays(stripes):
    model = tiny.model()
    metrics = evit_jax.evaluate(model, stripes, batch_size=40)
    labels = np.asarray(model(stripes[0])).argmax(-1)
    assert metrics['top1'] == pytest.approx((labels == stripes[1]).mean()) and metrics['images'] == 96
    assert metrics['macs'] == model.macs < metrics['macs_dense'] and metrics['left_out'] == 0
    with pytest.raises(ValueError, match='has 2 classes, the data have 3'):
        evit_jax.evaluate(tiny.model(class_names=('yes', 'no')), evit_jax.as_source(stripes))


def test_evaluate_takes_a_folder_of_classes(stripes, tmp_path):
    for image, label in zip(stripes[0][:9], stripes[1]):
        folder = tmp_path / tiny.NAMES[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f'{len(list(folder.iterdir()))}.png')
    model = tiny.model()
    assert evit_jax.evaluate(model, tmp_path)['top1'] == evit_jax.evaluate(
        model, (stripes[0][:9], stripes[1][:9]))['top1']


def test_train_on_arrays_learns_and_its_workdir_can_be_loaded(config, stripes, tmp_path):
    model = tiny.model()
    trained = evit_jax.train(config, model=model, train=stripes, test=stripes, workdir=tmp_path / 'run')
    before, after = (evit_jax.evaluate(each, stripes) for each in (model, trained))
    assert after['loss'] < before['loss'] and after['top1'] > 0.9
    assert (trained.config, trained.plan, trained.class_names) == (model.config, model.plan, model.class_names)
    again = evit_jax.train(config, model=model, train=stripes, test=stripes, workdir=tmp_path / 'run')
    np.testing.assert_array_equal(again(stripes[0][:8]), trained(stripes[0][:8]))  # was not trained further
    np.testing.assert_array_equal(evit_jax.load(tmp_path / 'run')(stripes[0][:8]), trained(stripes[0][:8]))


def test_train_on_other_classes_replaces_the_head(config, stripes, tmp_path):
    config = config.copy_and_resolve_references().unlock()
    config.epochs = 1
    source = evit_jax.as_source((stripes[0], stripes[1] % 2), class_names=('even', 'odd'))
    trained = evit_jax.train(config, model=tiny.model(), train=source, test=source, workdir=tmp_path)
    assert trained.config.classes == 2 and trained.class_names == ('even', 'odd')


@pytest.mark.parametrize('arguments, message', [
    ({'train': ()}, 'only train is given: give train and test'), ({'config': 'digit'}, 'no config digit: .*digits')])
def test_train_with_wrong_arguments_is_refused(config, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evit_jax.train(**{'config': config, 'workdir': tmp_path} | arguments)
