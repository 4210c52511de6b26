"""Models are saved for timm and transformers with a card, and loaded again with the same plan."""

import json

import jax
import numpy as np
import pytest

import evit_jax
from evit_jax.interchange import safetensors_file
from tests.helpers import fake_hub, published, tiny


@pytest.fixture(scope='module')
def model():
    return tiny.model()


@pytest.mark.parametrize('layout, plan', [('timm', {'keep_rate': 0.5}), ('timm', {'tokens': (5,)}),
                                          ('hugging_face', {'keep_rate': 1.0})])
def test_save_pretrained_folder_loads_with_the_same_plan(tmp_path, model, layout, plan):
    model = model.with_plan(**plan)
    model.loaded = model.loaded._replace(interpolation='bilinear')
    model.save_pretrained(tmp_path / 'mine', layout=layout)
    again = evit_jax.load(tmp_path / 'mine')
    assert (again.plan, again.config, again.class_names) == (model.plan, model.config, model.class_names)
    assert again.loaded.eval_transform() == model.loaded.eval_transform()
    assert (again.loaded.mean, again.loaded.std) == (model.loaded.mean, model.loaded.std)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_save_pretrained_merging_plan_is_restored(tmp_path, model):
    model = model.with_reducer('tome').with_plan(r=3)
    model.save_pretrained(tmp_path / 'mine')
    assert evit_jax.load(tmp_path / 'mine').plan == model.plan


def test_save_pretrained_another_image_size_writes_resized_positions(tmp_path, model):
    model.with_image_size(24).save_pretrained(tmp_path / 'mine')
    again = evit_jax.load(tmp_path / 'mine')
    assert again.loaded.image_size == 24 and again.plan.patches == 36


def test_save_pretrained_existing_folder_is_refused_unless_it_is_empty(tmp_path, model):
    (tmp_path / 'empty').mkdir()
    model.save_pretrained(tmp_path / 'empty')
    for name in ('empty', 'empty/README.md'):
        with pytest.raises(ValueError, match='exists and is not empty: give another folder'):
            model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match='not a local folder'):
        model.save_pretrained('gs://bucket/mine')


def test_save_pretrained_failed_write_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(safetensors_file, 'write', fail)
    with pytest.raises(ValueError, match='No space left'):
        model.save_pretrained(tmp_path / 'mine')
    assert not list(tmp_path.iterdir())


def test_save_pretrained_learned_modules_or_unknown_layout_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r'modules of reducer dynamicvit have no place .*: use VisionModel.save'):
        model.with_reducer('dynamicvit').save_pretrained(tmp_path / 'mine')
    with pytest.raises(ValueError, match="unknown layout 'tim': did you mean timm"):
        model.save_pretrained(tmp_path / 'mine', layout='tim')


def test_model_card_names_base_model_plan_and_what_was_not_measured(tmp_path, monkeypatch):
    with fake_hub.running() as server:
        fake_hub.connect(monkeypatch, server.endpoint, tmp_path / 'cache')
        server.add('lab/vit', published.files())
        model = evit_jax.load('hf-hub:lab/vit').with_plan(keep_rate=0.5)
    model.save_pretrained(tmp_path / 'mine')
    card = (tmp_path / 'mine' / 'README.md').read_text()
    commit = 'a' * 40
    assert card.startswith('---\nlibrary_name: timm\n') and 'base_model: lab/vit\n' in card
    assert f'| Base model | [lab/vit](https://huggingface.co/lab/vit/tree/{commit}), commit {commit} |' in card
    assert f'| Plan | {model.plan} |' in card and '| Reducer | evit |' in card
    assert f'{model.macs / 1e9:.3g} G, ' in card
    assert 'Speed was not measured.' in card and 'Accuracy was not measured under this plan.' in card
    assert json.loads((tmp_path / 'mine' / 'config.json').read_text())['evit_jax']['config']['keep.rate'] == 0.5
    assert evit_jax.load(tmp_path / 'mine').loaded.base_model == f'hf-hub:lab/vit@{commit}'


def test_model_card_has_measured_speed_and_accuracy(tmp_path, model):
    rows = [{'plan': str(model.plan), 'images_per_second': 1234.5, 'batch_size': 16, 'dtype': 'float32',
             'speedup_over_dense': 1.25, 'engine': 'jax', 'step': 'inference'},
            {'plan': 'another', 'images_per_second': 9.0}]
    (tmp_path / 'speed.json').write_text(json.dumps({'device': 'TPU v5e', 'rows': rows}))
    evaluated = {'top1': 0.81234, 'top5': 0.95, 'images': 50_000.0, 'macs': model.macs}
    model.save_pretrained(tmp_path / 'mine', measured=tmp_path / 'speed.json', evaluated=evaluated)
    card = (tmp_path / 'mine' / 'README.md').read_text()
    assert 'Measured on TPU v5e.' in card and '| 16 | float32 | 1,234.5 | 1.25x |' in card and '| another |' not in card
    assert 'Measured on 50,000 images.' in card and '| top1 | 81.23% |' in card
    model.save_pretrained(tmp_path / 'dict', measured={'images_per_second': 7.0, 'device': 'a CPU'})
    assert 'Measured on a CPU.' in (tmp_path / 'dict' / 'README.md').read_text()


@pytest.mark.parametrize('arguments, message', [
    ({'measured': {'rows': [{'plan': 'another', 'images_per_second': 1.0}]}}, 'has no row for .*, but for another'),
    ({'measured': {'speed': 1.0}}, 'has no images_per_second'),
    ({'evaluated': {'top1': 0.5, 'macs': 1}}, 'is of another plan'),
    ({'evaluated': {'plan': {'description': 'x'}, 'metrics': {'top1': 0.5}}}, r'is of another plan \(x'),
    ({'evaluated': {'loss': 0.5}}, 'has no accuracy')])
def test_model_card_measurements_of_another_plan_are_refused(tmp_path, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / 'mine', **arguments)
    assert not (tmp_path / 'mine').exists()
