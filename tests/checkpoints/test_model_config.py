"""Model configs as JSON, stored with the weights and compared at resume."""

import dataclasses
import json

import pytest

from evit_jax import models
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.models.lvvit import LVViTConfig
from tests.helpers import layouts


@pytest.mark.parametrize('config', [*models.CONFIGS.values(), layouts.SHAPE, LVViTConfig(width=96, heads=3)])
def test_from_json_of_to_json_is_the_config(config):
    stored = json.loads(json.dumps(model_configs.to_json(config)))
    assert model_configs.from_json(stored) == config and type(model_configs.from_json(stored)) is type(config)


@pytest.mark.parametrize('stored', [
    {'class': 'ViTConfig', 'fields': {'width': 64, 'widths': 3}}, {'class': 'Other', 'fields': {'widths': 3}}])
def test_from_json_of_another_version_is_refused(stored):
    with pytest.raises(ValueError, match=rf'{stored["class"]} has the unknown field widths: another version'):
        model_configs.from_json(stored)


def test_check_same_names_every_field_that_differs():
    saved = {model_configs.KEY: model_configs.to_json(layouts.SHAPE)}
    model_configs.check_same('runs/a', saved, layouts.SHAPE)
    model_configs.check_same('runs/a', {}, layouts.SHAPE)
    model_configs.check_same('runs/a', saved, dataclasses.replace(layouts.SHAPE, classes=9))  # compared as a config key
    other = dataclasses.replace(layouts.SHAPE, width=32, depth=3)
    with pytest.raises(ValueError, match=r'runs/a holds a run of another model \(model_config.depth 2 -> 3, '
                                         r'model_config.width 64 -> 32\)'):
        model_configs.check_same('runs/a', saved, other)
    with pytest.raises(ValueError, match=r'model_config.class ViTConfig -> LVViTConfig'):
        model_configs.check_same('runs/a', saved, models.get_config('lvvit_s'))
